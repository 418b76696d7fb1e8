"""PNG files: single images and grids."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..utils.files import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

Pixels = NDArray[np.uint8]
PNG_CHANNELS = (1, 3, 4)
GAP = 2  # pixels between the images of a grid


def grid(images: Pixels, columns: int | None = None, gap: int = GAP, scale: int = 1) -> Pixels:
    """Arranges images in a grid on white.

    Args:
        images: uint8 [N, H, W, C].
        columns: Default: the square root of N, rounded up.
        gap: Pixels around each image.
        scale: Integer factor of enlargement.

    Returns:
        uint8 [rows (scale H + gap) + gap, columns (scale W + gap) + gap, C].
    """
    n, h, w, c = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    h, w = h * scale, w * scale
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[top : top + h, left : left + w] = image
    return sheet


def check_channels(channels: int) -> None:
    """Raises ValueError for a number of channels that PNG does not support."""
    if channels not in PNG_CHANNELS:
        raise ValueError(
            f"cannot write {channels}-channel images as PNG; write .npy or .npz instead"
        )


def to_pil(images: Pixels) -> list[PILImage]:
    """Converts an array or tensor uint8 [N, H, W, C] with 1, 3 or 4 channels to Pillow images."""
    from PIL import Image

    pixels = np.asarray(images)
    check_channels(pixels.shape[-1])
    return [Image.fromarray(p[:, :, 0] if p.shape[2] == 1 else p) for p in pixels]


def encode_png(image: Pixels, **text: str) -> bytes:
    """Encodes an image as PNG.

    Args:
        image: Array or tensor uint8 [H, W, C] with 1, 3 or 4 channels.
        **text: Contents of text chunks by keyword.

    Raises:
        ValueError: The number of channels is another.
    """
    from PIL.PngImagePlugin import PngInfo

    buffer = io.BytesIO()
    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_text(key, value)
    to_pil(np.asarray(image)[None])[0].save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def save_grid(path: str | Path, images: Pixels, columns: int | None = None) -> None:
    """Writes images as one PNG grid; up to 256 small images are enlarged to about 64 pixels.

    Args:
        path: The PNG file.
        images: Array or tensor uint8 [N, H, W, C] with 1, 3 or 4 channels.
        columns: Default: the square root of N, rounded up.

    Raises:
        ValueError: The number of channels is another.
    """
    images = np.asarray(images)
    scale = max(1, 64 // max(images.shape[1:3])) if len(images) <= 256 else 1
    columns = columns or math.ceil(math.sqrt(len(images)))
    write_atomically(
        Path(path),
        encode_png(grid(images, columns, scale=scale), rows=str(math.ceil(len(images) / columns))),
    )


def first_row(path: Path) -> Pixels:
    """Returns the top row of a grid written by `save_grid`, without its lower border.

    Returns:
        uint8 [H', W', C].

    Raises:
        ValueError: The file is not such a grid.
    """
    from PIL import Image

    with Image.open(path) as sheet:
        rows = int(sheet.info.get("rows", 0))
        if not rows:
            raise ValueError(
                f"{path} was not written by save_grid: it does not record its number of rows"
            )
        pixels = np.asarray(sheet).reshape(sheet.height, sheet.width, -1)
    return pixels[: (len(pixels) - GAP) // rows]
