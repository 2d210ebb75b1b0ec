"""The tiny models that the default run starts from."""
