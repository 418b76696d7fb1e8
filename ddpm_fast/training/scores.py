"""KID of images drawn during training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..data.datasets import ImageData
from ..evaluation.metrics import Features, kid
from ..sampling.sampler import Sampler

FEWEST = 4  # images that KID can be estimated from
STEPS = 50  # of DDIM


class ImageScore:
    """Kernel distance (KID) of drawn images from fixed real ones, as `ddpm-fast eval` computes it.

    Args:
        real: the real images, uint8 with 1 or 3 channels; `count` of them, spread evenly, or all if there are fewer.
        count: how many images to draw, at least 4.
        device: where features are computed.

    Raises:
        ValueError: without the extra `metrics`, for too few images, or for images that are neither grey nor RGB.
    """

    def __init__(self, real: ImageData, count: int, device: torch.device | str = "cpu") -> None:
        if min(count, len(real)) < FEWEST or real.images.shape[3] not in (1, 3):
            raise ValueError(
                f"eval_images is {count}, with {len(real)} real images of {real.images.shape[3]} channels; expected at least "
                f"{FEWEST} of each, with 1 or 3 channels: give more images, or do not evaluate"
            )
        self.count = count
        self._features = Features(device)
        used = min(count, len(real))
        self._real = self._features(
            torch.from_numpy(real.images[np.arange(used) * len(real) // used])
        )

    def of(
        self, sampler: Sampler, batch_size: int, stop: Callable[[], bool]
    ) -> tuple[float, float] | None:
        """Draws images 0 ... count-1 of seed 0 with DDIM in 50 steps, or T if that is less.

        Returns:
            KID and its standard deviation over subsets; None if `stop()` ended the drawing.
        """
        steps = min(STEPS, len(sampler.schedule))
        drawn = sampler.sample(
            self.count, solver="ddim", steps=steps, batch_size=batch_size, stop=stop
        )
        return kid(self._real, self._features(drawn)) if len(drawn) == self.count else None
