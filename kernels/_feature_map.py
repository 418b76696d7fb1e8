"""Feature map of the network's kernels: pixels as rows of channels, with or without a border of zeros.

Bordered, an image [H, W] becomes (H + 1) (W + 1) rows: a zero row on top of it and a zero column on its left. The right border
of a row is the left border of the next, the bottom border of an image the top border of the next, so one tap of a 3x3 filter is
a constant row offset and a whole convolution is nine matrix products on shifted rows. Writers of a bordered map write its
zeros too; readers rely on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Pixels of images as rows [images * image_rows, C], each row contiguous."""

    rows: Tensor
    images: int
    height: int
    width: int
    bordered: bool

    @classmethod
    def empty(
        cls,
        images: int,
        height: int,
        width: int,
        channels: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        bordered: bool = True,
    ) -> FeatureMap:
        count = images * (height + bordered) * (width + bordered)
        return cls(
            torch.empty(count, channels, dtype=dtype, device=device),
            images,
            height,
            width,
            bordered,
        )

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype | None = None, bordered: bool = True) -> FeatureMap:
        """A copy of x [N, C, H, W]."""
        n, c, h, w = x.shape
        fm = cls.empty(n, h, w, c, dtype or x.dtype, x.device, bordered)
        fm.write(x)
        return fm

    @property
    def channels(self) -> int:
        return self.rows.shape[1]

    @property
    def image_rows(self) -> int:
        return (self.height + self.bordered) * (self.width + self.bordered)

    @property
    def grid(self) -> Tensor:
        """[N, H (+ 1), W (+ 1), C], the border included."""
        return self.rows.view(
            self.images, self.height + self.bordered, self.width + self.bordered, self.channels
        )

    @property
    def pixels(self) -> Tensor:
        """[N, C, H, W], a view."""
        return self.grid[:, self.bordered :, self.bordered :].permute(0, 3, 1, 2)

    @property
    def border(self) -> Tensor:
        """[N, H + W + 1, C], a copy of what should be zero; empty where there is none."""
        if not self.bordered:
            return self.rows.new_empty(self.images, 0, self.channels)
        return torch.cat([self.grid[:, 0], self.grid[:, 1:, 0]], dim=1)

    def expect(
        self,
        name: str,
        images: int,
        height: int,
        width: int,
        channels: int,
        bordered: bool | None = None,
    ) -> None:
        """Raises ValueError where the map is not what a launch needs: a kernel would read or write beyond it."""
        shape = (self.images, self.height, self.width, self.channels)
        if shape != (images, height, width, channels) or bordered not in (None, self.bordered):
            layout = "" if bordered is None else " bordered" if bordered else " dense"
            raise ValueError(
                f"{name} is {shape}{' bordered' if self.bordered else ' dense'} (images, height, width, channels); "
                f"expected {(images, height, width, channels)}{layout}"
            )

    def write(self, x: Tensor) -> None:
        """x [N, C, H, W] into the pixels, rounded once, and zero into the border."""
        if self.bordered:
            self.grid[:, 0] = 0
            self.grid[:, :, 0] = 0
        if self.rows.dtype == torch.float8_e4m3fn:
            x = x.clamp(-448, 448)  # torch's cast makes NaN of what is larger
        self.pixels.copy_(x)
