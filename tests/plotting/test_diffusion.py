import io
import sys
from importlib import import_module

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, save_pretrained
from ddpm_fast.data.animation import HOLD, MIN_FRAMES, save_animation
from ddpm_fast.data.pixels import from_uint8
from ddpm_fast.diffusion.forward_process import q_chain
from ddpm_fast.kernels import noise
from ddpm_fast.plotting.diffusion import (
    CAPTION,
    Reverse,
    forward_strip,
    frames_of,
    plot_schedules,
    reverse_trajectory,
)

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
CHAIN = NoiseSchedule.linear(1e-3, 0.2, 30)


def tiny():
    torch.manual_seed(0)
    config = dict(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        channels=(8, 16),
        layers=1,
        attention=(False, True),
    )
    return UNet(UNetConfig(**config, norm_groups=4)).eval()


def test_schedules_are_drawn_as_they_are(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "ddpm_fast.plotting.diffusion.save", lambda picture, out: drawn.append(picture)
    )
    zero = NoiseSchedule.linear().zero_terminal_snr()
    plot_schedules(
        {"linear": NoiseSchedule.linear(), "linear, zero terminal SNR": zero}, tmp_path / "a.png"
    )
    beta, bar, snr = drawn[0].axes
    for k, schedule in enumerate((NoiseSchedule.linear(), zero)):
        assert np.array_equal(beta.lines[k].get_ydata(), schedule.beta)
        assert np.array_equal(snr.lines[k].get_ydata()[:-1], schedule.snr[:-1])
        assert np.array_equal(bar.lines[k].get_ydata()[:-1], schedule.alpha_bar[:-1])
    assert np.isnan(snr.lines[1].get_ydata()[-1])


def test_the_forward_strip_is_one_trajectory(tmp_path):
    schedule = NoiseSchedule.linear()
    t, x = forward_strip(schedule, PIXELS, seed=3, steps=10)
    assert t == list(range(99, 1000, 100)) and forward_strip(schedule, PIXELS, 3, 1)[0] == [999]
    x_0 = from_uint8(torch.from_numpy(PIXELS))
    seed, image = torch.full((3,), 3), torch.arange(3)
    eps = [
        noise.noise(seed, image, torch.full((3,), at), noise.Q_SAMPLE, 1, 8, 8)
        for at in range(1000)
    ]
    assert torch.equal(x, q_chain(schedule, x_0, torch.stack(eps))[t])
    assert abs(float(x[-1].std()) - 1) < 0.2
    one, two = (forward_strip(schedule, PIXELS, 3, n)[1] for n in (1000, 500))
    assert torch.equal(one[-1], two[-1]) and torch.equal(one[-1], x[-1])
    step = (
        one[500] - np.sqrt(1 - schedule.beta[500]) * one[499]
    )  # neighbours differ by one step's noise
    assert abs(float(step.std()) / np.sqrt(schedule.beta[500]) - 1) < 0.2
    with pytest.raises(ValueError, match="1001 steps; expected 1 to 1000"):
        forward_strip(schedule, PIXELS, 0, 1001)


@pytest.mark.parametrize(
    ("how", "moments"),
    [({}, 6), (dict(solver="ddim", steps=7), 7), (dict(solver="dpm++2m", steps=9), 40)],
)
def test_the_reverse_strip_ends_in_what_sample_draws(how, moments):
    sampler = Sampler(tiny(), CHAIN, (1, 8, 8))
    trajectory = reverse_trajectory(sampler, range(5, 8), seed=2, moments=moments, **how)
    want = sampler.sample(range(5, 8), seed=2, **how).numpy()
    assert np.array_equal(trajectory.x[-1], want)
    assert np.array_equal(trajectory.x_0[-1], want)  # the last step goes to x_0 itself
    count = min(moments, len(sampler.table(**how)))
    assert len(trajectory.t) == len(trajectory.x) == count + 1
    assert trajectory.t[0] == 30 and trajectory.t[-1] == -1 and (np.diff(trajectory.t) < 0).all()
    start = sampler.begin(torch.arange(5, 8), 2).x
    assert np.array_equal(
        trajectory.x[0],
        ((start.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy(),
    )


@pytest.mark.parametrize("preset", ["exact", "openai", "diffusers", "ddim"])
def test_the_reverse_strip_rounds_as_its_preset_does(preset):
    sampler = Sampler(tiny(), CHAIN, (1, 8, 8))
    how = dict(solver="ddim", steps=5, preset=preset)
    assert np.array_equal(
        reverse_trajectory(sampler, 4, **how).x[-1], sampler.sample(4, **how).numpy()
    )


def test_what_is_not_finite_is_said():
    with pytest.raises(RuntimeError, match="contain NaN or Inf"):
        reverse_trajectory(Sampler(lambda x, t: x * float("nan"), CHAIN, (1, 8, 8)), 1)


def frames():
    generator = np.random.default_rng(1)
    x, x_0 = generator.integers(0, 256, (2, 6, 2, 8, 8, 1), dtype=np.uint8)
    return frames_of(Reverse([5, 4, 3, 2, 1, -1], x, x_0), 8)


def test_frames_hold_both_rows():
    made = frames()
    assert len(made) == 6 and made[0].shape == (2 * (CAPTION + 10 * 8) + 6, 2 * 10 * 8, 3)
    assert not made[0][CAPTION + 1 : CAPTION + 7].any()  # the border between images
    x = np.random.default_rng(1).integers(0, 256, (2, 6, 2, 8, 8, 1), dtype=np.uint8)[0]
    assert np.array_equal(
        made[2][CAPTION + 8 : CAPTION + 72 : 8, 8:72:8], x[2, 0].repeat(3, axis=2)
    )
    assert (made[2][:CAPTION] != made[3][:CAPTION]).any()  # t is written
    assert (made[0][-1] == 64).all() and (made[-1][-1] == (0, 158, 115)).all()  # the bar


def test_gif_decodes_to_its_frames(tmp_path):
    made = frames()
    save_animation(made, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as film:
        first = np.asarray(film.convert("RGB")).astype(int)
        time = 0
        for k in range(film.n_frames):  # Pillow joins frames that are alike
            film.seek(k)
            time += film.info["duration"]
        last = np.asarray(film.convert("RGB")).astype(int)
    assert time == (MIN_FRAMES + HOLD) * 50
    for got, want in ((first, made[0]), (last, made[-1])):
        assert np.abs(got - want).mean() < 2


def test_mp4_decodes_to_its_frames(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    made = frames()
    save_animation(made, tmp_path / "a.mp4")
    with av.open(io.BytesIO((tmp_path / "a.mp4").read_bytes())) as film:
        got = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(got) == MIN_FRAMES + HOLD and got[0].shape == made[0].shape
    for k in (0, 25, 59, -1):
        assert np.abs(got[k].astype(int) - made[-1 if k < 0 else k // 10]).mean() < 12
    monkeypatch.setattr(av, "codecs_available", set(av.codecs_available) - {"libx264"})
    save_animation(made, tmp_path / "b.mp4")
    with av.open(io.BytesIO((tmp_path / "b.mp4").read_bytes())) as film:
        assert film.streams.video[0].codec_context.name == "mpeg4"
        assert sum(1 for _ in film.decode(video=0)) == MIN_FRAMES + HOLD
    with pytest.raises(ValueError, match="no frames"):
        save_animation([], tmp_path / "c.mp4")


@pytest.fixture
def call(tmp_path, capsys):
    pytest.importorskip("click")
    pytest.importorskip("safetensors")
    np.save(tmp_path / "images.npy", PIXELS)
    save_pretrained(tmp_path / "model", tiny(), CHAIN)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            import_module("ddpm_fast.cli.main").main(["plot", *(str(a) for a in arguments)])
        return end.value.code, capsys.readouterr().err

    return run


def test_command_line(call, tmp_path):
    data, weights = (
        ("--data-dir", tmp_path / "images.npy", "--resolution", 8),
        ("--weights", tmp_path / "model"),
    )
    good = [
        ("schedule", "--zero-snr", "--out", tmp_path / "a.png"),
        ("schedule", *weights, "--out", tmp_path / "b.svg"),
        ("forward", *data, "--image", 0, "--image", 2, "--steps", 4, "--out", tmp_path / "c.png"),
        ("reverse", *weights, "--images", "2-3", "--moments", 3, "--out", tmp_path / "d.png"),
        (
            "reverse",
            *weights,
            "--images",
            1,
            "--solver",
            "dpm++2m",
            "--steps",
            4,
            "--out",
            tmp_path / "e.gif",
        ),
        (
            "reverse",
            *weights,
            "--images",
            1,
            "--solver",
            "ddim",
            "--steps",
            4,
            "--out",
            tmp_path / "f.mp4",
        ),
    ]
    for arguments in good:
        assert call(*arguments) == (0, "")
        assert arguments[-1].stat().st_size > 500
    bad = {
        ("schedule", "--schedule", "square"): "square",
        ("schedule", "--schedule", "linear", *weights): "not both",
        ("schedule", "--timesteps", 50, *weights): "not both",
        ("schedule", "--out", tmp_path / "a.txt"): "expected .png, .svg or .pdf",
        ("schedule", "--out", tmp_path / "no" / "a.png"): "does not exist",
        ("forward", *data, "--image", 3): "--image 3: .* holds 3 images",
        ("forward", "--data-dir", tmp_path / "nothing"): "does not exist",
        (
            "reverse",
            *weights,
            "--out",
            tmp_path / "a.avi",
        ): "expected .png, .svg, .pdf, .gif or .mp4",
        ("reverse", *weights, "--steps", 31): "31 steps",
        ("reverse", *weights, "--images", "none"): "--images none",
    }
    for arguments, message in bad.items():
        code, err = call(*arguments)
        assert code == 2 and err.count("\n") == 1
        with pytest.raises(ValueError, match=message):
            raise ValueError(err)


@pytest.mark.parametrize(("module", "name"), [("av", "a.mp4"), ("matplotlib.figure", "a.png")])
def test_a_missing_library_is_told_before_the_drawing(call, tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(
        "ddpm_fast.cli.actions.plot.reverse_trajectory", lambda *_, **__: pytest.fail("drew")
    )
    code, err = call("reverse", "--weights", tmp_path / "model", "--out", tmp_path / name)
    assert code == 2 and "pip install 'ddpm-fast[plot]'" in err and err.count("\n") == 1
