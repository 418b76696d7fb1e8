"""Which launches of a plan may run by their kernels: asked of child processes, with a time limit, and kept.

If a child dies or falls silent, the launch in progress is to blame, and another child goes on behind it. Launches that fail run by
their fallbacks from then on; the verdict is kept for this GPU, this software and these sources.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

import torch

from ... import __version__
from ...kernels import _triton, noise
from ...models.config import UNetConfig
from ...utils.cache import VERDICTS, cache_dir
from ...utils.files import write_atomically
from .checks import FORWARD, LATE, STEP_LAUNCHES, Verdict

HOME = str(Path(__file__).parents[3])  # where this package is imported from; a child need not find it by itself


def python(module: str) -> list[str]:
    """The command that runs `python -m module` of this very package, whatever this process's path and current folder."""
    start = f"import runpy, sys; sys.path.append({HOME!r}); runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-c", start]


def child_environment() -> dict[str, str]:
    """A child does not look for modules in the current folder, where a queue.py may lie (from Python 3.11 on)."""
    return {**os.environ, "PYTHONSAFEPATH": "1"}


COMMAND = python("ddpm_fast.engines.fused.checks")


@dataclass(frozen=True)
class Subject:
    """What is checked: the plan that these options give, and its launches' names."""

    config: UNetConfig
    options: Mapping[str, Any]
    launches: Sequence[str]

    @property
    def path(self) -> Path:
        """Where its verdict is kept."""
        return cache_dir() / VERDICTS / f"{self.key}.json"

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
        options = dict(self.options) | dict(device=device.type)  # of several like GPUs one speaks for all
        what = [hardware, software, asdict(self.config), options, list(self.launches)]
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
        if not any(v.late for v in found.values()):  # a busy machine's fault, perhaps
            _keep(subject.path, found)
    return found


def _keep(path: Path, found: Mapping[str, Verdict]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({k: asdict(v) for k, v in found.items()}, indent=1).encode())
    except OSError as error:
        warnings.warn(f"the self-check's verdict cannot be kept, and will be found again next time: {error}", stacklevel=4)


def check(
    subject: Subject,
    command: Sequence[str] | None = None,
    timeout: float = 300.0,
    progress: Callable[[str], object] = lambda name: None,
) -> dict[str, Verdict]:
    """Launch -> verdict, by children that judge one launch after the other.

    command   what starts a child; by default `python -m ddpm_fast.engines.fused.checks`
    timeout   seconds for one launch, its compilation included; also for the child to begin
    progress  called with the name of every launch before it is judged

    OutOfMemoryError where memory runs out, RuntimeError where a child cannot so much as begin: neither is a verdict.
    """
    wanted = [*STEP_LAUNCHES, *subject.launches, FORWARD]
    done: dict[str, Verdict] = {}
    while len(done) < len(wanted):
        before = len(done)
        known = {k: v.passed for k, v in done.items()}
        spec = dict(config=asdict(subject.config), options=dict(subject.options), known=known)
        end = _listen(command or COMMAND, spec, timeout, progress, done)
        if len(done) == before:
            raise RuntimeError(f"the self-check could not begin (check=False goes without it): {end}")
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
                message = dict(end=f"{LATE}for {timeout:g} s")
            if "begin" in message:
                running = message["begin"]
                progress(str(running))
            elif "done" in message:
                done[message["done"]], running = Verdict(**message["verdict"]), None
            elif "memory" in message:
                raise torch.OutOfMemoryError(f"the self-check ran out of memory: take a smaller batch_size ({message['memory']})")
            else:
                break
    if message.get("code") == -signal.SIGKILL:  # not by us: we ask for its end only after this
        raise torch.OutOfMemoryError("the self-check's process was killed, as systems do when the host's memory runs out")
    if running is not None:
        done[running] = Verdict(message["end"])
    return message["end"]


@contextmanager
def _child(command: Sequence[str], spec: Mapping[str, Any]) -> Iterator[Queue[dict[str, Any]]]:
    """Starts a child and yields what it says; its end, too, is a message."""
    pipe = subprocess.PIPE
    child = subprocess.Popen(list(command), stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=child_environment())
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
        messages.put(dict(end=f"the process ended with code {code}{': ' + last if last else ''}", code=code))

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


def fallbacks_of(found: Mapping[str, Verdict]) -> set[str]:
    """What is to run by its fallback, with one warning that says so; noise and step, if they failed, run their references from now on.

    Where every launch passed but the whole did not, none can be told from the others: then all.
    """
    failed = {k: v for k, v in found.items() if not v.passed}
    if not failed:
        return set()
    named = "; ".join(f"{k} ({v.reason})" for k, v in list(failed.items())[:5]) + (" ..." if len(failed) > 5 else "")
    launches = set(found) - {*STEP_LAUNCHES, FORWARD}
    fallbacks = launches if FORWARD in failed else set(failed) & launches
    _triton.UNTRUSTED.update(set(failed) & set(STEP_LAUNCHES))
    what = "the whole network runs" if FORWARD in failed else "what failed runs"
    count = f"{len(failed)} of {len(found)}"
    warnings.warn(
        f"{count} failed in the self-check of the kernels; {what} by plain PyTorch, slower but right: {named}",
        stacklevel=3,
    )
    return fallbacks
