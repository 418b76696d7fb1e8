"""Weight files of other codebases: named tensors, read without executing anything."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.input_files import MIB, regular_file_size
from ..utils.validation import shown

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PICKLES = (".pt", ".pth", ".ckpt", ".bin")
_SUFFIXES = (".safetensors", ".npz", *_PICKLES)
_CONTAINERS = ("state_dict", "model", "ema", "params")  # keys under which others nest their weights
_EXPANSION = 8  # largest ratio of tensors to file; trained weights hardly compress
_MAX_NAMES = 100_000
_PLAIN = "expected a plain state dict, as torch.save(model.state_dict(), path) writes it"
_STATE_DICT_OF_EDM = (
    "import pickle, torch; net = pickle.load(open('network.pkl', 'rb'))['ema']; "
    "torch.save(net.state_dict(), 'network.pt')"
)


class RawWeights(Mapping[str, Tensor]):
    """The tensors of one file by name, as stored, on the CPU.

    Attributes:
        path: The file.
        sha256: Its SHA-256 in hexadecimal digits.
        notes: Lines about what was left out or renamed.
    """

    def __init__(self, path: Path, trust: bool = False) -> None:
        """Reads a file.

        Args:
            path: Safetensors, an .npz of arrays, or a pickle of a plain state dict.
            trust: Whether pickles are read, by `torch.load(weights_only=True)`.

        Raises:
            ValueError: The file is missing, damaged, of another kind, an optimizer's state, a
                pickle without `trust`, or holds anything but dense tensors.
        """
        self.path, self.notes = path, list[str]()
        _check_name(path, trust)
        size = regular_file_size(path)
        with torch.device("cpu"):
            self._tensors = _READERS[path.suffix.lower()](path)
        self._check(size)
        self.sha256 = file_sha256(path)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """The shape of a tensor of `ndim` dimensions. ValueError if it is missing or has others."""
        if name not in self:
            raise ValueError(f"{self.path}: parameter {name} is missing; check --from")
        if self[name].ndim != ndim or not self[name].numel():
            raise ValueError(
                f"{self.path}: {name} has shape {tuple(self[name].shape)}; "
                f"expected {ndim} dimensions"
            )
        return tuple(self[name].shape)

    def count(self, pattern: str) -> int:
        """How many names of a pattern with one number are stored, from 0 on without a gap."""
        number = 0
        while pattern.format(number) in self:
            number += 1
        return number

    def rename(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces names and tensors."""
        self._tensors = dict(tensors)

    def strip_prefix(self, prefix: str) -> None:
        """Removes a prefix that every name has, such as "module." of a data-parallel wrapper."""
        if self and all(name.startswith(prefix) for name in self):
            self.rename({name.removeprefix(prefix): value for name, value in self.items()})
            self.notes.append(f"the prefix {prefix!r} of every name was removed")

    def dtypes(self) -> str:
        """The stored types with their counts, such as "300 in float16, 20 in float32"."""
        counts = Counter(str(t.dtype).removeprefix("torch.") for t in self.values())
        return ", ".join(f"{count} in {dtype}" for dtype, count in counts.most_common())

    def read(self, name: str) -> Tensor:
        """A copy in fp32. ValueError if it is not floating, or contains NaN or Inf."""
        if (dtype := self[name].dtype) not in FLOATING:
            raise ValueError(
                f"{self.path}: {name} has dtype {dtype}; expected a floating type: "
                "convert the weights"
            )
        value = self[name].to(torch.float32, copy=True)
        if not value.isfinite().all():
            raise ValueError(f"{self.path}: {name} contains NaN or Inf in fp32")
        return value

    def _check(self, file_size: int) -> None:
        """Refuses views that claim more elements than the file holds."""
        total = 0
        for name, t in self.items():
            nbytes = t.numel() * t.element_size()
            if nbytes > t.untyped_storage().nbytes():
                raise ValueError(
                    f"{self.path}: {shown(name)} has shape {tuple(t.shape)}, more elements than "
                    "are stored; save contiguous tensors"
                )
            total += nbytes
        _check_expansion(self.path, total, file_size)


def _check_expansion(path: Path, total: int, file_size: int) -> None:
    if total > max(64 * MIB, _EXPANSION * file_size):
        raise ValueError(
            f"{path} has {file_size} bytes and {total} bytes of tensors; "
            f"expected at most {_EXPANSION} times as many"
        )


def _check_name(path: Path, trust: bool) -> None:
    """Refuses a file by its name, before it is opened."""
    name, suffix = path.name, path.suffix.lower()
    if suffix == ".pkl":
        raise ValueError(
            f"{path} is a pickled network, which executes source code that it stores; it is never "
            f"opened here. Where you trust it, run in its own repository: {_STATE_DICT_OF_EDM}"
        )
    if suffix not in _SUFFIXES:
        raise ValueError(f"{path} has an unknown suffix; expected one of {', '.join(_SUFFIXES)}")
    if re.match(r"opt\d*\.", name):
        raise ValueError(
            f"{path} holds an optimizer's state; expected the weights: "
            "give ema_RATE_STEP.pt of the same folder"
        )
    if suffix in _PICKLES and not trust and os.path.lexists(path):
        raise ValueError(
            f"{path} is a pickle; expected safetensors, or --trust: "
            "torch.load(weights_only=True) then reads it, which builds tensors only"
        )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _read_arrays(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        _check_expansion(path, sum(entry.file_size for entry in entries), path.stat().st_size)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in _some(
                path, arrays.files)}  # fmt: skip
    except (zipfile.BadZipFile, OSError, EOFError, TypeError, zipfile.LargeZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except ValueError as error:  # object arrays, damaged headers
        message = str(error) if str(path) in str(error) else f"{path} cannot be read: {error}"
        raise ValueError(message) from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        mapped = zipfile.is_zipfile(path)  # files before torch 1.6 cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the type depends on where a damaged file breaks
        raise ValueError(_unreadable(path, error)) from None
    return _plain_state_dict(path, content)


def _unreadable(path: Path, error: Exception) -> str:
    if refused := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"{path} refers to {refused[1][:60]}, which is not a tensor and is never executed; "
            f"{_PLAIN}"
        )
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return f"{path} cannot be read: {first}"


def _plain_state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds {type(content).__name__}; {_PLAIN}")
    if "param_groups" in content:
        raise ValueError(
            f"{path} holds an optimizer's state; expected the weights: give another file"
        )
    for name in _some(path, content):
        value = content[name]
        if isinstance(value, dict) and name in _CONTAINERS:
            raise ValueError(
                f"{path} holds a dictionary under {shown(name)}; {_PLAIN}: save that one"
            )
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: {shown(name)} is a {type(value).__name__}; {_PLAIN}")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ValueError(f"{path}: {shown(name)} is not a dense tensor; {_PLAIN}")
    return {name: value.detach() for name, value in content.items()}


def _some(path: Path, names: Any) -> list[Any]:
    if len(names) > _MAX_NAMES:
        raise ValueError(f"{path} has {len(names)} names; expected at most {_MAX_NAMES}")
    return list(names)


_READERS = {
    ".safetensors": _read_safetensors,
    ".npz": _read_arrays,
    **dict.fromkeys(_PICKLES, _read_pickle),
}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(MIB):
            digest.update(block)
    return digest.hexdigest()


def choose_file(source: Path) -> tuple[Path, list[str]]:
    """The file to convert, and notes about the choice.

    A directory stands for its newest averaged weights, `ema_RATE_STEP.pt`. ValueError if there are
    none or several rates.
    """
    if not source.is_dir():
        return source, _note_on_raw_weights(source)
    averaged = _averaged(source)
    newest = [p for p in averaged if _step(p) == max(map(_step, averaged))]
    if len(newest) != 1:
        listed = ", ".join(p.name for p in newest) or "none"
        raise ValueError(f"{source} has {listed} as newest ema_RATE_STEP.pt; give one file")
    return newest[0], [f"{newest[0].name} is the newest averaged file of {source}"]


def _averaged(directory: Path) -> list[Path]:
    return sorted(p for p in directory.glob("ema_*_*.pt") if re.search(r"_\d{1,12}$", p.stem))


def _step(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _note_on_raw_weights(path: Path) -> list[str]:
    if not re.fullmatch(r"model\d*\.pt", path.name):
        return []
    averaged = _averaged(path.parent)
    better = (
        f"prefer {averaged[-1].name}" if averaged else "prefer ema_RATE_STEP.pt of the same run"
    )
    return [f"{path.name} holds the raw weights of training, not the averaged ones: {better}"]
