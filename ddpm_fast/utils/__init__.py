"""Utilities independent of diffusion."""
