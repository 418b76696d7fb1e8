"""Damaged and hostile checkpoint folders raise a one-line ValueError that names the file."""

import json
import math
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, load_pretrained, save_pretrained

safetensors = pytest.importorskip("safetensors.torch")

CONFIG = UNetConfig(
    sample_size=8, channels=(8, 16), layers=1, attention=(False, True), norm_groups=4,
    num_classes=16, time_dim=16,
)  # fmt: skip
UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PROJECTION = "down_blocks.1.attentions.0.to_q.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    save_pretrained(directory, UNet(CONFIG).eval(), NoiseSchedule.linear())
    return directory


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder, change):
    weights = safetensors.load_file(folder / WEIGHTS)
    change(weights)
    safetensors.save_file({k: v.contiguous() for k, v in weights.items()}, folder / WEIGHTS)


def refusal(load, seconds=5.0):
    """The message of the one-line ValueError that `load` raises within `seconds` of CPU time."""
    start = time.process_time()
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers match the message
        load()
    assert time.process_time() - start < seconds
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1200
    return str(caught.value)


# ---- weights


@pytest.mark.parametrize(
    ("name", "change", "shape"),
    [
        # square: where the element count is equal, the shape alone does not show the fault
        ("conv_in.weight", lambda w: w.permute(2, 3, 1, 0), "(3, 3, 3, 8)"),
        ("conv_in.weight", lambda w: w.flatten(1), "(8, 27)"),
        ("down_blocks.0.resnets.0.time_emb_proj.weight", lambda w: w.t(), "(16, 8)"),
        (PROJECTION, lambda w: w.flatten(), "(256,)"),
        (PROJECTION, lambda w: w[None, None], "(1, 1, 16, 16)"),
        ("down_blocks.1.attentions.0.to_q.bias", lambda w: w[:, None], "(16, 1)"),
        ("time_embedding.linear_2.weight", lambda w: w[:, :, None, None], "(16, 16, 1, 1)"),
    ],
)
def test_weights_of_another_shape_are_refused(folder, name, change, shape):
    before = safetensors.load_file(folder / WEIGHTS)[name]
    change_weights(folder, lambda w: w.update({name: change(w[name])}))
    text = refusal(lambda: load_pretrained(folder))
    assert WEIGHTS in text and name in text
    assert f"has shape {shape}; expected {tuple(before.shape)}" in text


def test_attention_stored_as_1x1_convolutions_is_read(folder):
    expected = load_pretrained(folder).unet.state_dict()

    def as_convolutions(weights):
        for name in list(weights):
            if ".attentions." in name and name.endswith("weight") and "to_" in name:
                weights[name] = weights[name][:, :, None, None]

    change_weights(folder, as_convolutions)
    loaded = load_pretrained(folder).unet.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int32, "I32"),
        (torch.bool, "BOOL"),
        (torch.uint8, "U8"),
        (torch.complex64, "C64"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
    ],
)
def test_weights_that_are_not_floating_are_refused(folder, dtype, name):
    change_weights(folder, lambda w: w.update({"conv_in.weight": w["conv_in.weight"].to(dtype)}))
    text = refusal(lambda: load_pretrained(folder))
    assert WEIGHTS in text
    assert f"conv_in.weight is stored as {name}; expected F32, F16, BF16, F64" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_weights_become_fp32(folder, dtype):
    stored = safetensors.load_file(folder / WEIGHTS)
    change_weights(folder, lambda w: w.update({k: v.to(dtype) for k, v in w.items()}))
    loaded = load_pretrained(folder).unet
    assert loaded.dtype == torch.float32 and all(p.requires_grad for p in loaded.parameters())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, stored[name].to(dtype).float())


def test_fp64_beyond_fp32_is_refused(folder):
    change_weights(
        folder, lambda w: w.update({"conv_in.bias": torch.full((8,), 1e300, dtype=torch.float64)})
    )
    assert "conv_in.bias contains NaN or Inf" in refusal(lambda: load_pretrained(folder))


def test_one_parameter_under_two_names_is_refused(folder):
    old = PROJECTION.replace("to_q", "query")
    change_weights(folder, lambda w: w.update({old: w[PROJECTION] + 1}))
    assert "are the same parameter" in refusal(lambda: load_pretrained(folder))


def test_names_with_line_breaks_are_shown_in_one_line(folder):
    change_weights(folder, lambda w: w.update({"a\nb" * 200: torch.zeros(1)}))
    assert "unexpected parameter" in refusal(lambda: load_pretrained(folder))


def test_a_header_that_lies_is_refused(folder):
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    for damaged in (
        struct.pack("<Q", 2**62) + content[8:],
        content[:8] + content[8 : 8 + length].replace(b'"F32"', b'"F99"') + content[8 + length :],
        content[:4],
        b"",
    ):
        (folder / WEIGHTS).write_bytes(damaged)
        assert f"{WEIGHTS} cannot be read" in refusal(lambda: load_pretrained(folder))


# ---- configurations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers_per_block": 10_000_000}, "layers_per_block=10000000"),
        ({"layers_per_block": 128}, "residual blocks"),  # valid, but not the network of the file
        ({"block_out_channels": [32, 64, 10**30]}, "block_out_channels="),
        ({"block_out_channels": [8] * 17}, "block_out_channels="),
        ({"in_channels": 10**9}, "in_channels=1000000000"),
        ({"sample_size": 10**9}, "sample_size=1000000000"),
        ({"sample_size": [8, 10**9]}, "sample_size="),
        ({"num_class_embeds": 10**12}, "num_class_embeds=1000000000000"),
        ({"num_class_embeds": 10**6}, "class_embedding.weight has shape (16, 16)"),
        ({"time_embedding_dim": 10**9}, "time_embedding_dim="),
        ({"freq_shift": 1e308}, "freq_shift=1e+308"),
        ({"freq_shift": 4}, "freq_shift=4; expected below 4"),
        ({"freq_shift": -1}, "freq_shift=-1"),
        ({"norm_eps": 1e-300}, "norm_eps=1e-300"),
        ({"norm_eps": math.inf}, "norm_eps=inf"),
        ({"freq_shift": math.nan}, "freq_shift=nan"),
        ({"dropout": 10**300}, "dropout=an integer of 997 bits"),
        ({"mid_block_scale_factor": 1e300}, "mid_block_scale_factor=1e+300"),
        ({"dropout": True}, "dropout=True"),
        ({"downsample_padding": True}, "downsample_padding=True"),
        ({"downsample_padding": 1.0}, "downsample_padding=1.0"),
        ({"attn_norm_num_groups": 5}, "mid_norm_groups=5"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps='many'"),
        ({"_class_name": "UNet2DConditionModel"}, "model class is unsupported: 'UNet2DCond"),
        ({"down_block_types": ["x\ny" * 999] * 2}, "block type"),
        ({"a\nb": 1}, r"unknown key 'a\nb'"),
    ],
    ids=lambda v: str(v)[:30],
)  # fmt: skip
def test_network_configurations_are_bounded(folder, change, message):
    edit(folder / UNET, **change)
    text = refusal(lambda: load_pretrained(folder))
    assert message in text and str(folder / "unet") in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_sample": "no"}, "clip_sample='no'; expected True or False"),
        ({"clip_sample": 1}, "clip_sample=1; expected True or False"),
        ({"clip_sample_range": 1e300}, "clip_sample_range=1e+300"),
        ({"clip_sample_range": True}, "clip_sample_range=True"),
        ({"beta_start": 1e-300}, "beta_start=1e-300"),
        ({"beta_start": 0}, "beta_start=0"),
        ({"beta_end": math.inf}, "beta_end=inf"),
        ({"clip_sample_range": math.nan}, "clip_sample_range=nan"),
        ({"beta_start": 0.03}, "beta_start=0.03, beta_end=0.02"),
        ({"beta_end": 1.0}, "beta_end=1.0"),
        ({"beta_end": True}, "beta_end=True"),
        ({"beta_end": 10**300}, "beta_end=an integer of"),
        ({"num_train_timesteps": True}, "num_train_timesteps=True"),
        ({"num_train_timesteps": 2**24}, "num_train_timesteps=16777216"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr='yes'"),
        ({"rescale_betas_zero_snr": True, "num_train_timesteps": 1}, "at least two steps"),
        ({"thresholding": 0}, "thresholding=0"),
        ({"steps_offset": -1}, "steps_offset=-1"),
        ({"timestep_spacing": 3}, "timestep_spacing=3"),
        ({"trained_betas": [1e-300, 0.1], "num_train_timesteps": 2}, "beta[0] = 1e-300"),
        ({"trained_betas": ["0.1", 0.1], "num_train_timesteps": 2}, "trained_betas="),
    ],
    ids=lambda v: str(v)[:30],
)  # fmt: skip
def test_scheduler_configurations_are_bounded(folder, change, message):
    edit(folder / SCHEDULER, **change)
    text = refusal(lambda: load_pretrained(folder))
    assert message in text and str(folder / SCHEDULER) in text


def test_another_scheduler_class_is_named(folder):
    diffusers = pytest.importorskip("diffusers")
    config = dict(diffusers.DPMSolverMultistepScheduler().config)
    (folder / SCHEDULER).write_text(
        json.dumps({"_class_name": "DPMSolverMultistepScheduler", **config})
    )
    text = refusal(lambda: load_pretrained(folder))
    assert "this scheduler class is unsupported: 'DPMSolverMultistepScheduler'" in text
    assert "supported: DDPMScheduler, DDIMScheduler" in text and SCHEDULER in text


def test_a_folder_of_the_network_alone_is_explained(folder):
    text = refusal(lambda: load_pretrained(folder / "unet"))
    assert "holds a network without its noise schedule, which no weight says" in text


# ---- files


def link_to_itself(path):
    path.unlink()
    path.symlink_to(path.name)


def replace(path, make):
    path.unlink()
    make(path)


@pytest.mark.parametrize("name", [UNET, SCHEDULER, WEIGHTS])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: replace(p, os.mkfifo), "is a FIFO, device or socket"),
        (lambda p: replace(p, lambda q: q.symlink_to("/dev/zero")), "is a FIFO, device or socket"),
        (lambda p: replace(p, Path.mkdir), "is a directory"),
        (link_to_itself, "Too many levels of symbolic links"),
    ],
    ids=["fifo", "device", "directory", "loop"],
)
def test_only_regular_files_are_read(folder, name, damage, message):
    damage(folder / name)
    text = refusal(lambda: load_pretrained(folder))
    assert message in text and str(folder / name) in text


@pytest.mark.parametrize("name", [UNET, SCHEDULER])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"norm_eps": ' + b"1" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"a":' * 100_000 + b"}" * 100_000, "is nested too deeply"),
        (b"[" * 500_000, "is nested too deeply"),
        (b'{"norm_eps": 1, "norm_eps": 2}', "key 'norm_eps' occurs twice"),
        ('{"norm_eps": 1}'.encode("utf-16"), "is not JSON in UTF-8"),
        (b'"text"', "holds str; expected a JSON object"),
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b" " * (16 * 2**20 + 1), "expected at most"),
    ],
    ids=lambda v: str(v)[:20],
)  # fmt: skip
def test_json_files_are_bounded(folder, name, content, message):
    (folder / name).write_bytes(content)
    text = refusal(lambda: load_pretrained(folder))
    assert message in text and str(folder / name) in text


def test_a_byte_order_mark_is_accepted(folder):
    for name in (UNET, SCHEDULER):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert load_pretrained(folder).unet.config == CONFIG


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_impossible_paths_are_refused(name):
    with pytest.raises(ValueError, match="is not a directory"):
        load_pretrained(name)


# ---- the caller's context


@pytest.mark.parametrize("context", ["bfloat16", "float64", "meta"])
def test_loading_ignores_the_default_dtype_and_device(folder, context):
    expected = load_pretrained(folder).unet.state_dict()
    images = Sampler.from_pretrained(folder, "cpu").sample(2, labels=1, solver="ddim", steps=3)
    default = torch.get_default_dtype()
    try:
        if context == "meta":
            with torch.device("meta"):
                loaded = load_pretrained(folder).unet
                sampler = Sampler.from_pretrained(folder, "cpu")
        else:
            torch.set_default_dtype(getattr(torch, context))
            loaded = load_pretrained(folder).unet
            sampler = Sampler.from_pretrained(folder, "cpu")
    finally:
        torch.set_default_dtype(default)
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32 and value.device.type == "cpu"
        assert torch.equal(value, expected[name])
    assert torch.equal(sampler.sample(2, labels=1, solver="ddim", steps=3), images)


def test_loading_draws_no_random_numbers(folder):
    state = torch.get_rng_state()
    load_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)


# ---- writing


@pytest.mark.parametrize("clip", [math.inf, math.nan, 1e300, True, "1"])
def test_clips_that_would_not_be_read_are_not_written(tmp_path, clip):
    with pytest.raises(ValueError, match=r"clip = .*; expected a number"):
        save_pretrained(tmp_path / "m", UNet(CONFIG), NoiseSchedule.linear(), clip=clip)


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.linear(0.02, 1e-4, 10),
        NoiseSchedule.linear(1e-9, 0.02, 10),
        NoiseSchedule.linear(0.1, 1.0, 10),
        NoiseSchedule.linear(timesteps=20).zero_terminal_snr(),
    ],
    ids=["falling", "tiny", "ending at 1", "zero SNR"],
)
def test_unusual_schedules_are_read_as_they_were_written(tmp_path, schedule):
    save_pretrained(tmp_path / "m", UNet(CONFIG), schedule)
    assert load_pretrained(tmp_path / "m").schedule == schedule
