"""Sampling: requests, the loop over batches and steps, outputs."""
