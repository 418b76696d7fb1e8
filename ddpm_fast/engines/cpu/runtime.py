"""Machine code that runs a program for each image of a list: the network, then the reverse step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import ir

from ...kernels import noise
from .codegen import I32, I64, Function, Value, compile_cached, entry, vector_width
from .instructions import INSTRUCTIONS
from .reverse_step import reverse_step

WIDTH = 20  # integers in a row of a program
# first row of a program
HEADER = (
    *("x", "elements", "time_row", "time_row_length", "out", "out_elements"),
    *("eps", "variance", "z", "old"),
)
# arguments of a run for one image
ITEM = ("x", "out", "time_row", "coef", "old", "learned", "seed", "image", "noise_row", "z")
# state of a batch; claims: one integer per part
JOB = ("next", "alone", "all", "items", "done", "yield_to_others", "claims")
ALIGN = 8
AFFINITY_TRIES = 100  # tries in which a part is left to the thread that has it in its cache
YIELD_AFTER = 2000  # tries before a thread yields the core to other threads


def _fields(f: Function, address: Value, names: tuple[str, ...]) -> dict[str, Value]:
    return {name: f.load(address, 2 * k, I64) for k, name in enumerate(names)}


def _copy(f: Function, source: Value, to: Value, elements: Value) -> None:
    with f.loop(0, elements) as i:
        f.store(f.load(source, i, I32), to, i)


def _instructions(module: ir.Module, width: int) -> list[ir.Function]:
    functions = []
    for name, (emit, arguments) in INSTRUCTIONS.items():
        f = Function(module, name, 3, width)
        operands, part, parts = f.arguments
        values = {a: f.load(operands, 2 * (k + 1), I64) for k, a in enumerate(arguments)}
        emit(f, part, parts, **values)
        f.end()
        functions.append(f.function)
    return functions


def _row(module: ir.Module, width: int, instructions: list[ir.Function]) -> ir.Function:
    """run_row(program, rows, item, i, part, parts) runs row i of a forward pass.

    Row 0 copies the image in. Row `rows` copies the output out and computes the reverse step if
    there are coefficients.
    """
    f = Function(module, "run_row", 6, width)
    program, rows, at, i, part, parts = f.arguments
    first = part.is_("==", 0)
    inside = f.b.and_(i.is_(">", 0).v, i.is_("<", rows).v)
    with f.b.if_else(inside) as (middle, end):
        with middle:
            instruction = program + i * (8 * WIDTH)
            after = f.function.append_basic_block("next")
            choice = f.b.switch(f.load(instruction, 0, I64).v, after)
            for k, function in enumerate(instructions):
                block = f.function.append_basic_block(function.name)
                choice.add_case(ir.Constant(I64, k), block)
                with f.b.goto_block(block):
                    f.b.call(function, [instruction.v, part.v, parts.v])
                    f.b.branch(after)
            f.b.position_at_end(after)
        with end, f.when(first):
            header, item = _fields(f, program, HEADER), _fields(f, at, ITEM)
            with f.b.if_else(i.is_("==", 0).v) as (begin, finish):
                with begin:
                    _copy(f, item["x"], header["x"], header["elements"])
                    _copy(f, item["time_row"], header["time_row"], header["time_row_length"])
                with finish:
                    _finish_image(f, header, item)
    f.end()
    return f.function


def _finish_image(f: Function, header: dict[str, Value], item: dict[str, Value]) -> None:
    with f.when(item["out"].is_("!=", 0)):
        _copy(f, header["out"], item["out"], header["out_elements"])
    with f.when(item["coef"].is_("!=", 0)):
        with f.when(item["old"].is_("!=", 0)):
            _copy(f, item["old"], header["old"], header["elements"])
        with f.when(item["z"].is_("!=", 0)):
            _copy(f, item["z"], header["z"], header["elements"])
        reverse_step(f, header, item)
        _copy(f, header["x"], item["x"], header["elements"])
        with f.when(item["old"].is_("!=", 0)):
            _copy(f, header["old"], item["old"], header["elements"])


def _work(module: ir.Module, width: int, run_row: ir.Function) -> None:
    """work(job, program, shared program, rows, part, parts) runs images one by one, counted in the
    job, then parts of the shared images.
    """
    f = Function(module, "work", 6, width)
    job, program, shared, rows, part, parts = f.arguments
    j = _fields(f, job, JOB)
    size = 8 * len(ITEM)
    with f.forever() as leave_if:
        i = Value(f.b, f.b.atomic_rmw("add", f.pointer(job), f.integer(1).v, "acq_rel"))
        leave_if(i.is_(">=", j["alone"]))
        with f.loop(0, rows + 1) as k:
            f.b.call(
                run_row,
                [program.v, rows.v, (j["items"] + i * size).v, k.v, f.integer(0).v, f.integer(1).v],
            )
    _share(f, run_row, job, j, shared, rows, part, parts)
    f.end()


def _share(
    f: Function,
    run_row: ir.Function,
    job: Value,
    j: dict[str, Value],
    program: Value,
    rows: Value,
    part: Value,
    parts: Value,
) -> None:
    """Runs the images from `alone` on by all threads.

    Threads claim the parts of a row. A row starts when all parts of the previous row are done.
    Threads run unclaimed parts of other threads, so they wait only for parts that are running.
    """
    rows_to_run = (j["all"] - j["alone"]) * (rows + 1)
    done = f.b.inttoptr((job + 8 * JOB.index("done")).v, I64.as_pointer())
    claims = job + 8 * JOB.index("claims")
    seen, tries = f.variable(f.integer(0)), f.variable(f.integer(0))
    with f.forever() as leave_if:
        now = Value(f.b, f.b.load_atomic(done, "acquire", ALIGN, typ=I64)) // parts
        leave_if(now.is_(">=", rows_to_run))
        with f.when(now.is_("!=", seen.get())):
            seen.set(now)
            tries.set(f.integer(0))
        claimed = tries.get().is_("<", AFFINITY_TRIES).pick(part, (part + tries.get()) % parts)
        claim = f.b.inttoptr((claims + claimed * 8).v, I64.as_pointer())
        tries.set(tries.get() + 1)
        free = Value(f.b, f.b.load_atomic(claim, "monotonic", ALIGN, typ=I64)).is_("==", now)
        with f.when(free):
            taken = f.b.cmpxchg(claim, now.v, (now + 1).v, "acq_rel", "monotonic")
            with f.when(Value(f.b, f.b.extract_value(taken, 1))):
                item = j["items"] + (j["alone"] + now // (rows + 1)) * (8 * len(ITEM))
                f.b.call(
                    run_row, [program.v, rows.v, item.v, (now % (rows + 1)).v, claimed.v, parts.v]
                )
                f.b.atomic_rmw("add", done, f.integer(1).v, "acq_rel")
        with f.when(tries.get().is_(">", YIELD_AFTER)):
            yield_address = j["yield_to_others"]
            with f.when(yield_address.is_("!=", 0)):
                f.b.call(f.b.inttoptr(yield_address.v, ir.FunctionType(I32, []).as_pointer()), [])


def _module(width: int) -> str:
    module = ir.Module("ddpm_fast")
    _work(module, width, _row(module, width, _instructions(module, width)))
    return str(module)


def compile_kernels() -> tuple[Callable[..., None], Any, bool]:
    """Returns (work, the LLVM engine that owns it, whether the code comes from the cache)."""
    width = vector_width()
    here, kernels = Path(__file__).parent, Path(noise.__file__).parent
    files = [
        here / f"{name}.py"
        for name in ("codegen", "products", "instructions", "reverse_step", "runtime")
    ]
    files += [kernels / f"{name}.py" for name in ("noise", "ddpm_step")]
    sources = [str(width), *(path.read_text() for path in files)]
    engine, from_cache = compile_cached(lambda: _module(width), sources)
    return entry(engine, "work", 6), engine, from_cache
