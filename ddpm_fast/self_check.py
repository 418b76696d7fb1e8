"""Before a plan is trusted on a GPU, each of its launches is held against its twin, in a child process with a time limit.

An illegal access poisons the process that made it, and a deadlock never returns: so a child runs the launches one by one and
says before each which it is about to run. If it dies or falls silent, the launch in progress is to blame, and another child goes on
behind it. Launches that fail run by their twins from then on; the verdict is kept, for this GPU and these sources.

What a launch must show, on the first, the middle and the last image of a batch, its output full of NaN before:

- relative L2 error at most twice that of the same operation by plain PyTorch in the launch's own precision
- no pixel that is off by more than twice what plain PyTorch's worst pixel is
- (either may be one unit in the last place of the output's largest value)
- a border of exact zeros, and the same bits in a second run

The truth is the twin in fp32, or fp64 where the plan is fp32. Then the whole forward is held against the reference network.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import __version__
from .cache import cache_dir
from .checkpoint import write_atomically
from .kernels import _triton, noise
from .kernels._feature_map import FeatureMap
from .kernels._tiles import Target
from .kernels.ddpm_step import COLUMNS, ddpm_step, ddpm_step_reference
from .plan import Launch, Plan
from .unet import UNet
from .unet_config import UNetConfig

if TYPE_CHECKING:
    from .fused_unet import FusedUNet

COMMAND = (sys.executable, "-m", "ddpm_fast.self_check")
STEP_LAUNCHES = ("noise", "ddpm_step")  # what a step runs besides the network
FORWARD = "forward"
FP8_FORWARD = 0.15  # relative error of an fp8 forward: plain PyTorch has none to compare with


@dataclass(frozen=True)
class Verdict:
    """reason: empty where the launch passed. error, allowed: relative L2; pixel, pixel_allowed: the worst pixel's, relative to the
    largest value.
    """

    reason: str = ""
    error: float = 0.0
    allowed: float = 0.0
    pixel: float = 0.0
    pixel_allowed: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.reason


# ---- one launch


def judge(kernel: FeatureMap, exact: FeatureMap, plain: FeatureMap) -> Verdict:
    """The rule above, for three maps of the same images; exact in fp32 or fp64, plain in the kernel's type."""
    ulp = torch.finfo(kernel.rows.dtype).eps
    if not bool((kernel.border.double() == 0).all()):
        return Verdict("the border is not zero")
    truth = exact.pixels.double()
    errors = []
    for fm in (kernel, plain):
        off = fm.pixels.double() - truth
        errors.append(
            (float(off.norm() / truth.norm().clamp(min=1e-30)), float(off.abs().max() / truth.abs().max().clamp(min=1e-30)))
        )
    (error, pixel), (plain_error, plain_pixel) = errors
    allowed, pixel_allowed = max(2 * plain_error, ulp), max(2 * plain_pixel, ulp)
    reason = ""
    if not error <= allowed:
        reason = f"relative error {error:.1e}, {allowed:.1e} allowed"
    elif not pixel <= pixel_allowed:
        reason = f"worst pixel off by {pixel:.1e}, {pixel_allowed:.1e} allowed"
    return Verdict(reason, error, allowed, pixel, pixel_allowed)


def check_launch(plan: Plan, launch: Launch) -> Verdict:
    """Runs a launch by its kernel, twice, on what its inputs hold, and by its twin on three images."""
    arguments, out = plan.arguments(launch), plan.maps[launch.out]
    images = sorted({0, out.images // 2, out.images - 1})
    some = {k: _of_images(v, images, out.images) for k, v in arguments.items()}
    truth_type = torch.float64 if out.rows.dtype == torch.float32 and not _is_half(plan) else torch.float32
    exact = _like(some["out"], truth_type)
    launch.op.twin(**(some | {"out": exact}), compute=truth_type)
    plain = _like(some["out"], out.rows.dtype)
    launch.op.twin(**(some | {"out": plain}), compute=None)
    runs = []
    for _ in range(2):
        out.rows.view(torch.uint8).fill_(0xFF)  # NaN in every type
        launch.op.run(**arguments)
        runs.append(out.rows.clone())
    if not torch.equal(*(r.view(torch.uint8) for r in runs)):
        return Verdict("two runs differ")
    return judge(_of_images(out, images, out.images), exact, plain)


def _is_half(plan: Plan) -> bool:
    return any(b.dtype.itemsize < 4 for b in plan.maps)


def _of_images(value: Any, images: list[int], batch: int) -> Any:
    """A map's or a vector's entries for some images; what is no image's stays."""
    if isinstance(value, FeatureMap) and value.images == batch:
        rows = value.rows.view(batch, -1, value.channels)[images].flatten(0, 1)
        return FeatureMap(rows, len(images), value.height, value.width, value.bordered)
    return value[images] if isinstance(value, Tensor) and value.ndim == 1 else value


def _like(fm: FeatureMap, dtype: torch.dtype) -> FeatureMap:
    return FeatureMap.empty(fm.images, fm.height, fm.width, fm.channels, dtype, fm.rows.device, fm.bordered)


def check_noise(device: torch.device) -> Verdict:
    """Noise by its kernel against the reference, to the bit."""
    vectors = (torch.tensor([-1, 5], device=device), torch.tensor([2**40, 0], device=device), torch.tensor([0, 999], device=device))
    got = noise.noise(*vectors, noise.X_T, 3, 33, 65)
    want = noise.noise_reference(*vectors, noise.X_T, (3, 33, 65))
    return Verdict("" if torch.equal(got.view(torch.int32), want.view(torch.int32)) else "the noise is not the reference's")


def check_ddpm_step(device: torch.device) -> Verdict:
    """One reverse step by its kernel against the reference, to the bit: neither fuses a multiplication with an addition."""
    generator = torch.Generator().manual_seed(0)
    x, out = torch.randn(2, 2, 3, 16, 16, generator=generator).to(device)
    table = torch.rand(4, len(COLUMNS), generator=generator).to(device)
    row, seed, image = (torch.tensor(v, device=device) for v in ([1, 3], [7, -7], [0, 2**33]))
    z = noise.noise_reference(seed, image, row, noise.REVERSE, (3, 16, 16))
    want = ddpm_step_reference(x, out, z, table, row)
    got = x.clone()
    ddpm_step(got, out, table, row, seed, image)
    return Verdict("" if torch.equal(got, want) else "the step is not the reference's")


# ---- the child


def main(lines: IO[str], say: Callable[[dict[str, Any]], None]) -> None:
    """Judges every launch of the plan that the first line describes, but for those that it lists as known."""
    from .fused_unet import FusedUNet

    spec = json.loads(lines.readline())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    unet, known = network_of(config_of(spec["config"])), spec["known"]
    fused = FusedUNet(unet, check=False, **(spec["options"] | dict(target=Target(**spec["options"]["target"]))))
    plan = fused.plan()
    device, failed = fused.device, {name for name, passed in known.items() if not passed}
    plan.poison()
    fused.load(*inputs_of(fused))
    others = {"noise": check_noise, "ddpm_step": check_ddpm_step}
    with torch.no_grad():
        for name in STEP_LAUNCHES:
            if name not in known:
                _judge(name, partial(others[name], device), say)
        for launch in plan:
            if launch.name not in known and not _judge(launch.name, partial(check_launch, plan, launch), say).passed:
                failed.add(launch.name)
            plan.twins = failed
            plan.run_one(launch)  # so that the next one has something to read
        if FORWARD not in known:
            _judge(FORWARD, partial(check_forward, fused, unet), say)


def _judge(name: str, check: Callable[[], Verdict], say: Callable[[dict[str, Any]], None]) -> Verdict:
    say(dict(begin=name))
    try:
        verdict = check()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except torch.OutOfMemoryError as error:
        say(dict(memory=" ".join(str(error).split())))
        raise SystemExit(0) from None
    except Exception as error:  # whatever a launch does wrong counts against it
        verdict = Verdict(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        say(dict(done=name, verdict=asdict(verdict)))
        if "CUDA" in str(error):  # after an illegal access nothing in this process can be believed
            raise SystemExit(0) from None
        return verdict
    say(dict(done=name, verdict=asdict(verdict)))
    return verdict


def check_forward(fused: FusedUNet, unet: UNet) -> Verdict:
    """The whole network, against the reference in fp32: at most twice as far off as the reference in the plan's own precision."""
    x, t, labels = inputs_of(fused)
    few = sorted({0, len(x) // 2, len(x) - 1})
    inputs = (x[few], t[few], None if labels is None else labels[few])
    own = fused.activations
    unet = unet.to(fused.device)
    exact = (unet.double() if own == torch.float32 else unet.float())(*inputs).double()
    plain = unet.to(own)(*inputs)
    error, other = (float((v.double() - exact).norm() / exact.norm()) for v in (fused(x, t, labels)[few], plain))
    allowed = max(2 * other, FP8_FORWARD if fused.dtype == "fp8" else torch.finfo(own).eps)
    return Verdict("" if error <= allowed else f"relative error {error:.1e}, {allowed:.1e} allowed", error, allowed)


def config_of(fields: Mapping[str, Any]) -> UNetConfig:
    """A configuration that came as JSON."""
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return UNetConfig(**arguments)


def network_of(config: UNetConfig) -> UNet:
    """A network with random weights: norms and biases too, so that a fault in them shows."""
    torch.manual_seed(0)
    unet = UNet(config).eval().requires_grad_(False)
    for p in unet.parameters():
        if p.ndim == 1:
            p.add_(0.3 * torch.randn_like(p))
    return unet


def inputs_of(fused: FusedUNet) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    b, c = fused.batch_size, fused.config
    x = torch.randn(b, c.in_channels, *fused.size, generator=generator).to(fused.device)
    t = torch.randint(fused.timesteps, (b,), generator=generator).to(fused.device)
    return x, t, torch.randint(c.num_classes, (b,), generator=generator).to(fused.device) if c.num_classes else None


# ---- the parent


@dataclass(frozen=True)
class Subject:
    """What is checked: the plan that these options give, and its launches' names."""

    config: UNetConfig
    options: Mapping[str, Any]
    launches: Sequence[str]

    @property
    def path(self) -> Path:
        """Where its verdict is kept."""
        return cache_dir() / "verdicts" / f"{self.key}.json"

    @property
    def key(self) -> str:
        """SHA-256 of everything that a verdict depends on: hardware, software, the kernels' sources, the plan."""
        device = torch.device(self.options["device"])
        hardware = [torch.cuda.get_device_name(device), driver()] if device.type == "cuda" else [device.type]
        sources = hashlib.sha256()
        for path in sorted(Path(noise.__file__).parent.glob("*.py")):
            sources.update(path.read_bytes())
        triton = getattr(_triton.triton, "__version__", None)
        software = [torch.__version__, triton, _triton.INTERPRETED, __version__, sources.hexdigest()]
        what = [hardware, software, asdict(self.config), dict(self.options), list(self.launches)]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def kept(self) -> dict[str, Verdict] | None:
        """The verdict that is kept, or None: not checked yet, or by another version."""
        try:
            return {k: Verdict(**v) for k, v in json.loads(self.path.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return None


def verdicts(subject: Subject, **how: Any) -> dict[str, Verdict]:
    """Launch -> verdict: the one that is kept, or found now (`check`) and kept."""
    found = subject.kept()
    if found is None:
        found = check(subject, **how)
        subject.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(subject.path, json.dumps({k: asdict(v) for k, v in found.items()}, indent=1).encode())
    return found


def check(
    subject: Subject,
    command: Sequence[str] = COMMAND,
    timeout: float = 300.0,
    progress: Callable[[str], object] = lambda name: None,
) -> dict[str, Verdict]:
    """Launch -> verdict, by children that judge one launch after the other.

    timeout   seconds for one launch, its compilation included; also for the child to begin
    progress  called with the name of every launch before it is judged

    RuntimeError where memory runs out or a child cannot so much as begin: neither is a verdict.
    """
    wanted = [*STEP_LAUNCHES, *subject.launches, FORWARD]
    done: dict[str, Verdict] = {}
    while len(done) < len(wanted):
        before = len(done)
        known = {k: v.passed for k, v in done.items()}
        end = _listen(
            command, dict(config=asdict(subject.config), options=dict(subject.options), known=known), timeout, progress, done
        )
        if len(done) == before:
            raise RuntimeError(f"the self-check could not begin: {end}")
    return {name: done[name] for name in wanted}


def _listen(
    command: Sequence[str], spec: Mapping[str, Any], timeout: float, progress: Callable[[str], object], done: dict[str, Verdict]
) -> str:
    """Puts into `done` what one child judges, and a launch that ended it; returns how it ended."""
    running: str | None = None
    with _child(command, spec) as messages:
        while True:
            try:
                message = messages.get(timeout=timeout)
            except Empty:
                message = dict(end=f"no answer for {timeout:g} s")
            if "begin" in message:
                running = message["begin"]
                progress(str(running))
            elif "done" in message:
                done[message["done"]], running = Verdict(**message["verdict"]), None
            elif "memory" in message:
                raise RuntimeError(f"the self-check ran out of memory: take a smaller batch_size ({message['memory']})")
            else:
                break
    if running is not None:
        done[running] = Verdict(message["end"])
    return message["end"]


@contextmanager
def _child(command: Sequence[str], spec: Mapping[str, Any]) -> Iterator[Queue[dict[str, Any]]]:
    """Starts a child and yields what it says; its end, too, is a message."""
    child = subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    messages: Queue[dict[str, Any]] = Queue()
    errors: list[str] = []

    def listen(stream: IO[str]) -> None:
        for line in stream:
            if line.startswith("{"):
                messages.put(json.loads(line))
        reader.join()
        code = child.wait()
        last = errors[-1].strip() if errors else ""
        messages.put(dict(end=f"the process ended with code {code}{': ' + last if last else ''}"))

    reader = threading.Thread(target=lambda: errors.extend(child.stderr or ()), daemon=True)
    listener = threading.Thread(target=listen, args=(child.stdout,), daemon=True)
    reader.start()
    listener.start()
    try:
        child.stdin.write(json.dumps(spec) + "\n")
        child.stdin.close()
    except BrokenPipeError:
        pass  # it ended at once, and its end will be heard
    try:
        yield messages
    finally:
        child.kill()
        listener.join()


def driver() -> str:
    """The GPU driver's version, as its library says it; "unknown" where it cannot be asked."""
    try:
        with open("/proc/driver/nvidia/version") as f:
            return f.readline().strip()
    except OSError:
        return "unknown"


def warn_of(found: Mapping[str, Verdict]) -> None:
    """One warning that names what failed, if anything did."""
    failed = {k: v for k, v in found.items() if not v.passed}
    if failed:
        named = "; ".join(f"{k} ({v.reason})" for k, v in list(failed.items())[:5]) + (" ..." if len(failed) > 5 else "")
        warnings.warn(
            f"{len(failed)} of {len(found)} launches failed their self-check and run by plain PyTorch, slower but right: {named}",
            stacklevel=3,
        )


if __name__ == "__main__":
    main(sys.stdin, lambda message: print(json.dumps(message), flush=True))
