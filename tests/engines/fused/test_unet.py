"""FusedUNet equals the reference: by fallbacks at full size, by kernels in the interpreter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.workloads import NETWORKS
from ddpm_fast import Sampler, UNet, UNetConfig, load_pretrained
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.engines.fused.unet import FusedUNet
from ddpm_fast.kernels import group_norm_silu
from ddpm_fast.kernels._gemm import Target
from ddpm_fast.utils.numerics import relative_error

WEIGHTS = Path(__file__).parents[3] / "weights" / "fashion-mnist-32"
SMALL = dict(in_channels=1, out_channels=1, layers=1)
# together they cover all paths
NETS = {
    "straddling groups": UNetConfig(
        8, channels=(32, 48), layers=1, attention=(False, True), norm_groups=4
    ),  # 80 = 4 x 20 channels
    "attention on two levels": UNetConfig(
        8, channels=(16, 32, 32), attention=(True, False, True), norm_groups=8, **SMALL
    ),
    "scale-shift, heads, 6 outputs": UNetConfig(
        (8, 12),
        channels=(32, 48),
        layers=1,
        attention=True,
        heads=(1, 3),
        norm_groups=8,
        scale_shift=True,
        out_channels=6,
        cos_first=True,
    ),
    "symmetric downsampling": UNetConfig(
        16, channels=(16, 32), norm_groups=4, downsample_padding=1, attention=False, **SMALL
    ),
    "class-conditional, 28x28": UNetConfig(
        28, channels=(16, 32, 48), norm_groups=16, num_classes=10, attention=False, **SMALL
    ),
    "blocks per level": UNetConfig(
        16,
        1,
        1,
        channels=(16, 32, 32),
        layers=(1, 1, 2),
        attention=(False, True, True),
        norm_groups=8,
    ),
    "not square": UNetConfig(
        (8, 24), channels=(16, 32), norm_groups=4, attention=(False, True), **SMALL
    ),
    "ADM resampling, no norm in the middle": UNetConfig(
        16,
        channels=(16, 32),
        norm_groups=4,
        attention=(False, True),
        down_resample="resnet",
        up_resample="resnet",
        mid_norm_groups=0,
        scale_shift=True,
        **SMALL,
    ),
    "ADM resampling, added time": UNetConfig(
        8,
        channels=(16, 32),
        norm_groups=4,
        attention=False,
        mid_attention=False,
        down_resample="resnet",
        up_resample="resnet",
        **SMALL,
    ),
    "mid scale, centred, odd time width": UNetConfig(
        8,
        channels=(16, 32),
        norm_groups=4,
        attention=(False, True),
        mid_scale=2**0.5,
        center_input=True,
        time_dim=40,
        **SMALL,
    ),
    "two-pass norms": UNetConfig(
        (48, 44), channels=(16, 16), norm_groups=2, attention=False, mid_attention=False, **SMALL
    ),
}

QUICK = (
    "straddling groups",
    "ADM resampling, added time",
    "mid scale, centred, odd time width",
)


def of(config, seed=0):
    """Random weights, including norms and biases."""
    torch.manual_seed(seed)
    unet = UNet(config).eval().requires_grad_(False)
    for p in unet.parameters():
        if p.ndim == 1:
            p.add_(0.3 * torch.randn_like(p))
    return unet


def inputs(config, batch, size=None):
    x = torch.randn(batch, config.in_channels, *(size or config.size))
    t = torch.randint(1000, (batch,))
    t[: min(2, batch)] = torch.tensor([999, 0])[:batch]
    return (
        (x, t)
        if config.num_classes is None
        else (x, t, torch.randint(config.num_classes, (batch,)))
    )


def run(fused, *args):
    fused.plan(tuple(args[0].shape[2:])).poison()
    return fused(*args)


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "batch"),
    [(NETWORKS["cifar10"], 3), (NETWORKS["celebahq256"], 1), (NETWORKS["improved_cifar10"], 2)],
)
@pytest.mark.full
def test_by_fallbacks_at_full_size(config, batch, figure):
    unet = of(config)
    fused = FusedUNet.from_unet(unet, batch, dtype="fp32")
    if not fused.plan().fallbacks:
        pytest.skip("the interpreter runs small networks only")
    args = inputs(config, batch)
    error = relative_error(run(fused, *args), unet(*args))
    figure(f"FusedUNet by fallbacks against the reference, {config.channels}, fp32", f"{error:.1e}")
    assert error < 1e-5
    if batch > 1:  # a smaller batch, and another image size
        for other in ([v[:1] for v in args], inputs(config, batch, (16, 48)), args):
            assert relative_error(run(fused, *other), unet(*other)) < 1e-5


@torch.no_grad()
def test_the_included_weights_by_fallbacks(figure):
    checkpoint = load_pretrained(WEIGHTS)
    unet = checkpoint.unet.eval()
    args = inputs(unet.config, 5)
    errors = {
        d: relative_error(run(FusedUNet(unet, 5, d, "cpu"), *args), unet(*args))
        for d in ("fp32", "fp16", "bf16", "fp8")
    }
    figure(
        "FusedUNet against the reference, included weights",
        ", ".join(f"{k} {v:.1e}" for k, v in errors.items()),
    )
    plain = relative_error(unet.bfloat16()(*args), unet.float()(*args))
    bounds = dict(fp32=1e-5, fp16=2e-3, bf16=2 * plain, fp8=0.1)
    assert all(errors[d] < bound for d, bound in bounds.items())


@torch.no_grad()
def test_blocks_per_level_by_the_fallback():
    unet = of(NETS["blocks per level"])
    fused = FusedUNet(unet, 2, "fp32", "cpu", check=False)
    fused.plan().fallbacks = {launch.name for launch in fused.plan()}
    args = inputs(unet.config, 2)
    expected = unet.double()(*args)
    assert relative_error(run(fused, *args), expected) < 1e-5


@torch.no_grad()
@pytest.mark.kernel
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in NETS]
)
def test_small_networks_by_kernels(name, device, figure):
    config = NETS[name]
    unet = of(config).to(device)
    batch = 1 if config.size[0] > 16 else 2
    args = [v.to(device) for v in inputs(config, batch)]
    fused = FusedUNet(unet, batch, "fp32", check=False)
    assert not fused.plan().fallbacks
    result = run(fused, *args)
    exact, plain = unet.double()(*args), unet.float()(*args)
    error, allowed = relative_error(result, exact), max(1e-6, 2 * relative_error(plain, exact))
    figure(
        f"by kernels against fp64, {name}: {len(fused.plan())} launches",
        f"{error:.1e} (plain PyTorch {allowed / 2:.1e})",
    )
    assert error <= allowed
    fused.plan().fallbacks = {launch.name for launch in fused.plan()}
    assert relative_error(run(fused, *args), exact) <= allowed


@torch.no_grad()
@pytest.mark.kernel
@pytest.mark.full
def test_any_launch_can_run_by_its_fallback(device):
    config = NETS["mid scale, centred, odd time width"]
    unet = of(config).to(device)
    args = [v.to(device) for v in inputs(config, 2)]
    fused = FusedUNet(unet, 2, "fp32", check=False)
    plan, expected = fused.plan(), unet(*args)
    one_of_each = {launch.op.name: launch.name for launch in plan}
    for name in one_of_each.values():
        plan.fallbacks = {name}
        assert relative_error(run(fused, *args), expected) < 3e-6 and not fused.invariant


@torch.no_grad()
@pytest.mark.kernel
@pytest.mark.parametrize(
    "name",
    [
        "straddling groups",
        pytest.param("scale-shift, heads, 6 outputs", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.full), "fp16"])
def test_an_image_is_the_same_alone_first_last_and_in_a_ragged_batch(name, dtype, device):
    config = replace(NETS[name], sample_size=(4, 6))
    unet = of(config).to(device)
    args = [v.to(device) for v in inputs(config, 5)]
    whole = run(FusedUNet(unet, 5, dtype, check=False), *args)
    small = FusedUNet(unet, 2, dtype, check=False)
    # alone in a partial batch; the last image first and the first one last
    assert torch.equal(run(small, *(v[3:4] for v in args)), whole[3:4])
    assert torch.equal(run(small, *(v[[4, 0]] for v in args)), whole[[4, 0]])
    assert small.invariant


@torch.no_grad()
@pytest.mark.kernel
@pytest.mark.full
def test_an_image_is_the_same_in_every_batch_where_its_norms_read_statistics(device, monkeypatch):
    """No map fits one pass, so launches keep statistics, except for attention."""
    monkeypatch.setattr(group_norm_silu, "MAX_ONE_PASS_ELEMENTS", 1)
    config = UNetConfig(
        (6, 10),
        channels=(16, 16),
        attention=(True, False),
        mid_attention=False,
        norm_groups=4,
        **SMALL,
    )
    unet = of(config).to(device)
    args = [v.to(device) for v in inputs(config, 3)]
    fused = FusedUNet(unet, 3, "fp32", check=False)
    norms = [launch.reads for launch in fused.plan() if launch.op.name == "group_norm_silu"]
    from_statistics = [reads for reads in norms if "stats" in reads]
    assert any("stats2" in reads for reads in from_statistics) and len(from_statistics) < len(norms)
    whole = run(fused, *args)
    small = FusedUNet(unet, 2, "fp32", check=False)
    assert torch.equal(run(small, *(v[1:2] for v in args)), whole[1:2])
    assert torch.equal(run(small, *(v[[2, 0]] for v in args)), whole[[2, 0]])
    assert small.invariant
    exact, plain = unet.double()(*args), unet.float()(*args)
    assert relative_error(whole, exact) <= max(1e-6, 2 * relative_error(plain, exact))


@torch.no_grad()
@pytest.mark.kernel
@pytest.mark.acceptance
def test_the_cifar10_network_by_every_kernel_of_its_plan(device, figure):
    unet = of(UNetConfig()).to(device)
    args = [v.to(device) for v in inputs(unet.config, 1)]
    fused = FusedUNet(unet, 1, "fp16", check=False)
    result, exact = run(fused, *args), unet(*args)
    fused.plan().fallbacks = {launch.name for launch in fused.plan()}
    fallbacks = run(fused, *args)
    error, other = relative_error(result, exact), relative_error(fallbacks, exact)
    figure(
        "CIFAR-10 network, fp16, against fp32: by kernels, by fallbacks",
        f"{error:.1e}, {other:.1e}",
    )
    assert error < 1.5 * other and error < 2e-3


@torch.no_grad()
def check_rows_per_step(monkeypatch, device):
    """Computes the rows in every step instead of a table, whose size limit is set to 0."""
    config = replace(NETS["class-conditional, 28x28"], sample_size=8)
    unet = of(config).to(device)
    args = [v.to(device) for v in inputs(config, 3)]
    table = run(FusedUNet(unet, 3, "fp32", check=False), *args)
    monkeypatch.setattr("ddpm_fast.models.time_table.LARGEST", 0)
    fused = FusedUNet(unet, 3, "fp32", check=False)
    assert next(iter(fused.plan())).name == "time_rows"
    assert relative_error(run(fused, *args), table) < 2e-6
    if not fused.plan().fallbacks:
        assert torch.equal(run(fused, *(v[:1] for v in args)), run(fused, *args)[:1])


def test_rows_of_the_time_embedding_by_fallbacks(monkeypatch):
    check_rows_per_step(monkeypatch, "cpu")


@pytest.mark.kernel
@pytest.mark.full
def test_rows_of_the_time_embedding_by_kernels(monkeypatch, device):
    check_rows_per_step(monkeypatch, device)


@torch.no_grad()
def test_weights_are_packed_at_construction():
    unet = of(NETS["not square"])
    args = inputs(unet.config, 1)
    fused = FusedUNet(unet, 1, "fp32", check=False)
    before = run(fused, *args)
    for p in unet.parameters():
        p.zero_()
    assert torch.equal(run(fused, *args), before)
    assert run(fused, *inputs(unet.config, 1, (16, 8))).abs().max() > 0


@torch.no_grad()
def test_samples_equal_those_of_the_reference():
    config = NETS["not square"]
    unet = of(config)
    schedule, shape = NoiseSchedule.linear(), (1, *config.size)
    expected = Sampler(unet, schedule, shape).sample(3, steps=5, output="float")
    fused = FusedUNet(unet, 2, "fp32", check=False)
    result = Sampler(fused, schedule, shape, device="cpu").sample(
        3, steps=5, output="float", batch_size=2
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_torch_dtypes_give_the_same_networks():
    unet = of(NETS["not square"]).to("meta")
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        assert FusedUNet(unet, 1, dtype, "meta").spec() == FusedUNet(unet, 1, name, "meta").spec()
    with pytest.raises(ValueError, match=r"dtype is torch\.float64; expected one of fp32"):
        FusedUNet(unet, 1, torch.float64, "meta")


def test_invalid_arguments_raise():
    unet = of(NETS["class-conditional, 28x28"])
    fused = FusedUNet(unet, 2, "fp32", check=False)
    x, t, labels = inputs(unet.config, 2)
    bad = {
        "give a larger batch_size": (torch.cat([x, x]), 5, torch.zeros(4, dtype=torch.int64)),
        "divisible by 4": (x[..., :26], t, labels),
        "labels missing": (x, t),
        r"in 0\.\.999": (x, torch.tensor([5, 1000]), labels),
        r"t\b.* -1\.\.5": (x, torch.tensor([5, -1]), labels),
        r"t\b.* torch\.float32": (x, t.float(), labels),
        r"labels\b.* in 0\.\.9": (x, t, torch.tensor([3, 10])),
        r"integers \[2\]": (x, t[:1].repeat(3), labels),
    }
    for message, args in bad.items():
        with pytest.raises(ValueError, match=message):
            fused(*args)
    with pytest.raises(ValueError, match="no labels"):
        FusedUNet(of(NETS["not square"]), 1, "fp32", check=False)(
            torch.zeros(1, 1, 8, 24), 0, torch.zeros(1, dtype=torch.int64)
        )
    with pytest.raises(
        ValueError, match="attention heads of 768 channels; the kernels take up to 512"
    ):
        FusedUNet(
            UNet(UNetConfig(8, channels=(32, 768), layers=1, attention=False)), 1, device="meta"
        )
    with pytest.raises(ValueError, match="multiples of 16"):
        FusedUNet(
            UNet(
                UNetConfig(8, channels=(8, 24), norm_groups=4, attention=False, mid_attention=False)
            ),
            1,
        )
    with pytest.raises(ValueError, match=r"8\.9 or newer"):
        FusedUNet(unet, 1, "fp8", target=Target(80, 108))
    for options, message in (
        (dict(batch_size=0), "at least 1"),
        (dict(batch_size=1, dtype="int8"), "fp32, fp16"),
        (dict(batch_size=1, size=(30, 28)), "divisible by 4"),
        (dict(batch_size=1, size=28), r"size is 28; expected \(H, W\)"),
        (dict(batch_size=1, target=Target(75, 40)), r"8\.0 or newer"),
    ):
        with pytest.raises(ValueError, match=message):
            FusedUNet(unet, **options)
    with pytest.raises(ValueError, match="sample_size"):
        FusedUNet(
            UNet(
                UNetConfig(
                    None, channels=(16,), norm_groups=4, attention=False, mid_attention=False
                )
            ),
            1,
        )


def test_inference_mode_autocast_and_gradients():
    model, x, t = UNet(NETS["not square"]).eval(), torch.randn(2, 1, 8, 24), torch.tensor([3, 700])
    expected = model(x, t).detach()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        network = FusedUNet(model, 2, "fp32")
        inside = network(x, t)
        other = network(torch.randn(2, 1, 16, 8), t)
    assert relative_error(inside, expected) < 3e-6 and other.shape == (2, 1, 16, 8)
    again = network(x.clone().requires_grad_(), t)
    assert torch.equal(again, inside) and not again.requires_grad
    network(torch.randn(2, 1, 16, 8), t)


def test_small_integers_do_not_overflow():
    model = UNet(NETS["class-conditional, 28x28"]).eval()
    network, x, labels = (
        FusedUNet(model, 2, "fp32"),
        torch.randn(2, 1, 28, 28),
        torch.tensor([9, 1], dtype=torch.uint8),
    )
    t = torch.tensor([200, 255])
    assert torch.equal(network(x, t.to(torch.uint8), labels), network(x, t, labels.long()))


def test_resized_shares_the_weights():
    model = UNet(NETS["class-conditional, 28x28"]).eval()
    network, x, labels = FusedUNet(model, 2, "fp32"), torch.randn(5, 1, 28, 28), torch.arange(5)
    more = network.resized(5)
    t = torch.arange(5) * 200
    assert more.batch_size == 5 and network.batch_size == 2 and more._packed is network._packed
    assert relative_error(more(x, t, labels), model(x, t, labels).detach()) < 3e-6
    assert (
        relative_error(network(x[:2], t[:2], labels[:2]), model(x[:2], t[:2], labels[:2]).detach())
        < 3e-6
    )
    with pytest.raises(ValueError, match="batch_size = 0"):
        network.resized(0)


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        ({"conv": {"block_m": 64}}, "tiles for 'conv'; expected a key such as"),
        (
            {"conv3x3 sm90 bfloat16 128->128 32x32": {"rows": 64}},
            "set rows; expected some of block_m, block_n, block_k",
        ),
    ],
)
def test_invalid_tiles_raise(tiles, message):
    with pytest.raises(ValueError, match=message):
        FusedUNet(UNet(NETS["not square"]), 1, tiles=tiles)
