"""What tests and benchmarks share: the accuracy rule, and the compilation of real launches without a GPU."""

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


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    registers: int
    spills: int  # local-memory instructions
    shared: int  # bytes
    ptx: str
    sass: list[str]  # the program's instructions, in order, without the idle loop behind EXIT

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
    sass = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", listing, re.MULTILINE)
    sass = sass[: len(sass) - next((i for i, line in enumerate(reversed(sass)) if line.startswith("EXIT")), 0)]
    spills = sum(line.startswith(("LDL", "STL")) for line in sass)
    return Compiled(int(found[1]), spills, compiled.metadata.shared, compiled.asm["ptx"], sass)


def _cuobjdump(cubin: bytes, flag: str) -> str:
    import triton.backends.nvidia

    tools = glob.glob(os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "cuobjdump*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        return subprocess.run([tools[0], flag, f.name], capture_output=True, text=True, check=True).stdout
