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
    ReverseTrajectory,
    forward_trajectory,
    frames_of,
    plot_schedules,
    reverse_trajectory,
)
from ddpm_fast.plotting.style import GREEN, rgb

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
CHAIN = NoiseSchedule.linear(1e-3, 0.2, 30)


def tiny():
    torch.manual_seed(0)
    config = dict(sample_size=8, in_channels=1, out_channels=1, channels=(8, 16), layers=1)
    return UNet(UNetConfig(**config, attention=(False, True), norm_groups=4)).eval()


def test_curves_of_schedules(tmp_path, monkeypatch):
    plots, linear = [], NoiseSchedule.linear()
    monkeypatch.setattr("ddpm_fast.plotting.diffusion.save", lambda plot, out: plots.append(plot))
    zero = linear.zero_terminal_snr()
    plot_schedules({"linear": linear, "linear, zero terminal SNR": zero}, tmp_path / "a.png")
    beta, bar, snr = plots[0].axes
    for k, schedule in enumerate((linear, zero)):
        assert np.array_equal(beta.lines[k].get_ydata(), schedule.beta)
        assert np.array_equal(snr.lines[k].get_ydata()[:-1], schedule.snr[:-1])
        assert np.array_equal(bar.lines[k].get_ydata()[:-1], schedule.alpha_bar[:-1])
    assert np.isnan(snr.lines[1].get_ydata()[-1])


def test_forward_trajectory(tmp_path):
    schedule = NoiseSchedule.linear()
    t, x = forward_trajectory(schedule, PIXELS, seed=3, steps=10)
    assert t == list(range(99, 1000, 100))
    assert forward_trajectory(schedule, PIXELS, 3, 1)[0] == [999]
    x_0 = from_uint8(torch.from_numpy(PIXELS))
    seed, image = torch.full((3,), 3), torch.arange(3)
    rows = (torch.full((3,), step) for step in range(1000))
    eps = [noise.noise(seed, image, row, noise.Q_SAMPLE, 1, 8, 8) for row in rows]
    assert torch.equal(x, q_chain(schedule, x_0, torch.stack(eps))[t])
    assert abs(float(x[-1].std()) - 1) < 0.2
    one, two = (forward_trajectory(schedule, PIXELS, 3, n)[1] for n in (1000, 500))
    assert torch.equal(one[-1], two[-1]) and torch.equal(one[-1], x[-1])
    step = one[500] - np.sqrt(1 - schedule.beta[500]) * one[499]  # noise of one step
    assert abs(float(step.std()) / np.sqrt(schedule.beta[500]) - 1) < 0.2
    with pytest.raises(ValueError, match="1001 steps; expected 1 to 1000"):
        forward_trajectory(schedule, PIXELS, 0, 1001)


@pytest.mark.parametrize(
    ("options", "records"),
    [({}, 6), (dict(solver="ddim", steps=7), 7), (dict(solver="dpm++2m", steps=9), 40)],
)
def test_the_last_record_of_a_reverse_trajectory_is_the_image(options, records):
    sampler = Sampler(tiny(), CHAIN, (1, 8, 8))
    trajectory = reverse_trajectory(sampler, range(5, 8), seed=2, records=records, **options)
    expected = sampler.sample(range(5, 8), seed=2, **options).numpy()
    assert np.array_equal(trajectory.x[-1], expected)
    assert np.array_equal(trajectory.x_0[-1], expected)  # the last step returns x_0
    count = min(records, len(sampler.table(**options)))
    assert len(trajectory.t) == len(trajectory.x) == count + 1
    assert trajectory.t[0] == 30 and trajectory.t[-1] == -1 and (np.diff(trajectory.t) < 0).all()
    start = (sampler.begin(torch.arange(5, 8), 2).x.clamp(-1, 1) + 1) * 127.5
    assert np.array_equal(trajectory.x[0], start.round().byte().permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("preset", ["exact", "openai", "diffusers", "ddim"])
def test_a_reverse_trajectory_is_rounded_as_the_preset_defines(preset):
    sampler = Sampler(tiny(), CHAIN, (1, 8, 8))
    options = dict(solver="ddim", steps=5, preset=preset)
    images = sampler.sample(4, **options).numpy()
    assert np.array_equal(reverse_trajectory(sampler, 4, **options).x[-1], images)


def test_nan_raises():
    with pytest.raises(RuntimeError, match="contain NaN or Inf"):
        reverse_trajectory(Sampler(lambda x, t: x * float("nan"), CHAIN, (1, 8, 8)), 1)


def make_frames():
    generator = np.random.default_rng(1)
    x, x_0 = generator.integers(0, 256, (2, 6, 2, 8, 8, 1), dtype=np.uint8)
    return frames_of(ReverseTrajectory([5, 4, 3, 2, 1, -1], x, x_0), 8)


def test_frames():
    frames = make_frames()
    assert len(frames) == 6 and frames[0].shape == (2 * (CAPTION + 10 * 8) + 6, 2 * 10 * 8, 3)
    assert not frames[0][CAPTION + 1 : CAPTION + 7].any()  # the border between images
    x = np.random.default_rng(1).integers(0, 256, (2, 6, 2, 8, 8, 1), dtype=np.uint8)[0]
    image = frames[2][CAPTION + 8 : CAPTION + 72 : 8, 8:72:8]
    assert np.array_equal(image, x[2, 0].repeat(3, axis=2))
    assert (frames[2][:CAPTION] != frames[3][:CAPTION]).any()  # t in the caption
    assert (frames[0][-1] == 64).all() and (frames[-1][-1] == rgb(GREEN)).all()  # progress bar


def test_gif_decodes_to_its_frames(tmp_path):
    frames = make_frames()
    save_animation(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        first = np.asarray(gif.convert("RGB")).astype(int)
        time = 0
        for k in range(gif.n_frames):  # Pillow merges equal frames
            gif.seek(k)
            time += gif.info["duration"]
        last = np.asarray(gif.convert("RGB")).astype(int)
    assert time == (MIN_FRAMES + HOLD) * 50
    for decoded, frame in ((first, frames[0]), (last, frames[-1])):
        assert np.abs(decoded - frame).mean() < 2


def test_mp4_decodes_to_its_frames(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    frames = make_frames()
    save_animation(frames, tmp_path / "a.mp4")
    with av.open(io.BytesIO((tmp_path / "a.mp4").read_bytes())) as video:
        decoded = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(decoded) == MIN_FRAMES + HOLD and decoded[0].shape == frames[0].shape
    for k in (0, 25, 59, -1):
        assert np.abs(decoded[k].astype(int) - frames[-1 if k < 0 else k // 10]).mean() < 12
    monkeypatch.setattr(av, "codecs_available", set(av.codecs_available) - {"libx264"})
    save_animation(frames, tmp_path / "b.mp4")
    with av.open(io.BytesIO((tmp_path / "b.mp4").read_bytes())) as video:
        assert video.streams.video[0].codec_context.name == "mpeg4"
        assert sum(1 for _ in video.decode(video=0)) == MIN_FRAMES + HOLD
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
    data = ("--data-dir", tmp_path / "images.npy", "--resolution", 8)
    weights = ("--weights", tmp_path / "model")
    animation = ("reverse", *weights, "--images", 1, "--steps", 4)
    good = [
        ("schedule", "--zero-snr", "--out", tmp_path / "a.png"),
        ("schedule", *weights, "--out", tmp_path / "b.svg"),
        ("forward", *data, "--image", 0, "--image", 2, "--steps", 4, "--out", tmp_path / "c.png"),
        ("reverse", *weights, "--images", "2-3", "--columns", 3, "--out", tmp_path / "d.png"),
        (*animation, "--solver", "dpm++2m", "--out", tmp_path / "e.gif"),
        (*animation, "--solver", "ddim", "--out", tmp_path / "f.mp4"),
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
        ("forward", *data, "--image", 3): "--image is 3; expected 0 to 2, the images of",
        ("forward", "--data-dir", tmp_path / "nothing"): "does not exist",
        ("reverse", *weights, "--out", tmp_path / "a.avi"): "expected .png, .* .gif or .mp4",
        ("reverse", *weights, "--steps", 31): "31 steps",
        ("reverse", *weights, "--images", "none"): "--images none",
    }
    for arguments, message in bad.items():
        code, err = call(*arguments)
        assert code == 2 and err.count("\n") == 1
        with pytest.raises(ValueError, match=message):
            raise ValueError(err)


@pytest.mark.parametrize(("module", "name"), [("av", "a.mp4"), ("matplotlib.figure", "a.png")])
def test_a_missing_library_is_an_error_before_sampling(call, tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(
        "ddpm_fast.cli.actions.plot.reverse_trajectory", lambda *_, **__: pytest.fail("drew")
    )
    code, err = call("reverse", "--weights", tmp_path / "model", "--out", tmp_path / name)
    assert code == 2 and "pip install 'ddpm-fast[plot]'" in err and err.count("\n") == 1
