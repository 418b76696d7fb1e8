"""Where training images come from: a folder, an array file, IDX files or a Hugging Face data set, all as uint8 in memory."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..utils.validation import is_count
from .resize import Pixels, channels_of, decode, fit_array, open_image

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FITS = ("crop", "pad")
MOST_CLASSES = 100_000  # more than any data set has; a label beyond is an identifier, not a class
IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images uint8 [N, H, W, C], their classes int64 [N] or None, and the classes' names or None."""

    images: Pixels
    labels: IntArray | None = None
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 4 or not all(shape):
            raise ValueError(f"images are {self.images.dtype} {shape}; expected uint8 [N, H, W, C] with at least one image")
        if self.labels is not None and self.labels.shape != shape[:1]:
            raise ValueError(f"labels have shape {self.labels.shape}; expected ({len(self.images)},), one per image")
        most = len(self.classes) if self.classes is not None else MOST_CLASSES
        if self.labels is not None and not 0 <= self.labels.min() <= self.labels.max() < most:
            raise ValueError(
                f"labels from {self.labels.min()} to {self.labels.max()}; expected classes counted from 0, fewer than {most}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def with_classes_of(self, other: ImageData) -> ImageData:
        """Labels counted as in `other`, by the classes' names where both have them. ValueError for a class that it lacks."""
        if self.labels is None or self.classes is None or other.classes is None:
            return self
        if unknown := sorted(set(self.classes) - set(other.classes)):
            raise ValueError(f"the classes {', '.join(unknown)} are not among those of training: {', '.join(other.classes)}")
        number = np.array([other.classes.index(name) for name in self.classes])
        return ImageData(self.images, number[self.labels], other.classes)

    @property
    def num_classes(self) -> int | None:
        """How many classes, or None without labels."""
        if self.labels is None:
            return None
        return len(self.classes) if self.classes is not None else int(self.labels.max()) + 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 over shape, pixels and labels: which data this is."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        for first in range(0, len(self.images), 4096):
            digest.update(np.ascontiguousarray(self.images[first : first + 4096]).data)
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


def load_images(
    source: str | Path, resolution: int, fit: str = "crop", channels: int | None = None, split: str = "train"
) -> ImageData:
    """Square images of `resolution` pixels from a path.

    source      a folder of pictures at any depth, whose first-level sub-folders, where every picture lies in one of several,
                  are the classes in order of name; a folder or file in IDX format, gzipped or not (MNIST's, with the labels
                  beside the images); an .npz with "images" and maybe "labels" (or arr_0, arr_1; or x_train, y_train); an .npy
    fit         "crop": scaled until the shorter side fits, the middle kept;
                "pad": scaled down where too large, then centred on black
    channels    1 or 3; None: as the source has it. Transparent pictures are laid on white.
    split       "train" or "test", where the source has both

    ValueError for what is missing, not readable or of no such kind, naming it.
    """
    source = Path(source)
    if not is_count(resolution):
        raise ValueError(f"resolution = {resolution!r}; expected pixels, at least 1")
    if fit not in FITS or split not in ("train", "test") or channels not in (None, 1, 3):
        raise ValueError(f"fit={fit!r}, split={split!r}, channels={channels!r}; expected crop or pad, train or test, 1 or 3")
    if not source.exists():
        raise ValueError(f"{source} does not exist; expected a folder of images, or an .npz, .npy or IDX file")
    if source.is_dir():
        found = sorted(source.glob("*images*idx3*"))
        if not found:
            return _read_folder(source, resolution, fit, channels)
        source = _of_split(source, found, split)
    if source.suffix in (".npz", ".npy"):
        images, labels = _read_numpy(source, split)
    elif "idx3" in source.name:
        images, labels = _read_idx_pair(source)
    else:
        raise ValueError(f"{source}: unknown kind of file; expected a folder of images, or an .npz, .npy or IDX file")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise ValueError(f"{source} holds {images.dtype} {images.shape}; expected uint8 [N, H, W] or [N, H, W, C]")
    if images.ndim == 3:
        images = images[..., None]
    elif images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    return ImageData(fit_array(images, resolution, fit, channels), labels)


def load_dataset(name: str, resolution: int, fit: str = "crop", channels: int | None = None, split: str = "train") -> ImageData:
    """A data set of the Hugging Face hub, or a folder that its library reads; needs the extra `train`.

    The first column of images is taken, and a column "label" or "labels" where there is one. See `load_images`.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(f"data set {name}: needs the extra train: pip install 'ddpm-fast[train]'") from None
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library's own kinds are many, and what went wrong is in the text
        raise ValueError(f"data set {name}, split {split}: {error}") from None
    image = next((k for k, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise ValueError(f"data set {name} has no column of images; its columns: {', '.join(table.features)}")
    label = next((k for k in ("label", "labels") if k in table.features), None)
    pictures = (partial(_picture_of, table, i, image) for i in range(len(table)))
    if not len(table):
        raise ValueError(f"data set {name}, split {split}, is empty")
    if channels is None:
        channels = 1 if all(channels_of(table[i][image]) == 1 for i in range(len(table))) else 3
    images = decode(pictures, len(table), resolution, fit, channels)
    labels = None if label is None else _as_labels(label, np.asarray(table[label]))
    names = None if label is None else getattr(table.features[label], "names", None)
    return ImageData(images, labels, None if names is None else tuple(names))


def _picture_of(table: Any, i: int, column: str) -> Any:
    return table[i][column]


# ---- readers


def has_test_split(source: Path) -> bool:
    """A folder of IDX files with a test split beside the training split?"""
    return source.is_dir() and any("t10k" in path.name or "test" in path.name for path in source.glob("*images*idx3*"))


def _of_split(source: Path, found: list[Path], split: str) -> Path:
    """The one file of IDX images for a split: by "train", or "t10k" or "test", in its name."""
    words = ("t10k", "test") if split == "test" else ("train",)
    chosen = [path for path in found if any(word in path.name for word in words)]
    if not chosen and split == "train" and not has_test_split(source):
        chosen = found
    if len(chosen) != 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{source} has {len(chosen) or 'no'} files of images for the {split} split among {names}; name one file")
    return chosen[0]


def _read_folder(source: Path, resolution: int, fit: str, channels: int | None) -> ImageData:
    paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in PICTURES and not _hidden(p.relative_to(source)))
    if not paths:
        raise ValueError(f"{source} holds no pictures; expected {', '.join(sorted(PICTURES))}, IDX files, or an .npz or .npy file")
    homes = [path.relative_to(source).parts[:-1] for path in paths]
    names = sorted({home[0] for home in homes if home})
    if channels is None:
        channels = 1 if all(channels_of(open_image(path)) == 1 for path in paths) else 3
    images = decode((partial(open_image, path) for path in paths), len(paths), resolution, fit, channels)
    if not all(homes) or len(names) < 2:
        return ImageData(images)
    return ImageData(images, np.array([names.index(home[0]) for home in homes], np.int64), tuple(names))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _read_numpy(path: Path, split: str) -> tuple[Pixels, IntArray | None]:
    try:
        held = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(held, np.ndarray):
            return held, None
        with held:
            pair = next((p for p in (("images", "labels"), (f"x_{split}", f"y_{split}"), ("arr_0", "arr_1")) if p[0] in held), None)
            if pair is None:
                raise ValueError(f"its arrays are {', '.join(held)}; expected images, x_{split} or arr_0")
            labels = held.get(pair[1])
            return held[pair[0]], None if labels is None else _as_labels(pair[1], labels)
    except Exception as error:  # damaged files raise errors of zlib, tokenize and others
        raise ValueError(f"{path} cannot be read: {error}") from None


def _as_labels(name: str, labels: NDArray[Any]) -> IntArray:
    if labels.dtype.kind not in "iu" or not len(labels) or labels.size != len(labels):
        raise ValueError(f"{name} is {labels.dtype} {labels.shape}; expected integers [N]")
    return labels.astype(np.int64).reshape(-1)


def _read_idx_pair(path: Path) -> tuple[Pixels, IntArray | None]:
    name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    beside = [p for p in (path.with_name(name), path.with_name(f"{name}.gz")) if p.exists() and p != path]
    return _read_idx(path), _read_idx(beside[0]).astype(np.int64) if beside else None


def _read_idx(path: Path) -> Pixels:
    """The format of MNIST's files: two zero bytes, 8 for uint8, the number of dimensions, their lengths, the bytes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path} is no IDX file of bytes")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if pixels.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} holds {pixels.size} bytes, and says it holds {' x '.join(map(str, shape))}")
    return pixels.reshape(shape)
