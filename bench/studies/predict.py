"""Predicted speed of the elementwise kernels on an H100: `python -m bench.studies.predict`.

Needs no GPU. Compiles the launches of `CASES` ahead of time and prints a table: registers, spills,
instructions and bytes per element, and the predicted share of an H100's copy rate. Of the two
bounds, the lower assumes that memory traffic and instruction issue do not overlap; the upper, that
they overlap perfectly (share 1 if memory takes longer). These are predictions, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ddpm_fast.kernels import ddpm_step, noise, noise_mse, q_sample
from ddpm_fast.utils.triton_tools import Compiled, RecordedLaunch, compile_launch, record_launches

COPY_RATE = 3.02e12  # bytes read + written per second, measured on one H100 SXM
# lanes x instructions per second: processors x schedulers x lanes x clock
ISSUE_RATE = 132 * 4 * 32 * 1.7e9


class Operation(Enum):
    NOISE = "noise"
    WORDS = "words"
    Q_SAMPLE = "q_sample"
    DDPM_STEP = "ddpm_step"
    NOISE_MSE = "noise_mse"
    NOISE_MSE_GRADIENT = "noise_mse gradient"


@dataclass(frozen=True)
class Case:
    """A launch to compile.

    Attributes:
        operation: What it computes.
        dtype: Type of x_0 (q_sample), of the network's output (ddpm_step, noise_mse) or of the
            noise.
        shape: [N, C, H, W]
        channels_last: Memory layout.
        learned: `ddpm_step` with a learned variance.
        history: `ddpm_step` of a multistep solver, which also reads and writes x_0.
        reads_x_0: `noise_mse` of a target that needs x_0, such as v.
    """

    operation: Operation
    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    channels_last: bool = True
    learned: bool = False
    history: bool = False
    reads_x_0: bool = False

    @property
    def name(self) -> str:
        operation = self.operation.value + ", history" * self.history + ", v" * self.reads_x_0
        layout = "channels-last" if self.channels_last else "channels-first"
        shape = "x".join(map(str, self.shape))
        return " ".join(
            [operation, str(self.dtype).removeprefix("torch."), shape, layout]
            + ["learned"] * self.learned
        )

    @property
    def bytes_per_element(self) -> int:
        """Fewest bytes to read and write per element."""
        size = self.dtype.itemsize
        return {
            Operation.NOISE: 4,
            Operation.WORDS: 8,
            Operation.Q_SAMPLE: size + 4,
            Operation.DDPM_STEP: 8 + size * (1 + self.learned) + 8 * self.history,
            Operation.NOISE_MSE: size + 4 * self.reads_x_0,
            Operation.NOISE_MSE_GRADIENT: 2 * size + 4 * self.reads_x_0,
        }[self.operation]


CASES = [
    Case(Operation.NOISE, torch.float32, (4096, 3, 32, 32)),
    Case(Operation.NOISE, torch.float32, (1, 1, 1, 1)),
    Case(Operation.WORDS, torch.int64, (4096, 1, 1, 1)),
    Case(Operation.WORDS, torch.int64, (16, 3, 32, 32)),
    Case(Operation.Q_SAMPLE, torch.float32, (1, 1, 1, 1)),
    Case(Operation.DDPM_STEP, torch.float32, (1, 1, 1, 1)),
    Case(Operation.Q_SAMPLE, torch.float32, (4096, 3, 32, 32)),
    Case(Operation.Q_SAMPLE, torch.bfloat16, (4096, 3, 32, 32)),
    Case(Operation.Q_SAMPLE, torch.float32, (2048, 3, 128, 128), channels_last=False),
    Case(Operation.Q_SAMPLE, torch.float32, (64, 1, 28, 28)),
    Case(Operation.Q_SAMPLE, torch.float32, (4, 3, 7, 5)),
    Case(Operation.DDPM_STEP, torch.float32, (4096, 3, 32, 32)),
    Case(Operation.DDPM_STEP, torch.bfloat16, (4096, 3, 32, 32)),
    Case(Operation.DDPM_STEP, torch.float16, (32, 3, 256, 256)),
    Case(Operation.DDPM_STEP, torch.float32, (2048, 3, 128, 128), channels_last=False),
    Case(Operation.DDPM_STEP, torch.bfloat16, (256, 3, 32, 32), learned=True),
    Case(Operation.DDPM_STEP, torch.float32, (64, 1, 28, 28)),
    Case(Operation.DDPM_STEP, torch.float32, (4, 3, 7, 5)),
    Case(Operation.DDPM_STEP, torch.float32, (4096, 3, 32, 32), history=True),
    Case(Operation.DDPM_STEP, torch.bfloat16, (256, 3, 32, 32), history=True),
    Case(Operation.NOISE_MSE, torch.float32, (4096, 3, 32, 32)),
    Case(Operation.NOISE_MSE, torch.bfloat16, (256, 3, 32, 32)),
    Case(Operation.NOISE_MSE, torch.float32, (256, 3, 32, 32), reads_x_0=True),
    Case(Operation.NOISE_MSE, torch.float32, (4, 3, 7, 5)),
    Case(Operation.NOISE_MSE_GRADIENT, torch.float32, (4096, 3, 32, 32)),
    Case(Operation.NOISE_MSE_GRADIENT, torch.bfloat16, (256, 3, 32, 32)),
    Case(Operation.NOISE_MSE_GRADIENT, torch.float32, (256, 3, 32, 32), reads_x_0=True),
    Case(Operation.NOISE_MSE_GRADIENT, torch.float32, (4, 3, 7, 5)),
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


def launch_of(case: Case) -> RecordedLaunch:
    """The launch of an operation, recorded on the meta device."""
    b, c, h, w = case.shape
    layout = torch.channels_last if case.channels_last else torch.contiguous_format

    def images(channels: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(b, channels, h, w, dtype=dtype).contiguous(memory_format=layout)

    with torch.device("meta"), record_launches() as launches:
        index, step_index = torch.empty(b, dtype=torch.int64), torch.empty(b, dtype=torch.int32)
        match case.operation:
            case Operation.NOISE | Operation.WORDS:
                out = torch.empty(b, c * h * w, dtype=case.dtype)
                normal = case.operation is Operation.NOISE
                noise._fill(out, index, index, step_index, noise.X_T, normal=normal)
            case Operation.Q_SAMPLE:
                q_sample._launch(
                    images(c, case.dtype), torch.empty(1000, 2), index, step_index, index, index
                )
            case Operation.NOISE_MSE | Operation.NOISE_MSE_GRADIENT:
                x_0 = images(c, torch.float32) if case.reads_x_0 else None
                counters = (index, step_index, index, index)
                arguments = (images(c, case.dtype), x_0, torch.empty(1000, 2), *counters)
                if case.operation is Operation.NOISE_MSE:
                    noise_mse._launch_loss(*arguments)
                else:
                    noise_mse._launch_gradient(torch.empty(b), *arguments)
            case Operation.DDPM_STEP:
                x_t = images(c, torch.float32)
                out = images(2 * c if case.learned else c, case.dtype)
                table = torch.empty(1000, len(ddpm_step.COLUMNS))
                old = images(c, torch.float32) if case.history else None
                ddpm_step._launch(x_t, out, table, step_index, index, index, case.learned, old)
    return launches[0]


def predict(case: Case, sm: int) -> Prediction:
    """Compiles one case for a compute capability."""
    launch = launch_of(case)
    compiled = compile_launch(launch, sm)
    per_thread = 4 * launch.args["BLOCK"] / (32 * launch.options["num_warps"])
    return Prediction(
        case.name, sm, compiled, len(compiled.sass) / per_thread, case.bytes_per_element
    )


def main() -> None:
    columns = f"{'launch':58} {'sm':>3} {'regs':>4} {'spills':>6} {'shared':>6}"
    columns += f" {'instr/el':>8} {'bytes/el':>8}"
    print(f"{columns}  predicted share of an H100's copy rate")
    for case in CASES:
        for sm in (80, 90, 100):
            p = predict(case, sm)
            shares = "{:.0%} to {:.0%}".format(*p.shares) if sm == 90 else ""
            c = p.compiled
            row = f"{p.name:58} {sm:3} {c.registers:4} {c.spills:6} {c.shared:6}"
            print(f"{row} {p.instructions:8.1f} {p.bytes:8}  {shares}")


if __name__ == "__main__":
    main()
