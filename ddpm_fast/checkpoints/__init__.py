"""Checkpoints: reading and writing trained networks."""
