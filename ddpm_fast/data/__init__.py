"""Data sets, pixels, image files."""
