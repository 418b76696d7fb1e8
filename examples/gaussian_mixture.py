"""DDPM in one dimension: `python examples/gaussian_mixture.py [--out DIR]`.

The data are 800 points of an even mixture of N(-2, 0.5) and N(2, 0.5); the second argument is the
variance. They are diffused over T = 1000 steps, and a small network learns to predict the noise.
DDPM, DDIM and DPM-Solver++ then generate samples, and one jump from x_T to x_0 shows that a single
step is not enough.

Each stage prints the Wasserstein-1 distance (W1) and the Kolmogorov-Smirnov statistic (KS) to the
expected result. The program takes one to two minutes on two cores and writes five figures and
numbers.json to DIR.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_fast import NoiseSchedule, Sampler, training_loss
from ddpm_fast.diffusion.forward_process import q_chain, q_jump

try:
    import gaussian_mixture_figures as figures
    from scipy import stats
except ImportError as missing:
    print(
        f"gaussian_mixture: error: {missing}; pip install 'ddpm-fast[plot]' scipy", file=sys.stderr
    )
    sys.exit(2)

SCHEDULE = NoiseSchedule.linear()
MODES, VARIANCE, POINTS = (-2.0, 2.0), 0.5, 800
STAGES = (0, 49, 99, 199, 299, 499, 699, 999)  # timesteps of the forward figure
SOLVERS = {"DDPM": ("ddpm", 1000), "DDIM": ("ddim", 50), "DPM-Solver++": ("dpm++2m", 20)}


# ---- data and exact distributions


def draw_data(count: int, seed: int) -> Tensor:
    """Draws `count` points of the mixture, fp64."""
    generator = torch.Generator().manual_seed(seed)
    mode = torch.tensor(MODES, dtype=torch.float64)[
        torch.randint(0, 2, (count,), generator=generator)
    ]
    return mode + math.sqrt(VARIANCE) * torch.randn(count, generator=generator, dtype=torch.float64)


class Mixture:
    """Exact distribution of x_t, a mixture with modes scaled by the signal; t=None: of x_0."""

    def __init__(self, t: int | None = None) -> None:
        bar, noise = (
            (1.0, 0.0)
            if t is None
            else (float(SCHEDULE.alpha_bar[t]), float(SCHEDULE.noise_var[t]))
        )
        self.parts = [
            stats.norm(math.sqrt(bar) * mode, math.sqrt(bar * VARIANCE + noise)) for mode in MODES
        ]

    def pdf(self, x: Any) -> Any:
        return sum(part.pdf(x) for part in self.parts) / len(self.parts)

    def cdf(self, x: Any) -> Any:
        return sum(part.cdf(x) for part in self.parts) / len(self.parts)

    def quantiles(self, count: int) -> Any:
        """The quantiles at (i + 1/2) / count, a sample of low discrepancy."""
        x = np.linspace(-9, 9, 200_001)
        return np.interp((np.arange(count) + 0.5) / count, self.cdf(x), x)


def exact_eps(x: Tensor, t: int) -> Tensor:
    """The optimal prediction of the noise for the true mixture, E[eps | x_t], fp64."""
    a, n = math.sqrt(SCHEDULE.alpha_bar[t]), float(SCHEDULE.noise_var[t])
    spread = a * a * VARIANCE + n
    mode = torch.tensor(MODES, dtype=torch.float64)
    weight = torch.softmax(-((x[..., None] - a * mode) ** 2) / (2 * spread), dim=-1)
    return (weight * math.sqrt(n) * (x[..., None] - a * mode) / spread).sum(-1)


def distances(x: Tensor, truth: Mixture, quantiles: Any) -> dict[str, float]:
    values = x.double().flatten().numpy()
    return dict(
        w1=float(stats.wasserstein_distance(values, quantiles)),
        ks=float(stats.ks_1samp(values, truth.cdf).statistic),
    )


# ---- training


class Denoiser(nn.Module):
    """Network x_t [B, 1, 1, 1], t [B] -> eps; its inputs are x_t and features of t."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        t = torch.arange(len(SCHEDULE))[:, None] / len(SCHEDULE)
        sinusoids = torch.cat(
            [f(math.pi * k * t) for k in (1, 2, 4, 8) for f in (torch.sin, torch.cos)], dim=1
        )
        half_log_snr = torch.from_numpy(np.log(SCHEDULE.snr) / 2).float()[:, None]
        self.register_buffer(
            "time", torch.cat([SCHEDULE.q_sample_table(), half_log_snr / 4, sinusoids], dim=1)
        )
        inputs = 1 + self.time.shape[1]
        layers = [
            nn.Linear(inputs, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        ]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x_t.flatten(1), self.time[t]], dim=1)).view(x_t.shape)


def train(data: Tensor, steps: int, seed: int, batch: int = 2048) -> Denoiser:
    """Algorithm 1 of Ho et al. 2020 with a cosine learning rate."""
    torch.manual_seed(seed)
    network = Denoiser()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data = data.float()
    for _ in range(steps):
        x_0 = data[torch.randint(0, len(data), (batch,))].view(-1, 1, 1, 1)
        loss = training_loss(network, SCHEDULE, x_0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return network.eval()


# ---- the stages


def forward(data: Tensor, seed: int) -> tuple[Tensor, list[dict[str, Any]]]:
    """All trajectories of the chain, [T, N], and the distances of each stage to the exact one."""
    generator = torch.Generator().manual_seed(seed + 1)
    x = q_chain(
        SCHEDULE,
        data,
        torch.randn(len(SCHEDULE), len(data), generator=generator, dtype=torch.float64),
    )
    rows = []
    for t in STAGES:
        exact, values = Mixture(t), x[t].numpy()
        to_normal = stats.ks_1samp(values, stats.norm.cdf).statistic
        w1_normal = stats.wasserstein_distance(
            values, stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
        )
        row = dict(
            t=t,
            alpha_bar=float(SCHEDULE.alpha_bar[t]),
            **distances(x[t], exact, exact.quantiles(2000)),
        )
        rows.append(row | dict(w1_normal=float(w1_normal), ks_normal=float(to_normal)))
    return x, rows


def variances(seed: int, count: int = 2000) -> dict[str, Any]:
    """Measured variance of x_t over t for both chains, on new points of the mixture."""
    x_0 = draw_data(count, seed + 2)
    eps = torch.randn(
        len(SCHEDULE), count, generator=torch.Generator().manual_seed(seed + 3), dtype=torch.float64
    )
    return {
        name: q_chain(SCHEDULE, x_0, eps, name == "exploding").var(1).tolist()
        for name in ("preserving", "exploding")
    }


class Paths:
    """Callback that records the first thousand states after every step."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []

    def __call__(self, step: int, t: int, x: Tensor) -> None:
        self.x.append(x[:1000].flatten().clone())


def reverse(
    network: Denoiser, data: Tensor, count: int, seed: int
) -> tuple[dict[str, Tensor], Tensor, list[dict[str, Any]]]:
    """Samples by solver, DDPM's trajectories [T, 1000], and the distances."""
    sampler = Sampler(network, SCHEDULE, (1, 1, 1), variance="fixed_small", clip=None)
    truth, paths, samples, rows = Mixture(), Paths(), {}, []
    quantiles = truth.quantiles(4000)
    of_data = distances(data, truth, quantiles)
    for name, (solver, steps) in SOLVERS.items():
        callback = paths if solver == "ddpm" else None
        options: dict[str, Any] = dict(solver=solver, steps=steps, callback=callback)
        x = sampler.sample(count, seed=seed, batch_size=count, output="float", **options)
        x = samples[name] = x.flatten().double()
        to_data = dict(
            w1_data=float(stats.wasserstein_distance(x.numpy(), data.numpy())),
            ks_data=float(stats.ks_2samp(x.numpy(), data.numpy()).statistic),
        )
        rows.append(dict(solver=name, steps=steps, **to_data, **distances(x, truth, quantiles)))
    rows.append(dict(solver="the 800 points", steps=None, w1_data=0.0, ks_data=0.0, **of_data))
    return samples, torch.stack(paths.x), rows


@torch.no_grad()
def one_jump(
    network: Denoiser, data: Tensor, count: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """x_0 from x_T in one step, by the network's and by the optimal prediction of the noise."""
    last = len(SCHEDULE) - 1
    generator = torch.Generator().manual_seed(seed + 4)
    x_0 = data[torch.randint(0, len(data), (count,), generator=generator)]
    x_t = q_jump(SCHEDULE, x_0, last, torch.randn(count, generator=generator, dtype=torch.float64))
    a, n = math.sqrt(SCHEDULE.alpha_bar[last]), math.sqrt(SCHEDULE.noise_var[last])
    eps = network(x_t.float().view(-1, 1, 1, 1), torch.full((count,), last)).double().flatten()
    results = {
        "network": (x_t - n * eps) / a,
        "best possible": (x_t - n * exact_eps(x_t, last)) / a,
    }
    truth = Mixture()
    quantiles = truth.quantiles(4000)
    rows = {
        name: dict(mean=float(x.mean()), std=float(x.std()), **distances(x, truth, quantiles))
        for name, x in results.items()
    }
    return results, rows


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Formats rows as a table; `columns` maps keys to headings."""
    lines = ["  ".join(f"{heading:>14}" for heading in columns.values())]
    for row in rows:
        cells = (row[key] for key in columns)
        shown = ("" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in cells)
        lines.append("  ".join(f"{cell:>14}" for cell in shown))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gaussian-mixture"), help="directory for the figures"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="train briefly and draw few samples")
    args = parser.parse_args()
    if not args.out.absolute().parent.is_dir():
        parser.error(
            f"--out {args.out}: {args.out.absolute().parent} does not exist; create it first"
        )
    args.out.mkdir(exist_ok=True)
    start = time.perf_counter()
    steps, count = (200, 500) if args.quick else (6000, 20_000)

    data = draw_data(POINTS, args.seed)
    chain, forward_rows = forward(data, args.seed)
    print(f"{POINTS} points diffused: distance to the exact mixture at t, and to a standard normal")
    print(
        table(
            forward_rows,
            dict(
                t="t",
                alpha_bar="alpha_bar",
                w1="W1 exact",
                ks="KS exact",
                w1_normal="W1 N(0,1)",
                ks_normal="KS N(0,1)",
            ),
        )
    )
    spread = variances(args.seed)
    print(
        f"\nvariance at t = 999: {spread['preserving'][-1]:.3f} preserving, "
        f"{spread['exploding'][-1]:.3f} exploding"
    )

    network = train(data, steps, args.seed)
    trained = time.perf_counter() - start
    print(f"\nnetwork trained, {steps} steps, {trained:.0f} s so far; {count} samples each:")
    samples, paths, reverse_rows = reverse(network, data, count, args.seed)
    columns = dict(
        solver="",
        steps="steps",
        w1_data="W1 to data",
        ks_data="KS to data",
        w1="W1 to mixture",
        ks="KS to mixture",
    )
    print(table(reverse_rows, columns))

    jumped, jump_rows = one_jump(network, data, count, args.seed)
    print("\nx_0 from x_T in one jump (the data has mean 0 and deviation 2.1):")
    print(
        table(
            [dict(by=k, **v) for k, v in jump_rows.items()],
            dict(by="eps by", mean="mean", std="deviation", w1="W1 to mixture", ks="KS"),
        )
    )
    print(
        "x_T does not determine x_0: the optimal prediction is the mean of the data, "
        "where there are no points."
    )

    numbers = dict(
        seed=args.seed,
        forward=forward_rows,
        variance=spread,
        reverse=reverse_rows,
        one_jump=jump_rows,
    )
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    figures.draw(
        args.out,
        data,
        chain,
        STAGES,
        Mixture,
        spread,
        SCHEDULE,
        samples,
        reverse_rows,
        paths,
        jumped,
    )
    print(f"\n{time.perf_counter() - start:.0f} s -> {args.out}/")


if __name__ == "__main__":
    main()
