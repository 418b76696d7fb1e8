"""Choices of options, by name alone, so that `--help` and typos are answered without importing torch.

The tables that map these names to objects belong to the library; tests/cli/test_lazy.py compares them.
"""

from __future__ import annotations

SOLVERS = ("ddpm", "ddim", "dpm++2m", "dpm++2m-sde")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
STORED_VARIANCES = ("fixed_small", "fixed_large", "learned_range")  # that a checkpoint may have
PREDICTIONS = ("eps", "x_0", "v")
SPACINGS = ("linspace", "leading", "trailing", "quadratic", "openai")
PRESETS = ("exact", "ho", "openai", "diffusers", "ddim")
DTYPES = ("fp32", "fp16", "bf16", "fp8")
NETWORK_DTYPES = ("fp32", "fp16", "bf16")  # without the fused engine
ENGINES = ("auto", "fused", "compile", "cpu", "reference")
FITS = ("crop", "pad")
SCHEDULES = ("linear", "scaled-linear", "cosine", "sigmoid")
GPUS = ("h100", "a100", "h200", "b200")
DDPM_FAST = "ddpm_fast"
BASELINES = (
    "plain PyTorch",
    "torch.compile",
    "diffusers",
    "DDPMPipeline",
    "ONNX Runtime",
    "OpenVINO",
)
