"""Timestep samplers: how t is drawn in training, and the losses by quarter of the timesteps."""

from __future__ import annotations

import torch
from torch import Tensor

QUARTILES = 4  # of the timesteps, for the log
HISTORY = 10  # losses kept for each timestep
UNIFORM_SHARE = 0.001


class LossAware:
    """Draws timesteps in proportion to sqrt(E[L_t^2]), where the loss is large and uneven (Nichol & Dhariwal 2021, eq. 18).

    The last ten losses of every timestep are kept, and all are drawn alike until every one has ten. Weighted by 1 / (T p_t), the
    losses have the expectation that they have under uniform t. Nothing here waits for the device, and all of it is integers
    and sums in a fixed order, so that a resumed run draws the same.
    """

    def __init__(self, timesteps: int, device: torch.device | str = "cpu") -> None:
        self.squares = torch.zeros(timesteps, HISTORY, dtype=torch.float64, device=device)
        self.count = torch.zeros(timesteps, dtype=torch.int64, device=device)

    def shares(self) -> Tensor:
        """p_t in units of about 2^-30: int64 [T], at least 1."""
        root = self.squares.mean(1).sqrt()
        uniform = torch.full_like(root, 1 / len(root))
        aware = (1 - UNIFORM_SHARE) * root / root.sum().clamp(min=1e-300) + UNIFORM_SHARE / len(
            root
        )
        chosen = torch.where((self.count >= HISTORY).all() & (root.sum() > 0), aware, uniform)
        return (chosen * 2**30).long().clamp(min=1)

    def draw(self, word: Tensor) -> tuple[Tensor, Tensor]:
        """Random words int64 [B] in 0 ... 2^32-1 -> t int64 [B] and the weights fp32 [B] of their losses."""
        shares = self.shares()
        until = shares.cumsum(0)
        t = torch.searchsorted(until, (word * until[-1]) >> 32, right=True)
        return t, (until[-1] / (len(shares) * shares[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Keeps the losses [B], as they are without weights, of timesteps t [B]. Those that are not finite are left out."""
        is_finite = losses.isfinite()
        same = (t[:, None] == t[None, :]) & is_finite[None, :]
        before, after = (
            (torch.ones_like(same).tril(-1) & same).sum(1),
            (torch.ones_like(same).triu(1) & same).sum(1),
        )
        place = t * HISTORY + (self.count[t] + before) % HISTORY
        # of more than ten at once the last ten stay; the others go to a place after the end
        place = torch.where(is_finite & (after < HISTORY), place, self.squares.numel())
        flat = torch.cat([self.squares.flatten(), self.squares.new_zeros(1)])
        flat[place] = losses.double().square()
        self.squares.copy_(flat[:-1].view_as(self.squares))
        self.count += torch.zeros_like(self.count).scatter_add_(0, t, is_finite.long())


def quartile_sums(t: Tensor, losses: Tensor, timesteps: int) -> Tensor:
    """Sums of the losses, then numbers of images, in each quarter of the timesteps. Does not wait for the device.

    Args:
        t: int64 [B] in 0 ... timesteps - 1.
        losses: fp32 [B].
        timesteps: T.

    Returns:
        fp32 [8]: four sums and four counts, lowest t first; added in the order of the batch, so that they repeat to the bit.
    """
    quartile = (t * QUARTILES // timesteps)[:, None] == torch.arange(QUARTILES, device=t.device)
    return torch.cat(
        [torch.where(quartile, losses.float()[:, None], 0).sum(0), quartile.float().sum(0)]
    )
