"""Array files: NumPy's .npy and .npz, and MNIST's IDX format, gzipped or not.

The unpacked size of an array is checked first. It must be that of the header's shape and type, and
above 256 MiB at most 100 times the compressed size. Compression ratios of real images are below 20,
those of decompression bombs about 1000.
"""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..utils.input_files import MIB, regular_file_size

Pixels = NDArray[np.uint8]
IntArray = NDArray[np.int64]
SMALL = 256 * MIB  # unpacked bytes allowed at any ratio
MAX_RATIO = 100  # unpacked to packed bytes above that


def read_numpy(path: Path, split: str) -> tuple[NDArray[Any], IntArray | None]:
    """Returns (images, labels or None) of an .npy or .npz; an .npy is memory-mapped.

    Raises:
        ValueError: The file is not a regular file, is damaged, has no known pair of array names, or
            has an array whose size contradicts its header or the limits above.
    """
    regular_file_size(path)
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content, None
        with content:
            pairs = (("images", "labels"), (f"x_{split}", f"y_{split}"), ("arr_0", "arr_1"))
            pair = next((p for p in pairs if p[0] in content), None)
            if pair is None:
                names = ", ".join(content.files[:8])
                raise ValueError(f"its arrays are {names}; expected images, x_{split} or arr_0")
            for name in pair:
                if name in content:
                    _check_member(content.zip, name)
            labels = as_labels(pair[1], content[pair[1]]) if pair[1] in content else None
            return content[pair[0]], labels
    except Exception as error:  # damaged files raise errors of zlib, tokenize and others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from None


def _check_member(archive: zipfile.ZipFile, name: str) -> None:
    """Compares the header of an .npz's array with the sizes in the archive's directory."""
    names = archive.namelist()
    info = archive.getinfo(name if name in names else f"{name}.npy")
    with archive.open(info) as member:
        shape, dtype = _npy_header(member)
        declared = member.tell() + math.prod(shape) * dtype.itemsize
    if info.file_size != declared:
        raise ValueError(
            f"{name} unpacks to {info.file_size} bytes; expected {declared} for {dtype} {shape}"
        )
    _check_ratio(name, declared, info.compress_size)


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(member)
    return shape, dtype


def _check_ratio(name: str | Path, unpacked: int, packed: int) -> None:
    if unpacked > max(SMALL, MAX_RATIO * packed):
        raise ValueError(
            f"{name} unpacks from {packed} to {unpacked} bytes; expected at most {SMALL} bytes, or "
            f"{MAX_RATIO} times the packed size: store it uncompressed if this is intended"
        )


def as_labels(name: str, labels: NDArray[Any]) -> IntArray:
    """Labels [N] as int64. ValueError for another type or shape."""
    is_list = labels.ndim > 0 and labels.size == len(labels) > 0
    if labels.dtype.kind not in "iu" or not is_list:
        raise ValueError(f"{name} is {labels.dtype} {labels.shape}; expected integers [N]")
    return labels.astype(np.int64).reshape(-1)


def read_idx_pair(path: Path) -> tuple[Pixels, IntArray | None]:
    """Returns (images, labels or None); the labels file has "labels" and "idx1" in its name."""
    name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    label_files = [
        p for p in (path.with_name(name), path.with_name(f"{name}.gz")) if p.exists() and p != path
    ]
    return _read_idx(path), _read_idx(label_files[0]).astype(np.int64) if label_files else None


def _read_idx(path: Path) -> Pixels:
    """Reads IDX: two zero bytes, 8 for uint8, number of dimensions, their lengths, the data."""
    size = regular_file_size(path)
    zipped = path.suffix == ".gz"
    try:
        with gzip.open(path) if zipped else open(path, "rb") as file:
            start = file.read(4)
            dimensions = start[3] if start[:3] == b"\0\0\x08" and len(start) == 4 else 0
            lengths = file.read(4 * dimensions)
            if not 1 <= dimensions <= 4 or len(lengths) < 4 * dimensions:
                raise ValueError(f"{path} is not an IDX file of uint8 with 1 to 4 dimensions")
            shape = tuple(int(n) for n in np.frombuffer(lengths, ">u4"))
            count = math.prod(shape)
            if zipped:
                _check_ratio(path, count, size)
            # one byte more than declared shows that the file is too long
            content = file.read(count + 1) if zipped or count <= size else b""
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if len(content) != count:
        raise ValueError(
            f"{path} does not have {' x '.join(map(str, shape))} bytes, as its header states"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)
