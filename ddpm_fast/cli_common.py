"""What every command shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PATH = click.Path(path_type=Path)


def pick_device(name: str | None) -> torch.device | None:
    """A device that answers; ValueError otherwise. None: the default."""
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device fails in a way of its own
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def report_of(report: dict[str, Any], as_json: bool, text: str) -> None:
    """The result of a command: one JSON object, or text for a person."""
    click.echo(json.dumps(report) if as_json else text)
