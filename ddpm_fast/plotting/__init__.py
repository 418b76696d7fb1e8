"""Plots of training runs and of diffusion processes."""
