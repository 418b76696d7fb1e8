"""Calibration: measurement, file format, use by `FusedUNet`, and display in plans."""

import json
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import (
    FusedUNet,
    NoiseSchedule,
    Sampler,
    UNet,
    UNetConfig,
    load_pretrained,
    save_pretrained,
)
from ddpm_fast.checkpoints.checkpoint import Checkpoint
from ddpm_fast.engines.base import DTYPES
from ddpm_fast.engines.fused.calibration import (
    FILE,
    FLOOR,
    MARGIN,
    Calibration,
    allowed_error,
    e4m3_convolutions,
    load_calibration,
)
from ddpm_fast.engines.fused.checks import check_launch
from ddpm_fast.engines.fused.model import PlanSpec
from ddpm_fast.kernels._triton import INTERPRETED
from ddpm_fast.sampling.calibrate import calibrate
from ddpm_fast.utils.numerics import relative_error

pytest.importorskip("safetensors")
CONFIG = UNetConfig(
    8,
    1,
    1,
    channels=(32, 32),
    layers=1,
    attention=False,
    mid_attention=False,
    norm_groups=4,
    num_classes=10,
)
PLANTED = "up_blocks.0.resnets.1.conv2"
SETTINGS = dict(images=3, steps=4)


def network(seed=0, planted=False):
    """Random weights. planted: one input channel of a convolution is very large and has zero
    weights, so that the other channels lose their bits.
    """
    torch.manual_seed(seed)
    unet = UNet(CONFIG).eval().requires_grad_(False)
    for p in unet.parameters():
        if p.ndim == 1:
            p.add_(0.3 * torch.randn_like(p))
    if planted:
        block = unet.get_submodule(PLANTED.removesuffix(".conv2"))
        block.norm2.weight[5] = 1e6
        block.conv2.weight[:, 5] = 0
    return unet


def checkpoint(**options):
    return Checkpoint(network(**options), NoiseSchedule.linear(1e-4, 0.02, 100))


@pytest.fixture(scope="module")
def calibrated():
    return calibrate(checkpoint(), **SETTINGS)


@pytest.fixture(scope="module")
def planted():
    return calibrate(checkpoint(planted=True), **SETTINGS)


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "model", network(), NoiseSchedule.linear(1e-4, 0.02, 100))
    return tmp_path / "model"


@pytest.fixture
def run(capsys):
    pytest.importorskip("click")
    main = import_module("ddpm_fast.cli.main").main

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


def inputs(batch=3):
    torch.manual_seed(1)
    return (
        torch.randn(batch, 1, 8, 8),
        torch.tensor([999, 500, 0])[:batch],
        torch.tensor([0, 3, 9])[:batch],
    )


# ---- measurement


@torch.no_grad()
def test_ranges_and_errors_equal_their_definitions(calibrated):
    """Largest input and error of a layer, computed from all its inputs in fp64."""
    c, name, seen = checkpoint(), "mid_block.resnets.0.conv1", []
    conv = c.unet.get_submodule(name)
    conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    Sampler(c.unet, c.schedule, (1, 8, 8), engine="reference").sample(
        3, seed=1, solver="ddim", steps=4
    )
    x, layer = torch.cat(seen), calibrated.layers[name]
    assert len(seen) == 4 and layer.amax == pytest.approx(float(x.abs().max()), rel=1e-5)

    def rounded(v, unit):
        return (v / unit).float().to(torch.float8_e4m3fn).double() * unit

    weight = conv.weight.double()
    wq = rounded(weight, weight.abs().amax((1, 2, 3), keepdim=True) / 448)
    exact, narrow = (
        F.conv2d(*v, padding=1) for v in ((x, weight), (rounded(x, MARGIN * layer.amax / 448), wq))
    )
    assert layer.error == pytest.approx(relative_error(narrow, exact), rel=1e-3)
    assert set(calibrated.layers) == set(e4m3_convolutions(c.unet)) and not calibrated.keep_bf16
    # 0.0375 for independent terms
    assert all(0.01 < v.error < FLOOR for v in calibrated.layers.values())


def test_allowed_error():
    assert allowed_error(dict(a=0.01, b=0.02, c=0.9)) == FLOOR
    assert allowed_error(dict(a=0.04, b=0.05, c=0.9)) == 0.1
    assert allowed_error(dict(a=0.04, b=float("nan"))) == 0.08
    of = lambda **errors: (
        Calibration.of(network(), {}, dict.fromkeys(errors, 1.0), errors).keep_bf16
    )
    assert of(a=0.02, b=0.04, c=0.05, d=0.06) == [] and of(
        a=0.02, b=0.02, c=0.06, d=float("nan")
    ) == ["c", "d"]


def test_networks_that_cannot_be_calibrated_raise():
    with pytest.raises(ValueError, match="images = 0, steps = 4; expected integers"):
        calibrate(checkpoint(), images=0, steps=4)
    unet = UNet(
        UNetConfig(
            8, 1, 1, channels=(24,), layers=1, attention=False, mid_attention=False, norm_groups=4
        )
    )
    with pytest.raises(ValueError, match="multiples of 32 channels"):
        calibrate(Checkpoint(unet, NoiseSchedule.linear()), images=1, steps=1)


# ---- the file


def test_the_command_writes_the_same_bytes_twice(run, folder, tmp_path, calibrated):
    options = ("calibrate", "--weights", folder, "--images", 3, "--steps", 4)
    code, out, _ = run(*options, "--json")
    report = json.loads(out)
    assert (
        code == 0
        and report["keep_bf16"] == []
        and report["out"] == str(folder / FILE)
        and len(report["layers"]) == 16
    )
    code, out, _ = run(*options, "--out", tmp_path / "again.json")
    assert code == 0 and "none of 16 stay bf16: 0.0" in out and PLANTED in out
    assert (
        (folder / FILE).read_bytes()
        == (tmp_path / "again.json").read_bytes()
        == calibrated.to_json()
    )
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    back = load_calibration(folder, load_pretrained(folder).unet)
    assert back == calibrated and back.made == dict(SETTINGS, solver="ddim", seed=1)
    for more, message in (
        (("--out", tmp_path), "is a directory"),
        (("--out", tmp_path / "no" / "x.json"), "not a directory"),
    ):
        code, _, err = run(*options, *more)
        assert code == 2 and message in err and err.count("\n") == 1


def test_a_folder_without_a_calibration(folder):
    assert load_calibration(folder, network()) is None


DAMAGES = {
    "of other weights": lambda c: c | dict(weights="0" * 64),
    "its layers differ": lambda c: c | dict(layers={"conv_in": c["layers"][PLANTED]}),
    "format 2; this version reads format 1": lambda c: c | dict(format=2),
    "format None": lambda c: {},
    "KeyError 'layers'": lambda c: {k: v for k, v in c.items() if k != "layers"},
    "expected amax and error of 0 or more": lambda c: (
        c | dict(layers={PLANTED: dict(amax=-1.0, error=0.1, keep_bf16=False)})
    ),
    "keep_bf16 true or false": lambda c: (
        c | dict(layers={PLANTED: dict(amax=1.0, error=0.1, keep_bf16="no")})
    ),
    "unexpected keyword": lambda c: c | dict(layers={PLANTED: dict(size=1.0)}),
    "has no attribute": lambda c: c | dict(layers=[1]),
    "expected weights, made and layers": lambda c: c | dict(made=None),
    "format 'list'": lambda c: [c],
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_file_raises(message, folder, run, calibrated):
    """All readers raise, with one line; fp32 does not read the file."""
    (folder / FILE).write_text(json.dumps(DAMAGES[message](json.loads(calibrated.to_json()))))
    with pytest.raises(ValueError, match=f"calibration.json .*{message}"):
        FusedUNet.from_pretrained(folder, 1, "fp8", check=False)
    assert FusedUNet.from_pretrained(folder, 1, "fp32", check=False)
    if message in ("of other weights", "format None"):
        code, _, err = run("info", folder, "--plan", "--dtype", "fp8")
        assert (
            code == 2
            and message in err
            and err.count("\n") == 1
            and "create it again by ddpm-fast calibrate" in err
        )
        assert run("info", folder, "--plan")[0] == 0


def test_a_truncated_file_raises(folder, calibrated):
    for content in (calibrated.to_json()[:100], b"\xff\xfe", b""):
        (folder / FILE).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a calibration"):
            load_calibration(folder, network())


# ---- use by the network


@torch.no_grad()
def test_units_are_calibrated(calibrated):
    unet = network()
    plan = FusedUNet(unet, 3, "fp8", "cpu", calibration=calibrated).plan()
    norms = {launch.out: launch.op for launch in plan if launch.op.name == "group_norm_silu"}
    convolutions = {launch.name: launch for launch in plan if launch.op.name == "conv3x3"}
    for name, layer in calibrated.layers.items():
        assert norms[convolutions[name].reads["x"]].unit == MARGIN * layer.amax / 448
        assert convolutions[name].op.weight.dtype == torch.float8_e4m3fn
    assert convolutions["conv_out"].op.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="of other weights"):
        FusedUNet(network(seed=1), 3, "fp8", "cpu", calibration=calibrated)
    errors = [
        relative_error(FusedUNet(unet, 3, "fp8", "cpu", **o)(*inputs()), unet(*inputs()))
        for o in ({}, dict(calibration=calibrated))
    ]
    assert max(errors) < 0.1


@torch.no_grad()
def test_a_layer_with_a_large_error_stays_in_bf16(planted, figure):
    unet, args = network(planted=True), inputs()
    assert planted.keep_bf16 == [PLANTED] and planted.layers[PLANTED].error > 0.5
    fused = FusedUNet(unet, 3, "fp8", "cpu", calibration=planted)
    types = {
        launch.name: launch.op.weight.dtype
        for launch in fused.plan()
        if launch.op.name == "conv3x3"
    }
    narrow = {name for name, dtype in types.items() if dtype == torch.float8_e4m3fn}
    assert types[PLANTED] == torch.bfloat16 and narrow == set(planted.layers) - {PLANTED}
    by_rule = relative_error(FusedUNet(unet, 3, "fp8", "cpu")(*args), unet(*args))
    in_bf16 = relative_error(fused(*args), unet(*args))
    figure(
        "a layer without bits: fp8 forward with all in e4m3, with that one in bf16",
        f"{by_rule:.2f}, {in_bf16:.3f}",
    )
    assert in_bf16 < 0.6 * by_rule
    # a worker of the self-check builds the same launches from the description, with other weights
    child = PlanSpec.from_json(json.loads(json.dumps(fused.spec().to_json()))).network(
        network(seed=1)
    )
    assert [(n.name, n.out.dtype) for n in child.plan()] == [
        (n.name, n.out.dtype) for n in fused.plan()
    ]


def test_info_shows_the_calibration(run, folder, planted):
    code, out, _ = run("info", folder, "--plan", "--dtype", "fp8", "--batch-size", 4)
    assert code == 0 and "16 convolutions in e4m3, with ranges by rule" in out
    save_pretrained(folder, network(planted=True), NoiseSchedule.linear(1e-4, 0.02, 100))
    (folder / FILE).write_bytes(planted.to_json())
    code, out, _ = run("info", folder, "--plan", "--dtype", "fp8", "--batch-size", 4)
    error = f"off by {planted.layers[PLANTED].error:.4f} in e4m3, {planted.allowed:.4f} allowed"
    reason = f"{PLANTED} stays bf16: {error}"
    assert code == 0 and "15 convolutions in e4m3, with ranges as calibrated, 1 kept in bf16" in out
    assert reason in out
    assert [line.split()[0] for line in out.splitlines() if " bf16 kept " in line] == [
        PLANTED.split(".", 2)[2]
    ]
    report = json.loads(
        run("info", folder, "--plan", "--dtype", "fp8", "--batch-size", 4, "--json")[1]
    )
    operands = {row["launch"]: row["operands"] for row in report["plan"]}
    assert report["calibrated"] and report["keep_bf16"] == [PLANTED]
    assert (operands[PLANTED], operands["conv_in"], operands["mid_block.resnets.0.conv1"]) == (
        "bf16",
        "bf16",
        "e4m3",
    )
    assert operands["conv_norm_out"] is None


def test_the_calibration_of_the_included_weights(run):
    pytest.importorskip("click")
    weights = import_module("bench.workloads").ROOT / "weights" / "fashion-mnist-32"
    unet = load_pretrained(weights).unet
    calibration = load_calibration(weights, unet)
    assert calibration is not None and not calibration.keep_bf16 and len(calibration.layers) == 22
    assert all(layer.error < FLOOR for layer in calibration.layers.values())


def test_invalid_options_raise():
    unet = network()
    for options, message in (
        (dict(accumulation="exact"), "accumulation is 'exact'; expected one of bounded, unbounded"),
        (
            dict(keep_bf16=["conv_out"]),
            r"keep_bf16 is \['conv_out'\]; expected a list of convolutions' names, of down_blocks",
        ),
        (dict(keep_bf16=PLANTED), f"keep_bf16 is '{PLANTED}'"),
    ):
        with pytest.raises(ValueError, match=message):
            FusedUNet(unet, 1, "fp8", "cpu", **options)
    with pytest.raises(ValueError, match="nothing was counted"):
        FusedUNet(unet, 1, "fp8", "cpu").saturated()


@pytest.mark.parametrize("accumulation", ["bounded", "unbounded"])
def test_accumulation_reaches_the_launch(accumulation):
    triton_tools = pytest.importorskip("triton") and import_module("ddpm_fast.utils.triton_tools")
    plan = FusedUNet(network().to("meta"), 3, "fp8", "meta", accumulation=accumulation).plan()
    with triton_tools.record_launches() as launches:
        plan.run()
    bounds = {
        (a["IMPRECISE"], a["BLOCK_K"])
        for a in (launch.args for launch in launches)
        if a.get("SCALED")
    }
    assert bounds == (
        {(32, 32), (64, 64)} if accumulation == "bounded" else {(None, 32), (None, 64)}
    )


# ---- saturation


def scaled(c, factor):
    """A calibration whose largest activations are multiplied by `factor`."""
    return replace(c, layers={k: replace(v, amax=factor * v.amax) for k, v in c.layers.items()})


@torch.no_grad()
def test_saturation_is_counted(calibrated):
    """No value in a large range; in a tenth of the range, as many as counted from the inputs."""
    unet, args = network(), inputs()
    fused = FusedUNet(
        unet, 3, "fp8", "cpu", calibration=scaled(calibrated, 4), count_saturated=True
    )
    fused(*args)
    assert fused.saturated() == {}
    name = "down_blocks.0.resnets.0.conv1"  # its input does not depend on other units
    claimed = scaled(calibrated, 0.1)
    small = FusedUNet(unet, 3, "fp8", "cpu", calibration=claimed, count_saturated=True)
    small(*args)
    exact = FusedUNet(unet, 3, "fp8", "cpu", keep_bf16=[name])
    plan = exact.load(*args)
    for launch in plan:
        plan.run_one(launch)
        if launch.name == name.replace("conv1", "norm1"):
            break
    over = int(
        (plan.maps[launch.out].pixels.float().abs() > MARGIN * claimed.layers[name].amax).sum()
    )
    # `over` counts values that are rounded to bf16
    assert over > 100 and small.saturated()[name] == pytest.approx(over, abs=over // 50)
    assert small.saturated(clear=True) and small.saturated() == {}
    small(*args)
    once = small.saturated()
    small(*args)
    assert small.saturated() == {k: 2 * v for k, v in once.items()}


@pytest.fixture
def right_casts(monkeypatch):
    """Casts to e4m3 as torch and GPUs do; the interpreter loses carries and subnormals."""
    if INTERPRETED:
        interpreter = import_module("triton.runtime.interpreter")
        convert = interpreter._convert_float

        def right(x, source, target, rounding):
            if (str(source), str(target)) != ("fp32", "fp8e4nv"):
                return convert(x, source, target, rounding)
            return (
                torch.from_numpy(x.view(np.float32).copy())
                .to(torch.float8_e4m3fn)
                .view(torch.uint8)
                .numpy()
            )

        monkeypatch.setattr(interpreter, "_convert_float", right)


@torch.no_grad()
@pytest.mark.kernel
@pytest.mark.usefixtures("right_casts")
@pytest.mark.full
def test_kernels_equal_fallbacks(monkeypatch, device, figure, calibrated):
    """Whole network in fp16 and e4m3, because the interpreter cannot multiply bf16."""
    monkeypatch.setitem(DTYPES, "fp8", (torch.float16, torch.float8_e4m3fn))
    unet = network().to(device)
    args = [v.to(device) for v in inputs()]
    exact, errors, counts = unet(*args), [], []
    for calibration in (scaled(calibrated, 4), scaled(calibrated, 0.3)):
        fused = FusedUNet(
            unet, 3, "fp8", check=False, calibration=calibration, count_saturated=True
        )
        for fallbacks in (set(), {launch.name for launch in fused.plan()}):
            fused.plan().fallbacks = fallbacks
            errors.append(relative_error(fused(*args), exact))
            counts.append(fused.saturated(clear=True))
    figure(
        "fp8 with calibration: error by kernels, by fallbacks", f"{errors[0]:.1e}, {errors[1]:.1e}"
    )
    assert errors[0] < 1.05 * errors[1] < 0.1
    assert counts[:2] == [{}, {}]
    by_kernels, by_fallbacks = counts[2:]
    assert sum(by_fallbacks.values()) > 100
    first = "down_blocks.0.resnets.0.conv1"  # the order of its sums may change later counts
    assert by_kernels[first] == by_fallbacks[first]
    assert sum(by_kernels.values()) == pytest.approx(sum(by_fallbacks.values()), rel=0.05)


@torch.no_grad()
def test_the_self_check_detects_a_wrong_unit(monkeypatch, calibrated):
    """The unit of an e4m3 norm; the fallback replaces the kernel."""
    norm = type(
        next(
            n.op
            for n in FusedUNet(network(), 3, "fp8", "cpu").plan()
            if n.op.name == "group_norm_silu"
        )
    )
    monkeypatch.setattr(norm, "run", lambda op, **maps: op.fallback(**maps, compute=torch.float32))
    plan = FusedUNet(network(), 3, "fp8", "cpu", calibration=calibrated).load(*inputs())
    launch = next(n for n in plan if n.out.dtype == torch.float8_e4m3fn)
    plan.run()
    assert check_launch(plan, launch).passed
    wrong = lambda op, **maps: replace(op, unit=op.unit / 1.3).fallback(
        **maps, compute=torch.float32
    )
    monkeypatch.setattr(norm, "run", wrong)
    assert "relative error" in check_launch(plan, launch).reason
