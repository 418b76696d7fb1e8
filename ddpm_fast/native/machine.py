"""Runs programs: takes images from a list, each through the network's instructions and the step behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import ir

from .code import I32, I64, Function, Value, compile_cached, entry, vector_width
from .instructions import INSTRUCTIONS
from .reverse_step import reverse_step

WIDTH = 20  # integers in a row of a program
HEADER = ("x", "elements", "row", "row_length", "out", "out_elements", "eps", "variance", "z", "old")  # a program's first row
ITEM = ("x", "out", "row", "coef", "old", "learned", "seed", "image", "step")  # what is wanted of one image
JOB = ("next", "alone", "all", "items", "arrived", "round", "yield_to_others")


def _fields(f: Function, address: Value, names: tuple[str, ...]) -> dict[str, Value]:
    return {name: f.load(address, 2 * k, I64) for k, name in enumerate(names)}


def _wait(f: Function, job: Value, parts: Value) -> None:
    """Until all threads that share an image are here."""
    align = 8
    with f.when(parts.is_(">", 1)):
        arrived, turn = (f.b.inttoptr((job + 8 * JOB.index(n)).v, I64.as_pointer()) for n in ("arrived", "round"))
        mine = Value(f.b, f.b.load_atomic(turn, "acquire", align, typ=I64))
        before = Value(f.b, f.b.atomic_rmw("add", arrived, f.integer(1).v, "acq_rel"))
        last = before.is_("==", parts - 1)
        with f.b.if_else(last.v) as (then, otherwise):
            with then:
                f.b.store_atomic(f.integer(0).v, arrived, "release", align)
                f.b.store_atomic((mine + 1).v, turn, "release", align)
            with otherwise:
                tries = f.variable(f.integer(0))
                with f.forever() as leave_if:
                    leave_if(Value(f.b, f.b.load_atomic(turn, "acquire", align, typ=I64)).is_("!=", mine))
                    tries.set(tries.get() + 1)
                    with f.when(tries.get().is_(">", 2000)):  # the others may want this core
                        give_way = f.load(job, 2 * JOB.index("yield_to_others"), I64)
                        with f.when(give_way.is_("!=", 0)):
                            f.b.call(f.b.inttoptr(give_way.v, ir.FunctionType(I32, []).as_pointer()), [])


def _copy(f: Function, source: Value, to: Value, elements: Value) -> None:
    with f.loop(0, elements) as i:
        f.store(f.load(source, i, I32), to, i)


def _instructions(module: ir.Module, width: int) -> list[ir.Function]:
    functions = []
    for name, (emit, arguments) in INSTRUCTIONS.items():
        f = Function(module, name, 3, width)
        row, part, parts = f.arguments
        emit(f, part, parts, **{a: f.load(row, 2 * (k + 1), I64) for k, a in enumerate(arguments)})
        f.end()
        functions.append(f.function)
    return functions


def _image(module: ir.Module, width: int, instructions: list[ir.Function]) -> ir.Function:
    """image(program, rows, item, job, part, parts): a forward pass, and the step behind it if there are coefficients."""
    f = Function(module, "image", 6, width)
    program, rows, at, job, part, parts = f.arguments
    header, item = _fields(f, program, HEADER), _fields(f, at, ITEM)
    first = part.is_("==", 0)
    with f.when(first):
        _copy(f, item["x"], header["x"], header["elements"])
        _copy(f, item["row"], header["row"], header["row_length"])
    _wait(f, job, parts)
    with f.loop(1, rows) as i:
        row = program + i * (8 * WIDTH)
        after = f.function.append_basic_block("next")
        choice = f.b.switch(f.load(row, 0, I64).v, after)
        for k, function in enumerate(instructions):
            block = f.function.append_basic_block(function.name)
            choice.add_case(ir.Constant(I64, k), block)
            with f.b.goto_block(block):
                f.b.call(function, [row.v, part.v, parts.v])
                f.b.branch(after)
        f.b.position_at_end(after)
        _wait(f, job, parts)
    with f.when(first):
        with f.when(item["out"].is_("!=", 0)):
            _copy(f, header["out"], item["out"], header["out_elements"])
        with f.when(item["coef"].is_("!=", 0)):
            with f.when(item["old"].is_("!=", 0)):
                _copy(f, item["old"], header["old"], header["elements"])
            reverse_step(f, header, item)
            _copy(f, header["x"], item["x"], header["elements"])
            with f.when(item["old"].is_("!=", 0)):
                _copy(f, header["old"], item["old"], header["elements"])
    _wait(f, job, parts)
    f.end()
    return f.function


def _work(module: ir.Module, width: int, image: ir.Function) -> None:
    """work(job, own program, shared program, rows, part, parts): images for this thread alone while there are any, then shared."""
    f = Function(module, "work", 6, width)
    job, own, shared, rows, part, parts = f.arguments
    j = _fields(f, job, JOB)
    size = 8 * len(ITEM)
    with f.forever() as leave_if:
        i = Value(f.b, f.b.atomic_rmw("add", f.pointer(job), f.integer(1).v, "acq_rel"))
        leave_if(i.is_(">=", j["alone"]))
        f.b.call(image, [own.v, rows.v, (j["items"] + i * size).v, job.v, f.integer(0).v, f.integer(1).v])
    with f.loop(j["alone"], j["all"]) as i:
        f.b.call(image, [shared.v, rows.v, (j["items"] + i * size).v, job.v, part.v, parts.v])
    f.end()


def _module(width: int) -> str:
    module = ir.Module("ddpm_fast")
    _work(module, width, _image(module, width, _instructions(module, width)))
    return str(module)


def compile_kernels() -> tuple[Callable[..., None], Any, bool]:
    """(work, the engine that must live as long, was it found in the cache)."""
    width = vector_width()
    sources = [str(width)]
    here = Path(__file__).parent
    for name in ("code.py", "instructions.py", "reverse_step.py", "machine.py", "../kernels/noise.py", "../kernels/ddpm_step.py"):
        sources.append((here / name).read_text())
    engine, found = compile_cached(lambda: _module(width), sources)
    return entry(engine, "work", 6), engine, found
