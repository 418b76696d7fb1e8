"""Utilities that know nothing of diffusion."""
