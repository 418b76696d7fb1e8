"""Training: trainer, data loader and training runs."""
