"""Compiles every launch of the networks' plans ahead of time, and checks the compiled code.

    python -m bench.tools.compile_check                       all networks, batches, types and GPUs
    python -m bench.tools.compile_check --sm 90 --batch 256   some of them
    python -m bench.tools.compile_check --markdown FILE       also writes the table to a file

Needs no GPU. A launch passes if

- no register spills, and shared memory suffices;
- feature maps are read and written with 16 bytes per instruction;
- matrix products use the tensor-core instruction of the architecture;
- 3x3 convolutions for sm_90 load operands by TMA, and multiply both from shared memory;
- products in fp32 use no tensor cores (checked on one network, for sm_90).

Equal launches are compiled once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.workloads import NETWORKS
from ddpm_fast import UNet
from ddpm_fast.engines.fused.unet import FusedUNet
from ddpm_fast.kernels._gemm import Target
from ddpm_fast.utils.triton_tools import (
    Compiled,
    RecordedLaunch,
    compile_launch,
    launch_key,
    record_launches,
)

PROCESSORS = {80: 108, 89: 128, 90: 132, 100: 148, 120: 170}
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB per program
HOT = ("_conv3x3_kernel", "_conv_upsample_kernel")
PRODUCTS = (
    *HOT,
    "_conv_downsample_kernel",
    "_conv1x1_kernel",
    "_conv_in_kernel",
    "_attention_kernel",
    "_time_embedding_kernel",
)
UNITS = {80: "mma.sync", 89: "mma.sync", 120: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Local-memory instructions that a normalization kernel may have on other architectures than sm_90.
# Its block fills the 128 registers of a thread; a few spills, which vary between releases of
# Triton, are negligible among two thousand instructions that wait for memory. Products: none.
SPILLS_OF_NORMS = 8
# name -> (dtype, accumulation) of `FusedUNet`
PRECISIONS = {name: (name, "bounded") for name in ("fp32", "fp16", "bf16", "fp8")} | {
    "fp8-unbounded": ("fp8", "unbounded")
}
FP32 = (["fashion_mnist"], [1], ["fp32"])


@dataclass(frozen=True, eq=False)
class Case:
    """One distinct launch, and the name of the first that is equal to it."""

    sm: int
    where: str
    launch: RecordedLaunch

    @property
    def kernel(self) -> str:
        return self.launch.kernel.fn.__name__

    @property
    def is_fp32(self) -> bool:
        return self.launch.args.get("PRECISION") == "ieee"


def launches_of(
    net: str, batch: int, dtype: str, sm: int, overlap: bool = False
) -> Iterator[tuple[str, RecordedLaunch]]:
    """(name, launch) for every kernel that a forward pass starts."""
    with torch.device("meta"):
        unet = UNet(NETWORKS[net])
    dtype, accumulation = PRECISIONS[dtype]
    target = Target(sm, PROCESSORS[sm])
    options: dict[str, Any] = dict(overlap=overlap, accumulation=accumulation)
    plan = FusedUNet(unet, batch, dtype, "meta", target=target, **options).plan()
    for planned in plan:
        with record_launches() as recorded:
            plan.run_one(planned)
        for launch in recorded:
            yield f"{net} {planned.name}", launch


def distinct(
    nets: Iterable[str],
    batches: Iterable[int],
    dtypes: Iterable[str],
    sm: int,
    overlap: bool = False,
) -> list[Case]:
    cases: dict[tuple[Any, ...], Case] = {}
    for net in nets:
        for dtype in dtypes:
            if PRECISIONS[dtype][0] == "fp8" and sm < 89:
                continue
            for batch in batches:
                for where, launch in launches_of(net, batch, dtype, sm, overlap):
                    cases.setdefault(launch_key(launch), Case(sm, where, launch))
    return list(cases.values())


def with_fp32(cases: list[Case]) -> list[Case]:
    """The cases, and the products of an fp32 plan for sm_90 that they do not contain."""
    known = {launch_key(case.launch) for case in cases}
    return cases + [
        c for c in distinct(*FP32, 90) if c.kernel in PRODUCTS and launch_key(c.launch) not in known
    ]


def faults(case: Case, c: Compiled) -> list[str]:
    """Failed checks; empty if all pass."""
    wrong = []
    if c.spills > (SPILLS_OF_NORMS if case.sm != 90 and case.kernel not in PRODUCTS else 0):
        wrong.append(f"{c.spills} local-memory instructions")
    if c.registers > 255:
        wrong.append(f"{c.registers} registers")
    if c.shared > SHARED[case.sm] * 1024:
        wrong.append(f"{c.shared} bytes of shared memory; expected at most {SHARED[case.sm]} KiB")
    if case.launch.options.get("launch_pdl") and not waits_first(c.ptx):
        wrong.append("does not wait for the previous launch")
    wrong += narrow_accesses(case, c)
    return wrong + (faults_of_product(case, c) if case.kernel in PRODUCTS else [])


def narrow_accesses(case: Case, c: Compiled) -> list[str]:
    """Failed checks of memory accesses: 16 bytes or TMA; 8 bytes for stores of e4m3.

    Applies to feature maps whose channels are a multiple of 8.
    """
    a = case.launch.args
    if a.get("USED", 8) % 8:
        return []
    wrong = [line.split()[0] for line in c.sass if re.match(r"(LDG|STG)\S*\.[US](8|16)\b", line)]
    reads_map = case.kernel != "_conv_in_kernel"  # which reads pixels of one to four channels
    if (
        reads_map
        and not c.count("UTMALDG")
        and not any(re.match(r"LDG\S*\.(128|256)", line) for line in c.sass)
    ):
        wrong.append("no loads of 16 bytes")
    widths = "64|128|256" if getattr(a.get("OUT"), "primitive_bitwidth", 16) == 8 else "128|256"
    writes_map = case.kernel not in ("_statistics_kernel", "_combine_kernel") and not a.get("DENSE")
    if writes_map and not any(re.match(rf"UTMASTG|STG\S*\.({widths})", line) for line in c.sass):
        wrong.append("no stores of 16 bytes")
    return sorted(set(wrong))


def waits_first(ptx: str) -> bool:
    """Returns True if the code waits for the previous launch once, before it accesses memory."""
    waits = [m.start() for m in re.finditer(r"griddepcontrol\.wait", ptx)]
    memory = re.search(r"\b(ld|st|atom|cp\.async\S*)\.(global|shared|bulk)", ptx)
    return len(waits) == 1 and (memory is None or waits[0] < memory.start())


def faults_of_product(case: Case, c: Compiled) -> list[str]:
    if case.is_fp32:
        tensor_cores = [unit for unit in ("tf32", *UNITS.values()) if unit in c.ptx]
        return [f"fp32 by {', '.join(tensor_cores)}"] if tensor_cores else []
    wrong = [] if UNITS[case.sm] in c.ptx else [f"no {UNITS[case.sm]}"]
    if case.kernel in HOT and case.sm == 90:
        if re.search(r"wgmma\.mma_async[^;]*\},\s*\{", c.ptx):
            wrong.append("an operand of wgmma comes from registers")
        if "cp.async.bulk.tensor" not in c.ptx:
            wrong.append("no TMA")
    return wrong


# ---- compilation in forked processes, which inherit the launches

_CASES: list[Case] = []


def _compile(index: int) -> tuple[int, Compiled | str, float]:
    start = time.perf_counter()
    try:
        result: Compiled | str = compile_launch(_CASES[index].launch, _CASES[index].sm)
    except Exception as error:
        result = f"does not compile: {' '.join(str(error).split())[:200]}"
    return index, result, time.perf_counter() - start


def compile_all(
    cases: list[Case], processes: int = 2
) -> Iterator[tuple[Case, Compiled | str, float]]:
    """Yields (case, compiled code or the reason of a failure, seconds)."""
    _CASES[:] = cases
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for index, result, seconds in pool.imap(_compile, range(len(cases))):
            yield cases[index], result, seconds


# ---- the report


def row_of(case: Case, c: Compiled | None, seconds: float) -> dict[str, Any]:
    """Row of the table; `c` is None for a launch that did not compile."""
    a = case.launch.args
    if "BLOCK_M" in a and "BLOCK_K" in a:
        tile = f"{a['BLOCK_M']}x{a['BLOCK_N']}x{a['BLOCK_K']}"
    elif "BLOCK_M" in a:
        tile = f"{a['BLOCK_M']} queries, {a['BLOCK_N']} keys"
    elif "T" in a:
        tile = f"{a['T']} tiles x {a['USED']} of {a['L']}"
    elif "P" in a:
        tile = f"{a['P']} px x {a['USED']} of {a['L']}"
    else:
        tile = ""
    channels = f"{a['C']}" if isinstance(a.get("C"), int) else ""
    if isinstance(a.get("K"), int):
        channels += (f"+{a['C2']}" if a.get("C2") else "") + f" -> {a['K']}"
    flags = ", ".join(
        k.lower() for k in ("RESIDUAL", "SCALED", "DENSE", "STATS", "TWO", "FOLDED") if a.get(k)
    )
    flags += ", unbounded" if a.get("SCALED") and a["IMPRECISE"] is None else ""
    return dict(
        sm=case.sm,
        kernel=case.kernel.strip("_").removesuffix("_kernel"),
        first=case.where,
        channels=channels,
        tile=tile,
        flags=flags,
        warps=case.launch.options.get("num_warps"),
        registers=c.registers if c else "",
        shared=round(c.shared / 1024) if c else "",
        spills=c.spills if c else "",
        step=c.step or "" if c else "",
        seconds=f"{seconds:.1f}",
    )


COLUMNS = dict(
    sm="sm",
    kernel="kernel",
    first="first in",
    channels="channels",
    tile="tile",
    flags="with",
    warps="warps",
    registers="registers",
    shared="shared KiB",
    spills="spills",
    step="instructions per K step",
)
WIDTHS = dict(
    sm=3,
    kernel=13,
    first=54,
    channels=14,
    tile=21,
    flags=16,
    warps=2,
    registers=3,
    shared=3,
    spills=2,
    step=3,
    seconds=5,
)


def text(row: dict[str, Any]) -> str:
    """One line of the table, with the seconds of compiling: few if Triton has cached the kernel."""
    return " ".join(f"{row[k]!s:{width}}" for k, width in WIDTHS.items())


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(r[k]) for k in COLUMNS) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--dtype", nargs="+", choices=list(PRECISIONS), default=["bf16", "fp8"])
    parser.add_argument(
        "--sm", nargs="+", type=int, choices=list(PROCESSORS), default=[80, 90, 100]
    )
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="launches that start before the previous one ends",
    )
    parser.add_argument("--markdown", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    import triton

    rows, failed = [], 0
    for sm in args.sm:
        start, serial = time.perf_counter(), 0.0
        cases = distinct(args.net, args.batch, args.dtype, sm, args.overlap)
        if sm == 90 and set(FP32[0]) <= set(args.net) and not args.overlap:
            cases = with_fp32(cases)
        for case, result, seconds in compile_all(cases):
            serial += seconds
            wrong = [result] if isinstance(result, str) else faults(case, result)
            failed += bool(wrong)
            row = row_of(case, None if isinstance(result, str) else result, seconds)
            rows.append(row)
            print(text(row) + "".join(f"\n  WRONG {fault}" for fault in wrong), flush=True)
        elapsed = f"{serial:.0f} s of compiling in {time.perf_counter() - start:.0f} s"
        number = f"{len(cases)} distinct launches"
        print(f"Triton {triton.__version__}, sm_{sm}: {number}, {elapsed}", flush=True)
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    print(f"{failed} launches fail a check" if failed else "every launch passes")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
