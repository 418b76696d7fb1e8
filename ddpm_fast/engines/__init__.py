"""Engines: what computes the steps of a sampler, and which one is chosen."""
