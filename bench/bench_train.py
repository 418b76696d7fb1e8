"""A training step: batch, noise, forward, backward, clipping, AdamW, average of the weights.

All engines train the same network in this process; their losses on one input must agree, or nothing is timed.
`bench.studies.training` runs them in worker processes that take turns.
"""

from __future__ import annotations

import pytest

from bench.studies.training import ENGINES, LOSS_TOLERANCES, fixed_loss

LOSSES: dict[tuple[str, int], float] = {}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_step(engine, precision, timed, device, tiny, benchmark):
    if engine == "compiled" and (tiny or device.type == "cpu"):
        pytest.skip("compiling takes minutes on a CPU: python -m bench.studies.training --compile")
    if engine == "diffusers":
        pytest.importorskip("diffusers")
    channels, batch = (
        ((8, 16), 4)
        if tiny
        else ((32, 64, 96), 64)
        if device.type == "cpu"
        else ((128, 256, 256), 256)
    )
    step, loss_of = ENGINES[engine](channels, batch, precision, device)
    loss = fixed_loss(loss_of, precision, device)
    error = abs(loss / LOSSES.setdefault((precision, batch), loss) - 1)
    seconds = timed(
        step, error, LOSS_TOLERANCES[precision], rounds=5, engine=engine, batch=batch, loss=loss
    )
    benchmark.extra_info.update(images_per_s=batch / seconds)
