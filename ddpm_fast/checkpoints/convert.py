"""Conversion of checkpoints of other codebases; see docs/checkpoints.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..diffusion.schedule import NoiseSchedule
from ..models.config import UNetConfig
from ..models.unet import UNet
from ..utils.input_files import naming, read_json_object
from ..utils.validation import is_count, is_number, shown
from .conversion import Conversion, Process, Setting
from .edm import convert_edm
from .ho import convert_ho
from .openai import convert_openai, read_architecture
from .openai_flags import DEFAULTS, SILENT, Architecture, OpenAIFlags, check_flags, parse_flags
from .published import CODEBASES, NEEDED, PUBLISHED, HoSettings
from .raw_weights import RawWeights, choose_file, file_sha256
from .weights import WEIGHTS, read_unet

# what diffusers' EMAModel.save_pretrained adds to the network's config.json
_EMA_KEYS = frozenset(
    {
        "decay",
        "min_decay",
        "optimization_step",
        "update_after_step",
        "use_ema_warmup",
        "inv_gamma",
        "power",
    }
)


def convert_checkpoint(
    source: str | Path,
    codebase: str | None = None,
    *,
    published: str | None = None,
    flags: str | None = None,
    process: Process | None = None,
    sample_size: int | None = None,
    dropout: float | None = None,
    network_only: bool = False,
    trust: bool = False,
) -> Conversion:
    """Converts a checkpoint of another codebase, in memory.

    What no weight says is an argument: there are no defaults for it.

    Args:
        source: A file; for OpenAI also a folder with ema_RATE_STEP.pt, for "diffusers-unet" a
            folder with config.json and weights.
        codebase: One of `published.CODEBASES`; default: that of `published`.
        published: Name of a published file, one of `published.PUBLISHED`, instead of the rest.
        flags: OpenAI's flags, as on the command line of its scripts.
        process: For "ho", "edm" and "diffusers-unet".
        sample_size: Training size in pixels, for "ho".
        dropout: Of training, for "ho" and "edm".
        network_only: Convert no process, for "edm" and "diffusers-unet".
        trust: Whether pickles are read, by `torch.load(weights_only=True)`.

    Raises:
        ValueError: A file is missing, damaged or refused, tensors do not fit the codebase, a
            setting is missing or contradicts the weights. The message is one line.
    """
    codebase = _codebase(codebase, published)
    given: dict[str, Any] = dict(
        flags=flags, process=process, sample_size=sample_size, dropout=dropout
    )
    _check_arguments(
        codebase, published, {k for k, v in given.items() if v is not None}, network_only
    )
    if sample_size is not None and not is_count(sample_size):
        raise ValueError(f"sample_size is {shown(sample_size)}; expected an integer of at least 1")
    if dropout is not None and not (is_number(dropout) and 0 <= dropout < 1):
        raise ValueError(f"dropout is {shown(dropout)}; expected a number from 0 to below 1")
    if codebase == "diffusers-unet":
        return _convert_folder(Path(source), process)
    text = str(PUBLISHED[published].settings) if published is not None else flags or ""
    openai_flags = parse_flags(text, codebase) if codebase in DEFAULTS else None
    path, notes = choose_file(Path(source))
    weights = RawWeights(path, trust)
    weights.notes += notes
    weights.strip_prefix("module.")
    try:
        if openai_flags is not None:
            return _convert_openai(weights, openai_flags, published)
        if codebase == "ho":
            return _convert_ho(weights, published, process, sample_size, dropout)
        return _convert_edm(weights, process, dropout)
    except ValueError as error:  # those of a configuration do not name the file
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from None


def _codebase(codebase: str | None, published: str | None) -> str:
    if published is not None and published not in PUBLISHED:
        raise ValueError(f"published is {shown(published)}; expected one of {', '.join(PUBLISHED)}")
    if codebase is None and published is None:
        raise ValueError("codebase is missing; give one, or the name of a published file")
    implied = PUBLISHED[published].codebase if published is not None else codebase
    if codebase not in (None, implied):
        raise ValueError(f"codebase is {shown(codebase)}; expected {implied}, that of {published}")
    if implied not in CODEBASES:
        raise ValueError(f"codebase is {shown(implied)}; expected one of {', '.join(CODEBASES)}")
    return implied


def _check_arguments(
    codebase: str, published: str | None, given: set[str], network_only: bool
) -> None:
    if network_only and codebase not in ("edm", "diffusers-unet"):
        raise ValueError(f"network_only is for edm and diffusers-unet; codebase is {codebase}")
    needed = set() if published is not None else set(NEEDED[codebase])
    needed -= {"process"} if network_only else set()
    if superfluous := sorted(given - needed):
        reason = f"{codebase} takes none"
        if published is not None:
            reason = f"{published} implies it"
        elif network_only:
            reason = "network_only converts none"
        raise ValueError(f"{superfluous[0]} was given; {reason}: leave it out")
    if missing := sorted(needed - given):
        raise ValueError(
            f"{', '.join(missing)} missing: no weight says it; "
            "give it, or the name of a published file"
        )


def _convert_ho(
    weights: RawWeights,
    published: str | None,
    process: Process | None,
    sample_size: int | None,
    dropout: float | None,
) -> Conversion:
    settings = PUBLISHED[published].settings if published is not None else None
    if isinstance(settings, HoSettings):
        process = Process(NoiseSchedule.linear(), "eps", settings.variance, 1.0)
        sample_size, dropout = settings.sample_size, settings.dropout
    assert process is not None and sample_size is not None and dropout is not None
    unet = convert_ho(weights, sample_size, dropout)
    if isinstance(settings, HoSettings) and unet.config.channels != settings.widths:
        raise ValueError(
            f"{weights.path} has levels of {unet.config.channels} channels; "
            f"{published} has {settings.widths}: give the name of this file"
        )
    origin = "given" if published is None else f"published file {published}"
    silent = [("sample_size", sample_size), ("dropout", dropout), *_process_items(process)]
    fixed = [("attention heads", 1), ("padding of downsampling", "right and bottom")]
    return _conversion(weights, "ho", unet, process, _settings(silent, origin, fixed))


def _convert_edm(weights: RawWeights, process: Process | None, dropout: float | None) -> Conversion:
    assert dropout is not None
    unet = convert_edm(weights, dropout)
    if process is not None:
        weights.notes.append(
            "the network is called with t = 0 .. T-1, which is right for iDDPM preconditioning only"
        )
    silent = [("dropout", dropout), *_process_items(process)]
    fixed = [("channels per head", 64), ("QKV order", "(head, channel, qkv)")]
    return _conversion(weights, "edm", unet, process, _settings(silent, "given", fixed))


def _convert_openai(weights: RawWeights, flags: OpenAIFlags, published: str | None) -> Conversion:
    architecture = read_architecture(weights)
    check_flags(flags, architecture)
    values = flags.values
    attended = [*architecture.attention[:-1], True]  # the middle attends
    unet = convert_openai(
        weights,
        architecture,
        sample_size=values["image_size"],
        heads=[
            flags.heads(width) if attends else 1
            for width, attends in zip(architecture.widths, attended, strict=True)
        ],
        new_attention_order=values.get("use_new_attention_order", False),
        time_scale=flags.time_scale,
        dropout=values["dropout"],
    )
    schedule = _openai_schedule(values["noise_schedule"], values["diffusion_steps"])
    process = Process(
        schedule, flags.prediction, flags.variance, 1.0 if values["clip_denoised"] else None
    )
    if published is None:
        weights.notes += _other_settings(flags, architecture)
    if flags.ignored:
        weights.notes.append(f"flags without effect here: {', '.join(flags.ignored)}")
    settings = tuple(
        Setting(n, str(values[n]), _origin(flags, n, published)) for n in SILENT if n in values
    )
    return _conversion(weights, flags.codebase, unet, process, settings)


def _origin(flags: OpenAIFlags, name: str, published: str | None) -> str:
    stated = name in flags.stated
    return f"published file {published}" if stated and published is not None else flags.origin(name)


def _openai_schedule(name: str, steps: int) -> NoiseSchedule:
    """The linear one is Ho's, stretched so that its end does not depend on the number of steps."""
    if name == "cosine":
        return NoiseSchedule.cosine(steps)
    scale = 1000 / steps
    if scale * 0.02 >= 1:
        raise ValueError(
            f"--diffusion_steps is {steps}; expected at least 21 with a linear schedule"
        )
    return NoiseSchedule.linear(scale * 1e-4, scale * 0.02, steps)


def _other_settings(flags: OpenAIFlags, architecture: Architecture) -> list[str]:
    """A note if the weights are like those of published files, but the flags differ."""
    names = set(SILENT) - {"dropout", "clip_denoised"}
    differing = []
    for candidate, published in PUBLISHED.items():
        if not isinstance(published.settings, str):
            continue
        other = parse_flags(published.settings, published.codebase)
        try:
            check_flags(other, architecture)
        except ValueError:
            continue
        changed = [
            f"{n} {other.values.get(n)}"
            for n in SILENT
            if n in names & set(flags.values)
            and flags.values[n] != other.values.get(n, flags.values[n])
        ]
        if not changed:
            return []
        differing.append(f"{candidate} has this architecture with {', '.join(changed)}")
    return [f"check the flags: {differing[0]}"] if differing else []


def _convert_folder(folder: Path, process: Process | None) -> Conversion:
    """A folder with config.json and weights, without a scheduler."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a directory; expected a folder with config.json and {WEIGHTS}"
        )
    content, notes = read_json_object(folder / "config.json"), []
    if ema := sorted(_EMA_KEYS & set(content)):
        notes.append(f"keys of an EMAModel were left out: {', '.join(ema)}")
    with naming(folder / "config.json"):
        config = UNetConfig.from_config({k: v for k, v in content.items() if k not in _EMA_KEYS})
    unet = read_unet(folder, config)
    _check_outputs(folder, unet, process)
    settings = _settings(_process_items(process), "given", [])
    path = folder / WEIGHTS
    return Conversion(
        unet, process, "diffusers-unet", path, file_sha256(path), settings, tuple(notes)
    )


def _check_outputs(path: Path, unet: UNet, process: Process | None) -> None:
    """Only a network with learned variances has twice as many outputs as inputs."""
    if process is None:
        return
    c, learned = unet.config, process.variance.startswith("learned")
    if c.out_channels != c.in_channels * (2 if learned else 1):
        raise ValueError(
            f"variance {process.variance} contradicts the weights in {path}: "
            f"{c.in_channels} channels in, {c.out_channels} out; twice as many out mean "
            "learned_range"
        )


def _process_items(process: Process | None) -> list[tuple[str, Any]]:
    if process is None:
        return []
    s = process.schedule
    return [
        ("timesteps", len(s)),
        ("schedule", f"beta from {s.beta[0]:.6g} to {s.beta[-1]:.6g}"),
        ("prediction", process.prediction),
        ("variance", process.variance),
        ("clip", process.clip),
    ]


def _settings(
    silent: list[tuple[str, Any]], origin: str, fixed: list[tuple[str, Any]]
) -> tuple[Setting, ...]:
    return (
        *(Setting(name, str(value), origin) for name, value in silent),
        *(Setting(name, str(value), "fixed by the codebase") for name, value in fixed),
    )


def _conversion(
    weights: RawWeights,
    codebase: str,
    unet: UNet,
    process: Process | None,
    settings: tuple[Setting, ...],
) -> Conversion:
    _check_outputs(weights.path, unet, process)
    notes = (f"tensors: {weights.dtypes()}, every one used once", *weights.notes)
    return Conversion(unet, process, codebase, weights.path, weights.sha256, settings, notes)
