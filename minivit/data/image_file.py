"""Image files: which are read, how large they may be, and their pixels as 8-bit gray or RGB.

EXIF orientation is applied; palettes, CMYK, 16-bit and floating-point images are converted; transparent pixels are composited on white.
A file of a few bytes can claim any number of pixels, and a decoder cannot be stopped: so the header decides whether it starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from ..errors import UserError
from ..files import open_regular, reading_untrusted

# Formats that Pillow decodes itself; PostScript and similar formats would start other programs.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000")
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2")
)
MAX_PIXELS = 1 << 25  # of an image, by default; decoding takes up to 15 bytes a pixel
HEAVY = ("WEBP", "JPEG2000")  # formats whose decoders take up to 30 bytes a pixel: their pixels count double
MOST_SCANS = 50  # of a progressive JPEG; cameras and programs write about 10
MARKER = re.compile(b"\xff[\x02-\xcf\xd8-\xfe]")  # the beginning of a segment of a JPEG; between segments of pixels there are others
STRIP = 1 << 18  # pixels that are converted at once
GRAY_MODES = frozenset(("1", "L", "LA", "La", "I", "F"))  # also every "I;16..."
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
UPRIGHT = {  # how an image of each other orientation becomes upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unreadable(UserError):
    """A file that cannot be decoded; the message names it."""


class Header(NamedTuple):
    """Size and kind of an image, known before decoding its pixels; EXIF orientation is applied."""

    width: int
    height: int
    gray: bool


@cache
def _formats() -> tuple[str, ...]:
    """The formats that the installed Pillow supports."""
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


def name_of(image: Any) -> str:
    """The path of an image that is a path, or of an open file that has one; otherwise ""."""
    name = image if isinstance(image, (str, os.PathLike)) else getattr(image, "filename", "") or getattr(image, "name", "")
    return os.fsdecode(name) if isinstance(name, (str, os.PathLike)) else ""


def _opened(source: Any) -> BinaryIO:
    """A path, the bytes of a file, or a file that is open for reading bytes, read from where it stands, as a file that can be searched."""
    if hasattr(source, "read"):
        source = source.read()
        if not isinstance(source, bytes):
            raise ValueError("it is open for reading text, not bytes: open it with mode 'rb'")
    return BytesIO(source) if isinstance(source, (bytes, bytearray)) else open_regular(source)


@contextmanager
def decoding(source: Any) -> Iterator[None]:
    """Inside the block an image is decoded: what Pillow raises becomes Unreadable, which names it."""
    with reading_untrusted(f"image {name_of(source) or 'given'}", kind=Unreadable):
        try:
            yield
        except Image.UnidentifiedImageError as error:
            raise ValueError("not an image of a known format") from error


@contextmanager
def open_image(source: Any, max_pixels: int) -> Iterator[Image.Image]:
    """An image file, by its path, its bytes or open, whose pixels are decoded when they are first used. Raises Unreadable."""
    with decoding(source), _opened(source) as file, Image.open(file, formats=_formats()) as image:
        width, height = image.size
        weight = 2 if image.format in HEAVY else 1
        if weight * width * height > max_pixels:
            pixels = f"{width}×{height} pixels{f', which count double in {image.format}' if weight > 1 else ''}"
            raise ValueError(f"it has {pixels}, and max_pixels is {max_pixels}: make it smaller, or raise max_pixels (--max-pixels)")
        if "progressive" in image.info and _has_many_scans(file):
            raise ValueError(f"it goes over its pixels more than {MOST_SCANS} times: save it anew")
        yield image


def _has_many_scans(file: BinaryIO) -> bool:
    """Whether a JPEG has more than MOST_SCANS scans, of which one in 80 bytes can last as long as all of a photograph."""
    at = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(at)
    scans, marker = 0, MARKER.search(content, 2)
    while marker and marker[0] != b"\xff\xd9" and scans <= MOST_SCANS:
        scans += marker[0] == b"\xff\xda"
        end = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
        marker = MARKER.search(content, end)
    return scans > MOST_SCANS


def check_max_pixels(max_pixels: int) -> int:
    """`max_pixels` itself. Raises UserError if it is not positive, or beyond what Pillow decodes."""
    most = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else max_pixels
    if not 1 <= max_pixels <= most:
        raise UserError(f"max_pixels must be from 1 to {most}, got {max_pixels}: PIL.Image.MAX_IMAGE_PIXELS sets half of the upper limit")
    return max_pixels


def read_header(path: str | os.PathLike[str]) -> Header:
    """Size and kind of an image file, however large. Raises Unreadable."""
    with decoding(path), open_regular(path) as file, Image.open(file, formats=_formats()) as image:
        width, height = image.size
        if width != height and _orientation(image) > 4:  # rotated by 90 degrees
            width, height = height, width
        return Header(width, height, _is_gray(image.mode))


def _is_gray(mode: str) -> bool:
    return mode in GRAY_MODES or mode.startswith("I;16")


def _orientation(image: Image.Image) -> int:
    """1 ... 8; 1 if the EXIF data is absent or damaged, as in viewers: the pixels are readable without it."""
    orientation = 1
    with suppress(Exception):
        orientation = image.getexif().get(ORIENTATION, 1)
    return orientation if orientation in UPRIGHT else 1


def upright(image: Image.Image) -> Image.Image:
    """The image turned and mirrored as its EXIF orientation says."""
    orientation = _orientation(image)
    return image if orientation == 1 else image.transpose(UPRIGHT[orientation])


def eight_bits(image: Image.Image) -> Image.Image:
    """The image in mode L or RGB: more than 8 bits are scaled to 8, and transparency is composited on white.

    Strip by strip, since the intermediate results have up to 16 bytes a pixel. Raises ValueError for pixels out of range.
    """
    mode = "L" if _is_gray(image.mode) else "RGB"
    deep = image.mode.startswith(("I", "F"))
    if not deep and not image.has_transparency_data and image.mode == mode:
        return image
    if deep:
        _check_range(image)
    result = Image.new(mode, image.size)
    for top, strip in _strips(image):
        result.paste(_scaled(strip) if deep else _opaque(strip).convert(mode), (0, top))
    return result


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Strips of at most STRIP pixels, or of one row, and the row where each begins."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _largest(mode: str) -> float:
    return 1.0 if mode == "F" else 65535.0


def _check_range(image: Image.Image) -> None:
    arrays = [np.asarray(strip) for _, strip in _strips(image)]
    low, high, largest = np.min([a.min() for a in arrays]), np.max([a.max() for a in arrays]), _largest(image.mode)
    if not (low >= 0 and high <= largest):
        raise ValueError(f"pixels of mode {image.mode} must lie in 0..{largest:g}, got {low:g}..{high:g}")


def _scaled(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)  # (H, W)
    return Image.fromarray(np.rint(values * (255 / _largest(image.mode))).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
