"""A step of training, with everything that belongs to it: batch, noise, forward, backward, clipping, AdamW, average of the weights.

All engines train the same network in this process; their losses on one input must agree, or nothing is timed. `bench.training` has
them in processes of their own, taking turns.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench.training import autocast_to, of_diffusers, ours, plain

ENGINES = {"ddpm_fast": ours, "ddpm_fast compiled": partial(ours, compile=True), "plain PyTorch": plain, "diffusers": of_diffusers}
LOSSES: dict[tuple[str, int], float] = {}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_step(engine, precision, timed, device, tiny, benchmark):
    if engine == "ddpm_fast compiled" and (tiny or device.type == "cpu"):
        pytest.skip("compiling takes minutes on a CPU: python -m bench.training --compile")
    if engine == "diffusers":
        pytest.importorskip("diffusers")
    channels, batch = ((8, 16), 4) if tiny else ((32, 64, 96), 64) if device.type == "cpu" else ((128, 256, 256), 256)
    step, loss_of = ENGINES[engine](channels, batch, precision, device)
    generator = torch.Generator().manual_seed(1)
    x_t, eps = (torch.randn(8, 1, 32, 32, generator=generator).to(device) for _ in range(2))
    with torch.no_grad(), autocast_to(precision, device):
        loss = float(loss_of(x_t, torch.arange(0, 1000, 125, device=device), torch.arange(8, device=device), eps))
    error = abs(loss / LOSSES.setdefault((precision, batch), loss) - 1)
    seconds = timed(step, error, 1e-4 if precision == "no" else 1e-3, rounds=5, engine=engine, batch=batch, loss=loss)
    benchmark.extra_info.update(images_per_s=batch / seconds)
