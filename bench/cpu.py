"""The CPU engine beside what users would run instead: `python -m bench.cpu --model shipped --batch 1 16 64`.

Every engine runs the same weights in a process of its own, so that none is slowed by another's waiting threads. Each is held
against the network in fp64 first; then they take turns: a burst each, after a rest, round after round. A ratio is of two bursts
of one round.

    ddpm_fast           `CPUEngine`
    reference           `UNet`, and channels-last
    diffusers           UNet2DModel: eager; by torch.compile with frozen weights; exported to ONNX Runtime; to OpenVINO
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, load_pretrained
from ddpm_fast.cpu_engine import CPUEngine
from ddpm_fast.environment import environment
from ddpm_fast.testing import relative_error
from ddpm_fast.unet import channels_last

SHIPPED = Path(__file__).parent.parent / "weights" / "fashion-mnist-32"
T = 1000
Forward = Callable[..., Tensor]
Inputs = tuple[Tensor, ...]
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def network(name: str) -> UNet:
    if name == "shipped":
        return load_pretrained(SHIPPED).unet
    torch.manual_seed(0)
    return UNet(UNetConfig()).eval()


def inputs(unet: UNet, batch: int) -> Inputs:
    """x_t, t and, where there are classes, labels."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, unet.config.in_channels, 32, 32, generator=g)
    t = torch.randint(0, T, (batch,), generator=g)
    return (x, t) if unet.config.num_classes is None else (x, t, torch.arange(batch) % unet.config.num_classes)


def shape_of(unet: UNet) -> tuple[int, int, int]:
    return unet.config.in_channels, 32, 32


# ---- engines: from (network, a call's inputs, a folder to keep things in) to a forward pass


def native(unet: UNet, given: Inputs, folder: Path) -> Forward:
    return CPUEngine(unet, shape_of(unet), T)


def reference(unet: UNet, given: Inputs, folder: Path) -> Forward:
    return unet


def reference_channels_last(unet: UNet, given: Inputs, folder: Path) -> Forward:
    unet = channels_last(unet)
    return lambda x, *rest: unet(x.contiguous(memory_format=torch.channels_last), *rest)


class Diffusers(torch.nn.Module):
    """UNet2DModel with the same weights, called as ours is."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.unet: Any = UNet2DModel.from_config(unet.config.to_diffusers()).eval()
        self.unet.load_state_dict(unet.state_dict())
        self.eval()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.unet(x, t, class_labels=labels, return_dict=False)[0]


def diffusers(unet: UNet, given: Inputs, folder: Path) -> Forward:
    return Diffusers(unet)


def compiled(unet: UNet, given: Inputs, folder: Path) -> Forward:
    import torch._inductor.config as inductor

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    inductor.freezing = True
    eager: Any = Diffusers(unet)
    model: Any = torch.compile(eager.to(memory_format=torch.channels_last))
    return lambda x, *rest: model(x.contiguous(memory_format=torch.channels_last), *rest)


def exported(unet: UNet, given: Inputs, folder: Path) -> Path:
    path = folder / f"batch-{len(given[0])}.onnx"
    if not path.exists():
        torch.onnx.export(Diffusers(unet), given, path, dynamo=True, verbose=False)
    return path


def onnx_runtime(unet: UNet, given: Inputs, folder: Path) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    path = str(exported(unet, given, folder))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda *x: torch.from_numpy(session.run(None, {n: v.numpy() for n, v in zip(names, x, strict=True)})[0])


def openvino(unet: UNet, given: Inputs, folder: Path) -> Forward:
    import openvino

    hints = dict(INFERENCE_PRECISION_HINT="f32", PERFORMANCE_HINT="LATENCY", INFERENCE_NUM_THREADS=torch.get_num_threads())
    model = openvino.Core().compile_model(str(exported(unet, given, folder)), "CPU", hints)
    request = model.create_infer_request()
    return lambda *x: torch.from_numpy(np.array(request.infer([v.numpy() for v in x])[0]))


ENGINES: dict[str, Callable[[UNet, Inputs, Path], Forward]] = {
    "ddpm_fast": native,
    "reference": reference,
    "reference, channels-last": reference_channels_last,
    "diffusers": diffusers,
    "diffusers, torch.compile": compiled,
    "diffusers, ONNX Runtime": onnx_runtime,
    "diffusers, OpenVINO": openvino,
}


# ---- one process for each engine


def serve(name: str, model: str, batch: int, folder: Path, threads: int, clock: Clock) -> None:
    """Says how long its first output took and how far it is from fp64; then runs what it is asked for."""
    torch.set_num_threads(threads)
    unet = network(model)
    given = inputs(unet, batch)
    began = time.perf_counter()
    with torch.no_grad():
        forward = ENGINES[name](copy.deepcopy(unet), given, folder)
        out = forward(*given)
        start = time.perf_counter() - began
        exact = copy.deepcopy(unet).double()(given[0][:2].double(), *(v[:2] for v in given[1:]))
        print(json.dumps(dict(start=start, error=relative_error(out[:2], exact))), flush=True)
        loop = own_loop(unet, forward, batch) if isinstance(forward, CPUEngine) else diffusers_loop(unet, forward, batch)
        for line in sys.stdin:
            what, amount = line.split()
            times = (
                burst(lambda: forward(*given), float(amount), clock)
                if what == "forward"
                else [timed(partial(loop, int(amount)), clock)]
            )
            print(json.dumps(times), flush=True)


def own_loop(unet: UNet, engine: CPUEngine, batch: int) -> Callable[[int], None]:
    sampler = Sampler(unet, NoiseSchedule.linear(), shape_of(unet))
    begun = sampler.begin(torch.arange(batch), 0)

    def loop(steps: int) -> None:
        for _ in engine.steps(copy.deepcopy(begun), sampler.table("ddpm", steps)):
            pass

    return loop


def diffusers_loop(unet: UNet, forward: Forward, batch: int) -> Callable[[int], None]:
    from diffusers import DDPMScheduler

    x, _, *labels = inputs(unet, batch)
    scheduler: Any = DDPMScheduler()

    def loop(steps: int) -> None:
        state = x
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            state = scheduler.step(forward(state, t.expand(batch).contiguous(), *labels), t, state).prev_sample

    return loop


def timed(call: Callable[[], object], clock: Clock) -> float:
    began = clock()
    call()
    return clock() - began


def burst(call: Callable[[], object], seconds: float, clock: Clock) -> list[float]:
    call()
    times = [timed(call, clock)]
    while sum(times) < seconds:
        times.append(timed(call, clock))
    return times


class Engine:
    """A process that runs when asked."""

    def __init__(self, name: str, args: argparse.Namespace, batch: int, folder: Path) -> None:
        self.name = name
        home = folder / name.replace(" ", "-")
        home.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "bench.cpu", "--serve", name, "--folder", str(home), "--batch", str(batch)]
        command += ["--model", args.model, "--threads", str(args.threads), "--clock", args.clock]
        env = {**os.environ, "DDPM_FAST_CACHE": str(home)}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.process = subprocess.Popen(command, text=True, env=env, **pipes)  # type: ignore[call-overload]
        self.hello: dict[str, float] = json.loads(self._read())

    def ask(self, what: str, amount: float) -> list[float]:
        self.process.stdin.write(f"{what} {amount}\n")
        self.process.stdin.flush()
        return json.loads(self._read())

    def _read(self) -> str:
        for line in self.process.stdout:
            if line.startswith(("{", "[")):
                return line
        last = (self.process.stderr.read().strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"{self.name}: {last}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# ---- the comparison


def compare(args: argparse.Namespace, batch: int, folder: Path) -> dict[str, Any]:
    """Milliseconds per image and step of every engine, and how much faster the first is: median over rounds, middle half.

    On a machine that others use too, one thread and the clock of its CPU time say what an engine takes without them.
    """
    engines, first, names, steps = [], {}, args.engines, args.loop
    for name in names:
        try:
            begun = Engine(name, args, batch, folder)
            first[name] = begun.hello["start"]
            begun.close()
            engines.append(Engine(name, args, batch, folder))
        except RuntimeError as error:
            print(f"  left out: {error}", flush=True)
    if wrong := {e.name: e.hello["error"] for e in engines if not e.hello["error"] < 1e-5}:
        raise RuntimeError(f"nothing is timed, since these are not the network in fp64: {wrong}")
    forward: dict[str, list[float]] = {e.name: [] for e in engines}
    fastest = dict.fromkeys(forward, float("inf"))
    loops: dict[str, list[float]] = {e.name: [] for e in engines}
    began = time.perf_counter()
    while time.perf_counter() - began < args.seconds or len(forward[names[0]]) < 5:
        for e in engines:
            time.sleep(0.3)  # threads that still wait for the last call's successor give up meanwhile
            times = e.ask("forward", 0.7)
            forward[e.name].append(statistics.median(times) / batch)
            fastest[e.name] = min(fastest[e.name], min(times) / batch)
            if steps:
                loops[e.name].append(e.ask("loop", steps)[0] / batch / steps)
    for e in engines:
        e.close()
    rows = []
    for e in engines:
        row: dict[str, Any] = dict(engine=e.name, error=e.hello["error"], first_start=first[e.name], second_start=e.hello["start"])
        row |= {f"forward_{k}": v for k, v in summary(forward[e.name], forward[names[0]]).items()}
        row["forward_fastest_ms"] = round(1e3 * fastest[e.name], 3)
        row["forward_fastest_ratio"] = round(fastest[e.name] / fastest[names[0]], 3)
        if steps:
            row |= {f"loop_{k}": v for k, v in summary(loops[e.name], loops[names[0]]).items()}
        rows.append(row)
    run = dict(model=args.model, batch=batch, threads=args.threads, clock=args.clock, load=os.getloadavg()[0])
    return dict(**run, rounds=len(forward[names[0]]), loop_steps=steps, rows=rows)


def summary(theirs: list[float], ours: list[float]) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    quarter = len(ratios) // 4
    middle = [round(ratios[quarter], 3), round(ratios[-1 - quarter], 3)]
    return dict(
        ms=round(1e3 * statistics.median(theirs), 3), ours_is_faster_by=round(statistics.median(ratios), 3), middle_half=middle
    )


def show(result: dict[str, Any]) -> None:
    about = f"{result['threads']} threads, {result['clock']} clock, {result['rounds']} rounds, load {result['load']:.1f}"
    print(f"{result['model']}, batch {result['batch']}, {about}: ms per image and step")
    for r in result["rows"]:
        text = f"  {r['engine']:26}"
        for what in ("forward", "loop") if result["loop_steps"] else ("forward",):
            low, high = r[f"{what}_middle_half"]
            text += f"{what} {r[f'{what}_ms']:8.2f}, ours {r[f'{what}_ours_is_faster_by']:5.2f} x ({low:.2f} to {high:.2f})   "
        text += f"fastest {r['forward_fastest_ms']:.2f}, {r['forward_fastest_ratio']:.2f} x   "
        print(f"{text}start {r['first_start']:5.1f} s, then {r['second_start']:5.2f}   error {r['error']:.0e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="shipped", choices=["shipped", "cifar"], help="cifar: UNetConfig(), random weights")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=60, help="of rounds, for each batch size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu: with --threads 1, on a machine that is not idle"
    )
    parser.add_argument("--loop", type=int, default=5, help="steps of the sampling loops; 0: none")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--out", type=Path, help="JSON; other models' and batch sizes' results in it stay")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.model, args.batch[0], args.folder, args.threads, CLOCKS[args.clock])
    kept = json.loads(args.out.read_text())["results"] if args.out and args.out.exists() else []
    for batch in args.batch:
        with tempfile.TemporaryDirectory() as folder:
            result = compare(args, batch, Path(folder))
        show(result)
        which = ("model", "batch", "threads", "clock")
        kept = [r for r in kept if any(r[k] != result[k] for k in which)] + [result]
        if args.out:
            args.out.write_text(json.dumps(dict(environment=environment(), results=kept), indent=2) + "\n")


if __name__ == "__main__":
    main()
