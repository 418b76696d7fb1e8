"""The fused engine: the UNet as a fixed list of Triton launches inside a CUDA graph."""
