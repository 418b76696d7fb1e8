"""Names of the choices of options, so that `--help` and option errors do not import torch.

The library has the tables that map names to objects; tests/cli/test_lazy.py compares both.
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
