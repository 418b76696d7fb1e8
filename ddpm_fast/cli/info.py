"""ddpm-fast info and collect-env: checkpoint, cost, plan, cache and environment."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from .choices import DTYPES, GPUS
from .common import JSON, PATH, action, parse_size


@click.command()
@click.argument("directory", type=PATH, required=False)
@click.option(
    "--plan", "planned", is_flag=True, help="Print every kernel launch with its cost and bound."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, 2**20),
    default=256,
    show_default=True,
    help="With --plan: images per batch.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="bf16",
    show_default=True,
    help="With --plan: dtype of the network.",
)
@click.option("--size", help="With --plan: HEIGHTxWIDTH in pixels.  [default: as trained]")
@click.option(
    "--gpu",
    type=click.Choice(GPUS),
    default="h100",
    show_default=True,
    help="With --plan: the GPU to predict for.",
)
@click.option(
    "--cache", is_flag=True, help="Print the contents of the cache folder ($DDPM_FAST_CACHE)."
)
@click.option("--clear", is_flag=True, help="With --cache: remove the contents.")
@JSON
def info(
    directory: Path | None,
    planned: bool,
    batch_size: int,
    dtype: str,
    size: str | None,
    gpu: str,
    cache: bool,
    clear: bool,
    as_json: bool,
) -> None:
    """Describe a checkpoint and its cost."""
    if clear and not cache:
        raise ValueError("--clear requires --cache")
    context = click.get_current_context()
    for name in ("batch_size", "dtype", "size", "gpu"):
        if not planned and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise ValueError(f"--{name.replace('_', '-')} requires --plan")
    if cache:
        action("info").describe_cache(clear, as_json)
        return
    if directory is None:
        raise ValueError("give the directory of a checkpoint, or --cache")
    if planned:
        sides = parse_size(size)
        action("info").describe_plan(directory, batch_size, dtype, sides, gpu, as_json)
    else:
        action("info").describe(directory, as_json)


@click.command("collect-env")
@JSON
def collect_env(as_json: bool) -> None:
    """Print environment information for bug reports."""
    action("info").describe_environment(as_json)
