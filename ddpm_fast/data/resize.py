"""Conversion of images of any size and mode to one uint8 array of square images."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..utils.input_files import regular_file_size

Pixels = NDArray[np.uint8]


def open_image(path: Path) -> Any:
    """Opens a regular file with Pillow, without decoding. ValueError if it is not an image."""
    from PIL import Image

    regular_file_size(path)
    try:
        return Image.open(path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{path} has too many pixels: {str(error).partition(',')[0]}; "
            "scale it down or remove it"
        ) from None
    except Exception:  # Pillow raises errors of many types for damaged files
        raise ValueError(f"{path} cannot be read; expected an image: repair or remove it") from None


@contextmanager
def refusing_bombs() -> Iterator[None]:
    """Makes images above Pillow's limit of 89 million pixels raise, in every thread."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def channels_of(image: Any) -> int:
    return 1 if image.mode in ("1", "L") or image.mode.startswith("I;16") else 3


def decode(
    openers: Iterable[Callable[[], Any]], count: int, resolution: int, fit: str, channels: int
) -> Pixels:
    """Decodes images in parallel into uint8 [count, resolution, resolution, channels]."""
    out = np.empty((count, resolution, resolution, channels), np.uint8)

    def one(i: int, opener: Callable[[], Any]) -> None:
        image = opener()
        try:
            out[i] = _fit_image(image, resolution, fit, channels)
        except Exception as error:
            name = getattr(image, "filename", None) or f"image {i}"
            raise ValueError(f"{name} cannot be read: {error}; repair or remove it") from None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = [pool.submit(one, i, opener) for i, opener in enumerate(openers)]
        try:
            for done in running:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return out


def _fit_image(image: Any, resolution: int, fit: str, channels: int) -> Pixels:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"mode {image.mode} has no defined range; expected 8 or 16 bits per channel"
        )
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    size = (resolution, resolution)
    if image.size != size and fit == "crop":
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    elif image.size != size:
        image.thumbnail(size, Image.Resampling.LANCZOS)
        canvas = Image.new(image.mode, size)
        canvas.paste(image, ((resolution - image.width) // 2, (resolution - image.height) // 2))
        image = canvas
    return np.asarray(image).reshape(resolution, resolution, channels)


def fit_array(images: Pixels, resolution: int, fit: str, channels: int | None) -> Pixels:
    """Fits images [N, H, W, C]; no copy if nothing changes. Arguments as in `load_images`."""
    from PIL import Image

    n, h, w, c = images.shape
    if c not in (1, 3):
        raise ValueError(f"images have {c} channels; expected 1 or 3")
    if channels in (None, c) and fit == "pad" and max(h, w) <= resolution:
        top, left = (resolution - h) // 2, (resolution - w) // 2
        return np.pad(
            images, ((0, 0), (top, resolution - h - top), (left, resolution - w - left), (0, 0))
        )
    if channels in (None, c) and h == w == resolution:
        return images
    openers = (
        partial(Image.fromarray, images[i] if c == 3 else images[i, :, :, 0]) for i in range(n)
    )
    return decode(openers, n, resolution, fit, channels or c)
