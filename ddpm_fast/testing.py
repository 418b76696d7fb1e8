"""What tests and benchmarks share: the accuracy rule, and the compilation of real launches without a GPU."""

from __future__ import annotations

import glob
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .kernels._feature_map import FeatureMap
from .kernels._triton import INTERPRETED


def relative_error(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact|| in fp64."""
    return float((x.double() - exact.double()).norm() / exact.double().norm())


def assert_as_accurate(fused: Tensor, plain: Tensor, exact: Tensor, slack: float = 2.0) -> None:
    """`fused` may be at most `slack` times as far from the fp64 truth `exact` as plain PyTorch is, plus one last-place unit."""
    ulp = torch.finfo(fused.dtype).eps * exact.abs().max()
    error = (fused.double() - exact).abs().max()
    allowed = slack * (plain.double() - exact).abs().max() + ulp
    assert error <= allowed, f"max error {error:.3g} > {allowed:.3g} = {slack} x plain PyTorch + 1 ulp"


@dataclass(frozen=True)
class Launch:
    """One kernel launch as a launcher made it."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any]


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collects Triton launches instead of running them, so launchers can be driven without a GPU (meta tensors do)."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False))
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        named |= {k: v for k, v in kwargs.items() if k in self.arg_names}
        launches.append(Launch(self, tuple(grid), named, options))

    original, JITFunction.run = JITFunction.run, run
    try:
        yield launches
    finally:
        JITFunction.run = original


def launch_key(launch: Launch) -> tuple[Any, ...]:
    """What makes a compilation of its own: as Triton specialises."""
    key: list[Any] = [launch.kernel.fn.__name__]
    for p in launch.kernel.params:
        value = launch.args[p.name]
        if p.is_constexpr:
            key.append(str(value))
        elif isinstance(value, Tensor):
            key.append((value.dtype, value.storage_offset() * value.element_size() % 16 == 0))
        elif isinstance(value, int):
            key.append(None if p.do_not_specialize else 1 if value == 1 else value % 16 == 0)
        elif not isinstance(value, float):
            key.append((tuple(value.block_shape), value.base.dtype))
    return (*key, *sorted((k, str(v)) for k, v in launch.options.items()))


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    registers: int
    spills: int  # local-memory instructions
    shared: int  # bytes
    ptx: str
    sass: list[str]  # the program's instructions, in order, without the idle loop behind EXIT
    step: int  # instructions of the shortest loop around a matrix product; 0: there is none, it is unrolled

    def count(self, opcode: str) -> int:
        return sum(line.startswith(opcode) for line in self.sass)


_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
}


def compile_launch(launch: Launch, sm: int) -> Compiled:
    """Compiles a recorded launch for compute capability `sm` (80, 90, 100) as Triton would at run time. Needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.args[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or (type(value) is int and value == 1 and specialised):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], aligned = _POINTERS[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
            attributes |= {(i,): [["tt.divisibility", 16]]} if aligned else {}
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            attributes |= {(i,): [["tt.divisibility", 16]]} if specialised and value % 16 == 0 else {}
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:  # a TMA descriptor
            shape = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_POINTERS[value.base.dtype][1:]}[{shape}]>"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch.options)
    usage, listing = _cuobjdump(compiled.asm["cubin"], "-res-usage"), _cuobjdump(compiled.asm["cubin"], "-sass")
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    numbered = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][^;]*);", listing, re.MULTILINE)
    numbered = numbered[: len(numbered) - next((i for i, line in enumerate(reversed(numbered)) if line[2].startswith("EXIT")), 0)]
    sass = [line for _, _, line in numbered]
    spills = sum(line.startswith(("LDL", "STL")) for line in sass)
    return Compiled(int(found[1]), spills, compiled.metadata.shared, compiled.asm["ptx"], sass, _shortest_loop(numbered))


def _shortest_loop(numbered: list[tuple[str, str, str]]) -> int:
    """Instructions on the shortest way from a matrix product back to itself: an epilogue that is jumped over does not count.

    numbered: (address, predicate, instruction)
    """
    at = {int(address, 16): i for i, (address, _, _) in enumerate(numbered)}
    after: list[list[int]] = []
    for i, (_, predicate, line) in enumerate(numbered):
        target = re.search(r"0x([0-9a-f]+)", line) if line.startswith("BRA") else None
        leads = [at[int(target[1], 16)]] if target and int(target[1], 16) in at else []
        ends = line.startswith(("BRA", "EXIT")) and not predicate and "UP" not in line.split(",")[0]
        after.append(leads if ends or i + 1 == len(numbered) else [*leads, i + 1])
    products = [i for i, (_, _, line) in enumerate(numbered) if re.match(r"[HQ]G?MMA|UTC\w*MMA", line)]
    return min((way for way in (_way_back(after, i) for i in products) if way), default=0)


def _way_back(after: list[list[int]], start: int) -> int:
    """The fewest steps from `start` to `start`; 0 where none lead there."""
    reached, steps, edge = {start}, 0, [start]
    while edge:
        steps += 1
        following = {j for i in edge for j in after[i]}
        if start in following:
            return steps
        edge = list(following - reached)
        reached |= following
    return 0


def _cuobjdump(cubin: bytes, flag: str) -> str:
    import triton.backends.nvidia

    tools = glob.glob(os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "cuobjdump*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        return subprocess.run([tools[0], flag, f.name], capture_output=True, text=True, check=True).stdout


# ---- operations on feature maps

GUARD = 256  # rows on either side of a map that belong to nobody


def operand_types() -> list[torch.dtype]:
    """What activations may be here. The interpreter multiplies bf16 wrongly and truncates where it should round to it."""
    return [torch.float32, torch.float16, *[torch.bfloat16] * (torch.cuda.is_available() and not INTERPRETED)]


def spread(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every combination of values of the axes, with every one of `operand_types`; or, as the interpreter takes its time, with one,
    in turn along every axis.
    """
    types = operand_types()
    points = [list(zip(*point, strict=True)) for point in itertools.product(*map(enumerate, axes))]
    return [(*v, t) for at, v in points for j, t in enumerate(types) if not INTERPRETED or j == sum(at) % len(types)]


def poisoned(
    images: int, height: int, width: int, channels: int, dtype: torch.dtype, device: Any, bordered: bool = True
) -> FeatureMap:
    """A map full of NaN with NaN around it: what is left unwritten, or read from outside, shows."""
    fm = FeatureMap.empty(images, height, width, channels, dtype, "meta", bordered)
    memory = torch.full((len(fm.rows) + 2 * GUARD, channels * dtype.itemsize), 0xFF, dtype=torch.uint8, device=device)
    return replace(fm, rows=memory.view(dtype)[GUARD:-GUARD])  # 0xFF is NaN in every type


def map_of(x: Tensor, dtype: torch.dtype | None = None, bordered: bool = True) -> FeatureMap:
    """x [N, C, H, W] as a map with NaN around it."""
    n, c, h, w = x.shape
    fm = poisoned(n, h, w, c, dtype or x.dtype, x.device, bordered)
    fm.write(x)
    return fm


def assert_written(out: FeatureMap) -> None:
    """No NaN is left in a map that was `poisoned`, its border is zero, and nothing around it was touched."""
    rows, guard = out.rows.double(), GUARD * out.channels * out.rows.element_size()
    memory = torch.empty(0, dtype=torch.uint8, device=rows.device).set_(out.rows.untyped_storage())
    assert not rows.isnan().any(), f"NaN in {int(rows.isnan().any(1).sum())} of {len(rows)} rows"
    assert not out.border.double().any(), "the border is not zero"
    assert (memory[:guard] == 0xFF).all() and (memory[-guard:] == 0xFF).all(), "something was written outside the map"


def assert_same_bits(x: Tensor, y: Tensor, what: str) -> None:
    assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)), f"{what}: other bits"


def run_twice(op: Any, out: FeatureMap, **arguments: Any) -> None:
    """Runs the kernel into `out`, which is `poisoned`, and into another such map: all is written, with the same bits."""
    again = poisoned(out.images, out.height, out.width, out.channels, out.rows.dtype, out.rows.device, out.bordered)
    for fm in (out, again):
        op.run(out=fm, **arguments)
        assert_written(fm)
    assert_same_bits(out.rows, again.rows, "a second run")


def assert_operation(
    op: Any,
    out: FeatureMap,
    reference: Callable[[torch.dtype], Tensor],
    slack: float = 2.0,
    fallback: float = 1e-11,
    **arguments: Any,
) -> None:
    """Kernel and fallback against `reference`, which computes in the type that it is given: fp64 is the truth, the type of `out`
    the yardstick. The fallback, in fp64, may be off by `fallback` of the largest value.
    """
    exact, plain = reference(torch.float64), reference(out.rows.dtype)
    run_twice(op, out, **arguments)
    assert_as_accurate(out.pixels, plain, exact, slack)
    error, allowed = relative_error(out.pixels, exact), slack * relative_error(plain, exact)
    assert error <= allowed, f"relative error {error:.3g} > {allowed:.3g} = {slack} x plain PyTorch"
    wide = poisoned(out.images, out.height, out.width, out.channels, torch.float64, out.rows.device, out.bordered)
    op.fallback(out=wide, compute=torch.float64, **arguments)
    assert_written(wide)
    torch.testing.assert_close(wide.pixels, exact, rtol=0, atol=fallback * float(exact.abs().max()), msg=lambda m: f"fallback: {m}")


def assert_same_in_any_batch(run: Callable[[list[int]], FeatureMap]) -> None:
    """`run` gives the map of the images it is told (of 0 ... 4): image 2 has the same bits wherever and with whom it stands."""
    alone = run([2]).grid[0]
    for batch in ([2, 0, 1], [1, 0, 2], [2, 4, 1, 3, 0], [4, 3, 1, 0, 2]):
        assert_same_bits(run(batch).grid[batch.index(2)], alone, f"image 2 in the batch {batch}")


def _leave(part: Callable[[FeatureMap], Tensor], value: float) -> Callable[[FeatureMap], Any]:
    return lambda out: part(out).fill_(value)


# what a broken kernel could leave behind -> what the checks above then say
DAMAGES: dict[str, tuple[Callable[[FeatureMap], Any], str]] = {
    "one pixel left out": (_leave(lambda out: out.pixels[0, :, 1, 2], float("nan")), "NaN"),
    "one pixel is zero": (_leave(lambda out: out.pixels[-1, :, 2, 1], 0.0), "error"),
    "one image is another": (lambda out: out.pixels[0].copy_(out.pixels[-1].clone()), "error"),
    "rows and columns swapped": (lambda out: out.pixels[0, :, :3, :3].copy_(out.pixels[0, :, :3, :3].mT.clone()), "error"),
    "top border left out": (_leave(lambda out: out.grid[0, 0, 1:], float("nan")), "NaN"),
    "left border left out": (_leave(lambda out: out.grid[-1, 1:, 0], float("nan")), "NaN"),
    "border of ones": (_leave(lambda out: out.grid[0, 0, -1, :1], 1.0), "border"),
    "a row before the first": (_leave(lambda out: out.rows.as_strided((1,), (1,), out.rows.storage_offset() - 1), 0.0), "outside"),
    "a row behind the last": (
        _leave(lambda out: out.rows.as_strided((1,), (1,), out.rows.storage_offset() + out.rows.numel()), 0.0),
        "outside",
    ),
    "chance": (lambda out: out.pixels[0, 0, 0, 0].copy_(torch.rand(())), "other bits"),
}


@dataclass(frozen=True, eq=False)
class Damaged:
    """An operation whose kernel leaves a damage behind."""

    op: Any
    damage: Callable[[FeatureMap], Any]

    def run(self, out: FeatureMap, **arguments: Any) -> None:
        self.op.run(out=out, **arguments)
        self.damage(out)
