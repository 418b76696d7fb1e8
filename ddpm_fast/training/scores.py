"""KID of images sampled during training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..data.datasets import ImageData
from ..evaluation.metrics import Features, kid
from ..sampling.sampler import Sampler

FEWEST = 4  # images; KID has no estimate from fewer
STEPS = 50  # of DDIM


class ImageScore:
    """Kernel distance (KID) between sampled and real images, as `ddpm-fast eval` computes it.

    Args:
        real: Real images, uint8 with 1 or 3 channels; at most `count` evenly spaced ones are used.
        count: Number of images to sample, at least 4.
        device: Device for the features.

    Raises:
        ValueError: The extra `metrics` is missing, or the images are too few or not grey or RGB.
    """

    def __init__(self, real: ImageData, count: int, device: torch.device | str = "cpu") -> None:
        if min(count, len(real)) < FEWEST or real.images.shape[3] not in (1, 3):
            raise ValueError(
                f"eval_images is {count}, with {len(real)} real images of {real.images.shape[3]} "
                f"channels; expected at least {FEWEST} of each, with 1 or 3 channels: use more "
                "images, or set --eval_images_every to 0"
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
        """Samples images 0 to count - 1 of seed 0 with DDIM in min(50, T) steps.

        Returns:
            KID and its standard deviation over subsets; None if `stop()` ended the sampling.
        """
        steps = min(STEPS, len(sampler.schedule))
        drawn = sampler.sample(
            self.count, solver="ddim", steps=steps, batch_size=batch_size, stop=stop
        )
        return kid(self._real, self._features(drawn)) if len(drawn) == self.count else None
