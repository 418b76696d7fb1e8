"""ddpm-fast bench: speed of a checkpoint on this machine, compared with baselines."""

from __future__ import annotations

import math
from typing import Any

import click

from .choices import BASELINES, DDPM_FAST, DTYPES
from .common import PATH, action, parse_size


def _options(command: Any) -> Any:
    known = ", ".join(BASELINES)
    options = [
        click.option("--weights", type=PATH, required=True, help="Checkpoint: a diffusers folder."),
        click.option("--device", help="cpu, cuda, cuda:1 ...  [default: the GPU if there is one]"),
        click.option(
            "--size", help="HEIGHTxWIDTH in pixels.  [default: the size of the training images]"
        ),
        click.option(
            "--baselines",
            help=f"Comma-separated: {known}, package.module:Class; or none.  [default: all]",
        ),
        click.option(
            "--seconds",
            type=click.FloatRange(0),
            default=30,
            show_default=True,
            help="Shortest time of the rounds per batch size; starting the engines and the "
            "roofline take another minute.",
        ),
        click.option(
            "--steps",
            type=click.IntRange(1),
            help="Steps per loop.  [default: about a second of the slowest engine]",
        ),
        click.option(
            "--out",
            type=PATH,
            default="bench.json",
            show_default=True,
            help="Results file; the figure has the same name with .png.",
        ),
        click.option(
            "--compare",
            "older",
            type=PATH,
            help="Older results file: exit code 1 if ddpm_fast has become slower.",
        ),
        click.option(
            "--threshold",
            type=click.FloatRange(0),
            default=5,
            show_default=True,
            help="Tolerance of --compare in percent.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
def bench() -> None:
    """Benchmark ddpm_fast against PyTorch, torch.compile, diffusers, ONNX Runtime and OpenVINO.

    Baselines that are not installed are left out. Every engine runs the same weights in a separate
    process, is checked against fp64 first, and is timed in interleaved rounds. A speedup is the
    ratio of two times of one round; its range is the 95 % confidence interval of the median. Needs
    an idle machine.
    """


_DTYPE = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Precision of the network.  [default: bf16 on a GPU, else fp32]",
)


def _batch_size(default: int) -> Any:
    return click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=default,
        show_default=True,
        help="Images per call.",
    )


@bench.command()
@_options
@_batch_size(1)
@_DTYPE
def latency(batch_size: int, dtype: str | None, **options: Any) -> None:
    """Measure the time per image and to the first image.

    The first image is measured with empty caches, then with filled ones.
    """
    _run([batch_size], dtype and [dtype], warm_start_limit=math.inf, **options)


@bench.command()
@_options
@_batch_size(64)
@_DTYPE
def throughput(batch_size: int, dtype: str | None, **options: Any) -> None:
    """Measure images per second at one batch size."""
    _run([batch_size], dtype and [dtype], **options)


@bench.command()
@_options
@click.option(
    "--batch-sizes", default="1,4,16,64", show_default=True, help="Comma-separated images per call."
)
@click.option(
    "--dtypes",
    help=f"Comma-separated: {', '.join(DTYPES)}.  [default: bf16,fp8 on a GPU, else fp32]",
)
def sweep(batch_sizes: str, dtypes: str | None, **options: Any) -> None:
    """Measure several batch sizes and precisions."""
    try:
        batches = [int(b) for b in batch_sizes.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise ValueError(
            f"--batch-sizes is {batch_sizes}; expected positive integers such as 1,4,16"
        )
    names = None if dtypes is None else dtypes.split(",")
    if not set(names or ()) <= set(DTYPES):
        raise ValueError(
            f"--dtypes is {dtypes}; expected some of {', '.join(DTYPES)}, separated by commas"
        )
    _run(batches, names, with_fp8=True, **options)


def _run(
    batches: list[int],
    dtypes: Any,
    size: str | None,
    baselines: str | None,
    **options: Any,
) -> None:
    names = _baselines(baselines)
    action("bench").bench(batches, dtypes, [DDPM_FAST, *names], size=parse_size(size), **options)


def _baselines(text: str | None) -> list[str]:
    if text is None:
        return list(BASELINES)
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in BASELINES and ":" not in name]:
        raise ValueError(
            f"--baselines is {unknown[0]!r:.60}; expected some of {', '.join(BASELINES)}, "
            "package.module:Class, or none"
        )
    return list(dict.fromkeys(names))
