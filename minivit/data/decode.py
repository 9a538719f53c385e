"""Decoding of images to square arrays of one size, shared by training and prediction.

EXIF orientation is applied; palettes, CMYK, 16-bit and floating-point images are converted to 8-bit gray or RGB; transparent pixels are
composited on white. Pillow's antialiased bicubic filter resizes; an image that already has the size is copied. `fit` says how an image of
other proportions becomes a square (`frame`):

    crop      the largest centred square is resized: the shorter side fills the square, and the ends of the longer one are lost
    pad       the whole image is resized by its longer side, and centred; the rest has the image's mean colour, which adds no edge of
              high contrast and does not change the mean
    stretch   the whole image is resized to the square, without its proportions
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
from PIL import Image

from ..errors import UserError, nearest

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
FITS = ("crop", "pad", "stretch")
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


def _open(path: str | os.PathLike[str]) -> Image.Image:
    return Image.open(path, formats=_formats())


def _unreadable(path: str | os.PathLike[str], error: BaseException) -> Unreadable:
    reason = "not an image of a known format" if isinstance(error, Image.UnidentifiedImageError) else str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror  # without the path, which the message contains already
    return Unreadable(f"cannot read image {os.fspath(path)}: {' '.join(reason.split())}")


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


class Frame(NamedTuple):
    """How an image becomes one of another size: a box of it is resized, and the result laid into the new image."""

    box: tuple[int, int, int, int]  # left, top, right, bottom in the image; whole pixels, so that an image of equal size is copied
    size: tuple[int, int]  # width and height of the resized box
    corner: tuple[int, int]  # left and top of the resized box in the new image


def frame(source: tuple[int, int], target: tuple[int, int], fit: str) -> Frame:
    """The frame for an image of size `source` in a new one of size `target`, both (width, height)."""
    width, height = source
    if fit == "crop":
        box_width = min(width, max(1, round(height * target[0] / target[1])))
        box_height = min(height, max(1, round(width * target[1] / target[0])))
        left, top = (width - box_width) // 2, (height - box_height) // 2
        return Frame((left, top, left + box_width, top + box_height), target, (0, 0))
    size = target
    if fit == "pad":
        scale = min(target[0] / width, target[1] / height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
    return Frame((0, 0, width, height), size, ((target[0] - size[0]) // 2, (target[1] - size[1]) // 2))


def check_fit(fit: str) -> str:
    """`fit` itself. Raises UserError if it is not one of FITS."""
    if fit not in FITS:
        raise UserError(f"unknown fit {fit!r}{nearest(str(fit), FITS)}: choose {', '.join(FITS)}")
    return fit


def _square(image: Image.Image, image_size: int, in_channels: int, fit: str) -> np.ndarray:
    """Returns uint8 (image_size, image_size, in_channels)."""
    if (orientation := _orientation(image)) != 1:
        image = image.transpose(UPRIGHT[orientation])
    mode = "L" if in_channels == 1 else "RGB"
    image = _eight_bits(image)
    image = image if image.mode == mode else image.convert(mode)
    return np.asarray(_resize(image, (image_size, image_size), fit)).reshape(image_size, image_size, in_channels)


def _resize(image: Image.Image, target: tuple[int, int], fit: str) -> Image.Image:
    """The image at the size `target` (width, height); its mode is L, RGB or F."""
    box, size, corner = frame(image.size, target, fit)
    if size != (box[2] - box[0], box[3] - box[1]):
        image = image.resize(size, Image.Resampling.BICUBIC, box)
    elif box != (0, 0, *image.size):
        image = image.crop(box)
    if size == target:
        return image
    mean = np.asarray(image).mean((0, 1), np.float64)  # () or (3,)
    colour = mean.item() if image.mode == "F" else tuple(np.rint(np.atleast_1d(mean)).astype(int).tolist())
    padded = Image.new(image.mode, target, colour)
    padded.paste(image, corner)
    return padded


def read_image(path: str | os.PathLike[str], image_size: int, in_channels: int, fit: str = "crop") -> np.ndarray:
    """An image file as uint8 (image_size, image_size, in_channels). Raises Unreadable."""
    try:
        with _open(path) as image:
            return _square(image, image_size, in_channels, fit)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


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
    planes = [np.asarray(_resize(Image.fromarray(np.ascontiguousarray(plane)), target, fit)) for plane in np.moveaxis(image, 2, 0)]
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
    if isinstance(item, (str, os.PathLike)):
        return read_image(item, image_size, in_channels, fit)
    if isinstance(item, Image.Image):
        try:
            return _square(item, image_size, in_channels, fit)
        except UNREADABLE as error:
            raise _unreadable(getattr(item, "filename", "") or "given", error) from error
    image = _channels_last(check_pixels(item, "image"), in_channels)
    if len(image) != 1:
        raise UserError(f"an image in a list must have the shape (H, W) or (H, W, C), got {np.shape(item)}")
    return _fit_array(image[0], image_size, in_channels, fit)


def prepare(images: Any, *, image_size: int, in_channels: int, fit: str = "crop") -> np.ndarray:
    """Images of any kind as (n, image_size, image_size, in_channels), decoded and fitted (see above) as for training.

    `images` is an array (n, H, W, C) or (H, W, C), or without C if gray: uint8, or floating-point in 0..1; a path; a PIL image; or a
    sequence of these. A 3-D array is one image if its last dimension is 1, 3 or 4, otherwise n gray images; for a model of 3 channels, an
    array (3, H, W) or (n, 3, H, W) is an error. The result is uint8, or float32
    if any input is a floating-point array. Raises UserError for a file that cannot be decoded, or pixels out of range.
    """
    check_fit(fit)
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    if not isinstance(images, Sequence):
        return fit_arrays(_channels_last(check_pixels(images), in_channels), image_size, in_channels, fit)
    prepared = list(in_threads(lambda item: _prepare_one(item, image_size, in_channels, fit), images))
    if not prepared:
        raise UserError("no images were given: pass at least one")
    if len({image.dtype for image in prepared}) > 1:
        prepared = [image / np.float32(255) if image.dtype == np.uint8 else image for image in prepared]
    return np.stack(prepared)  # (n, S, S, C)
