"""config.json of networks that diffusers' `UNet2DModel` cannot express.

The class name is "DdpmFastUNet"; the other keys are the fields of `UNetConfig`, every one of them.
diffusers refuses the class, so that it never builds another network.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..utils.validation import shown

MODEL = "DdpmFastUNet"


def arguments_from_own(config: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """The arguments of `UNetConfig`.

    Args:
        config: Content of config.json.
        fields: The names of the fields of `UNetConfig`.

    Raises:
        ValueError: A field is missing or unknown.
    """
    values = {name: value for name, value in config.items() if not name.startswith("_")}
    for kind, names in (
        ("unknown", set(values) - set(fields)),
        ("missing", set(fields) - set(values)),
    ):
        if names:
            raise ValueError(
                f"{kind} key {shown(sorted(names)[0])} in the {MODEL} configuration "
                f"({len(names)} in all); expected {', '.join(fields)}"
            )
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def to_own(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json for the fields of a `UNetConfig`."""
    return {
        "_class_name": MODEL,
        **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()},
    }
