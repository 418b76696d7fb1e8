"""Feature maps: pixels stored as rows of channels, dense or with a zero border.

A bordered image [H, W] has (H + 1) (W + 1) rows: a zero row on top and a zero column on the left.
The right border of a row is the left border of the next row, and the bottom border of an image is
the top border of the next image. So a tap of a 3x3 filter is a constant row offset, and a 3x3
convolution is nine matrix products on shifted rows. Writers of a bordered map write its zeros;
readers assume them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Batch of images, stored as contiguous rows of channels.

    Args:
        rows: [images * image_rows, C]; see the module's docstring.
        images: Batch size.
        height, width: Size of an image in pixels, without the border.
        bordered: Whether each image has a zero border.
    """

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
        """Copies x [N, C, H, W] into a new map."""
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
        """View [N, H, W, C] with the border, if any: [N, H + 1, W + 1, C]."""
        return self.rows.view(
            self.images, self.height + self.bordered, self.width + self.bordered, self.channels
        )

    @property
    def pixels(self) -> Tensor:
        """View [N, C, H, W] without the border."""
        return self.grid[:, self.bordered :, self.bordered :].permute(0, 3, 1, 2)

    @property
    def border(self) -> Tensor:
        """Copy [N, H + W + 1, C] of the border, which should be zero; [N, 0, C] if dense."""
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
        """Raises ValueError unless the map has this shape and layout (None: either layout)."""
        shape = (self.images, self.height, self.width, self.channels)
        if shape != (images, height, width, channels) or bordered not in (None, self.bordered):
            layout = "" if bordered is None else " bordered" if bordered else " dense"
            raise ValueError(
                f"{name} is {shape} {'bordered' if self.bordered else 'dense'} (images, height, "
                f"width, channels); expected {(images, height, width, channels)}{layout}"
            )

    def write(self, x: Tensor) -> None:
        """Copies x [N, C, H, W] into the pixels, rounded once, and writes zeros to the border."""
        if self.bordered:
            self.grid[:, 0] = 0
            self.grid[:, :, 0] = 0
        if self.rows.dtype == torch.float8_e4m3fn:
            x = x.clamp(-448, 448)  # torch casts larger values to NaN
        self.pixels.copy_(x)
