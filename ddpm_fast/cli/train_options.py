"""Options of `ddpm-fast train`, under the names of diffusers' train_unconditional.py where it has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .choices import FITS
from .common import PATH

# Written out, because the modules that define them import PyTorch; a test compares them.
LOSSES = ("simple", "min-snr", "hybrid", "vlb")
LR_SCHEDULERS = ("constant", "constant-with-warmup", "cosine", "linear")
PRECISIONS = ("no", "bf16", "fp16")
PREDICTIONS = ("eps", "x_0", "v")
TIMESTEP_SAMPLING = ("uniform", "loss-aware")
SCHEDULES = ("linear", "scaled-linear", "squaredcos-cap-v2", "sigmoid")
DIFFUSERS_PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v-prediction": "v"}


def _option(name: str, default: Any, help: str, **more: Any) -> Any:
    return click.option(name, default=default, show_default=default is not None, help=help, **more)


OPTIONS = (
    _option(
        "--train-data-dir",
        None,
        "Folder of images (sub-folders: classes), .npz, .npy, or IDX files.",
        type=PATH,
    ),
    _option(
        "--dataset-name", None, "Data set of the Hugging Face hub instead (needs its library)."
    ),
    _option(
        "--output-dir",
        "ddpm-model",
        "The run: model/, checkpoints, log.jsonl, samples/.",
        type=PATH,
    ),
    _option(
        "--resolution", 64, "Side of the square training images, in pixels.", type=click.IntRange(1)
    ),
    _option(
        "--fit",
        "crop",
        "crop: scale and keep the middle; pad: shrink if too large, then centre on black.",
        type=click.Choice(FITS),
    ),
    _option(
        "--center-crop",
        True,
        "Nothing else is done: for scripts that say so.",
        is_flag=True,
        hidden=True,
    ),
    _option("--random-flip", False, "Mirror half of the images.", is_flag=True),
    _option(
        "--class-labels/--no-class-labels",
        True,
        "Train class-conditionally where the data has classes.",
    ),
    _option(
        "--validation-data-dir",
        None,
        "Held-out images.  [default: the test split of IDX files, else training images]",
        type=PATH,
    ),
    _option("--channels", "64,128,128", "Width of each level of the network."),
    _option(
        "--layers",
        "2",
        "Residual blocks of each level: one number, or one per level such as 1,1,2.",
    ),
    _option(
        "--attention",
        None,
        "Levels with attention, from 0, the finest, such as 1,2.  [default: the coarsest]",
    ),
    _option("--head-dim", 32, "Channels of an attention head.", type=click.IntRange(1)),
    _option(
        "--dropout", 0.0, "In every residual block.", type=click.FloatRange(0, 1, max_open=True)
    ),
    _option(
        "--model-config-name-or-path",
        None,
        "diffusers' UNet2DModel config.json instead of the five above.",
        type=PATH,
    ),
    _option(
        "--weights",
        None,
        "Start from this checkpoint's network and weights (a diffusers folder).",
        type=PATH,
    ),
    _option("--train-batch-size", 16, "Images of one forward pass.", type=click.IntRange(1)),
    _option(
        "--gradient-accumulation-steps", 1, "Batches of one optimizer step.", type=click.IntRange(1)
    ),
    _option("--num-epochs", 100, "Passes over the data.", type=click.IntRange(1)),
    _option(
        "--max-train-steps",
        None,
        "Optimizer steps, instead of --num-epochs.",
        type=click.IntRange(1),
    ),
    _option(
        "--max-seconds",
        None,
        "Stop after so long, with a checkpoint.",
        type=click.FloatRange(0, min_open=True),
    ),
    _option("--learning-rate", 1e-4, "At its highest."),
    _option(
        "--lr-scheduler",
        "cosine",
        "How the rate runs.",
        type=click.Choice(LR_SCHEDULERS),
    ),
    _option("--lr-warmup-steps", 500, "The rate rises over so many steps."),
    _option(
        "--lr-decay-start",
        0.0,
        "Fraction of the steps before which cosine and linear stay at --learning-rate.",
    ),
    _option("--adam-beta1", 0.95, "AdamW."),
    _option("--adam-beta2", 0.999, "AdamW."),
    _option("--adam-weight-decay", 1e-6, "AdamW."),
    _option("--adam-epsilon", 1e-8, "AdamW."),
    _option("--max-grad-norm", 1.0, "Longer gradients are shortened to this."),
    _option("--use-ema/--no-use-ema", True, "Average the weights."),
    _option(
        "--ema-inv-gamma", 1.0, "The average keeps 1 - (1 + step / inv_gamma)^-power of itself."
    ),
    _option("--ema-power", 0.75, "See --ema-inv-gamma."),
    _option(
        "--ema-decays",
        "0.9999",
        "And never more than this: one average per value; the first is model/, 0.99 model-ema-0.99/.",
    ),
    _option("--ema-max-decay", None, "diffusers' name for a single --ema-decays.", type=float),
    _option(
        "--mixed-precision",
        "no",
        "Of the network's operations; weights stay fp32.",
        type=click.Choice(PRECISIONS),
    ),
    _option(
        "--prediction-type",
        "epsilon",
        "What the network predicts.",
        type=click.Choice([*DIFFUSERS_PREDICTIONS, *PREDICTIONS]),
    ),
    _option(
        "--loss-type",
        "simple",
        "What is minimised.",
        type=click.Choice(LOSSES),
    ),
    _option("--snr-gamma", 5.0, "Of the loss min-snr."),
    _option(
        "--timestep-sampling",
        "uniform",
        "How t is drawn.",
        type=click.Choice(TIMESTEP_SAMPLING),
    ),
    _option("--ddpm-num-steps", 1000, "T of the noise schedule.", type=click.IntRange(1)),
    _option("--ddpm-beta-schedule", "linear", "Noise schedule.", type=click.Choice(SCHEDULES)),
    _option(
        "--rescale-betas-zero-snr",
        False,
        "Let the schedule end in pure noise; predict sample or v.",
        is_flag=True,
    ),
    _option("--seed", 0, "Of everything that is drawn."),
    _option("--compile/--no-compile", False, "The network through torch.compile."),
    _option(
        "--deterministic/--no-deterministic", True, "On a GPU: only kernels that repeat to the bit."
    ),
    _option("--device", None, "cpu, cuda, cuda:1 ...  [default: the GPU if there is one]"),
    _option(
        "--logging-steps", 50, "A line in log.jsonl every so many steps.", type=click.IntRange(1)
    ),
    _option(
        "--checkpointing-steps", 500, "A checkpoint every so many steps.", type=click.IntRange(1)
    ),
    _option("--checkpoints-total-limit", 2, "How many are kept.", type=click.IntRange(1)),
    _option(
        "--save-model-epochs",
        10,
        "Write model/ every so many epochs; 0: at the end only.",
        type=click.IntRange(0),
    ),
    _option(
        "--save-images-epochs",
        10,
        "Draw a grid, take the validation loss every so many epochs; 0: never.",
        type=click.IntRange(0),
    ),
    _option(
        "--eval-images-every",
        0,
        "Log KID every so many training images, in whole steps; 0: never. Needs the extra metrics.",
        type=click.IntRange(0),
    ),
    _option(
        "--eval-images",
        2000,
        "Images drawn from every average for KID, by 50 steps of DDIM.",
        type=click.IntRange(4),
    ),
    _option(
        "--resume-from-checkpoint",
        None,
        '"latest", or a checkpoint of this run: resume from it bit-exactly, with its options.',
    ),
)


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: adds the options to a command, in their order."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
