import errno
import resource
from contextlib import suppress

import numpy as np
import pytest
import torch

from ddpm_fast.sampling.paths import images_in
from ddpm_fast.sampling.sinks import (
    ArraySink,
    FolderSink,
    GridSink,
    SinkError,
    check_path,
    open_sink,
)
from ddpm_fast.utils.files import write_atomically

Image = pytest.importorskip("PIL.Image")
IMAGES = torch.arange(5 * 4 * 4 * 3, dtype=torch.uint8).view(5, 4, 4, 3)


def write(sink, batches, first):
    with sink:
        for images in batches:
            sink.write(first, images)
            first += len(images)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_folder_has_a_png_per_image_named_by_its_index(tmp_path):
    write(open_sink(tmp_path / "many", range(7, 12), (3, 4, 4)), IMAGES.split(2), 7)
    assert names(tmp_path / "many") == [f"{i:06d}.png" for i in range(7, 12)]
    for i, expected in zip(range(7, 12), IMAGES.numpy(), strict=True):
        assert np.array_equal(np.array(Image.open(tmp_path / "many" / f"{i:06d}.png")), expected)


def test_indices_need_not_be_consecutive(tmp_path):
    sink = open_sink(tmp_path / "many", [3, 10**7, 5])
    sink.write(3, IMAGES[:1])
    sink.write(10**7, IMAGES[1:3])
    assert sink.count == 3
    assert names(tmp_path / "many") == ["00000003.png", "00000005.png", "10000000.png"]
    assert np.array_equal(np.array(Image.open(tmp_path / "many" / "00000005.png")), IMAGES[2])


@pytest.mark.parametrize("count", [5, 3])
def test_arrays_have_the_images_written_before_a_stop(tmp_path, count):
    write(open_sink(tmp_path / "a.npz", range(2, 7)), IMAGES[:count].split(2), 2)
    write(open_sink(tmp_path / "a.npy", range(2, 7)), IMAGES[:count].split(2), 2)
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(arrays["images"], IMAGES[:count])
        assert arrays["indices"].tolist() == list(range(2, 2 + count))
    assert np.array_equal(np.load(tmp_path / "a.npy"), IMAGES[:count])


def test_grid_has_every_image(tmp_path):
    write(open_sink(tmp_path / "g.png", 4), [IMAGES[:4]], 0)
    sheet = np.array(Image.open(tmp_path / "g.png"))
    assert sheet.shape == (2 * 64 + 6, 2 * 64 + 6, 3)
    for i in range(4):
        top, left = 2 + i // 2 * 66, 2 + i % 2 * 66
        assert np.array_equal(sheet[top : top + 64 : 16, left : left + 64 : 16], IMAGES[i])


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "g.png"])
def test_nothing_is_written_without_images_or_after_an_error(tmp_path, name):
    with open_sink(tmp_path / name, 5):
        pass
    with suppress(RuntimeError), open_sink(tmp_path / name, 5) as sink:
        sink.write(0, IMAGES[:2])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_batches_out_of_order_are_refused(tmp_path):
    sink = open_sink(tmp_path / "a.npy", range(10, 14))
    with pytest.raises(ValueError, match="from index 11; expected 10"):
        sink.write(11, IMAGES[:1])
    sink.write(10, IMAGES[:4])
    with pytest.raises(ValueError, match="expected no more images"):
        sink.write(14, IMAGES[:1])


def test_the_path_decides_the_sink_and_is_validated(tmp_path):
    kinds = {"a.png": GridSink, "a.npy": ArraySink, "a.npz": ArraySink, "a": FolderSink}
    assert {name: type(open_sink(tmp_path / name, 1)) for name in kinds} == kinds
    (tmp_path / "file").write_text("")
    (tmp_path / "d.png").mkdir()
    for path, message in (
        ("", "expected the name of a file"),
        ("x.npy/", "expected the name of a file"),
        (tmp_path / "a.jpg", "unknown kind of file"),
        (tmp_path / "no" / "a.npy", "does not exist; create it first"),
        (tmp_path / "d.png", "is a directory; expected a file name"),
        (tmp_path / "file", "is a file; expected a directory"),
    ):
        with pytest.raises(ValueError, match=message):
            check_path(path)
    with pytest.raises(ValueError, match="cannot write 5-channel images as PNG"):
        open_sink(tmp_path / "a.png", 1, (5, 4, 4))
    assert isinstance(open_sink(tmp_path / "a.npy", 1, (5, 4, 4)), ArraySink)


def test_suffixes_in_any_case(tmp_path):
    kinds = {"a.PNG": GridSink, "b.Npy": ArraySink, "c.NPZ": ArraySink}
    assert {name: type(open_sink(tmp_path / name, 1)) for name in kinds} == kinds
    for name in kinds:
        write(open_sink(tmp_path / name, 5), [IMAGES], 0)
    assert np.array_equal(np.load(tmp_path / "b.Npy"), IMAGES)
    assert np.array_equal(np.load(tmp_path / "c.NPZ")["images"], IMAGES)
    assert Image.open(tmp_path / "a.PNG").format == "PNG"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/full", "is a device or a pipe"),
        ("/dev/null", "is a device or a pipe"),
        ("-", "cannot write images to stdout"),
        ("a" * 250, "250 bytes; expected at most 220"),
        ("é" * 111 + ".png", "226 bytes; expected at most 220"),
        ("a\0b.png", "expected the name of a file"),
    ],
)
def test_names_that_cannot_be_written_are_refused(path, message):
    with pytest.raises(ValueError, match=message):
        check_path(path)


def test_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / ("a" * 216 + ".npy")
    write(open_sink(path, 5), [IMAGES], 0)
    assert np.array_equal(np.load(path), IMAGES)


def test_files_that_memory_cannot_hold_are_refused(tmp_path):
    for name in ("a.npz", "a.npy", "a.png"):
        with pytest.raises(ValueError, match=r"GiB of memory are available .* write a directory"):
            open_sink(tmp_path / name, 10**12, (1, 32, 32))
    assert isinstance(open_sink(tmp_path / "many", 10**12, (1, 32, 32)), FolderSink)


def test_the_error_for_a_full_disk_has_the_file_and_the_number_of_images(tmp_path, monkeypatch):
    sink, real = open_sink(tmp_path / "many", 5), write_atomically

    def full(path, content):
        if path.name == "000003.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr("ddpm_fast.sampling.sinks.write_atomically", full)
    sink.write(0, IMAGES[:2])
    with pytest.raises(SinkError, match=r"000003.png: No space left on device; 3 of 5 images are"):
        sink.write(2, IMAGES[2:])
    assert sorted(images_in(tmp_path / "many")) == [0, 1, 2]


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.png"])
def test_a_failed_write_leaves_no_file(tmp_path, name):
    """RLIMIT_FSIZE makes the operating system fail as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    images = torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(SinkError, match=rf"{name}: File too large; 0 of 5 images are in"):
            write(open_sink(tmp_path / name, 5), [images], 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_images_in_a_directory(tmp_path):
    write(open_sink(tmp_path / "many", range(7, 12)), [IMAGES], 7)
    (tmp_path / "many" / "photo.png").write_bytes(b"")
    assert sorted(images_in(tmp_path / "many")) == [7, 8, 9, 10, 11]
    assert list(images_in(tmp_path / "none")) == []
