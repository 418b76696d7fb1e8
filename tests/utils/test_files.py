import os

import pytest

from ddpm_fast.utils import files
from ddpm_fast.utils.files import write_atomically, write_directory_atomically


def full(*_):
    raise OSError(28, "No space left on device")


def contents(directory):
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def test_a_file_is_replaced_or_unchanged(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert contents(tmp_path) == {"a.json": b"old"}
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert contents(tmp_path) == {"a.json": b"new"}


@pytest.mark.parametrize(
    "exchange", [files._exchange, lambda a, b: False], ids=["exchange", "two renames"]
)
def test_a_directory_is_replaced_or_unchanged(tmp_path, monkeypatch, exchange):
    monkeypatch.setattr(files, "_exchange", exchange)
    old, new = {"x.json": b"1", "deep/y.bin": b"2"}, {"x.json": b"3", "z.json": b"4"}
    write_directory_atomically(tmp_path / "d", old)
    assert contents(tmp_path / "d") == old and (tmp_path / "d").stat().st_mode & 0o777 == 0o755
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_directory_atomically(tmp_path / "d", new)
    assert contents(tmp_path / "d") == old
    write_directory_atomically(tmp_path / "d", new)
    assert contents(tmp_path / "d") == new and [p.name for p in tmp_path.iterdir()] == ["d"]
