"""The work of ddpm-fast convert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...checkpoints.conversion import Conversion, Process
from ...checkpoints.convert import convert_checkpoint
from ...diffusion.schedule import NoiseSchedule
from ..common import mebibytes, print_report


def convert(
    source: Path,
    out: Path,
    codebase: str | None,
    published: str | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Converts SOURCE, writes OUT and prints what was read and assumed."""
    if not out.absolute().parent.is_dir():  # before the work
        raise ValueError(f"{out.absolute().parent} is not a directory; create it first")
    conversion = convert_checkpoint(
        source,
        codebase,
        published=published,
        flags=options["flags"],
        process=_process(options),
        sample_size=options["image_size"],
        dropout=options["dropout"],
        network_only=options["network_only"],
        trust=options["trust"],
    )
    conversion.save(out)
    _report(conversion, out, as_json)


def _process(options: dict[str, Any]) -> Process | None:
    name, timesteps = options["schedule"], options["timesteps"]
    if name is None:
        return None
    start, end = options["beta_start"], options["beta_end"]
    if name == "linear":
        schedule = NoiseSchedule.linear(start, end, timesteps)
    elif name == "scaled-linear":
        schedule = NoiseSchedule.scaled_linear(start, end, timesteps)
    elif name == "cosine":
        schedule = NoiseSchedule.cosine(timesteps)
    else:
        schedule = NoiseSchedule.sigmoid(timesteps)
    clip = None if options["clip"] == "none" else options["clip"]
    return Process(schedule, options["prediction"], options["variance"], clip)


def _report(c: Conversion, out: Path, as_json: bool) -> None:
    config = c.unet.config
    kind = config.to_config()["_class_name"]
    parameters = sum(p.numel() for p in c.unet.parameters())
    size = c.source.stat().st_size
    report = dict(
        source=str(c.source),
        bytes=size,
        sha256=c.sha256,
        codebase=c.codebase,
        parameters=parameters,
        format=kind,
        settings={s.name: dict(value=s.value, origin=s.origin) for s in c.settings},
        notes=list(c.notes),
        out=str(out),
    )
    heads = tuple(
        h for h, attends in zip(config.levels_of("heads"), config.attends, strict=True) if attends
    )
    width = max((len(s.name) for s in c.settings), default=0)
    lines = [
        f"{c.source}: {mebibytes(size)}, SHA-256 {c.sha256}",
        f"  network   {c.codebase}, widths {config.channels}, heads {heads}, "
        f"{parameters:,} parameters",
        *(f"  setting   {s.name:{width}} {s.value}  ({s.origin})" for s in c.settings),
        *(f"  note      {note}" for note in c.notes),
        f"  written   {out}, {kind}{_readers(kind)}",
    ]
    print_report(report, as_json, "\n".join(lines))


def _readers(kind: str) -> str:
    return "" if kind == "UNet2DModel" else ", which diffusers cannot express: ddpm_fast reads it"
