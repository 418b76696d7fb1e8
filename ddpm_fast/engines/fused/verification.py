"""Verification of a plan's kernels in worker processes with a timeout; results are cached.

If a worker dies or times out, its current launch has failed, and another worker continues after it.
Failed launches run by their fallbacks. Results are cached per GPU, software, sources and plan.
"""

from __future__ import annotations

import hashlib
import json
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...kernels import _triton, noise
from ...utils.cache import CHECKS, cache_dir
from ...utils.files import write_atomically
from ...utils.subprocess import JsonWorker, WorkerEnded, WorkerTimeout
from .checks import FORWARD, STEP_CHECKS, CheckResult
from .model import PlanSpec

START_TIMEOUT = 300.0  # seconds until a worker reports its first check: imports and packing


def verify(spec: PlanSpec, **options: Any) -> dict[str, CheckResult]:
    """Returns check -> result, from the cache or from `run_checks`.

    Args:
        spec: The plan.
        options: Options of `run_checks`.
    """
    results = cached_results(spec)
    if results is None:
        results = run_checks(spec, **options)
        if not any(r.timed_out for r in results.values()):
            _cache(cache_path(spec), results)
    return results


def run_checks(
    spec: PlanSpec,
    command: Sequence[str] | None = None,
    timeout: float = 300.0,
    progress: Callable[[str], object] = lambda name: None,
) -> dict[str, CheckResult]:
    """Runs every check of a plan in worker processes and returns check -> result.

    Args:
        spec: The plan.
        command: Command of a worker; default: `python -m ddpm_fast.engines.fused.checks`.
        timeout: Seconds for one launch, including its compilation.
        progress: Called with the name of every check before it runs.

    Raises:
        OutOfMemoryError: Memory ran out; no launch has failed.
        RuntimeError: A worker cannot start.
    """
    names = [*STEP_CHECKS, *spec.launches, FORWARD]
    results: dict[str, CheckResult] = {}
    while len(results) < len(names):
        before = len(results)
        end = _run_worker(spec, command, timeout, progress, results)
        if len(results) == before:
            raise RuntimeError(
                f"the self-check could not start: {end}. Pass check=False to run without it"
            )
    return {name: results[name] for name in names}


def _run_worker(
    spec: PlanSpec,
    command: Sequence[str] | None,
    timeout: float,
    progress: Callable[[str], object],
    results: dict[str, CheckResult],
) -> str:
    """Adds the results of one worker, and of the launch that ended it. Returns why it ended."""
    running: str | None = None
    seconds = max(timeout, START_TIMEOUT)
    with JsonWorker("ddpm_fast.engines.fused.checks", command=command) as worker:
        worker.send(
            dict(spec=spec.to_json(), passed={name: r.passed for name, r in results.items()})
        )
        worker.finish()
        while True:
            try:
                message = worker.receive(seconds)
            except (WorkerTimeout, WorkerEnded) as error:
                end = error
                break
            seconds = timeout
            if "started" in message:
                running = str(message["started"])
                progress(running)
            elif "finished" in message:
                results[message["finished"]], running = CheckResult(**message["result"]), None
            elif "out_of_memory" in message:
                reason = message["out_of_memory"]
                raise torch.OutOfMemoryError(
                    f"the self-check ran out of memory; use a smaller batch_size ({reason})"
                )
    if isinstance(end, WorkerEnded) and end.code == -signal.SIGKILL:
        raise torch.OutOfMemoryError(
            "the self-check's process was killed, probably because the host's memory ran out"
        )
    if running is not None:
        results[running] = CheckResult(str(end), timed_out=isinstance(end, WorkerTimeout))
    return str(end)


def fallbacks_of(results: Mapping[str, CheckResult]) -> set[str]:
    """Returns the launches that must run by their fallbacks, with a warning if there are any.

    Noise, step and step counter run by their references in this process if their checks failed. All
    launches run by their fallbacks if the check of the whole network failed.
    """
    failed = {name: r for name, r in results.items() if not r.passed}
    if not failed:
        return set()
    reasons = "; ".join(f"{k} ({v.reason})" for k, v in list(failed.items())[:5]) + (
        " ..." if len(failed) > 5 else ""
    )
    launches = set(results) - {*STEP_CHECKS, FORWARD}
    fallbacks = launches if FORWARD in failed else set(failed) & launches
    _triton.UNTRUSTED.update(set(failed) & set(STEP_CHECKS))
    affected = "the whole network runs" if FORWARD in failed else "the failed ones run"
    warnings.warn(
        f"{len(failed)} of {len(results)} checks of the kernels failed; {affected} in plain "
        f"PyTorch, which is slower: {reasons}",
        stacklevel=3,
    )
    return fallbacks


# ---- the cache


def cache_path(spec: PlanSpec) -> Path:
    """Path of the cached results of a plan."""
    return cache_dir() / CHECKS / f"{cache_key(spec)}.json"


def cache_key(spec: PlanSpec) -> str:
    """SHA-256 of what results depend on: hardware, software, the kernels' sources and the plan."""
    device = torch.device(spec.options["device"])
    hardware = (
        [torch.cuda.get_device_name(device), driver()] if device.type == "cuda" else [device.type]
    )
    sources = hashlib.sha256()
    for path in sorted(Path(noise.__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    triton = getattr(_triton.triton, "__version__", None)
    software = [torch.__version__, triton, _triton.INTERPRETED, __version__, sources.hexdigest()]
    options = dict(spec.options) | dict(device=device.type)  # equal GPUs share results
    content = [hardware, software, asdict(spec.config), options, list(spec.launches)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cached_results(spec: PlanSpec) -> dict[str, CheckResult] | None:
    """Returns the cached results; None if there are none or the file cannot be read."""
    try:
        return {k: CheckResult(**v) for k, v in json.loads(cache_path(spec).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _cache(path: Path, results: Mapping[str, CheckResult]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            path, json.dumps({k: asdict(v) for k, v in results.items()}, indent=1).encode()
        )
    except OSError as error:
        warnings.warn(
            f"the results of the self-check cannot be cached; they are computed again: {error}",
            stacklevel=4,
        )


def driver() -> str:
    """Version of the GPU driver; "unknown" if it cannot be read."""
    try:
        with open("/proc/driver/nvidia/version") as f:
            return f.readline().strip()
    except OSError:
        return "unknown"
