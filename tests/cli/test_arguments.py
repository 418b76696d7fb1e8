"""Property test of arbitrary command lines, with stubs for long computations.

Every command line ends with a result (exit code 0) or with one line on stderr and exit code 2,
without a traceback, within five seconds, and leaves no partial file.
"""

import contextlib
import io
import itertools
import signal
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, save_pretrained
from ddpm_fast.checkpoints.checkpoint import load_pretrained

click = pytest.importorskip("click")
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
main = import_module("ddpm_fast.cli.main")
ACTIONS = "ddpm_fast.cli.actions"


def commands(group, prefix=()):
    context = click.Context(group, **main._SETTINGS)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if name == "train":
            continue  # tests/training tests it
        if isinstance(command, click.Group):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


COMMANDS = list(commands(main.cli))
NUMBERS = ["0", "1", "2", "4", "8", "-1", "1.5", "1e3", "nan", "-inf", "", " ", "٣", "½", "0x8"]
NUMBERS += ["9" * 12, "9" * 19, "9" * 30, "9" * 5000]
LISTS = ["1,2", "2,1,", "1-3", "3-1", "-3", "1-", "8x8", "8x12", "7x9", "x", "8x", "9" * 9 + "x8"]
LISTS += ["ddim4", "ddim0", "ddim-1", "none", "plain PyTorch", "a:b", "fp32", "bf16,fp32"]
OUTS = [
    "o.png",
    "o.npz",
    "O.PNG",
    "o.npy",
    "o.json",
    "o.svg",
    "o.gif",
    "folder",
    "existing",
    "existing/",
]
OUTS += ["/dev/full", "/dev/null", "-", "missing/o.png", "a" * 250 + ".png", "o.jpg", "o.png/", "."]
DEVICES = ["cpu", "cuda", "meta", "toaster", "cuda:99"]
INPUTS = ["model", "data.npz", "missing", "existing", "/dev/null", "data.npz/x", "\udcff"]
ANY = st.one_of(
    st.sampled_from([*NUMBERS, *LISTS, *OUTS[-8:]]),
    st.text(st.characters(exclude_characters="\0"), max_size=8),
)


def values(option):
    """Values of an option, mostly plausible ones."""
    if isinstance(option.type, click.Choice):
        likely = st.sampled_from([str(choice) for choice in option.type.choices])
    elif option.name == "out":
        likely = st.sampled_from(OUTS)
    elif option.name == "device":
        likely = st.sampled_from(DEVICES)
    elif isinstance(option.type, click.Path):
        likely = st.sampled_from(INPUTS)
    elif option.type.name == "text":
        likely = st.sampled_from([*LISTS, *NUMBERS])
    else:
        likely = st.sampled_from(NUMBERS)
    return st.one_of(likely, likely, likely, ANY)


@st.composite
def command_lines(draw):
    path, command = draw(st.sampled_from(COMMANDS))
    line = list(path)
    for option in command.params:
        if isinstance(option, click.Argument):
            line += draw(st.sampled_from([["model"], ["missing"], [], ["model", "more"]]))
        elif option.required and draw(st.integers(0, 9)):
            line += [option.opts[0], draw(st.sampled_from(["model", "model", "data.npz"]))]
        elif not draw(st.integers(0, 3)):
            name = draw(st.sampled_from([*option.opts, *option.secondary_opts]))
            name = name.replace("-", "_").replace("__", "--", 1) if draw(st.booleans()) else name
            line += [name] if option.is_flag else [name, draw(values(option))]
    return line + (draw(st.lists(ANY, max_size=1)) if not draw(st.integers(0, 9)) else [])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a checkpoint `model`, images `data.npz` and a folder `existing` of images."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    options = dict(sample_size=8, in_channels=1, out_channels=1, channels=(8, 16), layers=1)
    unet = UNet(UNetConfig(**options, attention=(False, True), norm_groups=4, num_classes=4))
    save_pretrained(home / "model", unet, NoiseSchedule.linear(timesteps=20))
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
    np.savez(home / "data.npz", images=images, labels=np.arange(40) % 4)
    (home / "existing").mkdir()
    (home / "existing" / "000007.png").write_bytes(b"")
    return home


@pytest.fixture(scope="module")
def stubs(home):
    """Replaces long computations: networks, engines, figures, benchmarks."""
    checkpoint = load_pretrained(home / "model")
    sampler = Sampler.from_checkpoint(checkpoint, "cpu", engine="reference")

    def stream(indices, params, labels, batch_size, progress, stop):
        sampler.table(params)
        for first in range(0, len(indices), batch_size):
            if first >= 8:
                stop.signal = signal.SIGINT  # as if the run had been interrupted
                return
            size = min(batch_size, len(indices) - first, 8)
            yield indices[first], torch.zeros(size, 8, 8, 1, dtype=torch.uint8)
            if size < batch_size and first + size < len(indices):
                stop.signal = signal.SIGINT
                return

    fake = SimpleNamespace(
        shape=sampler.shape,
        table=sampler.table,
        stream=stream,
        device=sampler.device,
        engine=sampler.engine,
        variance=sampler.variance,
        schedule=sampler.schedule,
        num_classes=4,
    )
    bits = SimpleNamespace(terms=np.ones((2, 20)), prior=np.ones(2), mean=1.0, standard_error=1.0)
    replaced = {
        "sample.Sampler": SimpleNamespace(from_checkpoint=lambda *_: fake),
        "evaluate.Sampler": SimpleNamespace(from_pretrained=lambda *_, **__: fake),
        "evaluate.Features": lambda device: None,
        "evaluate._draw": lambda *_: (torch.zeros(4, 8, 8, 1, dtype=torch.uint8), None, "model"),
        "evaluate._add_distances": lambda *_: [],
        "evaluate.bits_per_dimension": lambda *_, **__: bits,
        "plot.Sampler": SimpleNamespace(from_pretrained=lambda *_, **__: fake),
        "plot.reverse_trajectory": lambda s, i, seed, label, columns, show, **o: s.table(**o),
        "plot.plot_reverse": lambda *_: None,
        "plot.frames_of": lambda *_: None,
        "plot.save_animation": lambda *_: None,
        "plot.plot_schedules": lambda *_: None,
        "plot.plot_forward": lambda *_: None,
        "calibrate.calibrate": lambda *_: (_ for _ in ()).throw(ValueError("no convolution")),
        "bench.compare": lambda *_, **__: dict(cases=[], ceilings=[], kernels=[]),
        "bench.draw": lambda *_: None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in replaced.items():
            patch.setattr(f"{ACTIONS}.{name}", value)
        patch.setenv("DDPM_FAST_CACHE", str(home / "cache"))
        yield


def run(arguments):
    """Returns (exit code, stdout, stderr)."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main.main(arguments)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return end.value.code, *texts


def files():
    return {str(path) for path in Path().rglob("*")}


@pytest.mark.parametrize(
    "cases",
    [pytest.param(100, id="100"), pytest.param(3000, id="3000", marks=pytest.mark.acceptance)],
)
def test_a_command_line_has_a_result_or_one_line_of_error(cases, home, stubs, monkeypatch):
    folders = itertools.count()

    @hypothesis.settings(
        max_examples=cases, deadline=None, derandomize=True, database=None, print_blob=False
    )
    @hypothesis.given(command_lines())
    def check(line):
        folder = home / f"run{cases}-{next(folders)}"
        folder.mkdir()
        for name in ("model", "data.npz"):
            (folder / name).symlink_to(home / name)
        (folder / "existing").mkdir()
        (folder / "existing" / "000007.png").write_bytes(b"")
        monkeypatch.chdir(folder)
        before, start = files(), time.process_time()
        code, out, err = run(line)
        assert time.process_time() - start < 5
        if code == 2:
            assert err.startswith("ddpm-fast: error: ") and err.count("\n") == 1 and out == ""
            assert files() == before
        else:
            stopped = line[0] == "sample" and "stopped after" in err
            assert code == (130 if stopped else 0), err
            assert out.strip()
        assert not [name for name in files() if name.endswith(".tmp")]

    check()
