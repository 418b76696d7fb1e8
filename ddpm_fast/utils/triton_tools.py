"""Tools for Triton's compiler: recording launches and compiling them without a GPU."""

from __future__ import annotations

import glob
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RecordedLaunch:
    """Arguments of a Triton launch that was recorded instead of run."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any]


@contextmanager
def record_launches() -> Iterator[list[RecordedLaunch]]:
    """Context that records Triton launches instead of running them.

    Meta tensors suffice as arguments; no GPU is needed.
    """
    from triton.runtime.jit import JITFunction

    launches: list[RecordedLaunch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False))
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        named |= {k: v for k, v in kwargs.items() if k in self.arg_names}
        launches.append(RecordedLaunch(self, tuple(grid), named, options))

    original, JITFunction.run = JITFunction.run, run
    try:
        yield launches
    finally:
        JITFunction.run = original


def launch_key(launch: RecordedLaunch) -> tuple[Any, ...]:
    """Returns the key of a compilation: launches with equal keys run the same binary."""
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
    """Result of compiling one launch."""

    registers: int
    spills: int  # local-memory instructions
    shared: int  # bytes
    ptx: str
    sass: list[str]  # instructions in order, without the padding after the last EXIT
    step: int  # instructions of the shortest loop with a matrix product; 0: unrolled

    def count(self, opcode: str) -> int:
        """Number of SASS instructions that start with `opcode`."""
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


def compile_launch(launch: RecordedLaunch, sm: int) -> Compiled:
    """Compiles a recorded launch as Triton would at run time. Needs no GPU.

    Args:
        launch: From `record_launches`.
        sm: Compute capability: 80, 90 or 100.
    """
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
            signature[name], aligned = (
                _POINTERS[value.dtype],
                value.storage_offset() * value.element_size() % 16 == 0,
            )
            attributes |= {(i,): [["tt.divisibility", 16]]} if aligned else {}
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            attributes |= (
                {(i,): [["tt.divisibility", 16]]} if specialised and value % 16 == 0 else {}
            )
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:  # a TMA descriptor
            shape = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_POINTERS[value.base.dtype][1:]}[{shape}]>"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch.options)
    usage, listing = (
        _cuobjdump(compiled.asm["cubin"], "-res-usage"),
        _cuobjdump(compiled.asm["cubin"], "-sass"),
    )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    numbered = re.findall(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][^;]*);", listing, re.MULTILINE
    )
    numbered = numbered[
        : len(numbered)
        - next((i for i, line in enumerate(reversed(numbered)) if line[2].startswith("EXIT")), 0)
    ]
    sass = [line for _, _, line in numbered]
    spills = sum(line.startswith(("LDL", "STL")) for line in sass)
    return Compiled(
        int(registers[1]),
        spills,
        compiled.metadata.shared,
        compiled.asm["ptx"],
        sass,
        _shortest_loop(numbered),
    )


def _shortest_loop(numbered: list[tuple[str, str, str]]) -> int:
    """Instructions of the shortest loop with a matrix product, without code that is branched over.

    numbered: (address, predicate, instruction)
    """
    at = {int(address, 16): i for i, (address, _, _) in enumerate(numbered)}
    after: list[list[int]] = []
    for i, (_, predicate, line) in enumerate(numbered):
        target = re.search(r"0x([0-9a-f]+)", line) if line.startswith("BRA") else None
        leads = [at[int(target[1], 16)]] if target and int(target[1], 16) in at else []
        ends = line.startswith(("BRA", "EXIT")) and not predicate and "UP" not in line.split(",")[0]
        after.append(leads if ends or i + 1 == len(numbered) else [*leads, i + 1])
    products = [
        i for i, (_, _, line) in enumerate(numbered) if re.match(r"[HQ]G?MMA|UTC\w*MMA", line)
    ]
    return min((length for i in products if (length := _cycle_length(after, i))), default=0)


def _cycle_length(after: list[list[int]], start: int) -> int:
    """Length of the shortest cycle through `start`; 0 if there is none."""
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

    tools = glob.glob(
        os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "cuobjdump*")
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        return subprocess.run(
            [tools[0], flag, f.name], capture_output=True, text=True, check=True
        ).stdout
