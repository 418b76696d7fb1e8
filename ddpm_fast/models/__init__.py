"""Models: the UNet in plain PyTorch, its configuration and its cost."""
