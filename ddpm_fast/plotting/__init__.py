"""Plots of training and of the diffusion process."""
