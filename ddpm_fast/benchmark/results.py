"""What a race leaves: a file, a table, and what got slower since an older one.

The file is one JSON object: `command`, `date`, `environment`, `network`, `cases` (`race.Race.case`), `ceilings` and `launches`
(`launches.py`).
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..models.flops import unet_cost
from ..utils.environment import environment
from ..utils.files import write_atomically
from .baselines import Subject

Result = dict[str, Any]
YARDSTICK = "plain PyTorch"


def begin(subject: Subject, name: str, timesteps: int) -> Result:
    """A result without cases."""
    config, size = subject.unet.config, subject.shape[1:]
    cost = unet_cost(config, size)
    network = dict(name=name, parameters=cost.parameters, gflop_per_image=round(cost.flops / 1e9, 3), timesteps=timesteps)
    return dict(**provenance(), network=network, cases=[], ceilings=[], launches=[])


def provenance() -> Result:
    """How, when and where a result came about."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    program = [Path(sys.argv[0]).name] if module is None else ["python", "-m", module.name.removesuffix(".__main__")]
    return dict(command=shlex.join([*program, *sys.argv[1:]]), date=now, environment=environment())


def write(path: Path, result: Result) -> None:
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def read(path: Path) -> Result:
    """ValueError for what is no file of this kind."""
    try:
        result = json.loads(path.read_text())
        _ = [(c["steps"], c["threads"], row["loop"]["ms"]) for c in result["cases"] for row in c["rows"]], result["network"]["name"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of ddpm-fast bench ({type(error).__name__}: {error})") from None
    return result


# ---- shown


def table_of(case: dict[str, Any], network: dict[str, Any]) -> str:
    """A case for a terminal: milliseconds per image and step, how much faster ours is, and the rest."""
    where = f"{case['device']}, {case['threads']} threads" if case["device"] == "cpu" else case["device"]
    lines = [
        f"{network['name']}: {network['parameters']:,} parameters, {network['gflop_per_image']} GFLOP an image and step; "
        f"batch {case['batch']}, {case['dtype']}, {where}, {case['rounds']} rounds, loops of {case['steps']} steps",
        f"  {'':26} {'forward, ms':>11}  {'ours faster by':>20} {'loop, ms':>9}  {'ours faster by':>20} "
        f"{'images/s':>9} {'peak MiB':>8} {'first image':>11}",
    ]
    for row in case["rows"]:
        cells = [f"{row['forward']['ms']:11.4g}", _ratio(row["forward"]), f"{row['loop']['ms']:9.4g}", _ratio(row["loop"])]
        again = f", then {row['again_s']:.1f}" if "again_s" in row else ""
        rest = f"{row['images_per_s']:9.3g} {row['peak_bytes'] / 2**20:8.0f} {row['first_image_s']:9.1f} s{again}"
        lines.append(f"  {row['name']:26} {cells[0]}  {cells[1]} {cells[2]}  {cells[3]} {rest}")
    lines += [f"  {name} left out: {why}" for name, why in case["left_out"].items()]
    lines += [f"  {line}" for line in behind(case)]
    t = network["timesteps"]
    return "\n".join(
        [*lines, f"  ms: per image and step; images/s: of all {t} steps; a range holds the median with 95 % certainty"]
    )


def _ratio(f: dict[str, Any]) -> str:
    low, high = f["from_to"]
    return f"{'':20}" if low == high == 1 else f"{f['ours_is_faster_by']:5.2f} ({low:5.2f} to {high:5.2f})"


def behind(case: dict[str, Any]) -> list[str]:
    """A line for every engine that ours does not lead: by how much, and what ours ran on."""
    ours, lines = case["rows"][0], []
    for row in case["rows"][1:]:
        for what in ("forward", "loop"):
            ratio, (_, high) = row[what]["ours_is_faster_by"], row[what]["from_to"]
            if ratio < 1:
                sure = "" if high < 1 else ", which may be chance"
                lines.append(f"{row['name']} is {1 / ratio - 1:.0%} faster ({what}{sure}); ours: {ours['name']}, {ours['reason']}")
    return lines


# ---- compared with an older one


@dataclass(frozen=True)
class Change:
    """One figure then and now, in ms and in the yardstick's time where both files have one.

    by     how much longer it takes now, a share: 0.1 is a tenth; of the yardstick's time where there is one
    sure   do the two intervals lie apart?
    """

    what: str
    then_ms: float
    now_ms: float
    by: float
    sure: bool
    relative: bool

    def line(self) -> str:
        noise = "" if self.sure else ", within the noise"
        beside = f" beside {YARDSTICK}" if self.relative else ""
        return f"{self.what}: {self.then_ms:g} -> {self.now_ms:g} ms, {self.by:+.1%}{beside}{noise}"


def same_case(old: Result, network: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """The older file's case of this network, batch, type, size, device and number of threads. ValueError where it has none."""
    if old["network"] != network:
        differs = ", ".join(
            f"{k} {old['network'].get(k)} there, {v} here" for k, v in network.items() if old["network"].get(k) != v
        )
        raise ValueError(f"that file is of another network: {differs}")
    keys = ("batch", "dtype", "size", "device_name", "threads")
    found = [c for c in old["cases"] if all(c.get(k) == case[k] for k in keys)]
    if not found:
        wanted, there = (", ".join(f"{k} {c.get(k)}" for k in keys) for c in (case, old["cases"][0]))
        raise ValueError(f"that file has no case of {wanted}; its first is of {there}")
    return found[0]


def changes(old: Result, new: Result) -> list[Change]:
    """Every figure of ours in the newer file against the older one's. Loops of different lengths are not compared: they share
    their beginning among more or fewer steps. ValueError as of `same_case`.

    Machines have better and worse days, and whoever shares them: so ours is measured by plain PyTorch's time in the same rounds.
    """
    found = []
    for case in new["cases"]:
        before = same_case(old, new["network"], case)
        for what in ("forward", "loop") if before["steps"] == case["steps"] else ("forward",):
            name = f"batch {case['batch']}, {case['dtype']}, {what}"
            found.append(_change(name, _figures(before, what), _figures(case, what)))
    return found


Figures = tuple[dict[str, Any], dict[str, Any] | None]


def _figures(case: dict[str, Any], what: str) -> Figures:
    """Ours, and plain PyTorch's."""
    yardstick = [row[what] for row in case["rows"] if row["engine"] == YARDSTICK]
    return case["rows"][0][what], yardstick[0] if yardstick else None


def _change(what: str, then: Figures, now: Figures) -> Change:
    (mine_then, plain_then), (mine_now, plain_now) = then, now
    if plain_then is None or plain_now is None:
        by = mine_now["ms"] / mine_then["ms"] - 1
        sure = mine_now["low"] > mine_then["high"] or mine_now["high"] < mine_then["low"]
        return Change(what, mine_then["ms"], mine_now["ms"], by, sure, False)
    by = plain_then["ours_is_faster_by"] / plain_now["ours_is_faster_by"] - 1
    (low_then, high_then), (low_now, high_now) = plain_then["from_to"], plain_now["from_to"]
    return Change(what, mine_then["ms"], mine_now["ms"], by, high_now < low_then or low_now > high_then, True)


def slower(found: list[Change], threshold: float) -> list[Change]:
    """What takes longer by more than `threshold`, beyond the noise."""
    return [c for c in found if c.sure and c.by > threshold]
