"""ddpm-fast convert: convert a checkpoint of another codebase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..checkpoints.published import CODEBASES, NEEDED, PUBLISHED
from .choices import PREDICTIONS, SCHEDULES, STORED_VARIANCES
from .common import JSON, PATH, action

_PROCESS = ("schedule", "timesteps", "prediction", "variance", "clip")
_BETAS = ("beta_start", "beta_end")  # of the schedules that have them
_FLAGS = {"sample_size": ("image_size",), "process": _PROCESS}


def _table() -> str:
    """The published files, one per line; "\\b" keeps click from wrapping them."""
    width = max(map(len, PUBLISHED))
    lines = [f"  {name:{width}}  {entry.file}" for name, entry in PUBLISHED.items()]
    return "\b\n" + "\n".join(["Published files, by NAME:", *lines])


@click.command(epilog=_table())
@click.argument("source", type=PATH)
@click.argument("out", type=PATH)
@click.option("--from", "codebase", type=click.Choice(CODEBASES), help="Codebase of SOURCE.")
@click.option(
    "--published",
    type=click.Choice(list(PUBLISHED)),
    metavar="NAME",
    help="Use the settings of this published file (list below).",
)
@click.option("--flags", help="OpenAI's MODEL_FLAGS and DIFFUSION_FLAGS, verbatim, as one string.")
@click.option(
    "--trust",
    is_flag=True,
    help="Read pickles (.pt, .ckpt, .bin) by torch.load(weights_only=True).",
)
@click.option("--network-only", is_flag=True, help="Write config.json and weights, no scheduler.")
@click.option("--schedule", type=click.Choice(SCHEDULES), help="Noise schedule of training.")
@click.option("--timesteps", type=click.IntRange(1, 1_000_000), help="T of training.")
@click.option("--beta-start", type=float, help="With a linear or scaled-linear schedule.")
@click.option("--beta-end", type=float, help="With a linear or scaled-linear schedule.")
@click.option("--prediction", type=click.Choice(PREDICTIONS), help="What the network predicts.")
@click.option("--variance", type=click.Choice(STORED_VARIANCES), help="Variance of sampling.")
@click.option("--clip", help="Limit of |x_0| in sampling, such as 1.0, or none.")
@click.option("--image-size", type=click.IntRange(1, 16_384), help="Training size in pixels.")
@click.option("--dropout", type=float, help="Dropout of training; no effect on sampling.")
@JSON
def convert(
    source: Path,
    out: Path,
    codebase: str | None,
    published: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert a checkpoint of another codebase.

    SOURCE is a file or folder of that codebase, OUT the folder to write. What the weights do not
    say must be given: by --published NAME, for OpenAI by --flags, else by the options from
    --schedule on. Formats and examples: docs/checkpoints.md.
    """
    if codebase is None and published is None:
        raise ValueError("--from is missing; give the codebase, or --published NAME")
    _check_settings(codebase, published, options)
    options["clip"] = _clip(options["clip"])
    action("convert").convert(source, out, codebase, published, as_json, options)


def _check_settings(codebase: str | None, published: str | None, options: dict[str, Any]) -> None:
    """Refuses missing and superfluous settings by their flags."""
    flags = ("flags", *_PROCESS, *_BETAS, "image_size", "dropout")
    given = {name for name in flags if options[name] is not None}
    if published is not None or codebase is None:
        if given:
            raise ValueError(f"{_flag(min(given))} was given; --published implies it: leave it out")
        return
    needed = {flag for name in NEEDED[codebase] for flag in _FLAGS.get(name, (name,))}
    needed -= set(_PROCESS) if options["network_only"] else set()
    if "schedule" in needed and options["schedule"] in ("linear", "scaled-linear"):
        needed |= set(_BETAS)
    if superfluous := sorted(given - needed):
        raise ValueError(
            f"{_flag(superfluous[0])} was given; expected "
            f"{', '.join(map(_flag, sorted(needed))) or 'no settings'}: leave it out"
        )
    if missing := sorted(needed - given):
        has_names = any(entry.codebase == codebase for entry in PUBLISHED.values())
        raise ValueError(
            f"{', '.join(map(_flag, missing))} missing: no weight says it; give it as in training"
            + (", or --published NAME" if has_names else "")
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _clip(text: str | None) -> float | str | None:
    """A number, "none", or None if it was not given. ValueError for anything else."""
    if text is None or text == "none":
        return text
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1e-6 <= value <= 1e6:
        raise ValueError(f"--clip is {text:.60}; expected a number from 1e-6 to 1e6, or none")
    return value
