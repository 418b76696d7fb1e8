"""Instruction set of the CPU engine for one image.

A program (`program.Program`) is rows of integers: an instruction's number and its arguments, with
addresses in bytes and strides in floats. Feature maps are [pixel][channel]; channels are padded to
whole vectors with zeros. Bordered maps have a border of one zero pixel, so that a 3x3 convolution
is nine products over shifted maps. Threads that share an image split an instruction's rows or
channels, never a sum, so the bits do not depend on the number of threads.
"""

from __future__ import annotations

import math
from typing import Any

from .codegen import F32, I32, I64, Function, Value
from .products import INSTRUCTIONS, as_float, instruction

__all__ = ["INSTRUCTIONS", "exponential"]


# ---- group norm: mean, then squared deviations; one thread sums a channel


@instruction("x x_channels y y_channels pixels means sums")
def channel_sums(f: Function, part: Value, parts: Value, **a: Value) -> None:
    """sums[c] = sum over pixels of x, or of (x - means[c])^2 if means is not 0; y's channels follow
    x's.
    """
    first, every = a["x_channels"] // f.width, (a["x_channels"] + a["y_channels"]) // f.width
    with f.loop(*f.share(every, part, parts)) as vector:
        c = vector * f.width
        of_x = vector.is_("<", first)
        source = of_x.pick(a["x"] + c * 4, a["y"] + (c - a["x_channels"]) * 4)
        stride = of_x.pick(a["x_channels"], a["y_channels"])
        for squared in (False, True):
            with f.when(a["means"].is_("!=" if squared else "==", 0)):
                mean = f.load(a["means"], c) if squared else f.vector(0)
                _sum_pixels(f, source, stride, a["pixels"], a["sums"] + c * 4, mean, squared)


def _sum_pixels(
    f: Function, source: Value, stride: Value, pixels: Value, out: Value, mean: Value, squared: bool
) -> None:
    """Uses four independent sums, which hides latency and reduces rounding errors."""
    sums = [f.variable(f.vector(0)) for _ in range(4)]

    def add(pixel: Value, total: Any) -> None:
        value = f.load(source, pixel * stride)
        deviation = value - mean
        total.set(f.fma(deviation, deviation, total.get()) if squared else total.get() + value)

    with f.loop(0, pixels // 4) as quad:
        for k, total in enumerate(sums):
            add(quad * 4 + k, total)
    with f.loop(pixels // 4 * 4, pixels) as pixel:
        add(pixel, sums[0])
    a, b, c, d = (s.get() for s in sums)
    f.store((a + b) + (c + d), out)


@instruction("sums channels group groups totals count means")
def group_means(f: Function, part: Value, parts: Value, **a: Value) -> None:
    """means[c] = mean of the group of channel c. Padding channels form one more group."""
    with f.when(part.is_("==", 0)):
        _totals(f, a)
        with f.loop(0, a["channels"]) as c:
            total = f.load(a["totals"], f.load(a["group"], c * 2, I64), F32)
            f.store(total * as_float(f, a["count"]), a["means"], c)


def _totals(f: Function, a: dict[str, Value]) -> None:
    with f.loop(0, a["groups"] + 1) as g:
        f.store(f.number(0), a["totals"], g)
    with f.loop(0, a["channels"]) as c:
        g = f.load(a["group"], c * 2, I64)
        f.store(f.load(a["totals"], g, F32) + f.load(a["sums"], c, F32), a["totals"], g)


@instruction(
    "sums channels group groups totals count means eps gamma beta time_row factors offsets"
)
def norm_factors(f: Function, part: Value, parts: Value, **a: Value) -> None:
    """norm(x) = factors x + offsets. If time_row is not 0: (1 + time_row[c]) norm(x) +
    time_row[channels + c].
    """
    with f.when(part.is_("==", 0)):
        _totals(f, a)
        with f.loop(0, a["channels"]) as c:
            variance = f.load(a["totals"], f.load(a["group"], c * 2, I64), F32) * as_float(
                f, a["count"]
            )
            sigma = f.intrinsic("llvm.sqrt", variance + as_float(f, a["eps"]))
            factor = f.variable(f.load(a["gamma"], c, F32) / sigma)
            offset = f.variable(
                f.load(a["beta"], c, F32) - f.load(a["means"], c, F32) * factor.get()
            )
            with f.when(a["time_row"].is_("!=", 0)):
                scale = f.load(a["time_row"], c, F32) + 1
                factor.set(factor.get() * scale)
                offset.set(offset.get() * scale + f.load(a["time_row"], a["channels"] + c, F32))
            f.store(factor.get(), a["factors"], c)
            f.store(offset.get(), a["offsets"], c)


@instruction("x x_channels y y_channels factors offsets silu height width out out_y out_x")
def normalise(f: Function, part: Value, parts: Value, **a: Value) -> None:
    """out = factors x + offsets (then SiLU); y's channels follow x's."""
    with f.loop(*f.share(a["height"], part, parts)) as y, f.loop(0, a["width"]) as x:
        pixel = y * a["width"] + x
        out = a["out"] + (y * a["out_y"] + x * a["out_x"]) * 4
        for source, channels, first_channel in (
            ("x", a["x_channels"], f.integer(0)),
            ("y", a["y_channels"], a["x_channels"]),
        ):
            from_, to = a[source] + pixel * channels * 4, out + first_channel * 4
            factors, offsets = a["factors"] + first_channel * 4, a["offsets"] + first_channel * 4
            for silu in (True, False):
                with (
                    f.when(a["silu"].is_("==", int(silu))),
                    f.loop(0, channels // f.width) as vector,
                ):
                    c = vector * f.width
                    value = f.fma(f.load(from_, c), f.load(factors, c), f.load(offsets, c))
                    f.store(value / (exponential(f, 0 - value) + 1) if silu else value, to, c)


def exponential(f: Function, x: Value) -> Value:
    """e^x within 2 ulp, x clamped to +-87."""
    x = x.is_(">", 87.0).pick(87.0, x)
    x = x.is_("<", -87.0).pick(-87.0, x)
    magic = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer
    n = f.fma(x, f.vector(1 / math.log(2)), f.vector(magic)) - magic
    r = f.fma(n, f.vector(-0.693359375), x)
    r = f.fma(n, f.vector(2.12194440054691e-4), r)
    y = f.vector(1 / 5040)
    for k in (720, 120, 24, 6, 2, 1, 1):
        y = f.fma(y, r, f.vector(1 / k))
    power = (n.cast("fptosi", I32) + 127) << 23
    return y * power.cast("bitcast", F32)


# ---- copies


@instruction("x elements channels width out out_y center")
def place(f: Function, part: Value, parts: Value, **a: Value) -> None:
    """Copies x_t [pixel][channel] without padding into a bordered map; 2 x - 1 if `center`."""
    row_length = a["width"] * a["channels"]
    with f.when(part.is_("==", 0)), f.loop(0, a["elements"]) as i:
        value = f.load(a["x"], i, F32)
        value = a["center"].is_("!=", 0).pick(value * 2 - 1, value)
        f.store(value, a["out"], i // row_length * a["out_y"] + i % row_length)


@instruction("x x_channels first channels pixels out")
def take(f: Function, part: Value, parts: Value, **a: Value) -> None:
    """out [pixel][channel], without padding = `channels` channels of x, starting at `first`."""
    with f.when(part.is_("==", 0)), f.loop(0, a["pixels"]) as pixel, f.loop(0, a["channels"]) as c:
        f.store(
            f.load(a["x"], pixel * a["x_channels"] + a["first"] + c, F32),
            a["out"],
            pixel * a["channels"] + c,
        )


@instruction("x channels height width divide repeat out out_y out_x")
def resample(f: Function, part: Value, parts: Value, **a: Value) -> None:
    """Copies dense x to [height][width]. repeat 2: each pixel as 2x2; divide 2: means of 2x2."""
    x_row = a["width"] * a["divide"] // a["repeat"] * a["channels"]
    with f.loop(*f.share(a["height"], part, parts)) as y, f.loop(0, a["width"]) as x:
        at = y * a["divide"] // a["repeat"] * x_row + x * a["divide"] // a["repeat"] * a["channels"]
        out = y * a["out_y"] + x * a["out_x"]
        with f.loop(0, a["channels"] // f.width) as vector:
            c = vector * f.width
            value = f.variable(f.load(a["x"], at + c))
            with f.when(a["divide"].is_("==", 2)):
                right, below, beyond = (
                    f.load(a["x"], at + d + c)
                    for d in (a["channels"], x_row, x_row + a["channels"])
                )
                value.set((value.get() + right + (below + beyond)) * 0.25)
            f.store(value.get(), a["out"], out + c)


# ---- attention


@instruction("x stride heads head pixels channels out")
def transpose(f: Function, part: Value, parts: Value, **a: Value) -> None:
    """Packs keys [pixel][head][channel] as a product's second operand, padded with zeros:
    [head][block][channel][2 vectors of pixels].
    """
    block_width = 2 * f.width
    blocks = (a["pixels"] + (block_width - 1)) // block_width
    with f.loop(*f.share(a["heads"] * blocks, part, parts)) as i:
        first, head = i % blocks * block_width, i // blocks
        with f.loop(0, block_width) as lane:
            pixel = first + lane
            real = pixel.is_("<", a["pixels"])
            x = a["x"] + (real.pick(pixel, f.integer(0)) * a["stride"] + head * a["head"]) * 4
            with f.loop(0, a["channels"]) as c:
                value = real.pick(f.load(x, c, F32), f.number(0))
                f.store(value, a["out"], (i * a["channels"] + c) * block_width + lane)


@instruction("x rows stride count")
def softmax(f: Function, part: Value, parts: Value, **a: Value) -> None:
    """Softmax of each row's first `count` numbers, in place; sets the padding to 0."""
    with f.loop(*f.share(a["rows"], part, parts)) as i:
        scores = a["x"] + i * a["stride"] * 4
        lane = f.lanes(I64)
        most = f.variable(f.vector(-3e38))
        with f.loop(0, a["stride"] // f.width) as vector:
            real = (f.splat(vector * f.width) + lane).is_("<", f.splat(a["count"]))
            value = real.pick(f.load(scores, vector * f.width), f.vector(-3e38))
            most.set(value.is_(">", most.get()).pick(value, most.get()))
        peak = f.splat(f.reduce(most.get(), lambda x, y: x.is_(">", y).pick(x, y)))
        total = f.variable(f.vector(0))
        with f.loop(0, a["stride"] // f.width) as vector:
            real = (f.splat(vector * f.width) + lane).is_("<", f.splat(a["count"]))
            value = real.pick(exponential(f, f.load(scores, vector * f.width) - peak), f.vector(0))
            total.set(total.get() + value)
            f.store(value, scores, vector * f.width)
        share = f.splat(f.number(1) / f.sum(total.get()))
        with f.loop(0, a["stride"] // f.width) as vector:
            f.store(f.load(scores, vector * f.width) * share, scores, vector * f.width)
