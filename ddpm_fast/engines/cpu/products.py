"""Instructions of matrix products and Winograd's transforms, and the registry of instructions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from .codegen import F32, I32, I64, Function, Value

Instruction = Callable[..., None]
INSTRUCTIONS: dict[str, tuple[Instruction, list[str]]] = {}


def instruction(arguments: str) -> Callable[[Instruction], Instruction]:
    """Registers the decorated emitter under its name, with the names of its arguments."""

    def register(emit: Instruction) -> Instruction:
        INSTRUCTIONS[emit.__name__] = (emit, arguments.split())
        return emit

    return register


def tile_rows(width: int) -> int:
    """Pixels whose sums fit in registers, two vectors of channels each."""
    return 6 if width == 8 else 8  # AVX2 has 16 registers, the others 32


# ---- products


@instruction(
    "batch a_batch segments segment_count u u_batch u_block u_row bias residual residual_scale "
    "out out_batch out_y out_x height width vectors"
)
def gemm(f: Function, part: Value, parts: Value, **a: Value) -> None:
    """out[y, x] = bias + residual_scale residual[y, x] + sum over s, c of a_s[y, x, c] u[s, c].

    A segment s is (address, channels, stride of y, stride of x): a tap of a convolution, or one of
    two concatenated sources. u is [block][s, c][2 vectors] with strides u_block, u_row; bias and
    residual may be 0. Every sum runs over s, then c, for all tile sizes.
    """
    a["residual_scale"] = as_float(f, a["residual_scale"])
    blocks = (a["vectors"] + 1) // 2
    rows = a["batch"] * blocks * a["height"]
    size = tile_rows(f.width)
    # Threads share the pixels if there are enough, so that each reads what it has in its cache.
    by_pixel = _units(f, a["width"]).is_(">=", parts)
    pixels = [
        by_pixel.pick(part_bound, bound)
        for part_bound, bound in zip(
            _share_pixels(f, a["width"], part, parts), (f.integer(0), a["width"]), strict=True
        )
    ]
    first_row, end_row = (
        by_pixel.pick(bound, part_bound)
        for bound, part_bound in zip((f.integer(0), rows), f.share(rows, part, parts), strict=True)
    )
    with f.loop(first_row, end_row) as i:
        y, rest = i % a["height"], i // a["height"]
        block, batch = rest % blocks, rest // blocks
        half = (block * 2 + 1).is_("==", a["vectors"])
        for vectors, condition in ((2, half.is_("==", 0)), (1, half)):
            with f.when(condition):
                first, stop = pixels
                with f.loop(0, (stop - first) // size) as j:
                    _tile(f, a, batch, block, y, first + j * size, size, vectors)
                left = (stop - first) % size
                for count in range(1, size):
                    with f.when(left.is_("==", count)):
                        _tile(f, a, batch, block, y, stop - left, count, vectors)


def _units(f: Function, pixels: Value) -> Value:
    return (pixels + (tile_rows(f.width) - 1)) // tile_rows(f.width)


def _share_pixels(f: Function, pixels: Value, part: Value, parts: Value) -> tuple[Value, Value]:
    """As `Function.share`, in whole tiles of a product except for the last."""
    first, stop = (v * tile_rows(f.width) for v in f.share(_units(f, pixels), part, parts))
    return first, stop.is_(">", pixels).pick(pixels, stop)


def _tile(
    f: Function,
    a: dict[str, Value],
    batch: Value,
    block: Value,
    y: Value,
    x: Value,
    count: int,
    vectors: int,
) -> None:
    sums = [[f.variable(f.vector(0)) for _ in range(vectors)] for _ in range(count)]
    u = f.variable(a["u"] + (batch * a["u_batch"] + block * a["u_block"]) * 4)
    with f.loop(0, a["segment_count"]) as s:
        address, channels, of_y, of_x = (
            f.load(a["segments"], s * 8 + 2 * k, I64) for k in range(4)
        )
        first = address + (batch * a["a_batch"] + y * of_y + x * of_x) * 4
        pixels = [first + of_x * (4 * k) for k in range(count)]
        with f.loop(0, channels) as c:
            u_address = u.get()
            weights = [f.load(u_address, k * f.width) for k in range(vectors)]
            for pixel, of_pixel in zip(pixels, sums, strict=True):
                value = f.splat(f.load(pixel, c, F32))
                for weight, total in zip(weights, of_pixel, strict=True):
                    total.set(f.fma(value, weight, total.get()))
            u.set(u_address + a["u_row"] * 4)
    at = batch * a["out_batch"] + y * a["out_y"] + x * a["out_x"] + block * (2 * f.width)
    places = [[at + a["out_x"] * p + v * f.width for v in range(vectors)] for p in range(count)]
    with f.when(a["bias"].is_("!=", 0)):
        biases = [f.load(a["bias"], (block * 2 + v) * f.width) for v in range(vectors)]
        for of_pixel in sums:
            for total, bias in zip(of_pixel, biases, strict=True):
                total.set(total.get() + bias)
    with f.when(a["residual"].is_("!=", 0)):
        scale = f.splat(a["residual_scale"])
        for of_pixel, of_place in zip(sums, places, strict=True):
            for total, place in zip(of_pixel, of_place, strict=True):
                total.set(f.fma(f.load(a["residual"], place), scale, total.get()))
    for of_pixel, of_place in zip(sums, places, strict=True):
        for total, place in zip(of_pixel, of_place, strict=True):
            f.store(total.get(), a["out"], place)


def as_float(f: Function, bits: Value) -> Value:
    """Reinterprets the low 32 bits of an integer as fp32."""
    return bits.cast("trunc", I32).cast("bitcast", F32)


@instruction("x width channels tiles_x first tiles v")
def winograd_in(f: Function, part: Value, parts: Value, **a: Value) -> None:
    """v[16][tile][channel] = B^T d B, the input transform of F(2x2, 3x3) (Lavin & Gray 2016).

    d: 4x4 pixels at every second row and column of a bordered map `width` pixels wide.
    """
    with f.loop(*_share_pixels(f, a["tiles"], part, parts)) as t:
        tile = a["first"] + t
        corner = ((tile // a["tiles_x"]) * 2 * a["width"] + (tile % a["tiles_x"]) * 2) * a[
            "channels"
        ]
        with f.loop(0, a["channels"] // f.width) as vector:
            c = vector * f.width
            d = [
                [
                    f.load(a["x"], corner + (a["width"] * i + j) * a["channels"] + c)
                    for j in range(4)
                ]
                for i in range(4)
            ]
            columns = [_b(*(d[i][j] for i in range(4))) for j in range(4)]
            for i in range(4):
                for j, value in enumerate(_b(*(columns[k][i] for k in range(4)))):
                    f.store(value, a["v"], ((a["tiles"] * (4 * i + j)) + t) * a["channels"] + c)


def _b(d0: Value, d1: Value, d2: Value, d3: Value) -> tuple[Value, Value, Value, Value]:
    return d0 - d2, d1 + d2, d2 - d1, d1 - d3


@instruction("m channels tiles_x first tiles bias residual residual_scale out width")
def winograd_out(f: Function, part: Value, parts: Value, **a: Value) -> None:
    """out[2x2 pixels] = bias + residual_scale residual + A^T m A, for m[16][tile][channel] and a
    dense map `width` pixels wide.
    """
    scale = f.splat(as_float(f, a["residual_scale"]))
    with f.loop(*_share_pixels(f, a["tiles"], part, parts)) as t:
        tile = a["first"] + t
        corner = ((tile // a["tiles_x"]) * 2 * a["width"] + (tile % a["tiles_x"]) * 2) * a[
            "channels"
        ]
        with f.loop(0, a["channels"] // f.width) as vector:
            c = vector * f.width
            m = [
                [
                    f.load(a["m"], ((a["tiles"] * (4 * i + j)) + t) * a["channels"] + c)
                    for j in range(4)
                ]
                for i in range(4)
            ]
            columns = [_a(*(m[i][j] for i in range(4))) for j in range(4)]
            bias = f.load(a["bias"], c)
            rows = [_a(*(columns[k][i] for k in range(4))) for i in range(2)]
            for i, j in product(range(2), range(2)):
                place = corner + (a["width"] * i + j) * a["channels"] + c
                value = f.variable(rows[i][j] + bias)
                with f.when(a["residual"].is_("!=", 0)):
                    value.set(f.fma(f.load(a["residual"], place), scale, value.get()))
                f.store(value.get(), a["out"], place)


def _a(m0: Value, m1: Value, m2: Value, m3: Value) -> tuple[Value, Value]:
    return m0 + m1 + m2, m1 - m2 - m3
