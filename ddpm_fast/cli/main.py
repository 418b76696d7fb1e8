"""The command line: ddpm-fast sample | train | eval | plot | calibrate | bench | info | collect-env."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import click
import torch

from .. import __version__
from ..data import image_io as pictures
from ..data.pixels import image_indices
from ..engines.base import DTYPES
from ..engines.select import ENGINES
from ..sampling.sampler import Sampler
from ..utils.environment import environment, peak_memory
from ..utils.signals import stop_on_signals
from .bench import bench
from .calibrate import calibrate_command
from .common import PATH, megabytes, parse_images, parse_size, parse_steps, pick_device, report_of, solver_options
from .evaluate import evaluate
from .info import info
from .plot import plot
from .train import train

# both spellings of every flag: --batch-size and --batch_size
_SETTINGS: dict[str, Any] = dict(
    help_option_names=["-h", "--help"], token_normalize_func=lambda s: s.replace("_", "-"), max_content_width=110
)


@click.group(context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="ddpm-fast")
def cli() -> None:
    """Exact and fast sampling from denoising diffusion models."""


@cli.command()
@click.option("--weights", type=PATH, required=True, help="Checkpoint: a diffusers folder.")
@click.option(
    "--images", default="64", show_default=True, help="How many, or a range of image indices: 64 or 100-199 (both ends drawn)."
)
@click.option("--seed", type=int, default=0, show_default=True, help="0 to 2^64 - 1.")
@solver_options("ddpm")
@click.option("--batch-size", type=int, default=64, show_default=True)
@click.option("--label", type=int, help="Class of every image.  [default: each draws its own]")
@click.option(
    "--out", default="samples.png", show_default=True, help="FILE.png: a grid; FILE.npz or .npy: an array; a directory: a PNG each."
)
@click.option("--device", help="cpu, cuda, cuda:1 ...  [default: the GPU if there is one]")
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="fp32",
    show_default=True,
    help="Of the network; the state is always fp32. fp8: with our own kernels.",
)
@click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True, help="What computes the steps.")
@click.option("--size", help="HEIGHTxWIDTH in pixels, such as 32x48.  [default: as trained]")
@click.option("--progress/--quiet", default=None, help="A progress bar.  [default: on a terminal]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def sample(
    weights: Path,
    images: str,
    seed: int,
    solver: str,
    steps: str | None,
    spacing: str | None,
    eta: float,
    variance: str | None,
    preset: str,
    batch_size: int,
    label: int | None,
    out: str,
    device: str | None,
    dtype: str,
    engine: str,
    size: str | None,
    progress: bool | None,
    as_json: bool,
) -> None:
    """Draw images. Image i of a seed is the same in whatever batch it is drawn.

    Ctrl-C or SIGTERM stops between two steps and keeps the images that are finished.
    """
    indices = parse_images(images)
    target = _check_target(out)
    sampler = Sampler.from_pretrained(weights, pick_device(device), dtype, parse_size(size), variance, engine)
    if target.suffix not in pictures.ARRAYS and sampler.shape[0] not in pictures.PNG_CHANNELS:
        raise ValueError(
            f"--out {out}: images of {sampler.shape[0]} channels are no pictures; write {' or '.join(pictures.ARRAYS)}"
        )
    how: dict[str, Any] = dict(solver=solver, steps=parse_steps(steps), spacing=spacing, eta=eta, preset=preset)
    table = sampler.table(**how)
    began = time.perf_counter()
    show = sys.stderr.isatty() if progress is None else progress
    with stop_on_signals() as stop:
        stream = sampler.stream(indices, batch_size, seed=seed, labels=label, **how, progress=show, stop=stop)
        count = _write(target, stream, indices)
    seconds = time.perf_counter() - began
    report = dict(
        out=str(target),
        images=count,
        seed=seed,
        solver=solver,
        steps=len(table),
        preset=preset,
        device=_device_name(sampler.device),
        dtype=dtype,
        engine=sampler.engine.name,
        reason=sampler.engine.reason,
        invariant=sampler.engine.invariant,
        peak_memory_bytes=peak_memory(sampler.device),
        seconds=round(seconds, 3),
        images_per_second=round(count / seconds, 3),
        milliseconds_per_image_step=round(1e3 * seconds / (max(count, 1) * len(table)), 4),
    )
    report_of(report, as_json, _text_of(report))
    if count < len(indices):
        click.echo(f"ddpm-fast: stopped after {count} of {len(indices)} images", err=True)
        sys.exit(stop.exit_code)


def _text_of(r: dict[str, Any]) -> str:
    what = f"{r['images']} images of seed {r['seed']}, {r['steps']} {r['solver']} steps, {r['dtype']} on {r['device']}"
    rates = f"{r['images_per_second']:.2f} images/s, {r['milliseconds_per_image_step']:.2f} ms per image and step"
    bits = "the same bits in every batch" if r["invariant"] else "bits that depend on the batch"
    return (
        f"{what}: {r['seconds']:.1f} s, {rates} -> {r['out']}\n"
        f"engine {r['engine']} ({r['reason']}), {bits}, peak memory {megabytes(r['peak_memory_bytes'])}"
    )


@cli.command("collect-env")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def collect_env(as_json: bool) -> None:
    """What a bug report should say about this machine."""
    report = environment()
    width = max(map(len, report))
    report_of(report, as_json, "\n".join(f"{k:{width}}  {v if v not in (None, []) else 'none'}" for k, v in report.items()))


cli.add_command(train)
cli.add_command(evaluate)
cli.add_command(plot)
cli.add_command(calibrate_command)
cli.add_command(bench)
cli.add_command(info)


def _check_target(out: str) -> Path:
    """The output's path, refused now rather than after sampling."""
    if not out or (out.endswith("/") and Path(out).suffix):
        raise ValueError(f"--out {out!r}: expected the name of a file or of a directory")
    path = Path(out)
    known = pictures.PICTURES + pictures.ARRAYS
    if path.suffix and path.suffix not in known and not path.is_dir():
        raise ValueError(f"--out {out}: unknown kind of file; expected {', '.join(known)}, or a directory")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: the directory {path.absolute().parent} does not exist; create it first")
    if path.suffix in known and path.is_dir():
        raise ValueError(f"--out {out} is a directory; expected a file name")
    if not path.suffix and path.is_file():
        raise ValueError(f"--out {out} is a file; expected a directory, or a name ending in {', '.join(known)}")
    writable = path if path.is_dir() else path.absolute().parent
    if not os.access(writable, os.W_OK):
        raise ValueError(f"--out {out}: the directory {writable} cannot be written to")
    return path


def _write(target: Path, stream: Any, indices: range) -> int:
    """Whole files at the end, single pictures as they come; returns how many images."""
    if target.suffix in pictures.PICTURES + pictures.ARRAYS:
        batches = [x for _, x in stream]
        if not batches:  # stopped before the first was finished
            return 0
        images = torch.cat(batches).numpy()
        if target.suffix in pictures.PICTURES:
            pictures.save_grid(target, images)
        else:
            pictures.save_array(target, images, image_indices(indices[: len(images)]).numpy())
        return len(images)
    target.mkdir(exist_ok=True)
    digits, count = max(6, len(str(indices[-1]))), 0
    for first, batch in stream:
        for i, image in enumerate(batch.numpy(), start=first):
            pictures.write_atomically(target / f"{i:0{digits}d}.png", pictures.encode_png(image))
        count += len(batch)
    return count


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def main(arguments: list[str] | None = None) -> NoReturn:
    """The `ddpm-fast` command. Bad input ends in one line on stderr and exit code 2, a failed run in one and 1."""
    try:
        cli.main(arguments, prog_name="ddpm-fast", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except (ValueError, OSError) as error:
        _fail(str(error))
    except (click.Abort, KeyboardInterrupt):  # before RuntimeError, of which Abort is one
        click.echo("ddpm-fast: interrupted", err=True)
        sys.exit(130)
    except MemoryError as error:
        _fail(f"out of memory: {error}", code=1)
    except RuntimeError as error:
        _fail(str(error), code=1)
    sys.exit(0)


def _fail(message: str, code: int = 2) -> NoReturn:
    click.echo(f"ddpm-fast: error: {' '.join(message.split())}", err=True)
    sys.exit(code)
