"""Training data in memory, uint8: from a folder, an array file, IDX files or Hugging Face."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.validation import is_count, shown
from .archives import IntArray, as_labels, read_idx_pair, read_numpy
from .resize import Pixels, channels_of, decode, fit_array, open_image, refusing_bombs

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FITS = ("crop", "pad")
MAX_CLASSES = 100_000  # larger labels are identifiers, not classes
MAX_PIXELS = 16_384  # per side of a training image


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images with optional labels.

    Args:
        images: uint8 [N, H, W, C], at least one.
        labels: Classes int64 [N], counted from 0, or None.
        classes: Names of the classes, or None.

    Raises:
        ValueError: A shape, type or label is invalid.
    """

    images: Pixels
    labels: IntArray | None = None
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 4 or not all(shape):
            raise ValueError(
                f"images are {self.images.dtype} {shape}; "
                "expected uint8 [N, H, W, C] with at least one image"
            )
        if self.labels is not None and self.labels.shape != shape[:1]:
            raise ValueError(
                f"labels have shape {self.labels.shape}; "
                f"expected ({len(self.images)},), one per image"
            )
        most = len(self.classes) if self.classes is not None else MAX_CLASSES
        if self.labels is not None and not 0 <= self.labels.min() <= self.labels.max() < most:
            raise ValueError(
                f"labels are {self.labels.min()} to {self.labels.max()}; "
                f"expected classes counted from 0, at most {most - 1}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def with_classes_of(self, other: ImageData) -> ImageData:
        """Returns the data with classes numbered as in `other`, if both have class names.

        Raises:
            ValueError: `other` does not have one of the classes.
        """
        if self.labels is None or self.classes is None or other.classes is None:
            return self
        if unknown := sorted(set(self.classes) - set(other.classes)):
            raise ValueError(
                f"the classes {', '.join(unknown)} are not among those of training: "
                f"{', '.join(other.classes)}"
            )
        number = np.array([other.classes.index(name) for name in self.classes])
        return ImageData(self.images, number[self.labels], other.classes)

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None without labels."""
        if self.labels is None:
            return None
        return len(self.classes) if self.classes is not None else int(self.labels.max()) + 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 over shape, pixels and labels."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        for first in range(0, len(self.images), 4096):
            digest.update(np.ascontiguousarray(self.images[first : first + 4096]).data)
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


def load_images(
    source: str | Path,
    resolution: int,
    fit: str = "crop",
    channels: int | None = None,
    split: str = "train",
) -> ImageData:
    """Loads square images from a path.

    Args:
        source: One of
            a folder of images at any depth. If every image is in one of several first-level
            subfolders, these are the classes, sorted by name;
            a folder or file in IDX format (MNIST's), gzipped or not, with the labels in the same
            folder;
            an .npz with "images" and optionally "labels" (or arr_0, arr_1; or x_train, y_train), or
            an .npy.
            Only regular files are read. An image may have 89 million pixels; the unpacked size of
            an archive is limited (`data.archives`).
        resolution: Side in pixels.
        fit: "crop": scale the shorter side to fit and crop the center; "pad": scale down if too
            large and center on black.
        channels: 1 or 3; None: as in the source. Transparent images are composed over white.
        split: "train" or "test", if the source has both.

    Raises:
        ValueError: The source is missing, unreadable or of another kind, or an argument is invalid.
    """
    source = Path(source)
    if not is_count(resolution, MAX_PIXELS):
        raise ValueError(f"resolution = {shown(resolution)}; expected 1 to {MAX_PIXELS} pixels")
    if fit not in FITS or split not in ("train", "test") or channels not in (None, 1, 3):
        raise ValueError(
            f"fit={fit!r}, split={split!r}, channels={channels!r}; "
            "expected crop or pad, train or test, 1 or 3"
        )
    if not os.path.exists(source):  # also False for a loop of links or a name that is too long
        raise ValueError(
            f"{source} does not exist; expected a folder of images, or an .npz, .npy or IDX file"
        )
    if source.is_dir():
        idx_files = sorted(source.glob("*images*idx3*"))
        if not idx_files:
            return _read_folder(source, resolution, fit, channels)
        source = _of_split(source, idx_files, split)
    if source.suffix in (".npz", ".npy"):
        images, labels = read_numpy(source, split)
    elif "idx3" in source.name:
        images, labels = read_idx_pair(source)
    else:
        raise ValueError(
            f"{source}: unknown kind of file; "
            "expected a folder of images, or an .npz, .npy or IDX file"
        )
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise ValueError(
            f"{source} holds {images.dtype} {images.shape}; "
            "expected uint8 [N, H, W] or [N, H, W, C]"
        )
    if images.ndim == 3:
        images = images[..., None]
    elif images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    return ImageData(fit_array(images, resolution, fit, channels), labels)


def load_dataset(
    name: str, resolution: int, fit: str = "crop", channels: int | None = None, split: str = "train"
) -> ImageData:
    """Loads a data set of the Hugging Face hub or a local folder; needs the extra `train`.

    Args:
        name: Name or path for `datasets.load_dataset`. The images are its first column of images,
            the labels its column "label" or "labels", if there is one.
        resolution, fit, channels, split: As in `load_images`.

    Raises:
        ValueError: The data set cannot be loaded, is empty or has no images, or `datasets` is not
            installed.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"data set {name}: needs the extra train: pip install 'ddpm-fast[train]'"
        ) from None
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises errors of many types
        raise ValueError(f"data set {name}, split {split}: {error}") from None
    image = next(
        (k for k, kind in table.features.items() if isinstance(kind, datasets.Image)), None
    )
    if image is None:
        raise ValueError(
            f"data set {name} has no column of images; its columns: {', '.join(table.features)}"
        )
    label = next((k for k in ("label", "labels") if k in table.features), None)
    openers = (partial(_image_of, table, i, image) for i in range(len(table)))
    if not len(table):
        raise ValueError(f"data set {name}, split {split}, is empty")
    if channels is None:
        channels = 1 if all(channels_of(table[i][image]) == 1 for i in range(len(table))) else 3
    images = decode(openers, len(table), resolution, fit, channels)
    labels = None if label is None else as_labels(label, np.asarray(table[label]))
    names = None if label is None else getattr(table.features[label], "names", None)
    return ImageData(images, labels, None if names is None else tuple(names))


def _image_of(table: Any, i: int, column: str) -> Any:
    return table[i][column]


# ---- readers


def has_test_split(source: Path) -> bool:
    """Returns True for a folder of IDX files with a test split."""
    return source.is_dir() and any(
        "t10k" in path.name or "test" in path.name for path in source.glob("*images*idx3*")
    )


def _of_split(source: Path, files: list[Path], split: str) -> Path:
    """The IDX file with the images of a split, by "train", "t10k" or "test" in its name."""
    words = ("t10k", "test") if split == "test" else ("train",)
    chosen = [path for path in files if any(word in path.name for word in words)]
    if not chosen and split == "train" and not has_test_split(source):
        chosen = files
    if len(chosen) != 1:
        names = ", ".join(path.name for path in files)
        raise ValueError(
            f"{source} has {len(chosen) or 'no'} files of images for the {split} split "
            f"among {names}; name one file"
        )
    return chosen[0]


def _read_folder(source: Path, resolution: int, fit: str, channels: int | None) -> ImageData:
    paths = sorted(
        p
        for p in source.rglob("*")
        if p.suffix.lower() in EXTENSIONS and not _hidden(p.relative_to(source))
    )
    if not paths:
        raise ValueError(
            f"{source} has no images; expected {', '.join(sorted(EXTENSIONS))}, IDX files, "
            "or an .npz or .npy file"
        )
    folders = [path.relative_to(source).parts[:-1] for path in paths]
    names = sorted({folder[0] for folder in folders if folder})
    openers = [partial(open_image, path) for path in paths]
    with refusing_bombs():
        if channels is None:
            channels = 1 if all(_channels(opener) == 1 for opener in openers) else 3
        images = decode(openers, len(paths), resolution, fit, channels)
    if not all(folders) or len(names) < 2:
        return ImageData(images)
    labels = np.array([names.index(folder[0]) for folder in folders], np.int64)
    return ImageData(images, labels, tuple(names))


def _channels(opener: Callable[[], Any]) -> int:
    with opener() as image:
        return channels_of(image)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
