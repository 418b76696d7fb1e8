"""Types and ranges of the fields of `UNetConfig`.

The translation from diffusers' config.json uses the same table, so a damaged or hostile
configuration raises a one-line error before memory is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..utils.validation import is_count, is_counts, is_number, is_number_in

MAX_SIDE = 16_384  # pixels
MAX_IMAGE_CHANNELS = 4_096
MAX_WIDTH = 16_384  # channels of a level
MAX_LEVELS = 16
MAX_LAYERS = 128  # residual blocks per level
MAX_TIME_DIM = 65_536
MAX_CLASSES = 1_000_000

# (description, predicate)
Rule = tuple[str, Callable[[Any], bool]]


def count(limit: int) -> Rule:
    """An integer from 1 to `limit`."""
    return f"an integer from 1 to {limit}", lambda v: is_count(v, limit)


def optional(rule: Rule) -> Rule:
    """`rule`, or None."""
    return f"{rule[0]}, or None", lambda v: v is None or rule[1](v)


def number(low: float, high: float) -> Rule:
    """A number from `low` to `high`, both included."""
    return f"a number from {low:g} to {high:g}", lambda v: is_number_in(v, low, high)


FLAG: Rule = ("True or False (true or false in JSON)", lambda v: isinstance(v, bool))
FLAGS: Rule = ("True or False per level", lambda v: all(isinstance(flag, bool) for flag in v))
SIDES: Rule = (
    f"an integer from 1 to {MAX_SIDE}, a pair of them (height, width), or None",
    lambda v: v is None or is_count(v, MAX_SIDE) or is_counts(v, 2, MAX_SIDE),
)
WIDTHS: Rule = (
    f"1 to {MAX_LEVELS} integers from 1 to {MAX_WIDTH}, one per level",
    lambda v: is_counts(v, None, MAX_WIDTH) and len(v) <= MAX_LEVELS,
)
RESAMPLING: Rule = (
    '"conv" or "resnet" per level',
    lambda v: all(isinstance(kind, str) and kind in ("conv", "resnet") for kind in v),
)

# Per-level fields are checked as tuples with one entry per level.
FIELDS: dict[str, Rule] = dict(
    sample_size=SIDES,
    in_channels=count(MAX_IMAGE_CHANNELS),
    out_channels=count(MAX_IMAGE_CHANNELS),
    channels=WIDTHS,
    layers=(
        f"integers from 1 to {MAX_LAYERS}, one or one per level",
        lambda v: is_counts(v, None, MAX_LAYERS),
    ),
    attention=FLAGS,
    up_attention=FLAGS,
    mid_attention=FLAG,
    heads=(
        f"integers from 1 to {MAX_WIDTH}, one or one per level",
        lambda v: is_counts(v, None, MAX_WIDTH),
    ),
    down_resample=RESAMPLING,
    up_resample=RESAMPLING,
    downsample_padding=(
        "0 (right and bottom) or 1 (symmetric)",
        lambda v: type(v) is int and v in (0, 1),
    ),
    norm_groups=count(MAX_WIDTH),
    mid_norm_groups=(
        f"an integer from 0 (no norm) to {MAX_WIDTH}",
        lambda v: is_count(v, MAX_WIDTH) or (type(v) is int and v == 0),
    ),
    norm_eps=number(1e-12, 1),
    scale_shift=FLAG,
    time_dim=count(MAX_TIME_DIM),
    cos_first=FLAG,
    freq_shift=("a number of at least 0", lambda v: is_number(v) and v >= 0),
    time_scale=number(1e-6, 1e6),
    sinusoid_dim=count(MAX_TIME_DIM),
    num_classes=optional(count(MAX_CLASSES)),
    dropout=("a number from 0 to below 1", lambda v: is_number(v) and 0 <= v < 1),
    mid_scale=number(1e-6, 1e6),
    center_input=FLAG,
)
