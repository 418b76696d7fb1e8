"""Data sets, pixel conversion and image files."""
