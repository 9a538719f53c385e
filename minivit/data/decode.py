"""Any image to a square array of one size: the one path that training and prediction share.

Orientation from EXIF is applied; palettes, CMYK, 16-bit and floating images become 8-bit gray or RGB; transparent pixels show white, the
page that most such images were drawn for. The largest centred square is cut out and resized to `image_size` with Pillow's antialiased
bicubic filter, which is resizing the shorter side and cropping the centre in one step; a square that has the size already is copied.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError

# Formats that Pillow decodes itself; PostScript and the like would start other programs.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000")
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2")
)
GRAY_MODES = frozenset(("1", "L", "LA", "La", "I", "F"))  # and every "I;16..."
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R 601-2, Pillow's weights

# What Pillow's decoders raise on bytes that are no image, or not a whole one.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Unreadable(UserError):
    """A file that cannot be decoded; the message names it."""


class Header(NamedTuple):
    """What an image says of itself before its pixels are decoded, the orientation applied."""

    width: int
    height: int
    gray: bool


def _is_gray(mode: str) -> bool:
    return mode in GRAY_MODES or mode.startswith("I;16")


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this Pillow was built with."""
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


def _open(path: str | os.PathLike[str]) -> Image.Image:
    return Image.open(path, formats=_formats())


def _unreadable(path: str | os.PathLike[str], error: BaseException) -> Unreadable:
    reason = "not an image of a known format" if isinstance(error, Image.UnidentifiedImageError) else str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror  # without the path, which is named already
    return Unreadable(f"cannot read image {os.fspath(path)}: {' '.join(reason.split())}")


def read_header(path: str | os.PathLike[str]) -> Header:
    """Size and kind of an image file; raises Unreadable."""
    try:
        with _open(path) as image:
            width, height = image.size
            if width != height and image.getexif().get(ORIENTATION, 1) > 4:  # these turn by a quarter
                width, height = height, width
            return Header(width, height, _is_gray(image.mode))
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of more than 8 bits scaled to 8; transparency painted white; L or RGB comes back."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)  # (H, W)
        largest = 1.0 if image.mode == "F" else 65535.0
        if not (values.min() >= 0 and values.max() <= largest):
            raise ValueError(f"pixels of mode {image.mode} must lie in 0..{largest:g}, got {values.min():g}..{values.max():g}")
        return Image.fromarray(np.rint(values * (255 / largest)).astype(np.uint8))
    mode = "L" if _is_gray(image.mode) else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _square(image: Image.Image, image_size: int, in_channels: int) -> np.ndarray:
    """uint8 (image_size, image_size, in_channels)."""
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    mode = "L" if in_channels == 1 else "RGB"
    image = _eight_bits(image)
    image = image if image.mode == mode else image.convert(mode)
    return np.asarray(_resize(image, image_size)).reshape(image_size, image_size, in_channels)


def _resize(image: Image.Image, image_size: int) -> Image.Image:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2  # whole pixels, so that equal sizes copy
    if side != image_size:
        return image.resize((image_size, image_size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return image if width == height else image.crop((left, top, left + side, top + side))


def read_image(path: str | os.PathLike[str], image_size: int, in_channels: int) -> np.ndarray:
    """An image file as uint8 (image_size, image_size, in_channels); raises Unreadable."""
    try:
        with _open(path) as image:
            return _square(image, image_size, in_channels)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def in_threads(function: Callable[[Any], Any], items: Sequence | np.ndarray) -> Iterator:
    """`map(function, items)` in threads, in order, never far ahead of what is taken; Pillow decodes without the interpreter's lock."""
    workers = min(32, os.cpu_count() or 1)
    size = min(32, -(-len(items) // workers))  # tasks of several small images cost less, but every thread gets its share
    tasks = iter([items[i : i + size] for i in range(0, len(items), size)] if size else [])
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(lambda part: [function(item) for item in part], part) for part in islice(tasks, 4 * workers))
        try:
            while waiting:
                yield from waiting.popleft().result()
                waiting.extend(pool.submit(lambda part: [function(item) for item in part], part) for part in islice(tasks, 1))
        finally:
            pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------------------- arrays
def _fit_float(image: np.ndarray, image_size: int, in_channels: int) -> np.ndarray:
    """float32 (H, W, C) in 0..1 -> float32 (image_size, image_size, in_channels)."""
    if image.shape[2] == 3 and in_channels == 1:
        image = image @ LUMA[:, None]
    planes = [np.asarray(_resize(Image.fromarray(np.ascontiguousarray(plane)), image_size)) for plane in np.moveaxis(image, 2, 0)]
    fitted = np.stack(planes, axis=2).clip(0, 1)  # bicubic filters overshoot
    return np.repeat(fitted, in_channels, axis=2) if fitted.shape[2] < in_channels else fitted


def _fit_array(image: np.ndarray, image_size: int, in_channels: int) -> np.ndarray:
    """One image (H, W, C), uint8 or float32, of another size or number of channels."""
    channels, stored = image.shape[2], image.dtype
    readable = (1, 3, 4) if stored == np.uint8 else (1, 3)  # gray, RGB and, in bytes, RGBA
    if image.shape == (image_size, image_size, in_channels):
        return image
    if channels in readable and in_channels in (1, 3) and stored == np.uint8:
        return _square(Image.fromarray(np.ascontiguousarray(image[:, :, 0] if channels == 1 else image)), image_size, in_channels)
    if channels != in_channels and not (channels in readable and in_channels in (1, 3)):
        raise UserError(
            f"{stored} images of {channels} channels cannot become {in_channels}: convert them first, or set in_channels={channels}"
        )
    fitted = _fit_float(image.astype(np.float32) / (255 if stored == np.uint8 else 1), image_size, in_channels)
    return np.rint(fitted * 255).astype(np.uint8) if stored == np.uint8 else fitted


def fit(images: np.ndarray, image_size: int, in_channels: int) -> np.ndarray:
    """Images (n, H, W, C), uint8 or float32, resized and converted to (n, image_size, image_size, in_channels) where they differ."""
    if images.shape[1:] == (image_size, image_size, in_channels):
        return images
    fitted = np.empty((len(images), image_size, image_size, in_channels), images.dtype)
    for i, image in enumerate(in_threads(lambda image: _fit_array(image, image_size, in_channels), images)):
        fitted[i] = image
    return fitted


def check_pixels(images: Any, what: str = "images") -> np.ndarray:
    """`images` as a C-contiguous uint8 array, or float32 within 0..1; raises UserError."""
    try:
        images = np.asarray(images)
    except ValueError:  # rows of different lengths
        raise UserError(f"{what} must be one array of equal sizes: resize the images, or give their files in a folder") from None
    if images.dtype.kind in "iu" and images.dtype != np.uint8:
        if images.size and not (images.min() >= 0 and images.max() <= 255):
            raise UserError(f"{what} of type {images.dtype} must lie in 0..255, got {images.min()}..{images.max()}: scale them to uint8")
        images = images.astype(np.uint8)
    elif images.dtype.kind == "f":
        images = images.astype(np.float32, copy=False)
        for start in range(0, len(images), 4096):  # no second array of the whole size
            _check_range(images[start : start + 4096], start, what)
    elif images.dtype != np.uint8:
        raise UserError(f"{what} must be uint8 in 0..255 or floating in 0..1, got {images.dtype}: convert with astype")
    return np.ascontiguousarray(images)


def _check_range(part: np.ndarray, start: int, what: str) -> None:
    finite = np.isfinite(part)
    if not finite.all():
        first = np.unravel_index(np.argmin(finite), part.shape)
        where = ", ".join(str(i) for i in (first[0] + start, *first[1:]))
        raise UserError(f"{what}[{where}] is {part[first]}: pixels must be finite")
    if part.size and not (part.min() >= 0 and part.max() <= 1):
        raise UserError(
            f"{what} of floating type must lie in 0..1, got {part.min():g}..{part.max():g}: "
            "divide by 255, or pass uint8; normalisation is done for you"
        )


# --------------------------------------------------------------------------------------------------------------------- prediction
def _channels_last(images: np.ndarray) -> np.ndarray:
    """(n, H, W, C) from (n, H, W, C), (n, H, W), (H, W, C) or (H, W)."""
    if images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (1, 3, 4)):
        images = images[None]
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise UserError(f"images must have the shape (n, H, W, C) or (H, W, C), got {images.shape}")
    return images


def _prepare_one(item: Any, image_size: int, in_channels: int) -> np.ndarray:
    if isinstance(item, (str, os.PathLike)):
        return read_image(item, image_size, in_channels)
    if isinstance(item, Image.Image):
        try:
            return _square(item, image_size, in_channels)
        except UNREADABLE as error:
            raise _unreadable(getattr(item, "filename", "") or "given", error) from error
    image = _channels_last(check_pixels(item, "image"))
    if len(image) != 1:
        raise UserError(f"an image in a list must have the shape (H, W) or (H, W, C), got {np.shape(item)}")
    return _fit_array(image[0], image_size, in_channels)


def prepare(images: Any, *, image_size: int, in_channels: int) -> np.ndarray:
    """Images of any kind as (n, image_size, image_size, in_channels), decoded and resized as for training.

    `images` is an array (n, H, W, C) or (H, W, C), without C for gray ones: uint8, or floating within 0..1; a path; a PIL image; or a
    sequence of these. A 3-D array is one image when its last size is 1, 3 or 4, else n gray ones. The result is uint8, or float32 where
    a floating array was among them. Raises UserError for a file that cannot be decoded, or pixels out of range.
    """
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    if not isinstance(images, Sequence):
        return fit(_channels_last(check_pixels(images)), image_size, in_channels)
    prepared = list(in_threads(lambda item: _prepare_one(item, image_size, in_channels), images))
    if not prepared:
        raise UserError("no images were given: pass at least one")
    if len({image.dtype for image in prepared}) > 1:
        prepared = [image / np.float32(255) if image.dtype == np.uint8 else image for image in prepared]
    return np.stack(prepared)  # (n, S, S, C)
