"""Reverse step x_t -> x_{t-1} as machine code: `kernels.ddpm_step` with bit-exact noise."""

from __future__ import annotations

from ...kernels import noise
from ...kernels.ddpm_step import COLUMNS
from .codegen import F32, I32, I64, Function, Value
from .instructions import exponential


def _normals(f: Function, item: dict[str, Value], z: Value, elements: Value) -> None:
    """z = the image's noise of this step, bit-exact with `kernels.noise`: without fused
    multiply-add.
    """
    word = f.integer(0xFFFFFFFF)
    half = lambda v: f.splat(v.cast("trunc", I32))
    key = half(item["seed"] & word), half(item["seed"] >> 32)
    streams = half(item["noise_row"] | (noise.REVERSE << 24))
    per_vector = 4 * f.width
    with f.loop(0, (elements + (per_vector - 1)) // per_vector) as i:
        block = half(i * f.width) + f.lanes(I32)
        words = _philox(
            f, (block, streams, half(item["image"] & word), half(item["image"] >> 32)), key
        )
        n = (*_box_muller(f, words[0], words[1]), *_box_muller(f, words[2], words[3]))
        pairs = [f.shuffle(n[k], n[k + 1], range(2 * f.width)) for k in (0, 2)]
        order = [
            (which // 2) * 2 * f.width + (which % 2) * f.width + lane
            for lane in range(f.width)
            for which in range(4)
        ]
        f.store(f.shuffle(pairs[0], pairs[1], order), z, i * per_vector)


def _philox(f: Function, counter: tuple[Value, ...], key: tuple[Value, Value]) -> tuple[Value, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = (
            c.cast("zext", I64) * m.value for c, m in ((c0, noise.PHILOX_M0), (c2, noise.PHILOX_M1))
        )
        high0, high1 = ((p >> 32).cast("trunc", I32) for p in (p0, p1))
        c0, c1, c2, c3 = (
            high1 ^ c1 ^ k0,
            p1.cast("trunc", I32),
            high0 ^ c3 ^ k1,
            p0.cast("trunc", I32),
        )
        k0, k1 = k0 + noise.PHILOX_W0.value, k1 + noise.PHILOX_W1.value
    return c0, c1, c2, c3


def _box_muller(f: Function, radius_word: Value, angle_word: Value) -> tuple[Value, Value]:
    bits = (radius_word.cast("uitofp", F32) + 0.5).cast("bitcast", I32) - noise.SQRT_HALF_2_32.value
    fraction = ((bits & 0x7FFFFF) + noise.SQRT_HALF.value).cast("bitcast", F32) - 1.0
    minus_2_log_u = bits.sar(23).cast("sitofp", F32) * noise.MINUS_2_LN2.value + fraction * _horner(
        fraction, noise.Q.value
    )
    radius = f.intrinsic("llvm.sqrt", minus_2_log_u)
    turned = angle_word + 0x20000000
    angle = ((turned & 0x3FFFFFFF) - 0x20000000).cast("sitofp", F32) * noise.RADIANS.value
    square = angle * angle
    sin, cos = angle * _horner(square, noise.S.value), _horner(square, noise.C.value)
    odd = (turned & 0x40000000).is_("!=", 0)
    signed = lambda word: (radius.cast("bitcast", I32) ^ (word & 0x80000000)).cast("bitcast", F32)
    return signed(turned + 0x40000000) * odd.pick(sin, cos), signed(turned) * odd.pick(cos, sin)


def _horner(x: Value, coefficients: tuple[float, ...]) -> Value:
    y = x * coefficients[-1] + coefficients[-2]
    for c in coefficients[-3::-1]:
        y = y * x + c
    return y


def reverse_step(f: Function, header: dict[str, Value], item: dict[str, Value]) -> None:
    """`ddpm_step_reference` over padded buffers; writes x_{t-1}, and the x_0 of this step into
    `old`.
    """
    of = {name: f.load(item["coef"], k, F32) for k, name in enumerate(COLUMNS)}
    noisy = of["sigma"].is_("!=", 0.0)
    with f.when(noisy & item["z"].is_("==", 0)):
        _normals(f, item, header["z"], header["elements"])
    v = {name: f.splat(value) for name, value in of.items()}
    with f.loop(0, (header["elements"] + (f.width - 1)) // f.width) as vector:
        e = vector * f.width
        x_t, out, old = (f.load(header[name], e) for name in ("x", "eps", "old"))
        x_0 = v["x_0_x"] * x_t + v["x_0_out"] * out
        x_0 = x_0.is_("<", 0 - v["clip"]).pick(0 - v["clip"], x_0)  # NaN stays NaN
        x_0 = x_0.is_(">", v["clip"]).pick(v["clip"], x_0)
        mean = v["mean_x_0"] * x_0 + v["mean_x"] * x_t + v["mean_out"] * out
        mean = mean + f.splat(of["mean_old"].is_("!=", 0.0)).pick(v["mean_old"] * old, f.vector(0))
        sigma = f.variable(v["sigma"])
        with f.when(item["learned"].is_("!=", 0)):
            share = (f.load(header["variance"], e) + 1) * 0.5
            sigma.set(exponential(f, share * v["log_sigma_max"] + (1 - share) * v["log_sigma_min"]))
        z = f.splat(noisy).pick(f.load(header["z"], e) * sigma.get(), f.vector(0))
        f.store(mean + z, header["x"], e)
        f.store(x_0, header["old"], e)
