"""Code generation for this CPU: a thin layer over LLVM's builder, and the cache of object code.

llvmlite contains LLVM, so no compiler needs to be installed. Python code fills a `Function`:
numbers are `Value`s with operators; `loop` and `when` are `with` blocks. Addresses are integers in
bytes; indices count 4-byte elements.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from ... import __version__
from ...utils.cache import CPU, cache_dir
from ...utils.files import write_atomically

I64, I32, F32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
POINTER = ir.PointerType()


class Value:
    """A number or vector in a function under construction."""

    def __init__(self, b: ir.IRBuilder, v: ir.Value) -> None:
        self.b, self.v = b, v

    @property
    def floating(self) -> bool:
        return isinstance(getattr(self.v.type, "element", self.v.type), ir.FloatType)

    def lift(self, other: Any) -> ir.Value:
        """Converts `other` to this type; Python numbers become constants in every lane."""
        if isinstance(other, Value):
            return other.v
        t = self.v.type
        number = float(other) if self.floating else int(other)
        return ir.Constant(t, [number] * t.count if isinstance(t, ir.VectorType) else number)

    def _binary(
        self, other: Any, of_float: str | None, of_int: str | None, swap: bool = False
    ) -> Value:
        name = of_float if self.floating else of_int
        assert name is not None
        a, c = (self.lift(other), self.v) if swap else (self.v, self.lift(other))
        return Value(self.b, getattr(self.b, name)(a, c))

    def __add__(self, o: Any) -> Value:
        return self._binary(o, "fadd", "add")

    __radd__ = __add__

    def __sub__(self, o: Any) -> Value:
        return self._binary(o, "fsub", "sub")

    def __rsub__(self, o: Any) -> Value:
        return self._binary(o, "fsub", "sub", swap=True)

    def __mul__(self, o: Any) -> Value:
        return self._binary(o, "fmul", "mul")

    __rmul__ = __mul__

    def __truediv__(self, o: Any) -> Value:
        return self._binary(o, "fdiv", None)

    def __rtruediv__(self, o: Any) -> Value:
        return self._binary(o, "fdiv", None, swap=True)

    def __floordiv__(self, o: Any) -> Value:
        return self._binary(o, None, "udiv")  # operands are never negative

    def __mod__(self, o: Any) -> Value:
        return self._binary(o, None, "urem")

    def __and__(self, o: Any) -> Value:
        return self._binary(o, None, "and_")

    def __or__(self, o: Any) -> Value:
        return self._binary(o, None, "or_")

    def __xor__(self, o: Any) -> Value:
        return self._binary(o, None, "xor")

    def __lshift__(self, o: Any) -> Value:
        return self._binary(o, None, "shl")

    def __rshift__(self, o: Any) -> Value:
        return self._binary(o, None, "lshr")

    def sar(self, o: Any) -> Value:
        """Arithmetic shift right."""
        return self._binary(o, None, "ashr")

    def is_(self, comparison: str, o: Any) -> Value:
        """Compares by "==", "!=", "<", "<=", ">" or ">="; integers are signed, NaN gives false."""
        compare = self.b.fcmp_ordered if self.floating else self.b.icmp_signed
        return Value(self.b, compare(comparison, self.v, self.lift(o)))

    def pick(self, yes: Any, no: Value) -> Value:
        """Selects `yes` where this truth value is true, else `no`."""
        return Value(self.b, self.b.select(self.v, no.lift(yes), no.v))

    def cast(self, conversion: str, scalar: ir.Type) -> Value:
        """Converts the lanes to `scalar` by an LLVM conversion such as "uitofp"."""
        t = self.v.type
        to = ir.VectorType(scalar, t.count) if isinstance(t, ir.VectorType) else scalar
        return Value(self.b, getattr(self.b, conversion)(self.v, to))


class Variable:
    """Mutable value; LLVM keeps it in a register."""

    def __init__(self, f: Function, start: Value) -> None:
        self.b = f.b
        with f.b.goto_block(f.entry):
            self.place = f.b.alloca(start.v.type)
        self.type = start.v.type
        self.set(start)

    def get(self) -> Value:
        return Value(self.b, self.b.load(self.place, typ=self.type))

    def set(self, value: Value) -> None:
        self.b.store(value.v, self.place)


class Function:
    """Function of 64-bit integers that returns nothing."""

    def __init__(self, module: ir.Module, name: str, count: int, width: int) -> None:
        self.module, self.width = module, width
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * count), name)
        self.entry = self.function.append_basic_block("entry")
        body = self.function.append_basic_block("body")
        self.b = ir.IRBuilder(self.entry)
        self.b.branch(body)
        self.b.position_at_end(body)
        self.arguments = [Value(self.b, a) for a in self.function.args]

    # ---- numbers

    def integer(self, n: int) -> Value:
        return Value(self.b, ir.Constant(I64, n))

    def number(self, n: float) -> Value:
        return Value(self.b, ir.Constant(F32, n))

    def vector(self, n: float) -> Value:
        return Value(self.b, ir.Constant(ir.VectorType(F32, self.width), [n] * self.width))

    def lanes(self, scalar: ir.Type) -> Value:
        """0, 1, 2, ..."""
        return Value(
            self.b, ir.Constant(ir.VectorType(scalar, self.width), list(range(self.width)))
        )

    def splat(self, x: Value) -> Value:
        t = ir.VectorType(x.v.type, self.width)
        one = self.b.insert_element(ir.Constant(t, ir.Undefined), x.v, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, self.width), [0] * self.width)
        return Value(self.b, self.b.shuffle_vector(one, ir.Constant(t, ir.Undefined), zeros))

    def variable(self, start: Value) -> Variable:
        return Variable(self, start)

    def fma(self, a: Value, c: Value, plus: Value) -> Value:
        """a c + plus, in one instruction if the CPU has it."""
        return self.intrinsic("llvm.fmuladd", a, c, plus)

    def intrinsic(self, name: str, *values: Value) -> Value:
        t = values[0].v.type
        full = f"{name}.v{t.count}f32" if isinstance(t, ir.VectorType) else f"{name}.f32"
        declared = self.module.globals.get(full)
        if declared is None:
            declared = ir.Function(self.module, ir.FunctionType(t, [t] * len(values)), full)
        return Value(self.b, self.b.call(declared, [v.v for v in values]))

    def shuffle(self, a: Value, c: Value, lanes: Sequence[int]) -> Value:
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return Value(self.b, self.b.shuffle_vector(a.v, c.v, mask))

    def sum(self, x: Value) -> Value:
        """Sum of a vector's lanes, by halves: in the same order on every CPU of this width."""
        return self.reduce(x, lambda a, c: a + c)

    def reduce(self, x: Value, combine: Callable[[Value, Value], Value]) -> Value:
        n = self.width
        while n > 1:
            n //= 2
            x = combine(self.shuffle(x, x, range(n)), self.shuffle(x, x, range(n, 2 * n)))
        return Value(self.b, self.b.extract_element(x.v, ir.Constant(I32, 0)))

    # ---- memory

    def pointer(self, address: Value, index: Value | int = 0) -> ir.Value:
        index = index.v if isinstance(index, Value) else ir.Constant(I64, index)
        base = self.b.inttoptr(address.v, POINTER)
        return self.b.gep(base, [index], source_etype=I32)

    def load(self, address: Value, index: Value | int = 0, typ: ir.Type | None = None) -> Value:
        """Loads a vector of floats, or one value of `typ`."""
        typ = typ or ir.VectorType(F32, self.width)
        return Value(self.b, self.b.load(self.pointer(address, index), align=4, typ=typ))

    def store(self, value: Value, address: Value, index: Value | int = 0) -> None:
        self.b.store(value.v, self.pointer(address, index), align=4)

    # ---- control

    @contextmanager
    def loop(self, start: Value | int, stop: Value | int, step: int = 1) -> Iterator[Value]:
        begin, end = (self.integer(v) if isinstance(v, int) else v for v in (start, stop))
        i = self.variable(begin)
        head, body, after = (self.function.append_basic_block(n) for n in ("head", "body", "after"))
        self.b.branch(head)
        self.b.position_at_end(head)
        index = i.get()
        self.b.cbranch(index.is_("<", end).v, body, after)
        self.b.position_at_end(body)
        yield index
        i.set(index + step)
        self.b.branch(head)
        self.b.position_at_end(after)

    @contextmanager
    def forever(self) -> Iterator[Callable[[Value], None]]:
        """Endless loop; yields a function that leaves it if its argument is true."""
        body, after = (self.function.append_basic_block(n) for n in ("again", "out"))
        self.b.branch(body)
        self.b.position_at_end(body)

        def leave_if(condition: Value) -> None:
            go_on = self.function.append_basic_block("on")
            self.b.cbranch(condition.v, after, go_on)
            self.b.position_at_end(go_on)

        yield leave_if
        self.b.branch(body)
        self.b.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.b.if_then(condition.v):
            yield

    def share(self, count: Value, part: Value, parts: Value) -> tuple[Value, Value]:
        """(start, stop) of the part of `count` items that thread `part` of `parts` computes."""
        return count * part // parts, count * (part + 1) // parts

    def end(self) -> None:
        self.b.ret_void()


# ---- compilation


def vector_width() -> int:
    """Floats in the widest arithmetic register of this CPU."""
    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx") else 4


def compile_cached(build: Callable[[], str], sources: Sequence[str]) -> tuple[Any, bool]:
    """Returns (engine that owns the functions, whether the code comes from the cache).

    `build` returns the module's text. The object code is cached by CPU, package and LLVM versions
    and `sources`, with its checksum. If the file is damaged, the module is compiled again.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    key = [cpu, features, __version__, llvmlite.__version__, str(llvm.llvm_version_info), *sources]
    path = cache_dir() / CPU / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.o"
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(
        cpu, features, opt=3, reloc="default", codemodel="jitdefault"
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    code = _cached(path)
    from_cache = code is not None
    if code is None:
        module = llvm.parse_assembly(build())
        module.verify()
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        # the code is vectorized already
        options.loop_vectorization = options.slp_vectorization = False
        passes = llvm.create_pass_builder(machine, options)
        passes.getModulePassManager().run(module, passes)
        code = machine.emit_object(module)
        _cache(path, code)
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine, from_cache


def _cached(path: Any) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _cache(path: Any, code: bytes) -> None:
    """Writes the code to the cache; if it cannot be written, the next process compiles again."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, hashlib.sha256(code).digest() + code)


def entry(engine: Any, name: str, count: int) -> Callable[..., None]:
    """Returns the compiled function of `count` integers. It runs without Python's lock."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * count)(engine.get_function_address(name))
