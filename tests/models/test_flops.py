import pytest
import torch

from ddpm_fast import UNetConfig
from ddpm_fast.models.flops import _PeakMemory, unet_cost

CELEBA = UNetConfig(
    sample_size=256, channels=(128, 128, 256, 256, 512, 512), attention=(False,) * 4 + (True, False)
)


@pytest.mark.parametrize(
    ("config", "parameters", "gflops"),
    [(UNetConfig(), 35_746_307, 12.444), (CELEBA, 113_673_219, 497.03)],
)
def test_classic_networks(config, parameters, gflops):
    """FLOPs were counted by hand, layer by layer."""
    cost = unet_cost(config)
    assert cost.parameters == parameters and cost.weight_bytes == 4 * parameters
    assert cost.flops / 1e9 == pytest.approx(gflops, rel=1e-4)


def test_flops_grow_with_the_image():
    config = UNetConfig(attention=(False,) * 4, mid_attention=False)
    assert unet_cost(config, (64, 64)).flops == pytest.approx(4 * unet_cost(config).flops, rel=1e-2)
    with pytest.raises(ValueError, match="no sample_size"):
        unet_cost(UNetConfig(sample_size=None))


def test_peak_memory_of_a_chain_with_a_known_peak():
    x = torch.empty(1000, device="meta")
    with _PeakMemory() as memory:
        a = x + 1  # 4000
        b = a + 1  # 8000
        del a  # 4000
        c = b + b + b  # one temporary: 12000 at the peak
        c = c.view(10, 100)  # no memory
        del b
    assert memory.peak == 12000 and memory.alive == 4000
    del c
    assert memory.alive == 0
