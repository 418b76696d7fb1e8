"""Sources of training data: pixels, labels and hostile files."""

import gzip
import io
import os
import struct
import time
import tracemalloc
import warnings
import zipfile
import zlib

import numpy as np
import pytest

from ddpm_fast.data.datasets import ImageData, load_dataset, load_images

Image = pytest.importorskip("PIL.Image")
GENERATOR = np.random.default_rng(0)
GREY = GENERATOR.integers(0, 256, (6, 8, 8), dtype=np.uint8)
COLOUR = GENERATOR.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder_and_file(tmp_path, suffix):
    for prefix, shift in (("train", 0), ("t10k", 1)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{suffix}", GREY + np.uint8(shift))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}", LABELS)
    for source, split, want in (
        (tmp_path, "train", GREY),
        (tmp_path, "test", GREY + np.uint8(1)),
        (tmp_path / f"t10k-images-idx3-ubyte{suffix}", "train", GREY + np.uint8(1)),
    ):
        data = load_images(source, 8, split=split)
        assert np.array_equal(data.images[..., 0], want)
        assert np.array_equal(data.labels, LABELS) and data.num_classes == 3


def test_padding_centres_on_black(tmp_path):
    np.save(tmp_path / "a.npy", GREY)
    images = load_images(tmp_path / "a.npy", 12, "pad").images
    assert np.array_equal(images[:, 2:-2, 2:-2, 0], GREY)
    images[:, 2:-2, 2:-2] = 0
    assert not images.any()


@pytest.mark.parametrize(
    "names", [("images", "labels"), ("arr_0", "arr_1"), ("x_train", "y_train")], ids=" ".join
)
def test_npz(tmp_path, names):
    np.savez(tmp_path / "a.npz", **{names[0]: COLOUR, names[1]: LABELS})
    data = load_images(tmp_path / "a.npz", 8)
    assert np.array_equal(data.images, COLOUR) and np.array_equal(data.labels, LABELS)


def test_npy_channels_first_and_last(tmp_path):
    np.save(tmp_path / "a.npy", COLOUR)
    np.save(tmp_path / "b.npy", COLOUR.transpose(0, 3, 1, 2))
    assert np.array_equal(load_images(tmp_path / "a.npy", 8).images, COLOUR)
    assert np.array_equal(load_images(tmp_path / "b.npy", 8).images, COLOUR)
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])
    assert np.abs(load_images(tmp_path / "a.npy", 8, channels=1).images[..., 0] - luma).max() <= 1


@pytest.mark.parametrize("pixels", [GREY[..., None], COLOUR], ids=["grey", "colour"])
def test_folder_with_classes(tmp_path, pixels):
    for i, (name, image) in enumerate(
        zip(["coat", "bag", "coat", "bag", "shoe", "shoe"], pixels, strict=True)
    ):
        home = tmp_path / name / ("deep" if i == 0 else "")
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(home / f"{i}.png")
    (tmp_path / "coat" / "notes.txt").write_text("no picture")
    data = load_images(tmp_path, 8)
    assert data.classes == ("bag", "coat", "shoe") and sorted(data.labels) == [0, 0, 1, 1, 2, 2]
    by_name = {1: 0, 3: 0, 0: 1, 2: 1, 4: 2, 5: 2}  # picture -> class
    for image, label in zip(data.images, data.labels, strict=True):
        (which,) = [i for i in range(6) if np.array_equal(pixels[i], image)]
        assert by_name[which] == label


def test_folder_without_classes(tmp_path):
    for i in range(2):
        Image.fromarray(COLOUR[i]).save(tmp_path / f"{i}.png")
    assert load_images(tmp_path, 8).labels is None
    (tmp_path / "only").mkdir()
    Image.fromarray(COLOUR[2]).save(tmp_path / "only" / "2.png")
    assert load_images(tmp_path, 8).labels is None and len(load_images(tmp_path, 8)) == 3


def test_crops_the_middle_and_shrinks_to_pad(tmp_path):
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, 8:24] = 200  # the middle square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (load_images(tmp_path, 16).images == 200).all()
    padded = load_images(tmp_path, 16, "pad").images[0]
    assert not padded[:4].any() and not padded[-4:].any() and padded[7, 8, 0] == 200


def test_transparency_is_white_and_orientation_is_kept(tmp_path):
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(tmp_path / "clear.png")
    assert (load_images(tmp_path, 8).images == 255).all()
    turned = Image.fromarray(COLOUR[0])
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "clear.png", exif=exif)
    assert np.array_equal(load_images(tmp_path, 8).images[0], COLOUR[0, ::-1, ::-1])


def test_dataset_of_the_hub(monkeypatch):
    """With a fake `datasets` library."""
    import sys
    import types

    class Kind:
        names = ("cat", "dog", "owl")

    class Table(list):
        features = {"img": None, "label": Kind()}  # noqa: RUF012

        def __getitem__(self, key):
            return [row["label"] for row in self] if key == "label" else super().__getitem__(key)

    library = types.ModuleType("datasets")
    library.Image = type("Image", (), {})
    Table.features["img"] = library.Image()
    library.load_dataset = lambda name, split: Table(
        {"img": Image.fromarray(image), "label": int(label)}
        for image, label in zip(COLOUR, LABELS, strict=True)
    )
    monkeypatch.setitem(sys.modules, "datasets", library)
    data = load_dataset("user/pets", 8)
    assert (
        np.array_equal(data.images, COLOUR)
        and np.array_equal(data.labels, LABELS)
        and data.classes == ("cat", "dog", "owl")
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the extra train"):
        load_dataset("user/pets", 8)


def test_digest_depends_on_pixels_and_labels():
    same = ImageData(COLOUR.copy(), LABELS).digest
    assert same == ImageData(COLOUR, LABELS).digest
    changed = COLOUR.copy()
    changed[5, 7, 7, 2] ^= 1
    others = {
        ImageData(changed, LABELS).digest,
        ImageData(COLOUR).digest,
        ImageData(COLOUR, LABELS[::-1]).digest,
    }
    assert len(others | {same}) == 4


def test_refuses_what_it_cannot_read(tmp_path):
    def refused(name, message, **options):
        with pytest.raises(ValueError, match=message):
            load_images(tmp_path / name, **{"resolution": 8, **options})

    refused("nowhere", "does not exist")
    refused("", "has no images")
    (tmp_path / "a.txt").write_text("text")
    refused("a.txt", "unknown kind of file")
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    refused("a.npz", "cannot be read")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    refused("objects.npy", "cannot be read")
    np.save(tmp_path / "floats.npy", GREY.astype(np.float32))
    refused("floats.npy", "expected uint8")
    np.savez(tmp_path / "b.npz", pictures=GREY)
    refused("b.npz", "expected images")
    np.savez(tmp_path / "c.npz", images=GREY, labels=LABELS[:4])
    refused("c.npz", "one per image")
    for labels in (LABELS - 1, LABELS * 10**9):
        np.savez(tmp_path / "c.npz", images=GREY, labels=labels)
        refused("c.npz", "expected classes counted from 0")
    for labels in (LABELS + 0.5, np.eye(6, dtype=np.int64), np.array(list("abcabc"))):
        np.savez(tmp_path / "c.npz", images=GREY, labels=labels)
        refused("c.npz", "expected integers")
    (tmp_path / "images-idx3").write_bytes(b"\0\0\x08\x03" + bytes(12) + b"x")
    refused("images-idx3", "as its header states")
    (tmp_path / "images-idx3").write_bytes(b"PK")
    refused("images-idx3", "not an IDX file")
    refused("floats.npy", "expected 1 to 16384 pixels", resolution=0)
    refused("floats.npy", "crop or pad", fit="stretch")
    (tmp_path / "pictures").mkdir()
    Image.fromarray(COLOUR[0]).save(tmp_path / "pictures" / "whole.png")
    (tmp_path / "pictures" / "truncated.png").write_bytes(
        (tmp_path / "pictures" / "whole.png").read_bytes()[:80]
    )
    refused("pictures", "truncated.png")
    (tmp_path / "pictures" / "truncated.png").write_bytes(b"")
    refused("pictures", "truncated.png cannot be read")
    write_idx(tmp_path / "pictures" / "train-images-idx3-ubyte", GREY)
    refused("pictures", "no files of images for the test split", split="test")


def test_idx_files_of_other_names(tmp_path):
    """As EMNIST: the split is inside the name, and only the labels are gzipped."""
    for split, shift in (("train", 0), ("test", 1)):
        write_idx(tmp_path / f"emnist-letters-{split}-images-idx3-ubyte", GREY + np.uint8(shift))
        write_idx(tmp_path / f"emnist-letters-{split}-labels-idx1-ubyte.gz", LABELS)
    assert np.array_equal(load_images(tmp_path, 8).images[..., 0], GREY)
    assert np.array_equal(load_images(tmp_path, 8, split="test").images[..., 0], GREY + np.uint8(1))
    assert np.array_equal(load_images(tmp_path, 8).labels, LABELS)
    write_idx(tmp_path / "emnist-digits-train-images-idx3-ubyte", GREY)
    with pytest.raises(ValueError, match="2 files of images for the train split"):
        load_images(tmp_path, 8)


def test_a_few_images_may_have_high_labels():
    """A subset of a larger data set, as in `eval --images 4` on ten classes."""
    assert ImageData(COLOUR[:2], np.array([3, 9])).num_classes == 10


def test_hidden_folders_are_not_classes(tmp_path):
    for i, name in enumerate([".ipynb_checkpoints", "__MACOSX", "cat", "dog"]):
        (tmp_path / name).mkdir()
        Image.fromarray(COLOUR[i]).save(tmp_path / name / "a.png")
    assert load_images(tmp_path, 8).classes == ("cat", "dog")


def test_classes_of_a_second_folder_are_counted_as_in_the_first():
    first = ImageData(COLOUR[:3], np.arange(3), ("cat", "dog", "owl"))
    second = ImageData(COLOUR[3:5], np.arange(2), ("dog", "owl")).with_classes_of(first)
    assert second.labels.tolist() == [1, 2] and second.num_classes == 3
    with pytest.raises(ValueError, match="the classes fox are not among"):
        ImageData(COLOUR[:1], np.zeros(1, np.int64), ("fox",)).with_classes_of(first)


def test_sixteen_bits_keep_their_range_and_unknown_ranges_are_refused(tmp_path):
    Image.fromarray(GREY[0].astype(np.uint16) * 257).save(tmp_path / "a.png")
    assert np.array_equal(load_images(tmp_path, 8).images[0, ..., 0], GREY[0])
    Image.fromarray(GREY[0].astype(np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(ValueError, match=r"b\.tif cannot be read: mode F"):
        load_images(tmp_path, 8)


# ---- hostile files


def refusal(source, seconds=5.0, resolution=8, **options):
    """The message of the one-line ValueError raised within `seconds` of CPU time."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is no warning besides the error
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers match the message
            load_images(source, resolution, **options)
    assert time.process_time() - start < seconds and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "images-idx3", "images-idx3.gz"])
@pytest.mark.parametrize("target", ["fifo", "/dev/zero"])
def test_only_regular_files_are_read(tmp_path, name, target):
    os.mkfifo(tmp_path / name) if target == "fifo" else (tmp_path / name).symlink_to(target)
    assert f"{name} is a FIFO, device or socket; expected a regular file" in refusal(
        tmp_path / name
    )


@pytest.mark.parametrize("channels", [None, 3])
def test_a_fifo_among_images_is_refused(tmp_path, channels):
    Image.fromarray(COLOUR[0]).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "f.png")
    assert "f.png is a FIFO" in refusal(tmp_path, channels=channels)


def test_links_in_a_loop_and_impossible_names_do_not_exist(tmp_path):
    (tmp_path / "a.npz").symlink_to("a.npz")
    assert "does not exist" in refusal(tmp_path / "a.npz")
    assert "does not exist" in refusal(tmp_path / ("x" * 5000))
    assert "does not exist" in refusal("a\0b.npz")
    (tmp_path / "c.png").symlink_to("c.png")
    assert "c.png cannot be read: Too many levels of symbolic links" in refusal(tmp_path)


def write_npz(path, size, content, name="images.npy"):
    """Writes an .npz whose array is `content` padded with zeros to `size` bytes."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w") as member,
    ):
        member.write(content)
        for first in range(len(content), size, 2**20):
            member.write(bytes(min(2**20, size - first)))


def npy_header(shape):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, dict(descr="|u1", fortran_order=False, shape=shape)
    )
    return buffer.getvalue()


def test_zip_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_fast.data.archives.SMALL", 2**20)
    header = npy_header((2048, 32, 32))
    write_npz(tmp_path / "bomb.npz", len(header) + 2**21, header)
    # the number of zeros agrees with the header: only the ratio reveals the bomb
    monkeypatch.setattr(np.lib.format, "read_array", lambda *a, **k: pytest.fail("unpacked"))
    text = refusal(tmp_path / "bomb.npz")
    assert "bomb.npz cannot be read: images unpacks from" in text
    assert "100 times the packed size" in text


@pytest.mark.parametrize(
    ("shape", "size"), [((6, 8, 8), 2**21), ((10**6, 10**6, 10**6), 384), ((2**40, 2**40), 384)]
)
def test_arrays_are_as_large_as_their_header_states(tmp_path, shape, size):
    header = npy_header(shape)
    write_npz(tmp_path / "a.npz", len(header) + size, header)
    assert "images unpacks to" in refusal(tmp_path / "a.npz")


def test_labels_in_an_archive_are_bounded_too(tmp_path):
    header = npy_header((3, 3))
    np.savez(tmp_path / "a.npz", images=GREY)
    with zipfile.ZipFile(tmp_path / "a.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.npy", header + bytes(2**21))
    assert "labels unpacks to" in refusal(tmp_path / "a.npz")


def test_compressed_arrays_are_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images=GREY, labels=LABELS)
    data = load_images(tmp_path / "a.npz", 8)
    assert np.array_equal(data.images[..., 0], GREY) and np.array_equal(data.labels, LABELS)


def idx_header(*shape):
    return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)


def test_gzip_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_fast.data.archives.SMALL", 2**20)
    path = tmp_path / "images-idx3.gz"
    # the size agrees with the header: only the ratio reveals the bomb
    path.write_bytes(gzip.compress(idx_header(2048, 32, 32) + bytes(2**21), 1))
    assert "100 times the packed size" in refusal(path)
    # the file is longer than its header states: no more than stated is unpacked
    path.write_bytes(gzip.compress(idx_header(2, 8, 8) + bytes(2**26), 1))
    tracemalloc.start()
    try:
        assert "does not have 2 x 8 x 8 bytes" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_header(2**32 - 1, 2**32 - 1, 2**32 - 1), "images-idx3"),
        (idx_header(*[1] * 255), "1 to 4 dimensions"),
        (idx_header(), "1 to 4 dimensions"),
        (idx_header(2, 8, 8) + bytes(127), "does not have 2 x 8 x 8 bytes"),
        (idx_header(2, 8, 8) + bytes(129), "does not have 2 x 8 x 8 bytes"),
        (b"\0\0\x08", "not an IDX file"),
        (b"", "not an IDX file"),
    ],
    ids=range(7),
)
def test_idx_files_hold_what_their_header_states(tmp_path, suffix, content, message):
    path = tmp_path / f"images-idx3{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    text = refusal(path)
    assert message in text and str(path) in text


def write_png_bomb(path, side):
    """Writes a PNG of side x side black pixels, one bit each, in a few kilobytes."""
    chunk = lambda kind, data: (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    pack = zlib.compressobj(1)
    rows = b"".join(pack.compress(bytes(1 + side // 8)) for _ in range(side)) + pack.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("channels", [None, 1])
@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow warns of the first, refuses the second
def test_images_with_too_many_pixels_are_refused(tmp_path, side, channels):
    write_png_bomb(tmp_path / "bomb.png", side)
    text = refusal(tmp_path, channels=channels)
    assert "bomb.png has too many pixels" in text and f"{side * side} pixels" in text


def test_resolutions_are_bounded(tmp_path):
    np.save(tmp_path / "a.npy", GREY)
    for resolution in (10**9, 10**400, True, 8.0):
        assert "resolution = " in refusal(tmp_path / "a.npy", resolution=resolution)
