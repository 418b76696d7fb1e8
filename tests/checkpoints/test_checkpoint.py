import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, UNet, UNetConfig, load_pretrained, save_pretrained
from ddpm_fast.utils.numerics import relative_error

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")

CONFIG = UNetConfig(
    sample_size=16,
    channels=(16, 32),
    layers=1,
    attention=(False, True),
    norm_groups=4,
)
WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")


def unet(seed=0):
    torch.manual_seed(seed)
    return UNet(CONFIG).eval()


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "model", unet(), NoiseSchedule.linear())
    return tmp_path / "model"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "schedule",
    [NoiseSchedule.linear(), NoiseSchedule.cosine(), NoiseSchedule.sigmoid(100)],
    ids=len,
)
@pytest.mark.parametrize(
    ("prediction", "variance", "clip"),
    [("eps", "fixed_large", 1.0), ("v", "learned_range", None), ("x_0", "fixed_small", 2.0)],
)
def test_round_trip(tmp_path, schedule, prediction, variance, clip):
    model = unet()
    save_pretrained(tmp_path / "m", model, schedule, prediction, variance, clip)
    back = load_pretrained(tmp_path / "m")
    assert back.unet.config == CONFIG and not back.unet.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), back.unet.state_dict().values(), strict=True)
    )
    assert np.array_equal(back.schedule.beta, schedule.beta)
    assert (back.prediction, back.variance, back.clip) == (prediction, variance, clip)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]  # no temporary directory remains


@torch.no_grad()
def test_diffusers_loads_saved_checkpoints(folder):
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    x = torch.randn(2, 3, 16, 16)
    assert relative_error(pipeline.unet(x, 7).sample, unet()(x, 7)) < 1e-5
    assert pipeline.scheduler.config.variance_type == "fixed_large"
    np.testing.assert_allclose(pipeline.scheduler.betas, NoiseSchedule.linear().beta, rtol=1e-4)


@torch.no_grad()
def test_checkpoints_of_diffusers_are_loaded(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        baseline = diffusers.UNet2DModel(block_out_channels=(32, 64, 64, 64), sample_size=16).eval()
        scheduler = diffusers.DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
        )
        diffusers.DDIMPipeline(baseline, scheduler).save_pretrained(tmp_path / "m")
    loaded = load_pretrained(tmp_path / "m")
    assert (loaded.prediction, loaded.clip) == ("v", None)
    x = torch.randn(2, 3, 16, 16)
    assert relative_error(loaded.unet(x, 7), baseline(x, 7).sample) < 1e-5
    images = Sampler.from_pretrained(tmp_path / "m").sample(1, steps=2, solver="ddim")
    assert images.shape == (1, 16, 16, 3)


def test_reads_attention_names_from_before_2023(folder):
    weights = safetensors.load_file(folder / WEIGHTS)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        weights = {k.replace(f".{new}.", f".{name}."): v for k, v in weights.items()}
    assert any(".query." in k for k in weights)
    safetensors.save_file(weights, folder / WEIGHTS)
    back = load_pretrained(folder).unet.state_dict()
    assert all(torch.equal(v, back[k]) for k, v in unet().state_dict().items())


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_reads_every_schedule_of_diffusers(folder, schedule):
    edit(
        folder / "scheduler/scheduler_config.json",
        beta_schedule=schedule,
        beta_start=2e-4,
        beta_end=0.03,
        num_train_timesteps=500,
    )
    betas = diffusers.DDPMScheduler(500, 2e-4, 0.03, schedule).betas
    np.testing.assert_allclose(load_pretrained(folder).schedule.beta, betas, rtol=2e-4, atol=1e-7)


def test_a_failed_write_keeps_the_old_checkpoint(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(folder, unet(1), NoiseSchedule.linear())
    monkeypatch.undo()
    assert torch.equal(load_pretrained(folder).unet.conv_in.weight, unet(0).conv_in.weight)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    save_pretrained(folder, unet(1), NoiseSchedule.linear())
    assert torch.equal(load_pretrained(folder).unet.conv_in.weight, unet(1).conv_in.weight)


def test_replaces_a_checkpoint_by_an_exchange_or_two_renames(folder, monkeypatch):
    for seed, exchange in ((1, None), (2, lambda a, b: False)):
        if exchange:
            monkeypatch.setattr("ddpm_fast.utils.files._exchange", exchange)
        save_pretrained(folder, unet(seed), NoiseSchedule.linear())
        assert torch.equal(load_pretrained(folder).unet.conv_in.weight, unet(seed).conv_in.weight)
        assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_failed_rename_restores_the_old_checkpoint(folder, monkeypatch):
    rename = Path.rename

    def once(self, target):
        if Path(target) == folder and not self.name.endswith("-old"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr("ddpm_fast.utils.files._exchange", lambda a, b: False)  # unsupported
    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(OSError, match="Input/output error"):
        save_pretrained(folder, unet(1), NoiseSchedule.linear())
    assert torch.equal(load_pretrained(folder).unet.conv_in.weight, unet(0).conv_in.weight)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "options", [dict(prediction="foo"), dict(variance="foo"), dict(clip=-1.0)], ids=str
)
def test_refuses_to_save_what_cannot_be_loaded(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        save_pretrained(tmp_path / "m", unet(), NoiseSchedule.linear(), **options)
    assert not list(tmp_path.iterdir())


def test_does_not_overwrite_what_is_not_a_checkpoint(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        save_pretrained(tmp_path / "photos", unet(), NoiseSchedule.linear())
    with pytest.raises(ValueError, match="create it first"):
        save_pretrained(tmp_path / "no" / "where", unet(), NoiseSchedule.linear())


def remove(name):
    return lambda d: shutil.rmtree(d / name) if (d / name).is_dir() else (d / name).unlink()


def change_weights(change):
    def damage(d):
        weights = safetensors.load_file(d / WEIGHTS)
        change(weights)
        safetensors.save_file(weights, d / WEIGHTS)

    return damage


BAD_UNET_VALUES = [
    {"norm_num_groups": 0},
    {"attention_head_dim": 0},
    {"attention_head_dim": [1, 2]},
    {"block_out_channels": 5},
    {"block_out_channels": None},
    {"block_out_channels": ["a"]},
    {"down_block_types": None},
    {"up_block_types": [1, 2]},
    {"in_channels": "3"},
    {"layers_per_block": 1.5},
    {"norm_eps": None},
    {"freq_shift": "a"},
    {"dropout": 1.0},
    {"time_embedding_dim": -4},
    {"num_class_embeds": -1},
    {"mid_block_scale_factor": 0},
    {"sample_size": "8"},
    {"sample_size": [8]},
    {"add_attention": "yes"},
]
BAD_SCHEDULER_VALUES = [
    {"num_train_timesteps": "1000"},
    {"num_train_timesteps": None},
    {"num_train_timesteps": 1000.5},
    {"num_train_timesteps": 10**12},
    {"beta_start": None},
    {"clip_sample_range": None},
    {"prediction_type": []},
    {"variance_type": {}},
    {"trained_betas": {}},
    {"trained_betas": [0.1, 0.2]},
    {"timestep_values": [1, 2]},
]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is not a directory"),
        (remove("unet"), "unet/config.json is missing"),
        (remove("scheduler"), "scheduler_config.json is missing"),
        (remove(WEIGHTS), "never a pickle"),
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-100]), "cannot be read"),
        (lambda d: (d / "unet/config.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "unet/config.json").write_text("[]"), "expected a JSON object"),
        (lambda d: edit(d / "unet/config.json", surprise=1), "unknown key 'surprise'"),
        (lambda d: edit(d / "unet/config.json", in_channels=1), "has shape"),
        (lambda d: edit(d / "unet/config.json", layers_per_block=2), "missing parameter"),
        *[
            (lambda d, c=change: edit(d / "unet/config.json", **c), f"{next(iter(change))}=")
            for change in BAD_UNET_VALUES
        ],
        *[
            (
                lambda d, c=change: edit(d / "scheduler/scheduler_config.json", **c),
                next(iter(change)).replace("num_train_", ""),
            )
            for change in BAD_SCHEDULER_VALUES
        ],
        (
            lambda d: edit(d / "scheduler/scheduler_config.json", surprise=1),
            "unknown key 'surprise'",
        ),
        (
            lambda d: edit(d / "scheduler/scheduler_config.json", thresholding=True),
            "thresholding=True is not supported",
        ),
        (
            lambda d: edit(d / "scheduler/scheduler_config.json", prediction_type="flow"),
            "prediction_type='flow'",
        ),
        (
            lambda d: edit(d / "scheduler/scheduler_config.json", beta_schedule="laplace"),
            "beta_schedule='laplace'",
        ),
        (
            change_weights(lambda w: w["conv_in.bias"].fill_(float("nan"))),
            "conv_in.bias contains NaN or Inf",
        ),
        (change_weights(lambda w: w.update(extra=torch.zeros(1))), "unexpected parameter extra"),
    ],
)
def test_refuses_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)
