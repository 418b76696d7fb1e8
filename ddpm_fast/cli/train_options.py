"""Options of `ddpm-fast train`; most names are those of diffusers' train_unconditional.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .choices import FITS
from .common import PATH

# Copies, because the modules that define these import PyTorch; a test compares them.
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
        "Images: a folder (sub-folders are classes), .npz, .npy or IDX files.",
        type=PATH,
    ),
    _option(
        "--dataset-name", None, "Data set of the Hugging Face hub instead; needs the extra train."
    ),
    _option(
        "--output-dir",
        "ddpm-model",
        "Directory of the run: model/, checkpoints, log.jsonl, samples/.",
        type=PATH,
    ),
    _option(
        "--resolution", 64, "Side of the square training images, in pixels.", type=click.IntRange(1)
    ),
    _option(
        "--fit",
        "crop",
        "crop: scale and crop the center; pad: shrink if too large, then pad with black.",
        type=click.Choice(FITS),
    ),
    _option(
        "--center-crop",
        True,
        "No effect; accepted for compatibility with diffusers' script.",
        is_flag=True,
        hidden=True,
    ),
    _option("--random-flip", False, "Mirror half of the images.", is_flag=True),
    _option(
        "--class-labels/--no-class-labels",
        True,
        "Train a class-conditional network if the data has classes.",
    ),
    _option(
        "--validation-data-dir",
        None,
        "Held-out images.  [default: test split of IDX files, else training images]",
        type=PATH,
    ),
    _option("--channels", "64,128,128", "Channels of each level of the network, finest first."),
    _option(
        "--layers",
        "2",
        "Residual blocks per level: one number, or one per level such as 1,1,2.",
    ),
    _option(
        "--attention",
        None,
        "Levels with attention such as 1,2; 0 is the finest.  [default: the coarsest]",
    ),
    _option("--head-dim", 32, "Channels per attention head.", type=click.IntRange(1)),
    _option(
        "--dropout",
        0.0,
        "Dropout probability in every residual block.",
        type=click.FloatRange(0, 1, max_open=True),
    ),
    _option(
        "--model-config-name-or-path",
        None,
        "diffusers' UNet2DModel config.json instead of the five options above.",
        type=PATH,
    ),
    _option(
        "--weights",
        None,
        "Checkpoint with the initial network and weights: a diffusers folder.",
        type=PATH,
    ),
    _option("--train-batch-size", 16, "Images per forward pass.", type=click.IntRange(1)),
    _option(
        "--gradient-accumulation-steps", 1, "Batches per optimizer step.", type=click.IntRange(1)
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
        "Time limit in seconds; a checkpoint is written at the end.",
        type=click.FloatRange(0, min_open=True),
    ),
    _option("--learning-rate", 1e-4, "Maximum learning rate."),
    _option(
        "--lr-scheduler",
        "cosine",
        "Schedule of the learning rate.",
        type=click.Choice(LR_SCHEDULERS),
    ),
    _option("--lr-warmup-steps", 500, "Steps of linear warm-up of the learning rate."),
    _option(
        "--lr-decay-start",
        0.0,
        "Fraction of the steps at which cosine and linear start to decay.",
    ),
    _option("--adam-beta1", 0.95, "First beta of AdamW."),
    _option("--adam-beta2", 0.999, "Second beta of AdamW."),
    _option("--adam-weight-decay", 1e-6, "Weight decay of AdamW."),
    _option("--adam-epsilon", 1e-8, "Epsilon of AdamW."),
    _option("--max-grad-norm", 1.0, "Maximum norm of the gradient; larger gradients are clipped."),
    _option("--use-ema/--no-use-ema", True, "Average the weights (EMA)."),
    _option(
        "--ema-inv-gamma",
        1.0,
        "Decay of the average: 1 - (1 + step / inv_gamma)^-power, at most --ema-decays.",
    ),
    _option("--ema-power", 0.75, "See --ema-inv-gamma."),
    _option(
        "--ema-decays",
        "0.9999",
        "Maximum decays, one average per value; the first is model/, 0.99 is model-ema-0.99/.",
    ),
    _option(
        "--ema-max-decay", None, "A single --ema-decays, under its name in diffusers.", type=float
    ),
    _option(
        "--mixed-precision",
        "no",
        "Precision of the network's operations; weights stay fp32.",
        type=click.Choice(PRECISIONS),
    ),
    _option(
        "--prediction-type",
        "epsilon",
        "Quantity that the network predicts.",
        type=click.Choice([*DIFFUSERS_PREDICTIONS, *PREDICTIONS]),
    ),
    _option(
        "--loss-type",
        "simple",
        "Loss function; see docs/training.md.",
        type=click.Choice(LOSSES),
    ),
    _option("--snr-gamma", 5.0, "Gamma of the loss min-snr."),
    _option(
        "--timestep-sampling",
        "uniform",
        "Distribution of the timesteps t.",
        type=click.Choice(TIMESTEP_SAMPLING),
    ),
    _option(
        "--ddpm-num-steps",
        1000,
        "Number of timesteps T of the noise schedule.",
        type=click.IntRange(1),
    ),
    _option("--ddpm-beta-schedule", "linear", "Noise schedule.", type=click.Choice(SCHEDULES)),
    _option(
        "--rescale-betas-zero-snr",
        False,
        "Rescale the schedule to end in pure noise; needs prediction type sample or v.",
        is_flag=True,
    ),
    _option("--seed", 0, "Seed of all random draws."),
    _option("--compile/--no-compile", False, "Run the network through torch.compile."),
    _option("--deterministic/--no-deterministic", True, "Use only deterministic kernels on a GPU."),
    _option("--device", None, "cpu, cuda, cuda:1 ...  [default: the GPU if there is one]"),
    _option("--logging-steps", 50, "Steps between entries in log.jsonl.", type=click.IntRange(1)),
    _option("--checkpointing-steps", 500, "Steps between checkpoints.", type=click.IntRange(1)),
    _option("--checkpoints-total-limit", 2, "Number of checkpoints.", type=click.IntRange(1)),
    _option(
        "--save-model-epochs",
        10,
        "Epochs between writes of model/; 0: only at the end.",
        type=click.IntRange(0),
    ),
    _option(
        "--save-images-epochs",
        10,
        "Epochs between sample grids and validation losses; 0: never.",
        type=click.IntRange(0),
    ),
    _option(
        "--eval-images-every",
        0,
        "Training images between KID evaluations; 0: never. Needs the extra metrics.",
        type=click.IntRange(0),
    ),
    _option(
        "--eval-images",
        2000,
        "Images drawn from every average for KID, with 50 steps of DDIM.",
        type=click.IntRange(4),
    ),
    _option(
        "--resume-from-checkpoint",
        None,
        'Checkpoint to resume from bit-exactly, with its options: "latest" or a path.',
    ),
)


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds the options to a command, in their order."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
