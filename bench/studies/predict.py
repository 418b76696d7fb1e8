"""What the compiler makes of the elementwise kernels, and how fast that can be: `python -m bench.studies.predict`. Needs no GPU.

Compiles the launches of `CASES` ahead of time and prints a table: registers, spills, instructions and bytes per element,
and for an H100 the share of its copy rate to expect. Two bounds are given: memory traffic and instruction issue overlap
perfectly (share 1 where memory is the longer of the two), or not at all. These are predictions, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_fast.kernels import ddpm_step, noise, noise_mse, q_sample
from ddpm_fast.testing import Compiled, Launch, compile_launch, record_launches

COPY_RATE = 3.02e12  # bytes read + written per second, measured on one H100 SXM
ISSUE_RATE = 132 * 4 * 32 * 1.7e9  # lanes x instructions per second: processors x schedulers x lanes x clock

# operation, dtype of x_0 or of the network's output, shape, channels-last?, learned variance?
# "ddpm_step, history" is that of a multistep solver; "noise_mse" and "noise_mse, v" read x_0 too or not
CASES = [
    ("noise", torch.float32, (4096, 3, 32, 32), True, False),
    ("noise", torch.float32, (1, 1, 1, 1), True, False),
    ("words", torch.int64, (4096, 1, 1, 1), True, False),
    ("words", torch.int64, (16, 3, 32, 32), True, False),
    ("q_sample", torch.float32, (1, 1, 1, 1), True, False),
    ("ddpm_step", torch.float32, (1, 1, 1, 1), True, False),
    ("q_sample", torch.float32, (4096, 3, 32, 32), True, False),
    ("q_sample", torch.bfloat16, (4096, 3, 32, 32), True, False),
    ("q_sample", torch.float32, (2048, 3, 128, 128), False, False),
    ("q_sample", torch.float32, (64, 1, 28, 28), True, False),
    ("q_sample", torch.float32, (4, 3, 7, 5), True, False),
    ("ddpm_step", torch.float32, (4096, 3, 32, 32), True, False),
    ("ddpm_step", torch.bfloat16, (4096, 3, 32, 32), True, False),
    ("ddpm_step", torch.float16, (32, 3, 256, 256), True, False),
    ("ddpm_step", torch.float32, (2048, 3, 128, 128), False, False),
    ("ddpm_step", torch.bfloat16, (256, 3, 32, 32), True, True),
    ("ddpm_step", torch.float32, (64, 1, 28, 28), True, False),
    ("ddpm_step", torch.float32, (4, 3, 7, 5), True, False),
    ("ddpm_step, history", torch.float32, (4096, 3, 32, 32), True, False),
    ("ddpm_step, history", torch.bfloat16, (256, 3, 32, 32), True, False),
    ("noise_mse", torch.float32, (4096, 3, 32, 32), True, False),
    ("noise_mse", torch.bfloat16, (256, 3, 32, 32), True, False),
    ("noise_mse, v", torch.float32, (256, 3, 32, 32), True, False),
    ("noise_mse", torch.float32, (4, 3, 7, 5), True, False),
    ("noise_mse gradient", torch.float32, (4096, 3, 32, 32), True, False),
    ("noise_mse gradient", torch.bfloat16, (256, 3, 32, 32), True, False),
    ("noise_mse gradient, v", torch.float32, (256, 3, 32, 32), True, False),
    ("noise_mse gradient", torch.float32, (4, 3, 7, 5), True, False),
]


@dataclass(frozen=True)
class Prediction:
    name: str
    sm: int
    compiled: Compiled
    instructions: float  # per element
    bytes: int  # per element

    @property
    def shares(self) -> tuple[float, float]:
        """(worst, best) share of the H100's copy rate."""
        memory, issue = self.bytes / COPY_RATE, self.instructions / ISSUE_RATE
        return memory / (memory + issue), memory / max(memory, issue)


def launch_of(op: str, dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool, learned: bool) -> Launch:
    """The launch an operation makes, recorded on the meta device."""
    b, c, h, w = shape
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def images(channels: int, kind: torch.dtype) -> Tensor:
        return torch.empty(b, channels, h, w, dtype=kind).contiguous(memory_format=layout)

    with torch.device("meta"), record_launches() as launches:
        index, row = torch.empty(b, dtype=torch.int64), torch.empty(b, dtype=torch.int32)
        if op in ("noise", "words"):
            noise._fill(torch.empty(b, c * h * w, dtype=dtype), index, index, row, noise.X_T, normal=op == "noise")
        elif op == "q_sample":
            q_sample._launch(images(c, dtype), torch.empty(1000, 2), index, row, index, index)
        elif op.startswith("noise_mse"):
            x_0 = images(c, torch.float32) if op.endswith("v") else None
            rest = images(c, dtype), x_0, torch.empty(1000, 2), index, row, index, index
            if "gradient" in op:
                noise_mse._launch_gradient(torch.empty(b), *rest)
            else:
                noise_mse._launch_loss(*rest)
        else:
            out = images(2 * c if learned else c, dtype)
            ddpm_step._launch(
                images(c, torch.float32), out, torch.empty(1000, len(ddpm_step.COLUMNS)), row, index, index, learned, None
            )
    return launches[0]


def bytes_per_element(op: str, item: int, learned: bool) -> int:
    """What has to be read and written; `item`: of the type that varies."""
    name, _, more = op.partition(", ")
    if name.startswith("noise_mse"):
        return item * (2 if "gradient" in name else 1) + (4 if more == "v" else 0)
    step = 8 + item * (1 + learned) + (8 if more == "history" else 0)
    return {"noise": 4, "words": 8, "q_sample": item + 4, "ddpm_step": step}[name]


def predict(case: tuple[str, torch.dtype, tuple[int, ...], bool, bool], sm: int) -> Prediction:
    """Compiles one case for a compute capability."""
    op, dtype, shape, channels_last, learned = case
    launch = launch_of(*case)
    compiled = compile_launch(launch, sm)
    per_thread = 4 * launch.args["BLOCK"] / (32 * launch.options["num_warps"])
    moved = bytes_per_element(op, dtype.itemsize, learned)
    parts = [
        op,
        str(dtype).removeprefix("torch."),
        "x".join(map(str, shape)),
        "channels-last" if channels_last else "channels-first",
    ]
    return Prediction(" ".join(parts + ["learned"] * learned), sm, compiled, len(compiled.sass) / per_thread, moved)


def main() -> None:
    columns = f"{'launch':58} {'sm':>3} {'regs':>4} {'spills':>6} {'shared':>6} {'instr/el':>8} {'bytes/el':>8}"
    print(f"{columns}  predicted share of an H100's copy rate")
    for case in CASES:
        for sm in (80, 90, 100):
            p = predict(case, sm)
            shares = "{:.0%} to {:.0%}".format(*p.shares) if sm == 90 else ""
            c = p.compiled
            print(f"{p.name:58} {sm:3} {c.registers:4} {c.spills:6} {c.shared:6} {p.instructions:8.1f} {p.bytes:8}  {shares}")


if __name__ == "__main__":
    main()
