"""Training: the trainer, its data loader, its runs."""
