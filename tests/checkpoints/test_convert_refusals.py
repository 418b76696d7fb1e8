"""Damaged, hostile and contradictory input of convert: one line, exit code 2, no output."""

import json
import os
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("click")
safetensors = pytest.importorskip("safetensors.torch")
main = import_module("ddpm_fast.cli.main").main

FLAGS = (
    "--image_size 64 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --class_cond True "
    "--attention_resolutions 32 --num_head_channels 16 --use_new_attention_order True "
    "--resblock_updown True --learn_sigma True --diffusion_steps 1000 --noise_schedule linear"
)
PROCESS = (
    "--schedule linear --timesteps 1000 --beta-start 1e-4 --beta-end 0.02 --prediction eps "
    "--variance fixed_large --clip 1"
)
HO = f"--from ho {PROCESS} --image-size 8 --dropout 0"


@pytest.fixture(scope="module")
def states(networks):
    """State dicts of small networks by codebase."""
    x, t = torch.zeros(1, 3, 8, 8, dtype=torch.double), torch.zeros(1, dtype=torch.int64)
    guided, ho = networks.Parameters(), networks.Parameters()
    options = dict(head_channels=16, new_order=True, updown=True, classes=10)
    networks.openai(guided, x, t, t, **options)
    networks.ho(ho, x, t)
    return dict(guided=guided.state_dict(), ho=ho.state_dict())


def refusal(capsys, source, out, *arguments):
    """The line on stderr. Nothing is written: neither the folder nor a temporary one."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["convert", str(source), str(out), *arguments])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and len(lines[0]) < 700 and lines[0].startswith("ddpm-fast: error: ")
    assert sorted(out.parent.iterdir()) == before
    return lines[0]


def guided(source, flags=FLAGS):
    return ("--from", "guided-diffusion", "--flags", flags, *(["--trust"] if source else []))


# ---- files


@pytest.fixture
def refuse(capsys, tmp_path):
    return lambda name, *arguments: refusal(capsys, tmp_path / name, tmp_path / "out", *arguments)


@pytest.mark.parametrize("cut", [0, 10, 5000, -100])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_truncated_file(states, tmp_path, refuse, suffix, cut):
    path = tmp_path / f"ema.{suffix}"
    if suffix == "pt":
        torch.save(states["guided"], path)
    else:
        safetensors.save_file(states["guided"], path)
    path.write_bytes(path.read_bytes()[:cut])
    assert "ema." in refuse(path.name, *guided(True))


def test_file_that_executes_code(tmp_path, refuse):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    torch.save({"input_blocks.0.0.weight": Attack()}, tmp_path / "ema.pt")
    line = refuse("ema.pt", *guided(True))
    assert "posix.system" in line or "nt.system" in line
    assert "never executed" in line and not (tmp_path / "executed").exists()


def test_pickle_needs_trust(states, tmp_path, refuse):
    torch.save(states["guided"], tmp_path / "ema.pt")
    assert "is a pickle; expected safetensors, or --trust" in refuse("ema.pt", *guided(False))


def test_pickled_network_of_edm_is_never_opened(tmp_path, refuse):
    os.mkfifo(tmp_path / "network.pkl")  # opening it would block
    line = refuse("network.pkl", "--from", "edm", "--network-only", "--dropout", "0", "--trust")
    assert "executes source code" in line and "net.state_dict()" in line


def test_optimizer_is_refused_by_name_and_by_content(states, tmp_path, refuse):
    os.mkfifo(tmp_path / "opt001000.pt")
    assert "optimizer's state" in refuse("opt001000.pt", *guided(True))
    torch.save({"state": {}, "param_groups": []}, tmp_path / "ema.pt")
    assert "optimizer's state" in refuse("ema.pt", *guided(True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds list"),
        ({"state_dict": {"x": torch.ones(1)}}, "holds a dictionary under 'state_dict'"),
        ({"step": 5}, "'step' is a int"),
        ({"x": torch.ones(1).to_sparse()}, "not a dense tensor"),
        ({"x": torch.ones(1).expand(2**40)}, "more elements than are stored"),
    ],
)
def test_pickle_of_something_else(tmp_path, refuse, content, message):
    torch.save(content, tmp_path / "ema.pt")
    assert message in refuse("ema.pt", *guided(True))


@pytest.mark.parametrize("kind", ["objects", "bomb", "text", "unknown variable", "twice"])
def test_hostile_arrays(tmp_path, refuse, kind):
    path = tmp_path / "variables.npz"
    if kind == "objects":
        np.savez(path, **{"model/conv_in/W": np.array([{}], dtype=object)})
    elif kind == "bomb":
        np.savez_compressed(path, **{"model/conv_in/W": np.zeros(2**25, np.float32)})
    elif kind == "text":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/conv_in/W.npy", "hello")
    elif kind == "twice":
        names = ("model/conv_in/W", "conv_in/W")
        np.savez(path, **{name: np.zeros((3, 3, 3, 32), np.float32) for name in names})
    else:
        np.savez(path, **{"model/conv_in/kernel": np.zeros(3, np.float32)})
    expected = dict(
        objects="allow_pickle",
        bomb="at most 8 times",
        text="cannot be read",
        twice="under two names",
    ).get(kind, "expected W, b, gamma or beta")
    assert expected in refuse(path.name, *HO.split())


@pytest.mark.parametrize(
    "name", ["missing.safetensors", "folder.safetensors", "fifo.safetensors", "a.zip"]
)
def test_file_that_is_not_there_or_not_one(tmp_path, refuse, name):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "a.zip").write_bytes(b"x")
    assert name in refuse(name, *guided(False))


def test_output_that_cannot_be_written(states, tmp_path, capsys):
    safetensors.save_file(states["guided"], tmp_path / "m.safetensors")
    source = tmp_path / "m.safetensors"
    line = refusal(capsys, source, tmp_path / "out", *guided(False)[:2])  # without flags
    assert "--flags missing" in line
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("kept")
    assert "is not a checkpoint" in refusal(capsys, source, tmp_path / "full", *guided(False))
    assert (tmp_path / "full/thesis.txt").read_text() == "kept"
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["convert", str(source), str(tmp_path / "no/where"), *guided(False)])
    assert "create it first" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(tmp_path / "full/thesis.txt")
    assert "is not a checkpoint" in refusal(capsys, source, tmp_path / "link", *guided(False))
    assert (tmp_path / "full/thesis.txt").read_text() == "kept"


# ---- tensors


def without(state, name):
    return {k: v for k, v in state.items() if k != name}


DAMAGE = {
    "renamed": (
        lambda s: without(s, "out.2.bias") | {"out.2.offset": s["out.2.bias"]},
        "out.2.bias is missing",
    ),
    "extra": (lambda s: s | {"surprise": torch.ones(1)}, "unexpected parameter surprise"),
    "shape": (
        lambda s: s | {"out.2.weight": s["out.2.weight"][:, :16].contiguous()},
        "has shape (6, 16, 3, 3); expected (6, 32, 3, 3)",
    ),
    "projection": (
        lambda s: s | {"middle_block.1.qkv.weight": torch.ones(3, 64, 1)},
        "has shape (3, 64, 1); expected (192, 64)",
    ),
    "NaN": (lambda s: s | {"out.0.bias": s["out.0.bias"] / 0}, "out.0.bias contains NaN or Inf"),
    "integers": (
        lambda s: s | {"out.0.bias": s["out.0.bias"].int()},
        "out.0.bias has dtype torch.int32; expected a floating type",
    ),
    "rank": (
        lambda s: s | {"time_embed.0.weight": torch.ones(4)},
        "has shape (4,); expected 2 dimensions",
    ),
    "empty": (lambda s: s | {"time_embed.0.weight": torch.ones(4, 0)}, "has shape (4, 0)"),
    "no block": (
        lambda s: without(s, "output_blocks.3.0.in_layers.0.weight"),
        "contradicts the weights",
    ),
    "classifier": (
        lambda s: {k: v for k, v in s.items() if not k.startswith("output")},
        "a classifier",
    ),
    "nothing": (lambda s: {"x": torch.ones(1)}, "time_embed.0.weight is missing; check --from"),
    "huge": (
        lambda s: s | {"output_blocks.0.0.out_layers.0.weight": torch.ones(40_000)},
        "contradicts the weights",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_tensors(states, tmp_path, refuse, name):
    change, message = DAMAGE[name]
    safetensors.save_file(change(dict(states["guided"])), tmp_path / "m.safetensors")
    assert message in refuse("m.safetensors", *guided(False))


@pytest.mark.parametrize(
    ("codebase", "message"),
    [
        ("ho", "temb.dense.0.weight is missing; check --from"),
        ("edm", "map_layer0.weight is missing; check --from"),
    ],
)
def test_wrong_codebase(states, tmp_path, refuse, codebase, message):
    safetensors.save_file(states["guided"], tmp_path / "m.safetensors")
    line = HO if codebase == "ho" else f"--from edm {PROCESS} --dropout 0"
    assert message in refuse("m.safetensors", *line.split())


def test_networks_of_edm_that_are_unsupported(networks, tmp_path, refuse):
    x, t = torch.zeros(1, 3, 4, 4, dtype=torch.double), torch.zeros(1, dtype=torch.int64)
    p = networks.Parameters()
    networks.edm(p, x, t)
    line = f"--from edm {PROCESS} --dropout 0".split()
    state = p.state_dict()
    safetensors.save_file(without(state, "out_norm.weight"), tmp_path / "song.safetensors")
    assert "is a SongUNet" in refuse("song.safetensors", *line)
    name = "enc.8x8_down.conv0.resample_filter"
    safetensors.save_file(state | {name: torch.ones(1, 1, 4, 4)}, tmp_path / "fir.safetensors")
    assert f"{name} is not the filter [1, 1]" in refuse("fir.safetensors", *line)
    narrow = networks.Parameters()
    networks.edm(narrow, x, t, ch=64)
    safetensors.save_file(narrow.state_dict(), tmp_path / "narrow.safetensors")
    assert "have fewer than 32 groups" in refuse("narrow.safetensors", *line)


# ---- flags


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("--num_channels 32", "--num_channels 64"),
            "--num_channels (given) contradicts the weights: 64 by the flags, 32",
        ),
        (("1,2", "1,3"), "contradicts the weights: widths (32, 96) by the flags, (32, 64)"),
        (("--channel_mult 1,2", ""), "contradicts the weights: widths (32, 64, 96, 128)"),
        (
            ("--num_res_blocks 1", "--num_res_blocks 2"),
            "blocks per level (2, 2) by the flags, (1, 1)",
        ),
        (("resolutions 32", "resolutions 64,32"), "attention per level (True, True)"),
        (("--image_size 64", "--image_size 32"), "attention per level (True, False)"),
        (("--class_cond True", ""), "--class_cond (default of guided-diffusion) contradicts"),
        (
            ("--resblock_updown True", ""),
            "--resblock_updown (default of guided-diffusion) contradicts",
        ),
        (("--learn_sigma True", ""), "output channels 3 by the flags, 6 in the file"),
        (
            ("--class_cond True", "--class_cond True --use_scale_shift_norm False"),
            "--use_scale_shift_norm (given) contradicts",
        ),
        (
            ("--num_head_channels 16", "--num_head_channels 48"),
            "--num_head_channels 48 contradicts the weights, which attend at 64",
        ),
        (("--num_head_channels 16", "--num_heads 7"), "--num_heads 7 contradicts the weights"),
        (("--num_head_channels 16", "--num_head_channels 0"), "expected -1 or 1 to 16384"),
        (("--diffusion_steps 1000", ""), "do not name --diffusion_steps, which no weight says"),
        (("--noise_schedule linear", ""), "do not name --noise_schedule"),
        (("--image_size 64", ""), "do not name --image_size"),
        (("--noise_schedule linear", "--noise_schedule quad"), "expected linear or cosine"),
        (
            ("--image_size 64", "--image_size 64 --colour red"),
            "--colour is not a flag of guided-diffusion",
        ),
        (
            ("--image_size 64", "--image_size 64 --sigma_small True"),
            "--sigma_small is not a flag of guided-diffusion",
        ),
        (("--image_size 64", "--image_size 64 --large_size 256"), "upsamplers are unsupported"),
        (("--image_size 64", "--image_size many"), "--image_size is 'many'; expected an integer"),
        (
            ("--image_size 64", "--image_size 64 --image_size 32"),
            "--image_size is 64 and 32; give it once",
        ),
        (("--image_size 64", "--image_size"), "expected --NAME VALUE pairs"),
        (("--image_size 64", "'--image_size 64"), "--flags cannot be parsed"),
        (("--learn_sigma True", "--learn_sigma maybe"), "expected True or False"),
        (("--diffusion_steps 1000", "--diffusion_steps 10"), "expected at least 21"),
        (("1,2", "1,2,"), "expected integers separated by commas"),
        (
            ("--image_size 64", "--image_size 64 --num_heads_upsample 2"),
            "other heads on the way up are unsupported",
        ),
    ],
)
def test_contradicting_and_incomplete_flags(states, tmp_path, refuse, change, message):
    safetensors.save_file(states["guided"], tmp_path / "m.safetensors")
    assert change[0] in FLAGS
    assert message in refuse("m.safetensors", *guided(False, FLAGS.replace(*change)))


def test_order_of_projections_is_no_flag_of_improved_diffusion(states, tmp_path, refuse):
    safetensors.save_file(states["guided"], tmp_path / "m.safetensors")
    line = refuse("m.safetensors", "--from", "improved-diffusion", "--flags", FLAGS)
    assert "is not a flag of improved-diffusion" in line


def test_published_name_of_another_network(states, tmp_path, refuse):
    safetensors.save_file(states["guided"], tmp_path / "m.safetensors")
    line = refuse("m.safetensors", "--published", "adm-imagenet64")
    assert (
        "--num_channels (given) contradicts the weights: 192 by the flags, 32 in the file" in line
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "--from is missing"),
        (
            "--from ho --image-size 8 --dropout 0",
            "--clip, --prediction, --schedule, --timesteps, --variance missing",
        ),
        (HO.replace("--beta-end 0.02", ""), "--beta-end missing: no weight says it"),
        (HO.replace("--clip 1", ""), "--clip missing"),
        (HO.replace("--dropout 0", ""), "--dropout missing"),
        (HO.replace("--image-size 8", ""), "--image-size missing"),
        (HO.replace("linear", "cosine"), "expected --clip, --dropout"),
        (HO.replace("--clip 1", "--clip -1"), "--clip is -1"),
        (HO.replace("--beta-end 0.02", "--beta-end 2"), "2"),
        (HO.replace("--dropout 0", "--dropout nan"), "dropout is nan"),
        (
            HO.replace("fixed_large", "learned_range"),
            "variance learned_range contradicts the weights",
        ),
        ("--published ho-cifar10", "ho-cifar10 has (128, 256, 256, 256)"),
        (f"{HO} --flags x", "--flags was given"),
        (f"{HO} --network-only", "leave it out"),
        ("--published ho-cifar10 --dropout 0", "--published implies it"),
        ("--published ho-cifar10 --from edm", "expected ho, that of ho-cifar10"),
        (
            "--from guided-diffusion",
            "--flags missing: no weight says it; give it as in training, or --published",
        ),
        (f"--from diffusers-unet {PROCESS}", "is not a directory"),
    ],
)
def test_missing_and_superfluous_settings(states, tmp_path, refuse, line, message):
    safetensors.save_file(states["ho"], tmp_path / "m.safetensors")
    assert message in refuse("m.safetensors", *line.split())


# ---- folders without a scheduler, and this package's own format


@pytest.fixture
def folder(states, tmp_path):
    safetensors.save_file(states["ho"], tmp_path / "m.safetensors")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["convert", str(tmp_path / "m.safetensors"), str(tmp_path / "full"), *HO.split()])
    return Path(tmp_path / "full/unet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block_out_channels=[10**9, 64]), "block_out_channels"),
        (dict(layers_per_block=10**6), "layers_per_block"),
        (dict(surprise=1), "unknown key 'surprise'"),
        (dict(_class_name="../../etc/passwd"), "model class is unsupported"),
        (dict(_class_name="DdpmFastUNet"), "unknown key"),
    ],
)
def test_absurd_configuration(folder, tmp_path, capsys, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    line = refusal(capsys, folder, tmp_path / "out", "--from", "diffusers-unet", *PROCESS.split())
    assert message in line and "config.json" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(time_scale=0), "time_scale=0"),
        (dict(time_scale="1"), "time_scale='1'"),
        (dict(time_scale=float("nan")), "time_scale=nan"),
        (dict(sinusoid_dim=33), "sinusoid_dim=33"),
        (dict(sinusoid_dim=10**9), "sinusoid_dim=1000000000"),
        (dict(heads=[1, 3]), "cannot be split into 3 attention heads"),
        (dict(heads=[1, [2]]), "heads"),
        (dict(channels=None), "channels=None"),
        (dict(attention="yes"), "attention"),
        (dict(surprise=1), "unknown key 'surprise'"),
    ],
)
def test_own_configuration_is_checked(folder, change, message):
    load = import_module("ddpm_fast").load_pretrained
    unet = load(folder.parent).unet
    own = import_module("ddpm_fast.models.own_format").to_own(
        import_module("dataclasses").asdict(unet.config)
    )
    (folder / "config.json").write_text(json.dumps(own))
    assert load(folder.parent).unet.config == unet.config
    (folder / "config.json").write_text(json.dumps(own | change))
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        load(folder.parent)
    assert message in str(caught.value)
    del own["time_scale"]
    (folder / "config.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match="missing key 'time_scale'"):
        load(folder.parent)


# ---- the hub


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    load = import_module("ddpm_fast").load_pretrained

    def fail(name, allow_patterns):
        assert name == "google/ddpm-cifar10-32"
        assert all(p.endswith((".json", ".safetensors")) for p in allow_patterns)
        raise OSError("no route\nto host")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(
        ValueError, match=r"^google/ddpm-cifar10-32 is not a directory.*no route.*$"
    ):
        load("google/ddpm-cifar10-32")
    for path in ("tests/nothing", "nothing", "/a/b", "a/b/c", "../a"):  # local paths
        with pytest.raises(ValueError, match="expected a checkpoint with unet/"):
            load(path)


def test_hub_repository_is_loaded(folder, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(folder.parent))
    ddpm_fast = import_module("ddpm_fast")
    expected = ddpm_fast.load_pretrained(folder.parent).unet.state_dict()
    loaded = ddpm_fast.Sampler.from_pretrained("somebody/ddpm", engine="reference")
    assert all(torch.equal(loaded.model.state_dict()[k], v) for k, v in expected.items())
