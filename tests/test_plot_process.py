import io
from importlib import import_module

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, save_pretrained
from ddpm_fast.animate import HOLD, save_animation
from ddpm_fast.images import from_uint8
from ddpm_fast.plot_process import Reverse, forward_strip, frames_of, plot_schedules, reverse_trajectory

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
CHAIN = NoiseSchedule.linear(1e-3, 0.2, 30)


def tiny():
    torch.manual_seed(0)
    config = dict(sample_size=8, in_channels=1, out_channels=1, channels=(8, 16), layers=1, attention=(False, True))
    return UNet(UNetConfig(**config, norm_groups=4)).eval()


def test_schedules_are_drawn_as_they_are(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("ddpm_fast.plot_process.save", lambda picture, out: drawn.append(picture))
    zero = NoiseSchedule.linear().zero_terminal_snr()
    plot_schedules({"linear": NoiseSchedule.linear(), "linear, zero terminal SNR": zero}, tmp_path / "a.png")
    beta, bar, snr = drawn[0].axes
    for k, schedule in enumerate((NoiseSchedule.linear(), zero)):
        assert np.array_equal(beta.lines[k].get_ydata(), schedule.beta)
        assert np.array_equal(snr.lines[k].get_ydata()[:-1], schedule.snr[:-1])
        assert np.array_equal(bar.lines[k].get_ydata()[:-1], schedule.alpha_bar[:-1])
    assert np.isnan(snr.lines[1].get_ydata()[-1])


def test_the_forward_strip_is_one_trajectory(tmp_path):
    schedule = NoiseSchedule.linear()
    t, x = forward_strip(schedule, PIXELS, seed=3, steps=11)
    assert t[0] == 0 and t[-1] == 999 and x.shape == (11, 3, 1, 8, 8)
    x_0 = from_uint8(torch.from_numpy(PIXELS))
    assert (x[0] - x_0).abs().max() < 0.06  # one step of beta = 1e-4
    assert abs(float(x[-1].std()) - 1) < 0.2
    one, two = (forward_strip(schedule, PIXELS, 3, n)[1] for n in (1000, 500))
    assert torch.equal(one[-1], two[-1]) and torch.equal(one[-1], x[-1])
    step = one[500] - np.sqrt(1 - schedule.beta[500]) * one[499]  # neighbours differ by one step's noise
    assert abs(float(step.std()) / np.sqrt(schedule.beta[500]) - 1) < 0.2
    with pytest.raises(ValueError, match="1001 steps; expected 1 to 1000"):
        forward_strip(schedule, PIXELS, 0, 1001)


@pytest.mark.parametrize(("how", "moments"), [({}, 6), (dict(solver="ddim", steps=7), 7), (dict(solver="dpm++2m", steps=9), 40)])
def test_the_reverse_strip_ends_in_what_sample_draws(how, moments):
    sampler = Sampler(tiny(), CHAIN, (1, 8, 8))
    trajectory = reverse_trajectory(sampler, range(5, 8), seed=2, moments=moments, **how)
    want = sampler.sample(range(5, 8), 2, **how).numpy()
    assert np.array_equal(trajectory.x[-1], want)
    assert np.array_equal(trajectory.x_0[-1], want)  # the last step goes to x_0 itself
    count = min(moments, len(sampler.table(**how)))
    assert len(trajectory.t) == len(trajectory.x) == count + 1
    assert trajectory.t[0] == 30 and trajectory.t[-1] == -1 and (np.diff(trajectory.t) < 0).all()
    start = sampler.begin(torch.arange(5, 8), 2).x
    assert np.array_equal(trajectory.x[0], ((start.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())


def frames():
    generator = np.random.default_rng(1)
    x, x_0 = generator.integers(0, 256, (2, 6, 2, 8, 8, 1), dtype=np.uint8)
    return frames_of(Reverse([5, 4, 3, 2, 1, -1], x, x_0), 8)


def test_frames_hold_both_rows():
    made = frames()
    assert len(made) == 6 and made[0].shape == (2 * 10 * 8 + 6, 2 * 10 * 8, 3)
    assert not made[0][1:7].any()  # the border between images
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
    assert time == (6 + HOLD) * 50
    for got, want in ((first, made[0]), (last, made[-1])):
        assert np.abs(got - want).mean() < 2


def test_mp4_decodes_to_its_frames(tmp_path):
    av = pytest.importorskip("av")
    made = frames()
    save_animation(made, tmp_path / "a.mp4")
    with av.open(io.BytesIO((tmp_path / "a.mp4").read_bytes())) as film:
        got = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(got) == 6 + HOLD and got[0].shape == made[0].shape
    for k in (0, 5, -1):
        assert np.abs(got[k].astype(int) - made[min(k, 5)]).mean() < 12
    with pytest.raises(ValueError, match="no frames"):
        save_animation([], tmp_path / "b.mp4")


@pytest.fixture
def call(tmp_path, capsys):
    pytest.importorskip("click")
    pytest.importorskip("safetensors")
    np.save(tmp_path / "images.npy", PIXELS)
    save_pretrained(tmp_path / "model", tiny(), CHAIN)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            import_module("ddpm_fast.cli").main(["plot", *(str(a) for a in arguments)])
        return end.value.code, capsys.readouterr().err

    return run


def test_command_line(call, tmp_path):
    data, weights = ("--data-dir", tmp_path / "images.npy", "--resolution", 8), ("--weights", tmp_path / "model")
    good = [
        ("schedule", "--zero-snr", "--out", tmp_path / "a.png"),
        ("schedule", *weights, "--out", tmp_path / "b.svg"),
        ("forward", *data, "--image", 0, "--image", 2, "--steps", 4, "--out", tmp_path / "c.png"),
        ("reverse", *weights, "--images", "2-3", "--moments", 3, "--out", tmp_path / "d.png"),
        ("reverse", *weights, "--images", 1, "--solver", "dpm++2m", "--steps", 4, "--out", tmp_path / "e.gif"),
        ("reverse", *weights, "--images", 1, "--solver", "ddim", "--steps", 4, "--out", tmp_path / "f.mp4"),
    ]
    for arguments in good:
        assert call(*arguments) == (0, "")
        assert arguments[-1].stat().st_size > 500
    bad = {
        ("schedule", "--schedule", "square"): "square",
        ("schedule", "--schedule", "linear", *weights): "not both",
        ("schedule", "--out", tmp_path / "a.txt"): "expected .png, .svg or .pdf",
        ("schedule", "--out", tmp_path / "no" / "a.png"): "does not exist",
        ("forward", *data, "--image", 3): "--image 3: .* holds 3 images",
        ("forward", "--data-dir", tmp_path / "nothing"): "does not exist",
        ("reverse", *weights, "--out", tmp_path / "a.avi"): "expected .png, .svg, .pdf, .gif or .mp4",
        ("reverse", *weights, "--steps", 31): "31 steps",
        ("reverse", *weights, "--images", "none"): "--images none",
    }
    for arguments, message in bad.items():
        code, err = call(*arguments)
        assert code == 2 and err.count("\n") == 1
        with pytest.raises(ValueError, match=message):
            raise ValueError(err)
