"""Loss-aware timestep sampling, and sums of the losses by quarter of the timesteps."""

from __future__ import annotations

import torch
from torch import Tensor

QUARTILES = 4  # of the timesteps, for the log
HISTORY = 10  # latest losses per timestep
UNIFORM_SHARE = 0.001


class LossAware:
    """Importance sampling of t in proportion to sqrt(E[L_t^2]) (Nichol & Dhariwal 2021, eq. 18).

    E is the mean of a timestep's last ten losses; until every timestep has ten, t is uniform.
    Weighted by 1 / (T p_t), the losses have the same expectation as under uniform t. No method
    waits for the device. Integers and a fixed order of sums make resumed runs bit-exact.

    Args:
        timesteps: T.
        device: Device of the history.
    """

    def __init__(self, timesteps: int, device: torch.device | str = "cpu") -> None:
        self.squares = torch.zeros(timesteps, HISTORY, dtype=torch.float64, device=device)
        self.count = torch.zeros(timesteps, dtype=torch.int64, device=device)

    def shares(self) -> Tensor:
        """p_t in units of about 2^-30: int64 [T], at least 1."""
        root = self.squares.mean(1).sqrt()
        uniform = torch.full_like(root, 1 / len(root))
        proportional = (1 - UNIFORM_SHARE) * root / root.sum().clamp(min=1e-300)
        aware = proportional + UNIFORM_SHARE / len(root)
        chosen = torch.where((self.count >= HISTORY).all() & (root.sum() > 0), aware, uniform)
        return (chosen * 2**30).long().clamp(min=1)

    def draw(self, word: Tensor) -> tuple[Tensor, Tensor]:
        """Draws timesteps.

        Args:
            word: Random words, int64 [B] in 0 to 2^32 - 1.

        Returns:
            t, int64 [B], and the weights of their losses, fp32 [B].
        """
        shares = self.shares()
        until = shares.cumsum(0)
        t = torch.searchsorted(until, (word * until[-1]) >> 32, right=True)
        return t, (until[-1] / (len(shares) * shares[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Records the unweighted losses [B] of timesteps t [B]; NaN and Inf are left out."""
        is_finite = losses.isfinite()
        same = (t[:, None] == t[None, :]) & is_finite[None, :]
        before = (torch.ones_like(same).tril(-1) & same).sum(1)
        after = (torch.ones_like(same).triu(1) & same).sum(1)
        index = t * HISTORY + (self.count[t] + before) % HISTORY
        # of more than ten at once only the last ten are recorded; the extra element takes the rest
        index = torch.where(is_finite & (after < HISTORY), index, self.squares.numel())
        flat = torch.cat([self.squares.flatten(), self.squares.new_zeros(1)])
        flat[index] = losses.double().square()
        self.squares.copy_(flat[:-1].view_as(self.squares))
        self.count += torch.zeros_like(self.count).scatter_add_(0, t, is_finite.long())


def quartile_sums(t: Tensor, losses: Tensor, timesteps: int) -> Tensor:
    """Sums of the losses and numbers of images in each quarter of the timesteps, without a sync.

    Args:
        t: Timesteps, int64 [B] in 0 to timesteps - 1.
        losses: fp32 [B].
        timesteps: T.

    Returns:
        fp32 [8]: four sums, then four counts, lowest t first; bit-exact for the same batch.
    """
    quartile = (t * QUARTILES // timesteps)[:, None] == torch.arange(QUARTILES, device=t.device)
    return torch.cat(
        [torch.where(quartile, losses.float()[:, None], 0).sum(0), quartile.float().sum(0)]
    )
