"""Machine code of GroupNorm with SiLU on [pixel][channel], forward and backward.

    z = (x + time - mean) / sigma * gamma + beta;   y = z, or z sigmoid(z)

Forward: one pass over an image for the means, one for the squared deviations, one for y. Backward:
one for the sums, one for dx. x, y and their gradients are fp32 or bf16; all arithmetic is fp32.
Channels are summed in vectors and then added to groups, so a group may have any width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

from llvmlite import ir

from .codegen import F32, I32, Function, Value, compile_cached, entry, vector_width
from .instructions import exponential

I16 = ir.IntType(16)
BLOCK = 4  # vectors of channels per pass over the pixels: whole cache lines
CHUNK = 64  # pixels per partial sum, which keeps rounding errors small
DTYPES = ("fp32", "bf16")
ARGUMENTS = {
    "forward": "x time time_stride gamma beta y stats first last pixels channels groups eps silu",
    "backward": "dy x residual gamma beta stats dx sums time_gradient scratch first last "
    "pixels channels groups silu",
}
Arguments = dict[str, Value]
_compiling = Lock()


class _Image:
    """Loops over an image [pixel][channel], stored in fp32 or bf16 and computed in fp32."""

    def __init__(self, f: Function, dtype: str, a: Arguments) -> None:
        self.f, self.a, self.bf16 = f, a, dtype == "bf16"
        self.channels, self.pixels = a["channels"], a["pixels"]
        self.bytes = self.pixels * self.channels * (2 if self.bf16 else 4)

    def columns(self, address: Value, c: Value, count: int) -> list[Value]:
        """Loads `count` vectors of fp32 from channel c on."""
        return [self.f.load(address, c + v * self.f.width) for v in range(count)]

    def read(self, address: Value, pixel: Value, c: Value, count: int) -> list[Value]:
        f, at = self.f, pixel * self.channels + c
        if not self.bf16:
            return self.columns(address, at, count)
        typ = ir.VectorType(I16, f.width)
        bits = [
            f.load(address + (at + v * f.width) * 2, typ=typ).cast("zext", I32) << 16
            for v in range(count)
        ]
        return [v.cast("bitcast", F32) for v in bits]

    def write(self, values: Sequence[Value], address: Value, pixel: Value, c: Value) -> None:
        """Rounds to the nearest bf16, ties to even; NaN stays NaN."""
        f, at = self.f, pixel * self.channels + c
        for v, value in enumerate(values):
            if not self.bf16:
                f.store(value, address, at + v * f.width)
                continue
            bits = value.cast("bitcast", I32)
            rounded = bits + 0x7FFF + ((bits >> 16) & 1)
            bits = value.is_("==", value).pick(rounded, bits | 0x400000) >> 16
            f.store(bits.cast("trunc", I16), address + (at + v * f.width) * 2)

    def blocks(self, emit: Callable[[Value, int], None]) -> None:
        """Calls emit(first channel, vectors): BLOCK vectors at a time, then one at a time."""
        f = self.f
        whole = self.channels // (BLOCK * f.width) * (BLOCK * f.width)
        for start, stop, count in ((f.integer(0), whole, BLOCK), (whole, self.channels, 1)):
            with f.loop(start, stop, count * f.width) as c:
                emit(c, count)

    def sums(self, count: int, terms: Callable[[Value], Sequence[Value]]) -> list[Value]:
        """Sums `count` vectors of terms over the pixels."""
        f = self.f
        totals = [f.variable(f.vector(0)) for _ in range(count)]
        with f.loop(0, self.pixels, CHUNK) as first:
            parts = [f.variable(f.vector(0)) for _ in range(count)]
            end = first + CHUNK
            with f.loop(first, end.is_("<", self.pixels).pick(end, self.pixels)) as pixel:
                for part, term in zip(parts, terms(pixel), strict=True):
                    part.set(part.get() + term)
            for total, part in zip(totals, parts, strict=True):
                total.set(total.get() + part.get())
        return [total.get() for total in totals]

    def groups(self, terms: Callable[[Value], Sequence[Value]], emit: Callable[..., None]) -> None:
        """Calls emit(channel, mean, mean): the means over its group of two sums per channel."""
        f, width = self.f, self.channels // self.a["groups"]
        share = f.number(1) / (width * self.pixels).cast("sitofp", F32)
        with f.loop(0, self.a["groups"]) as group:
            start = group * width
            totals = [f.variable(f.number(0)) for _ in range(2)]
            with f.loop(start, start + width) as c:
                for total, value in zip(totals, terms(c), strict=True):
                    total.set(total.get() + value)
            means = [total.get() * share for total in totals]
            with f.loop(start, start + width) as c:
                emit(c, *means)

    def put(self, values: Sequence[Value], address: Value, c: Value) -> None:
        for v, value in enumerate(values):
            self.f.store(value, address, c + v * self.f.width)


def _forward(f: Function, image: _Image, a: Arguments) -> None:
    """Writes y, and stats [N, 2, C]: mean - time, which is subtracted from x, and 1 / sigma."""
    with f.loop(a["first"], a["last"]) as n:
        x, y = a["x"] + n * image.bytes, a["y"] + n * image.bytes
        means = a["stats"] + n * image.channels * 8
        factors = means + image.channels * 4
        _means(f, image, a, x, a["time"] + n * a["time_stride"] * 4, means)
        _factors(f, image, a, x, means, factors)
        for silu in (True, False):

            def normalise(c: Value, count: int, silu: bool = silu) -> None:
                mean, factor, beta = _affine(image, a, means, factors, c, count)
                with f.loop(0, image.pixels) as pixel:
                    values = zip(image.read(x, pixel, c, count), mean, factor, beta, strict=True)
                    z = [f.fma(value - m, k, b) for value, m, k, b in values]
                    image.write([v * _sigmoid(f, v) for v in z] if silu else z, y, pixel, c)

            with f.when(a["silu"].is_("==", int(silu))):
                image.blocks(normalise)


def _means(f: Function, image: _Image, a: Arguments, x: Value, time: Value, means: Value) -> None:
    def sum_up(c: Value, count: int) -> None:
        image.put(image.sums(count, lambda pixel: image.read(x, pixel, c, count)), means, c)

    pixels = image.pixels.cast("sitofp", F32)
    image.blocks(sum_up)
    image.groups(
        lambda c: [f.load(means, c, F32), f.load(time, c, F32) * pixels],
        lambda c, of_x, of_time: f.store(of_x + of_time - f.load(time, c, F32), means, c),
    )


def _factors(
    f: Function, image: _Image, a: Arguments, x: Value, means: Value, factors: Value
) -> None:
    eps = a["eps"].cast("trunc", I32).cast("bitcast", F32)

    def square(c: Value, count: int) -> None:
        mean = image.columns(means, c, count)

        def terms(pixel: Value) -> list[Value]:
            off = [value - m for value, m in zip(image.read(x, pixel, c, count), mean, strict=True)]
            return [d * d for d in off]

        image.put(image.sums(count, terms), factors, c)

    image.blocks(square)
    image.groups(
        lambda c: [f.load(factors, c, F32), f.number(0)],
        lambda c, variance, _: f.store(
            f.number(1) / f.intrinsic("llvm.sqrt", variance + eps), factors, c
        ),
    )


def _affine(
    image: _Image, a: Arguments, means: Value, factors: Value, c: Value, count: int
) -> tuple[list[Value], list[Value], list[Value]]:
    """z = (x - mean) factor + beta"""
    gamma, factor = image.columns(a["gamma"], c, count), image.columns(factors, c, count)
    products = [g * k for g, k in zip(gamma, factor, strict=True)]
    return image.columns(means, c, count), products, image.columns(a["beta"], c, count)


def _sigmoid(f: Function, z: Value) -> Value:
    return 1 / (exponential(f, 0 - z) + 1)


def _backward(f: Function, image: _Image, a: Arguments) -> None:
    """Writes dx (+ residual), time_gradient [N, C] and sums [N, 2, C]: dgamma, dbeta per image."""
    channels = image.channels
    with f.loop(a["first"], a["last"]) as n:
        x, dy, dx = (a[name] + n * image.bytes for name in ("x", "dy", "dx"))
        means = a["stats"] + n * channels * 8
        sums, averages = a["sums"] + n * channels * 8, a["scratch"]
        at = dict(x=x, dy=dy, dx=dx, means=means, factors=means + channels * 4, averages=averages)
        at |= dict(dgamma=sums, dbeta=sums + channels * 4, dz=averages + channels * 8)
        at["residual"] = a["residual"] + n * image.bytes
        at["time_gradient"] = a["time_gradient"] + n * channels * 4
        for silu in (True, False):
            with f.when(a["silu"].is_("==", int(silu))):
                image.blocks(partial(_gradient_sums, f, image, a, at, silu))
        weighted = lambda c, name: f.load(at[name], c, F32) * f.load(a["gamma"], c, F32)

        def store(c: Value, of_product: Value, of_gradient: Value) -> None:
            f.store(of_product, averages, c)
            f.store(of_gradient, averages, channels + c)

        image.groups(lambda c: [weighted(c, "dgamma"), weighted(c, "dbeta")], store)
        for residual in (True, False):
            with f.when(a["residual"].is_("!=" if residual else "==", 0)):
                image.blocks(partial(_input_gradient, f, image, a, at, residual))


def _gradient_sums(
    f: Function, image: _Image, a: Arguments, at: Arguments, silu: bool, c: Value, count: int
) -> None:
    """Stores dz = dy silu'(z), and its sums over pixels: plain, and times (x - mean) / sigma."""
    mean, factor, beta = _affine(image, a, at["means"], at["factors"], c, count)

    def terms(pixel: Value) -> list[Value]:
        gradients = image.read(at["dy"], pixel, c, count)
        off = [
            value - m for value, m in zip(image.read(at["x"], pixel, c, count), mean, strict=True)
        ]
        if silu:
            z = [f.fma(d, k, b) for d, k, b in zip(off, factor, beta, strict=True)]
            gradients = [g * _slope(f, v) for g, v in zip(gradients, z, strict=True)]
        image.put(gradients, at["dz"], pixel * image.channels + c)
        return [g * d for g, d in zip(gradients, off, strict=True)] + gradients

    sums = image.sums(2 * count, terms)
    inverse = image.columns(at["factors"], c, count)
    image.put([s * k for s, k in zip(sums[:count], inverse, strict=True)], at["dgamma"], c)
    image.put(sums[count:], at["dbeta"], c)


def _slope(f: Function, z: Value) -> Value:
    """Derivative of z sigmoid(z)."""
    s = _sigmoid(f, z)
    return s * f.fma(z, 1 - s, f.vector(1))


def _input_gradient(
    f: Function, image: _Image, a: Arguments, at: Arguments, residual: bool, c: Value, count: int
) -> None:
    """dx = (gamma dz - mean(gamma dz) - x_hat mean(gamma dz x_hat)) / sigma, with means over the
    group; plus the gradient of the residual path.
    """
    mean, of_dz, _ = _affine(image, a, at["means"], at["factors"], c, count)
    inverse = image.columns(at["factors"], c, count)
    products = image.columns(at["averages"], c, count)
    gradients = image.columns(at["averages"], image.channels + c, count)
    of_x = [0 - k * k * p for k, p in zip(inverse, products, strict=True)]
    constant = [0 - k * g for k, g in zip(inverse, gradients, strict=True)]

    def terms(pixel: Value) -> list[Value]:
        dz = image.columns(at["dz"], pixel * image.channels + c, count)
        off = [
            value - m for value, m in zip(image.read(at["x"], pixel, c, count), mean, strict=True)
        ]
        by_x = [f.fma(d, k, w) for d, k, w in zip(off, of_x, constant, strict=True)]
        dx = [f.fma(d, k, v) for d, k, v in zip(dz, of_dz, by_x, strict=True)]
        more = image.read(at["residual"], pixel, c, count) if residual else [f.vector(0)] * count
        image.write(
            [d + m for d, m in zip(dx, more, strict=True)] if residual else dx, at["dx"], pixel, c
        )
        return dx

    image.put(image.sums(count, terms), at["time_gradient"], c)


def _module(width: int) -> str:
    module = ir.Module("group_norm_silu")
    for name, emit in (("forward", _forward), ("backward", _backward)):
        names = ARGUMENTS[name].split()
        for dtype in DTYPES:
            f = Function(module, f"{name}_{dtype}", len(names), width)
            a = dict(zip(names, f.arguments, strict=True))
            emit(f, _Image(f, dtype, a), a)
            f.end()
    return str(module)


def functions(width: int) -> dict[str, Callable[..., None]]:
    """Functions of the integers in `ARGUMENTS`, for images first..last-1: forward_fp32,
    forward_bf16, backward_fp32, backward_bf16.
    """
    with _compiling:  # one engine per width, which owns the functions
        return _compiled(width)[0]


@cache
def _compiled(width: int) -> tuple[dict[str, Callable[..., None]], Any]:
    files = (Path(__file__).with_name(f"{n}.py") for n in ("norm_loops", "codegen", "instructions"))
    sources = [str(width), *(path.read_text() for path in files)]
    engine, _ = compile_cached(lambda: _module(width), sources)
    compiled = {}
    for name, arguments in ARGUMENTS.items():
        for dtype in DTYPES:
            compiled[f"{name}_{dtype}"] = entry(engine, f"{name}_{dtype}", len(arguments.split()))
    return compiled, engine


@cache
def fitting_width(channels: int) -> int | None:
    """Returns the widest vector of this CPU that divides the channels, or None."""
    return next((w for w in (16, 8, 4) if w <= vector_width() and channels % w == 0), None)
