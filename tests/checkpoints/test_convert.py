"""Checkpoints of other codebases: the converted network computes the same function."""

import json
from importlib import import_module

import numpy as np
import pytest
import torch

from ddpm_fast import (
    FusedUNet,
    NoiseSchedule,
    Sampler,
    UNet,
    UNetConfig,
    load_pretrained,
    save_pretrained,
)
from ddpm_fast.checkpoints.conversion import Process
from ddpm_fast.checkpoints.convert import convert_checkpoint
from ddpm_fast.checkpoints.published import PUBLISHED
from ddpm_fast.utils.numerics import relative_error

pytest.importorskip("click")
safetensors = pytest.importorskip("safetensors.torch")
main = import_module("ddpm_fast.cli.main").main
PROCESS = Process(NoiseSchedule.linear(), "eps", "fixed_large", 1.0)
DIFFUSION = "--diffusion_steps 1000 --noise_schedule linear"


def arguments(side=8, labels=None):
    batch = 3 if side <= 8 else 1
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, 3, side, side, generator=generator)
    t = torch.tensor([0, 437, 999])[:batch]
    return x, t, None if labels is None else torch.arange(batch) % labels


def save(networks, path, network, x, t, y=None, **options):
    """Writes a state dict of random weights; returns what the network computes, in fp64."""
    p = networks.Parameters()
    expected = network(p, x.double(), t, *([] if y is None else [y]), **options)
    safetensors.save_file(p.state_dict(), path)
    return expected


def error(unet, expected, x, t, y):
    with torch.no_grad():
        return relative_error(unet.double()(x.double(), t, y), expected)


# ---- the same function, in fp64


OPENAI = {
    "improved, 4 heads, rescaled timesteps": (
        "improved-diffusion",
        "--image_size 32 --num_channels 32 --num_res_blocks 1 --learn_sigma True --dropout 0.3 "
        "--diffusion_steps 4000 --noise_schedule cosine",
        dict(mult=(1, 2, 2, 2), factors=(2, 4), heads=4, time_scale=0.25),
    ),
    "improved, one head, time added": (
        "improved-diffusion",
        "--image_size 64 --num_channels 32 --num_res_blocks 2 --num_heads 1 "
        "--use_scale_shift_norm False --attention_resolutions 16 --sigma_small True "
        "--predict_xstart True --rescale_timesteps False " + DIFFUSION,
        dict(mult=(1, 2, 3, 4), layers=2, factors=(4,), scale_shift=False, out=3),
    ),
    "guided, new order, classes, residual resampling": (
        "guided-diffusion",
        "--image_size 64 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 "
        "--attention_resolutions 32 --num_head_channels 16 --use_new_attention_order True "
        "--resblock_updown True --class_cond True --learn_sigma True " + DIFFUSION,
        dict(head_channels=16, new_order=True, updown=True, classes=10),
    ),
    "guided, 4 heads at two widths": (
        "guided-diffusion",
        "--image_size 64 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --num_heads 4 "
        "--attention_resolutions 64,32 --resblock_updown True --learn_sigma True " + DIFFUSION,
        dict(factors=(1, 2), heads=4, updown=True),
    ),
    "guided, half the width first": (
        "guided-diffusion",
        "--image_size 512 --num_channels 64 --num_res_blocks 1 --num_head_channels 32 "
        "--attention_resolutions 32,16,8 --resblock_updown True --learn_sigma True " + DIFFUSION,
        dict(
            ch=64, mult=(0.5, 1, 1, 2, 2, 4, 4), factors=(16, 32, 64), head_channels=32,
            updown=True,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPENAI)
def test_openai_network_computes_the_same(networks, tmp_path, name):
    codebase, flags, options = OPENAI[name]
    side = 2 ** (len(options.get("mult", (1, 2))) - 1)
    call = arguments(max(side, 8), options.get("classes"))
    expected = save(
        networks, tmp_path / "ema_0.9999_1.safetensors", networks.openai, *call, **options
    )
    conversion = convert_checkpoint(tmp_path / "ema_0.9999_1.safetensors", codebase, flags=flags)
    assert error(conversion.unet, expected, *call) < 1e-12


def test_the_other_order_of_a_joint_projection_is_another_network(networks, tmp_path):
    codebase, flags, options = OPENAI["guided, new order, classes, residual resampling"]
    call = arguments(8, 10)
    expected = save(networks, tmp_path / "m.safetensors", networks.openai, *call, **options)
    wrong = flags.replace("--use_new_attention_order True", "")
    conversion = convert_checkpoint(tmp_path / "m.safetensors", codebase, flags=wrong)
    assert error(conversion.unet, expected, *call) > 0.01
    assert (
        "use_new_attention_order",
        "False",
        "default of guided-diffusion",
    ) in conversion.settings


@pytest.mark.parametrize("stored", ["port", "averaged variables", "raw variables"])
def test_network_of_ho_computes_the_same(networks, tmp_path, stored):
    x, t, _ = arguments()
    path = tmp_path / "network.safetensors"
    expected = save(networks, path, networks.ho, x, t)
    if stored != "port":
        variables = networks.tensorflow_variables(safetensors.load_file(path))
        path = tmp_path / "variables.npz"
        names = {name: f"{name}/ExponentialMovingAverage" for name in variables}
        if stored == "averaged variables":
            averaged = {names[name]: value for name, value in variables.items()}
            variables = {name: value + 1 for name, value in variables.items()} | averaged
        slots = {f"{name}/Adam": value for name, value in variables.items()}
        np.savez(path, **variables, **slots, global_step=np.int64(5))
    conversion = convert_checkpoint(path, "ho", process=PROCESS, sample_size=8, dropout=0.1)
    assert error(conversion.unet, expected, x, t, None) < 1e-12
    notes = " ".join(conversion.notes)
    assert ("(EMA) were taken" in notes) == (stored == "averaged variables")
    assert ("optimizer were left out" in notes) == (stored != "port")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_network_of_edm_computes_the_same(networks, tmp_path, prefix):
    x, t, y = arguments(4, labels=5)
    path = tmp_path / "network.safetensors"
    expected = save(networks, path, networks.edm, x, t, y, classes=5)
    stored = safetensors.load_file(path) | {"map_augment.weight": torch.ones(128, 9)}
    safetensors.save_file({prefix + name: value for name, value in stored.items()}, path)
    conversion = convert_checkpoint(path, "edm", dropout=0.1, network_only=True)
    assert error(conversion.unet, expected, x, t, y) < 1e-12
    assert conversion.unet.config.size == (16, 16)
    conversion.unet.float()
    conversion.save(tmp_path / "network")
    assert sorted(p.name for p in (tmp_path / "network").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    with pytest.raises(ValueError, match="without its noise schedule"):
        load_pretrained(tmp_path / "network")


# ---- folders


def assert_equal_checkpoints(a, b):
    assert a.unet.config == b.unet.config and a.schedule == b.schedule
    assert (a.prediction, a.variance, a.clip) == (b.prediction, b.variance, b.clip)
    weights = b.unet.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in a.unet.state_dict().items())


@pytest.mark.parametrize("name", OPENAI)
def test_converted_folder_loads_and_saves_again(networks, tmp_path, name):
    codebase, flags, options = OPENAI[name]
    side = max(8, 2 ** (len(options.get("mult", (1, 2))) - 1))
    call = arguments(side, options.get("classes"))
    save(networks, tmp_path / "m.safetensors", networks.openai, *call, **options)
    conversion = convert_checkpoint(tmp_path / "m.safetensors", codebase, flags=flags)
    conversion.save(tmp_path / "a")
    first = load_pretrained(tmp_path / "a")
    assert_equal_checkpoints(conversion.checkpoint, first)
    save_pretrained(
        tmp_path / "b", first.unet, first.schedule, first.prediction, first.variance, first.clip
    )
    assert_equal_checkpoints(first, load_pretrained(tmp_path / "b"))
    index = json.loads((tmp_path / "b/model_index.json").read_text())
    kind = json.loads((tmp_path / "b/unet/config.json").read_text())["_class_name"]
    expressible = name in (
        "improved, one head, time added",
        "guided, new order, classes, residual resampling",
    )
    assert kind == ("UNet2DModel" if expressible else "DdpmFastUNet")
    assert index["unet"] == ["diffusers" if expressible else "ddpm_fast", kind]
    diffusers = pytest.importorskip("diffusers")
    if not expressible:
        with pytest.raises(ValueError, match="diffusers has"):
            first.unet.config.to_diffusers()
        return
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "b/unet").eval()
    x, t, y = call
    with torch.no_grad():
        assert relative_error(first.unet(x, t, y), unet(x, t, y).sample) < 1e-5


@pytest.mark.parametrize("codebase", ["ho", "edm"])
def test_diffusers_computes_the_same(networks, tmp_path, codebase):
    diffusers = pytest.importorskip("diffusers")
    x, t, _ = arguments(8 if codebase == "ho" else 4)
    path = tmp_path / "network.safetensors"
    expected = save(networks, path, getattr(networks, codebase), x, t)
    if codebase == "ho":
        conversion = convert_checkpoint(path, "ho", process=PROCESS, sample_size=8, dropout=0.0)
    else:
        conversion = convert_checkpoint(path, "edm", dropout=0.0, network_only=True)
    conversion.save(tmp_path / "out")
    folder = tmp_path / "out/unet" if codebase == "ho" else tmp_path / "out"
    unet = diffusers.UNet2DModel.from_pretrained(folder).eval()
    with torch.no_grad():
        assert relative_error(unet(x, t).sample, expected) < 1e-5


def test_settings_of_flags_reach_the_checkpoint(networks, tmp_path):
    codebase, flags, options = OPENAI["improved, one head, time added"]
    x, t, _ = arguments()
    save(networks, tmp_path / "m.safetensors", networks.openai, x, t, **options)
    c = convert_checkpoint(
        tmp_path / "m.safetensors", codebase, flags=f"{flags} --clip_denoised False"
    ).checkpoint
    assert (c.prediction, c.variance, c.clip) == ("x_0", "fixed_small", None)
    assert c.schedule == NoiseSchedule.linear() and c.unet.config.dropout == 0
    codebase, flags, options = OPENAI["improved, 4 heads, rescaled timesteps"]
    save(networks, tmp_path / "n.safetensors", networks.openai, x, t, **options)
    c = convert_checkpoint(tmp_path / "n.safetensors", codebase, flags=flags).checkpoint
    assert (c.prediction, c.variance, c.clip) == ("eps", "learned_range", 1.0)
    assert c.schedule == NoiseSchedule.cosine(4000)
    assert c.unet.config.dropout == 0.3 and c.unet.config.time_scale == 0.25


def test_openai_schedules():
    schedule = import_module("ddpm_fast.checkpoints.convert")._openai_schedule
    betas = np.linspace(0.25 * 1e-4, 0.25 * 0.02, 4000)
    assert np.allclose(schedule("linear", 4000).beta, betas, rtol=1e-12)
    alpha_bar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    assert np.allclose(schedule("cosine", 1000).beta, betas, rtol=1e-9)


def test_averaged_diffusers_folder_without_a_scheduler(networks, tmp_path):
    """As diffusers' EMAModel writes it."""
    x, t, _ = arguments()
    save(networks, tmp_path / "m.safetensors", networks.ho, x, t)
    network = convert_checkpoint(
        tmp_path / "m.safetensors", "ho", process=PROCESS, sample_size=8, dropout=0.0
    )
    network.save(tmp_path / "full")
    (tmp_path / "full/unet").rename(tmp_path / "unet_ema")
    config = json.loads((tmp_path / "unet_ema/config.json").read_text())
    config |= dict(decay=0.9999, min_decay=0.0, optimization_step=9, update_after_step=0)
    config |= dict(use_ema_warmup=False, inv_gamma=1.0, power=0.75)
    (tmp_path / "unet_ema/config.json").write_text(json.dumps(config))
    line = (
        f"convert {tmp_path}/unet_ema {tmp_path}/out --from diffusers-unet --schedule cosine "
        "--timesteps 100 --prediction v --variance fixed_small --clip none"
    )
    with pytest.raises(SystemExit, match=r"^0$"):
        main(line.split())
    c = load_pretrained(tmp_path / "out")
    assert c.schedule == NoiseSchedule.cosine(100)
    assert (c.prediction, c.variance, c.clip) == ("v", "fixed_small", None)
    assert torch.equal(c.unet.conv_in.weight, network.unet.conv_in.weight)


def test_flat_folder_is_loaded(networks, tmp_path):
    """The layout of the older repositories of the hub."""
    x, t, _ = arguments()
    save(networks, tmp_path / "m.safetensors", networks.ho, x, t)
    c = convert_checkpoint(
        tmp_path / "m.safetensors", "ho", process=PROCESS, sample_size=8, dropout=0.0
    )
    c.save(tmp_path / "full")
    for path in (*(tmp_path / "full/unet").iterdir(), *(tmp_path / "full/scheduler").iterdir()):
        path.rename(tmp_path / "full" / path.name)
    (tmp_path / "full/unet").rmdir()
    (tmp_path / "full/scheduler").rmdir()
    assert_equal_checkpoints(load_pretrained(tmp_path / "full"), c.checkpoint)


def test_pickles_and_folders_of_openai(networks, tmp_path):
    codebase, flags, options = OPENAI["improved, 4 heads, rescaled timesteps"]
    x, t, _ = arguments()
    p = networks.Parameters()
    networks.openai(p, x.double(), t, **options)
    state = p.state_dict()
    half = {
        k: v.half() if k.startswith(("input", "middle", "output")) else v for k, v in state.items()
    }
    torch.save({k: v * 0 for k, v in state.items()}, tmp_path / "ema_0.9999_000900.pt")
    torch.save({k: v * 2 for k, v in state.items()}, tmp_path / "model001000.pt")
    torch.save(half, tmp_path / "ema_0.9999_001000.pt", _use_new_zipfile_serialization=False)
    conversion = convert_checkpoint(tmp_path, codebase, flags=flags, trust=True)
    assert conversion.source.name == "ema_0.9999_001000.pt"
    assert torch.equal(conversion.unet.conv_in.weight, half["input_blocks.0.0.weight"].float())
    raw = convert_checkpoint(tmp_path / "model001000.pt", codebase, flags=flags, trust=True)
    assert any("prefer ema_0.9999_001000.pt" in note for note in raw.notes)
    assert torch.equal(raw.unet.conv_in.weight, 2 * state["input_blocks.0.0.weight"])
    torch.save(state, tmp_path / "ema_0.999_001000.pt")
    with pytest.raises(ValueError, match=r"ema_0\.9999_001000\.pt, ema_0\.999_001000\.pt"):
        convert_checkpoint(tmp_path, codebase, flags=flags, trust=True)


# ---- published files

RESCALED = ("iddpm-cifar10", "iddpm-cifar10-vlb", "iddpm-imagenet64", "iddpm-imagenet64-vlb")


@pytest.mark.parametrize("name", PUBLISHED)
def test_flags_of_published_files_are_complete(name):
    flags = import_module("ddpm_fast.checkpoints.openai_flags")
    published = PUBLISHED[name]
    if published.codebase == "ho":
        assert published.settings.variance.startswith("fixed")
        return
    parsed = flags.parse_flags(published.settings, published.codebase)
    widths = [int(m * parsed.values["num_channels"]) for m in parsed.multipliers]
    assert all(parsed.heads(w) for w, a in zip(widths, parsed.attention, strict=True) if a)
    assert parsed.variance == "learned_range" and parsed.prediction == "eps"
    assert parsed.time_scale == (0.25 if name in RESCALED else 1.0)


# ---- the command


def test_command_prints_settings_with_their_origin(networks, tmp_path, capsys):
    codebase, flags, options = OPENAI["improved, 4 heads, rescaled timesteps"]
    x, t, _ = arguments()
    path = tmp_path / "m.safetensors"
    save(networks, path, networks.openai, x, t, **options)
    line = ["convert", str(path), str(tmp_path / "out"), "--from", codebase, "--flags", flags]
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*line, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["num_heads"] == {
        "value": "4",
        "origin": "default of improved-diffusion",
    }
    assert report["settings"]["diffusion_steps"] == {"value": "4000", "origin": "given"}
    assert len(report["sha256"]) == 64 and report["format"] == "DdpmFastUNet"
    with pytest.raises(SystemExit, match=r"^0$"):
        main(line)
    text = capsys.readouterr().out
    assert f"SHA-256 {report['sha256']}" in text and "diffusers cannot express" in text


# ---- the new fields


def test_engines_apply_time_scale_and_sinusoid_width():
    torch.manual_seed(0)
    options = dict(
        sample_size=8, channels=(32, 64), layers=1, attention=(False, True), time_scale=0.25,
        sinusoid_dim=48, num_classes=3, heads=(1, 4), out_channels=6,
    )  # fmt: skip
    unet = UNet(UNetConfig(**options)).eval()
    schedule = NoiseSchedule.cosine(4000)
    images = {}
    for engine in ("reference", "cpu"):
        sampler = Sampler(unet, schedule, (3, 8, 8), variance="learned_range", engine=engine)
        images[engine] = sampler.sample(2, steps=4, labels=[0, 2], output="float")
    assert relative_error(images["cpu"], images["reference"]) < 1e-4
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([400, 3999]), torch.tensor([0, 1])
    fused = FusedUNet(unet, 2, "fp32", "cpu", check=False, timesteps=4000)
    with torch.no_grad():
        assert relative_error(fused(x, t, y), unet(x, t, y)) < 1e-5
    other = UNet(UNetConfig(**options | dict(time_scale=1.0))).eval()
    other.load_state_dict(unet.state_dict())
    t = torch.tensor([400, 1000])
    with torch.no_grad():
        assert torch.equal(unet(x, t, y), other(x, t / 4, y))
        assert not torch.allclose(unet(x, t, y), other(x, t, y))
