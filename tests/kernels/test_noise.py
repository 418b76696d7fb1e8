"""Counter-based noise: `kernels.noise`."""

import numpy as np
import pytest
import torch

from ddpm_fast.kernels import noise as N
from ddpm_fast.kernels._triton import INTERPRETED, tl, triton

SEED, IMAGE, ROW = 0x0123456789ABCDEF, 0x0000000500000007, 42


def stream(batch, seed=SEED, image=IMAGE, row=ROW, device="cpu"):
    seed = seed - 2**64 if seed >= 2**63 else seed
    return (
        torch.full((batch,), seed, dtype=torch.int64, device=device),
        torch.arange(image, image + batch, device=device),
        torch.full((batch,), row, dtype=torch.int32, device=device),
    )


def bits(x):
    return x.contiguous().view(torch.int32)


# Known answers published with Random123: counter, key -> words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter, key, words):
    got = N.philox_reference(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(w) for w in got) == words


def test_layout_of_the_counter():
    """Compares with Philox: key low and high, block, tag and row, image low and high."""
    seed, image, row, tag = 0xFEDCBA9876543210, 0x123456789, 0xABCDEF, N.REVERSE
    got = N.words_reference(*stream(1, seed, image, row), tag, 7)[0].tolist()
    key = (torch.tensor(0x76543210), torch.tensor(0xFEDCBA98))
    expected = []
    for block in (0, 1):
        counter = (block, tag << 24 | row, 0x23456789, 0x1)
        expected += [int(w) for w in N.philox_reference(tuple(map(torch.tensor, counter)), key)]
    assert got == expected[:7]


def test_golden_layout():
    """Frozen: image i of seed s must never change."""
    tags = dict(X_T=0, REVERSE=1, Q_SAMPLE=2, TRAIN_T=3, LABEL=4, DEQUANTISE=5)
    assert {name: getattr(N, name) for name in tags} == tags
    words = N.words_reference(*stream(1), N.X_T, 5)[0].tolist()
    assert [f"{w:08x}" for w in words] == GOLDEN_WORDS
    normals = N.noise_reference(*stream(2), N.REVERSE, (3, 2, 1))
    words_of_normals = bits(normals.permute(0, 2, 3, 1)).flatten().tolist()
    assert " ".join(f"{b & 0xFFFFFFFF:08x}" for b in words_of_normals) == GOLDEN_NORMALS


GOLDEN_WORDS = ["948ef781", "39c40e91", "3b63b2c9", "284b7d22", "6d7da0da"]
GOLDEN_NORMALS = (
    "3fba8e9c 3f003c5d 3f013e01 be5bee5f 3fc469cd bfa94f3d "
    "3fb46654 3f2af79c 3f8469fd be32ecaa bf3cd04c be2fdeee"
)


def test_normals_against_fp64():
    generator = torch.Generator().manual_seed(0)
    radius, angle = torch.randint(0, 2**32, (2, 1_000_000), generator=generator)
    radius[:4] = torch.tensor([0, 2**32 - 1, 1, 2**31])
    angle[:8] = torch.tensor([0, 2**32 - 1, 2**29, 2**29 - 1, 2**30, 2**31, 3 * 2**30, 7 * 2**29])
    n0, n1 = N.box_muller_reference(radius, angle)
    r = (-2 * (((radius.float() + 0.5).double() * 2.0**-32).log())).sqrt()
    theta = angle.double() * (2 * torch.pi * 2.0**-32)
    error = torch.stack([n0 - r * theta.cos(), n1 - r * theta.sin()]).abs() / r.clamp_min(1)
    assert error.max() < 3e-7
    assert n0[0].abs().max() == pytest.approx((2 * 33 * np.log(2)) ** 0.5, rel=1e-6)


@pytest.mark.kernel
def test_a_million_words_and_normals_are_bit_exact(device, figure, monkeypatch):
    batch, count = 4, 250_000
    if INTERPRETED:
        monkeypatch.setattr(N, "BLOCK", 2**15)  # the interpreter takes time per operation
    args = stream(batch, device=device)
    words = N.words(*args, N.X_T, count)
    assert torch.equal(words.cpu(), N.words_reference(*stream(batch), N.X_T, count))
    normals = N.noise(*args, N.REVERSE, 2, 250, 500)
    expected = N.noise_reference(*stream(batch), N.REVERSE, (2, 250, 500))
    assert torch.equal(bits(normals.cpu()), bits(expected))
    figure("words and normals, bit-exact in kernel and reference", f"{batch * count:,} of each")


@triton.jit
def _philox_kernel(words_ptr, inputs_ptr):
    """inputs: four counter words and two key words per program."""
    n = tl.program_id(0)
    p = inputs_ptr + 6 * n
    c0, c1 = tl.load(p).to(tl.uint32), tl.load(p + 1).to(tl.uint32)
    c2, c3 = tl.load(p + 2).to(tl.uint32), tl.load(p + 3).to(tl.uint32)
    k0, k1 = tl.load(p + 4).to(tl.uint32), tl.load(p + 5).to(tl.uint32)
    w0, w1, w2, w3 = N.philox(c0, c1, c2, c3, k0, k1)
    tl.store(words_ptr + 4 * n, w0.to(tl.int64))
    tl.store(words_ptr + 4 * n + 1, w1.to(tl.int64))
    tl.store(words_ptr + 4 * n + 2, w2.to(tl.int64))
    tl.store(words_ptr + 4 * n + 3, w3.to(tl.int64))


@pytest.mark.kernel
def test_kernel_known_answers(device):
    inputs = torch.tensor([[*counter, *key] for counter, key, _ in KNOWN], device=device)
    words = torch.empty(len(KNOWN), 4, dtype=torch.int64, device=device)
    _philox_kernel[(len(KNOWN),)](words, inputs)
    assert [tuple(w) for w in words.tolist()] == [w for _, _, w in KNOWN]


@pytest.mark.kernel
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 7, 5), (1, 28, 28), (4, 33, 31), (3, 32, 32), (2, 1, 1030)], ids=str
)
@pytest.mark.parametrize("seed", [0, 2**64 - 1], ids=["zero", "largest"])
def test_noise_of_any_shape(shape, seed, device):
    got = N.noise(*stream(3, seed, 2**40, 2**24 - 1, device), N.REVERSE, *shape)
    assert got.is_contiguous(memory_format=torch.channels_last) and got.shape[1:] == shape
    expected = N.noise_reference(*stream(3, seed, 2**40, 2**24 - 1), N.REVERSE, shape)
    assert torch.equal(bits(got.cpu()), bits(expected))


@pytest.mark.kernel
def test_opcheck(device):
    torch.library.opcheck(N.noise, (*stream(2, device=device), N.X_T, 3, 5, 7))
    torch.library.opcheck(N.words, (*stream(2, device=device), N.X_T, 9))


def test_opcheck_of_the_reference():
    torch.library.opcheck(N.noise, (*stream(2), N.X_T, 3, 5, 7))
    torch.library.opcheck(N.words, (*stream(2), N.X_T, 9))


def test_an_image_does_not_depend_on_its_batch():
    whole = N.noise(*stream(8), N.X_T, 3, 9, 9)
    for i in (0, 3, 7):
        assert torch.equal(whole[i : i + 1], N.noise(*stream(1, image=IMAGE + i), N.X_T, 3, 9, 9))


@pytest.mark.parametrize("bad", ["length", "dtype"])
def test_refuses(bad):
    seed, image, row = stream(2)
    row = row[:1] if bad == "length" else row.float()
    with pytest.raises(ValueError, match=r"row is .*expected int32 or int64 \[2\]"):
        N.noise(seed, image, row, 0, 1, 2, 2)


def test_statistics(figure):
    """The streams are fixed, so the p-values are constants; a changed generator changes them."""
    from scipy import stats

    n, (c, h, w) = 1000, (1, 32, 32)
    x = N.noise(*stream(n, seed=0, image=0, row=0), N.X_T, c, h, w).double()
    flat = x.flatten(1).numpy()
    values = flat.ravel()
    size = values.size
    z = {
        "mean": values.mean() * np.sqrt(size),
        "variance": (values.var() - 1) * np.sqrt(size / 2),
        "skewness": stats.skew(values) * np.sqrt(size / 6),
        "kurtosis": stats.kurtosis(values) * np.sqrt(size / 24),
        "correlation of neighbouring elements": _correlation(flat[:, :-1], flat[:, 1:]),
        "correlation of cosine and sine": _correlation(flat[:, 0::4], flat[:, 1::4]),
        "correlation of neighbouring images": _correlation(flat[:-1], flat[1:]),
    }
    neighbours = {  # seed, image, row, tag
        "steps": (0, 0, 1, N.X_T),
        "seeds": (1, 0, 0, N.X_T),
        "streams": (0, 0, 0, N.REVERSE),
        "seeds 2^32 apart": (2**32, 0, 0, N.X_T),
        "images 2^32 apart": (0, 2**32, 0, N.X_T),
    }
    for name, (seed, image, row, tag) in neighbours.items():
        y = N.noise(*stream(n, seed, image, row), tag, c, h, w).double().flatten(1).numpy()
        z[f"correlation of neighbouring {name}"] = _correlation(flat, y)
    p = {name: 2 * stats.norm.sf(abs(v)) for name, v in z.items()}
    p["Kolmogorov-Smirnov"] = stats.kstest(values, "norm").pvalue
    tails = 2 * stats.norm.sf(np.abs(values[np.abs(values) > 3])) / (2 * stats.norm.sf(3))
    p["Kolmogorov-Smirnov, tails (|x| > 3)"] = stats.kstest(tails, "uniform").pvalue
    words = N.words(*stream(n, seed=0, image=0, row=0), N.X_T, 1024).numpy().ravel()
    for name, byte in (("top", words >> 24), ("low", words & 255)):
        counts = np.bincount(byte, minlength=256)
        p[f"chi-squared of the words' {name} byte"] = stats.chisquare(counts).pvalue
    for name, value in p.items():
        figure(f"p, {name} ({size:,} normals)", f"{value:.3f}")
    assert min(p.values()) > 0.001, min(p, key=p.get)


def _correlation(a, b):
    """Returns the correlation in standard errors."""
    return np.corrcoef(a.ravel(), b.ravel())[0, 1] * np.sqrt(a.size)


@pytest.mark.acceptance
def test_statistics_of_sixty_million(figure):
    """60 seeds of 1,024,000 normals: the moments of all, and the uniformity of the 60 p-values."""
    from scipy import stats

    sums, size, p = np.zeros(4), 0, []
    for seed in range(60):
        vectors = stream(1000, seed=7919 * seed + 1, image=0, row=0)
        x = N.normals_reference(*vectors, N.X_T, 1024).double().numpy().ravel()
        sums += [(x**k).sum() for k in (1, 2, 3, 4)]
        size += x.size
        p.append(stats.kstest(x, "norm").pvalue)
    m = sums / size
    z = np.array([m[0], (m[1] - 1) / 2**0.5, m[2] / 15**0.5, (m[3] - 3) / 96**0.5]) * size**0.5
    deviations = " ".join(f"{v:+.2f}" for v in z)
    figure(f"{size:,} normals: deviation of four moments in standard errors", deviations)
    uniform = stats.kstest(p, "uniform").pvalue
    figure("p-value of the uniformity of 60 Kolmogorov-Smirnov p-values", f"{uniform:.2f}")
    assert abs(z).max() < 4
    assert uniform > 0.001
