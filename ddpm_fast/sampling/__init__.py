"""Sampling: the loop, its requests, its outputs."""
