"""Fused engine: the UNet as a fixed list of Triton launches in a CUDA graph."""
