import torch

from ddpm_fast.models.fingerprint import weights_fingerprint


def test_fingerprint_depends_on_every_bit():
    """For odd sizes, half precision, any memory layout, and views at any offset."""
    flat = torch.randn(101)
    values = [
        torch.randn(3),
        torch.randn(()),
        torch.randn(5, 7).half().t(),
        flat[1:4],
        flat[5:11].view(2, 3),
        torch.zeros(0),
    ]
    values.append(torch.randn(4, 2, 3, 3).contiguous(memory_format=torch.channels_last))
    model = torch.nn.ParameterList([torch.nn.Parameter(v) for v in values])
    before = weights_fingerprint(model)
    assert weights_fingerprint(model) == before
    for p in model:
        for i in range(p.numel()):
            at = torch.unravel_index(torch.tensor(i), p.shape)
            old = p.data[at].clone()
            p.data[at] = (
                torch.nextafter(old.float(), torch.tensor(9.0)).to(p.dtype)
                if p.dtype == torch.float32
                else old * 1.01
            )
            assert weights_fingerprint(model) != before
            p.data[at] = old
    assert weights_fingerprint(model) == before
