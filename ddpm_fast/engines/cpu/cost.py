"""Cost of an instruction: (FLOP, bytes), each operand counted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .instructions import INSTRUCTIONS
from .program import Program, Segments

NAMES = list(INSTRUCTIONS)
EXP = 10  # approximate FLOP of an exponential


def costs(program: Program) -> list[tuple[str, int, int]]:
    """(instruction, FLOP, bytes) of every row of a program, in order."""
    result = []
    for number, *values in program.instructions:
        name = NAMES[int(number)]  # type: ignore[arg-type]
        arguments = dict(zip(INSTRUCTIONS[name][1], values, strict=True))
        flops, floats = COSTS[name](program, **arguments)
        result.append((name, int(flops), 4 * int(floats)))
    return result


def _gemm(p: Program, **a: Any) -> tuple[int, int]:
    assert isinstance(a["segments"], Segments)
    segments = p.segments[a["segments"].first :][: a["segment_count"]]
    summed, outputs = sum(s.channels for s in segments), a["vectors"] * p.vector
    pixels = a["batch"] * a["height"] * a["width"]
    taps = 9 if len(segments) % 9 == 0 else 1  # the taps of a 3x3 convolution read the same map
    stride = segments[0].stride_x // segments[0].channels if taps == 9 else 1
    moved = (
        pixels * (stride**2 * summed // taps + outputs * (1 + bool(a["residual"])))
        + a["batch"] * summed * outputs
    )
    return 2 * pixels * summed * outputs, moved


def _winograd_out(p: Program, **a: Any) -> tuple[int, int]:
    elements = a["tiles"] * a["channels"]
    return 28 * elements, elements * (16 + 4 + 4 * bool(a["residual"]))


def _channel_sums(p: Program, **a: Any) -> tuple[int, int]:
    elements = a["pixels"] * (a["x_channels"] + a["y_channels"])
    return (3 if a["means"] else 1) * elements, elements


def _normalise(p: Program, **a: Any) -> tuple[int, int]:
    elements = a["height"] * a["width"] * (a["x_channels"] + a["y_channels"])
    return (2 + (EXP + 2) * a["silu"]) * elements, 2 * elements


def _resample(p: Program, **a: Any) -> tuple[int, int]:
    written = a["height"] * a["width"] * a["channels"]
    return (4 * written if a["divide"] == 2 else 0), written + written * a["divide"] ** 2 // a[
        "repeat"
    ] ** 2


COSTS: dict[str, Callable[..., tuple[int, int]]] = {
    "gemm": _gemm,
    "winograd_in": lambda p, **a: (
        32 * a["tiles"] * a["channels"],
        20 * a["tiles"] * a["channels"],
    ),
    "winograd_out": _winograd_out,
    "channel_sums": _channel_sums,
    "group_means": lambda p, **a: (a["channels"], 2 * a["channels"]),
    "norm_factors": lambda p, **a: (6 * a["channels"], 6 * a["channels"]),
    "normalise": _normalise,
    "place": lambda p, **a: (0, 2 * a["elements"]),
    "take": lambda p, **a: (0, 2 * a["pixels"] * a["channels"]),
    "resample": _resample,
    "transpose": lambda p, **a: (0, 2 * a["pixels"] * a["channels"] * a["heads"]),
    "softmax": lambda p, **a: ((EXP + 3) * a["rows"] * a["count"], 2 * a["rows"] * a["count"]),
}
