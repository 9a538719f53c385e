"""Decoding of images to square arrays of one size, shared by training and prediction.

EXIF orientation is applied; palettes, CMYK, 16-bit and floating-point images are converted to 8-bit gray or RGB; transparent pixels are
composited on white. Pillow's antialiased bicubic filter resizes; an image that already has the size is copied. `fit.py`
says how an image of other proportions becomes a square.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from io import BytesIO
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..errors import UserError
from .fit import check_fit, fitted

# Formats that Pillow decodes itself; PostScript and similar formats would start other programs.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000")
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2")
)
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
LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R 601-2, Pillow's weights

# Exceptions of Pillow's decoders for data that is not an image or is truncated.
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
    """Size and kind of an image, known before decoding its pixels; EXIF orientation is applied."""

    width: int
    height: int
    gray: bool


def _is_gray(mode: str) -> bool:
    return mode in GRAY_MODES or mode.startswith("I;16")


@cache
def _formats() -> tuple[str, ...]:
    """The formats that the installed Pillow supports."""
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


def _open(source: Any) -> Image.Image:
    """The image of a path, of the bytes of a file, or of a file that is open for reading bytes, read from where it stands."""
    if hasattr(source, "read"):
        source = source.read()
        if not isinstance(source, bytes):
            raise ValueError("it is open for reading text, not bytes: open it with mode 'rb'")
    return Image.open(BytesIO(source) if isinstance(source, (bytes, bytearray)) else source, formats=_formats())


def name_of(image: Any) -> str:
    """The path of an image that is a path, or of an open file that has one; otherwise ""."""
    name = image if isinstance(image, (str, os.PathLike)) else getattr(image, "filename", "") or getattr(image, "name", "")
    return os.fsdecode(name) if isinstance(name, (str, os.PathLike)) else ""


def _unreadable(source: Any, error: BaseException) -> Unreadable:
    reason = "not an image of a known format" if isinstance(error, Image.UnidentifiedImageError) else str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror  # without the path, which the message contains already
    return Unreadable(f"cannot read image {name_of(source) or 'given'}: {' '.join(reason.split())}")


def _orientation(image: Image.Image) -> int:
    """1 ... 8; 1 if the EXIF data is absent or damaged, as in viewers: the pixels are readable without it."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except UNREADABLE:
        return 1
    return orientation if orientation in UPRIGHT else 1


def read_header(path: str | os.PathLike[str]) -> Header:
    """Size and kind of an image file. Raises Unreadable."""
    try:
        with _open(path) as image:
            width, height = image.size
            if width != height and _orientation(image) > 4:  # rotated by 90 degrees
                width, height = height, width
            return Header(width, height, _is_gray(image.mode))
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales gray of more than 8 bits to 8 bits and composites transparency on white; returns mode L or RGB."""
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


def _square(image: Image.Image, image_size: int, in_channels: int, fit: str) -> np.ndarray:
    """Returns uint8 (image_size, image_size, in_channels)."""
    if (orientation := _orientation(image)) != 1:
        image = image.transpose(UPRIGHT[orientation])
    mode = "L" if in_channels == 1 else "RGB"
    image = _eight_bits(image)
    image = image if image.mode == mode else image.convert(mode)
    return np.asarray(fitted(image, (image_size, image_size), fit)).reshape(image_size, image_size, in_channels)


def read_image(source: Any, image_size: int, in_channels: int, fit: str = "crop") -> np.ndarray:
    """An image file, by its path, its bytes or open, as uint8 (image_size, image_size, in_channels). Raises Unreadable."""
    try:
        with _open(source) as image:
            return _square(image, image_size, in_channels, fit)
    except UNREADABLE as error:
        raise _unreadable(source, error) from error


def in_threads(function: Callable[[Any], Any], items: Sequence[Any] | np.ndarray) -> Iterator[Any]:
    """`map(function, items)` in threads, in order, with limited read-ahead; Pillow releases the GIL while decoding."""
    workers = min(32, os.cpu_count() or 1)
    size = min(32, -(-len(items) // workers))  # several items per task reduce overhead, but every thread must get some
    tasks = iter([items[i : i + size] for i in range(0, len(items), size)] if size else [])
    with ThreadPoolExecutor(workers) as pool:
        futures = deque(pool.submit(lambda part: [function(item) for item in part], part) for part in islice(tasks, 4 * workers))
        try:
            while futures:
                yield from futures.popleft().result()
                futures.extend(pool.submit(lambda part: [function(item) for item in part], part) for part in islice(tasks, 1))
        finally:
            pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------------------- arrays
def _fit_float(image: np.ndarray, image_size: int, in_channels: int, fit: str) -> np.ndarray:
    """Resize and convert an image: float32 (H, W, C) in 0..1 -> float32 (image_size, image_size, in_channels)."""
    if image.shape[2] == 3 and in_channels == 1:
        image = image @ LUMA[:, None]
    target = image_size, image_size
    planes = [np.asarray(fitted(Image.fromarray(np.ascontiguousarray(plane)), target, fit)) for plane in np.moveaxis(image, 2, 0)]
    resized = np.stack(planes, axis=2).clip(0, 1)  # bicubic filters overshoot
    return np.repeat(resized, in_channels, axis=2) if resized.shape[2] < in_channels else resized


def _fit_array(image: np.ndarray, image_size: int, in_channels: int, fit: str) -> np.ndarray:
    """Resize and convert one image (H, W, C), uint8 or float32. Raises UserError if the number of channels cannot be converted."""
    channels, dtype = image.shape[2], image.dtype
    convertible = (1, 3, 4) if dtype == np.uint8 else (1, 3)  # gray, RGB and, in bytes, RGBA
    if image.shape == (image_size, image_size, in_channels):
        return image
    if channels in convertible and in_channels in (1, 3) and dtype == np.uint8:
        return _square(Image.fromarray(np.ascontiguousarray(image[:, :, 0] if channels == 1 else image)), image_size, in_channels, fit)
    if channels != in_channels and not (channels in convertible and in_channels in (1, 3)):
        raise UserError(
            f"{dtype} images of {channels} channels cannot become {in_channels}: convert them first, or set in_channels={channels}"
        )
    resized = _fit_float(image.astype(np.float32) / (255 if dtype == np.uint8 else 1), image_size, in_channels, fit)
    return np.rint(resized * 255).astype(np.uint8) if dtype == np.uint8 else resized


def fit_arrays(images: np.ndarray, image_size: int, in_channels: int, fit: str = "crop") -> np.ndarray:
    """Images (n, H, W, C), uint8 or float32, resized and converted to (n, image_size, image_size, in_channels) if necessary."""
    if images.shape[1:] == (image_size, image_size, in_channels):
        return images
    result = np.empty((len(images), image_size, image_size, in_channels), images.dtype)
    for i, image in enumerate(in_threads(lambda image: _fit_array(image, image_size, in_channels, fit), images)):
        result[i] = image
    return result


def check_pixels(images: Any, what: str = "images") -> np.ndarray:
    """`images` as a C-contiguous array of uint8, or of float32 in 0..1. Raises UserError."""
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
        for start in range(0, len(images), 4096):  # in chunks, to avoid temporary arrays of the full size
            _check_range(images[start : start + 4096], start, what)
    elif images.dtype != np.uint8:
        raise UserError(f"{what} must be uint8 in 0..255 or floating in 0..1, got {images.dtype}: convert with astype")
    return np.ascontiguousarray(images)


def _check_range(chunk: np.ndarray, start: int, what: str) -> None:
    finite = np.isfinite(chunk)
    if not finite.all():
        first = np.unravel_index(np.argmin(finite), chunk.shape)
        where = ", ".join(str(i) for i in (first[0] + start, *first[1:]))
        raise UserError(f"{what}[{where}] is {chunk[first]}: pixels must be finite")
    if chunk.size and not (chunk.min() >= 0 and chunk.max() <= 1):
        raise UserError(
            f"{what} of floating type must lie in 0..1, got {chunk.min():g}..{chunk.max():g}: "
            "divide by 255, or pass uint8; normalisation is done for you"
        )


# --------------------------------------------------------------------------------------------------------------------- prediction
def _channels_last(images: np.ndarray, in_channels: int) -> np.ndarray:
    """Reshape (n, H, W, C), (n, H, W), (H, W, C) or (H, W) to (n, H, W, C). Raises UserError, also where channels come first."""
    if in_channels == 3 and images.ndim in (3, 4) and images.shape[-3] == 3 and images.shape[-1] not in (1, 3, 4):
        raise UserError(f"images of shape {images.shape} look channels-first: move the axis of length 3 to the end, as in (H, W, 3)")
    if images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (1, 3, 4)):
        images = images[None]
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise UserError(f"images must have the shape (n, H, W, C) or (H, W, C), got {images.shape}")
    return images


def _prepare_one(item: Any, image_size: int, in_channels: int, fit: str) -> np.ndarray:
    if is_file(item):
        return read_image(item, image_size, in_channels, fit)
    if isinstance(item, Image.Image):
        try:
            return _square(item, image_size, in_channels, fit)
        except UNREADABLE as error:
            raise _unreadable(item, error) from error
    image = _channels_last(check_pixels(item, "image"), in_channels)
    if len(image) != 1:
        raise UserError(f"an image in a list must have the shape (H, W) or (H, W, C), got {np.shape(item)}")
    return _fit_array(image[0], image_size, in_channels, fit)


def prepare(images: Any, *, image_size: int, in_channels: int, fit: str = "crop") -> np.ndarray:
    """Images of any kind as (n, image_size, image_size, in_channels), decoded and fitted (see above) as for training.

    `images` is an array (n, H, W, C) or (H, W, C), or without C if gray: uint8, or floating-point in 0..1; a path; the bytes of an image
    file, or such a file, open; a PIL image; or a sequence of these. A 3-D array is one image if its last dimension is 1, 3 or 4, otherwise
    n gray images; for a model of 3 channels, an array (3, H, W) or (n, 3, H, W) is an error. The result is uint8, or float32
    if any input is a floating-point array. Raises UserError for a file that cannot be decoded, or pixels out of range.
    """
    check_fit(fit)
    images = as_items(images)
    if not isinstance(images, Sequence):
        return fit_arrays(_channels_last(check_pixels(images), in_channels), image_size, in_channels, fit)
    prepared = list(in_threads(lambda item: _prepare_one(item, image_size, in_channels, fit), images))
    if not prepared:
        raise UserError("no images were given: pass at least one")
    return _stacked(prepared)


def prepare_in_batches(
    images: Sequence[Any], batch_size: int, skipped: list[Unreadable] | None, *, image_size: int, in_channels: int, fit: str = "crop"
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """`prepare` for a sequence of any length, of which only some images are in memory at once.

    Yields (pixels (B, image_size, image_size, in_channels), their places in `images`), B at most `batch_size`. skipped: a list, to which an
    Unreadable is added for each image that cannot be decoded, which is then left out; None: the first one is raised.
    """

    def decode(item: Any) -> np.ndarray | Unreadable:
        try:
            return _prepare_one(item, image_size, in_channels, fit)
        except Unreadable as error:
            if skipped is None:
                raise
            return error

    decoded = zip(count(), in_threads(decode, images))
    while some := list(islice(decoded, batch_size)):
        good = [(place, image) for place, image in some if isinstance(image, np.ndarray)]
        if skipped is not None:
            skipped += [image for _, image in some if isinstance(image, Unreadable)]
        if good:
            yield _stacked([image for _, image in good]), [place for place, _ in good]


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    """(n, S, S, C), float32 if any image is."""
    if len({image.dtype for image in images}) > 1:
        images = [image / np.float32(255) if image.dtype == np.uint8 else image for image in images]
    return np.stack(images)


def is_file(image: Any) -> bool:
    """Whether this is the path, the bytes or the open file of one image."""
    return isinstance(image, (str, os.PathLike, bytes, bytearray)) or hasattr(image, "read")


def as_items(images: Any) -> Any:
    """Images as an array, or as a sequence where one file or PIL image was given."""
    return [images] if is_file(images) or isinstance(images, Image.Image) else images
