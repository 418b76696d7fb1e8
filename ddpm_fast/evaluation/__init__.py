"""Evaluation: likelihood and sample quality."""
