"""The size of the images that these tests look at."""

SIZE = (64, 48)
"""(height, width) in pixels: 4 by 3 patches of 16."""
