"""Utilities that are independent of diffusion."""
