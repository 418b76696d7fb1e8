"""Animations: GIF by Pillow, MP4 by PyAV."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..utils.files import write_atomically
from .image_io import Pixels

KINDS = (".gif", ".mp4")
PER_SECOND = 20
MIN_FRAMES = 60  # frames are repeated up to this number
HOLD = 20  # repetitions of the last frame


def save_animation(frames: list[Pixels], out: Path) -> None:
    """Writes a .gif or .mp4 of at least three seconds, with the last frame shown for one second.

    Args:
        frames: uint8 [H, W, 3] of one size with even sides.
        out: The suffix selects the format.

    Raises:
        ValueError: There are no frames, or MP4 is requested without the extra `plot`.
    """
    if not frames:
        raise ValueError("no frames; expected at least one")
    repeats = -(-MIN_FRAMES // len(frames))
    frames = [*(frame for frame in frames for _ in range(repeats)), *frames[-1:] * HOLD]
    write_atomically(out, _gif(frames) if out.suffix == ".gif" else _mp4(frames))


def find_av() -> Any:
    """Returns the module of PyAV. ValueError without the extra `plot`."""
    try:
        import av
    except ImportError:
        raise ValueError("MP4 needs the extra plot: pip install 'ddpm-fast[plot]'") from None
    return av


def _gif(frames: list[Pixels]) -> bytes:
    from PIL import Image

    images = [Image.fromarray(frame).quantize(64, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], duration=1000 // PER_SECOND, loop=0
    )
    return buffer.getvalue()


def _mp4(frames: list[Pixels]) -> bytes:
    av, buffer = find_av(), io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = container.add_stream(codec, rate=PER_SECOND)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"  # supported by all browsers
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
