"""The open trainer for ERGO: reinforcement learning that teaches a vision-language model where to look."""
