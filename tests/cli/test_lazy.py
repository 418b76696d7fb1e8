"""Help, versions and option errors do not import torch."""

import subprocess
import sys
from importlib import import_module

import pytest

click = pytest.importorskip("click")
main = import_module("ddpm_fast.cli.main")
choices = import_module("ddpm_fast.cli.choices")


QUICK = [
    ("--help", 0, "collect-env"),
    ("--version", 0, main.__version__),
    ("dance", 2, "No such command"),
    ("sample --help", 0, "--weights"),
    ("sample --shiny", 2, "No such option"),
    ("sample --weights x --solver euler", 2, "'euler' is not one of"),
    ("sample --weights x --images many", 2, "expected a count"),
    ("sample --weights x --size 32", 2, "expected HEIGHTxWIDTH"),
    ("sample --weights x --out x.jpg", 2, "unknown kind of file"),
    ("sample --weights x --seed -1", 2, "expected 0 to 2^64 - 1"),
    ("eval --help", 0, "--bits-per-dim"),
    ("eval --data-dir x", 2, "give --weights to draw from"),
    ("convert --help", 0, "adm-imagenet512"),
    ("convert a b", 2, "--from is missing"),
    ("convert a b --from ho", 2, "no weight says it"),
    ("plot reverse --help", 0, "--columns"),
    ("plot schedule --schedule square", 2, "'square' is not one of"),
    ("calibrate --help", 0, "--images"),
    ("bench latency --help", 0, "OpenVINO"),
    ("bench sweep --weights x --dtypes fp4", 2, "--dtypes is fp4"),
    ("info --gpu tpu", 2, "'tpu' is not one of"),
    ("collect-env --help", 0, "--json"),
    ("train --help", 0, "--train-data-dir"),
    ("train --shiny", 2, "No such option"),
    ("train --lr-scheduler round", 2, "'round' is not one of"),
]
WATCH = """
import sys
from ddpm_fast.cli.main import main
from resource import RUSAGE_SELF, getrusage
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "numpy", "triton"} & set(sys.modules), "torch was imported"
    print(getrusage(RUSAGE_SELF).ru_utime + getrusage(RUSAGE_SELF).ru_stime)
"""


@pytest.mark.parametrize(
    ("line", "code", "text"), QUICK, ids=lambda v: v if isinstance(v, str) else ""
)
def test_help_and_option_errors_do_not_import_torch(line, code, text):
    command = [sys.executable, "-c", WATCH, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code and text in done.stdout + done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    seconds = float(done.stdout.split()[-1])  # CPU time, because the machine may be busy
    assert seconds < 0.4


def test_choices_are_those_of_the_library():
    def of(module):
        return import_module(f"ddpm_fast.{module}")

    assert choices.SOLVERS == of("diffusion.solvers").SOLVERS
    assert choices.VARIANCES == of("diffusion.solvers").VARIANCES
    assert choices.SPACINGS == of("diffusion.timesteps").SPACINGS
    diffusers = of("checkpoints.diffusers")
    assert set(choices.STORED_VARIANCES) == set(diffusers.VARIANCES.values())
    assert set(choices.PREDICTIONS) == set(diffusers.PREDICTIONS.values())
    assert tuple(of("diffusion.presets").PRESETS) == choices.PRESETS
    assert tuple(of("engines.base").DTYPES) == choices.DTYPES
    assert choices.DTYPES[:3] == choices.NETWORK_DTYPES
    assert choices.ENGINES == of("engines.select").ENGINES
    assert choices.FITS == of("data.datasets").FITS
    assert tuple(of("engines.fused.roofline").GPUS) == choices.GPUS
    assert tuple(of("cli.actions.plot").SCHEDULES) == choices.SCHEDULES
    assert (choices.DDPM_FAST, *choices.BASELINES) == tuple(of("benchmark.baselines").BASELINES)
    assert of("engines.fused.calibration").FILE == "calibration.json"  # in calibrate --help


@pytest.mark.parametrize("name", main._COMMANDS)
def test_the_list_of_commands_has_the_first_lines_of_their_help(name):
    context = click.Context(main.cli, **main._SETTINGS)
    command = main.cli.get_command(context, name)
    assert command.name == name
    first = command.help.strip().splitlines()[0]
    if name not in ("bench", "train"):
        assert first.startswith(main._COMMANDS[name].help.rstrip("."))


def test_underscores_are_accepted():
    context = click.Context(main.cli, **main._SETTINGS)
    assert main.cli.resolve_command(context, ["collect_env"])[0] == "collect-env"
