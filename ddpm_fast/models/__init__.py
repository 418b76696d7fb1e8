"""Networks: the UNet in plain PyTorch, its configuration, its cost."""
