"""ddpm-fast bench: speed of a checkpoint on this machine, compared with baselines."""

from __future__ import annotations

import math
from typing import Any

import click

from .choices import BASELINES, DDPM_FAST, DTYPES
from .common import PATH, action, parse_size


def _options(command: Any) -> Any:
    known = ", ".join(BASELINES)
    decimal = click.FloatRange(0)
    options = [
        click.option("--weights", type=PATH, required=True, help="Checkpoint: a diffusers folder."),
        click.option("--device", help="cpu, cuda, cuda:1 ...  [default: the GPU if there is one]"),
        click.option("--size", help="HEIGHTxWIDTH in pixels.  [default: as trained]"),
        click.option(
            "--baselines",
            help=f"Comma-separated: {known}, package.module:Class; or none.  [default: all]",
        ),
        click.option(
            "--seconds",
            type=decimal,
            default=30,
            show_default=True,
            help="Shortest time of the rounds per batch size; starting the engines and the roofline add about a minute.",
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
            help="Results file; next to it a figure, .png.",
        ),
        click.option(
            "--compare",
            type=PATH,
            help="Older results file: exit code 1 if ddpm_fast is slower than there.",
        ),
        click.option(
            "--threshold",
            type=decimal,
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
    """Benchmark ddpm_fast against PyTorch, torch.compile, diffusers, ONNX Runtime and OpenVINO, as far as installed.

    Every engine runs the same weights in its own process, is checked against fp64 first, and takes turns with the others. A speedup
    is the ratio of two times of one round; its range is the 95 % confidence interval of the median. Needs an idle machine.
    """


_DTYPE = click.option(
    "--dtype", type=click.Choice(DTYPES), help="[default: bf16 on a GPU, else fp32]"
)


@bench.command()
@_options
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@_DTYPE
def latency(batch_size: int, dtype: str | None, **options: Any) -> None:
    """Time per image, and time to the first image: cold, and with filled caches."""
    _run([batch_size], [dtype], warm_start_limit=math.inf, **options)


@bench.command()
@_options
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@_DTYPE
def throughput(batch_size: int, dtype: str | None, **options: Any) -> None:
    """Images per second at one batch size."""
    _run([batch_size], [dtype], **options)


@bench.command()
@_options
@click.option("--batch-sizes", default="1,4,16,64", show_default=True)
@click.option(
    "--dtypes",
    help=f"Comma-separated: {', '.join(DTYPES)}.  [default: bf16,fp8 on a GPU, else fp32]",
)
def sweep(batch_sizes: str, dtypes: str | None, **options: Any) -> None:
    """Several batch sizes and precisions."""
    try:
        batches = [int(b) for b in batch_sizes.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise ValueError(
            f"--batch-sizes is {batch_sizes}; expected positive integers such as 1,4,16"
        )
    kinds: list[str | None] = [None] if dtypes is None else list(dtypes.split(","))
    if any(d not in (None, *DTYPES) for d in kinds):
        raise ValueError(
            f"--dtypes is {dtypes}; expected some of {', '.join(DTYPES)}, separated by commas"
        )
    _run(batches, kinds, several=True, **options)


def _run(
    batches: list[int],
    dtypes: list[str | None],
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
    if wrong := [name for name in names if name not in BASELINES and ":" not in name]:
        raise ValueError(
            f"--baselines has the unknown engine {wrong[0]!r:.60}; expected {', '.join(BASELINES)}, "
            "package.module:Class, or none"
        )
    return list(dict.fromkeys(names))
