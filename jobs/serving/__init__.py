"""Both turns for somebody who asks."""
