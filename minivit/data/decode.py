"""Decoding of images to arrays of one size, shared by training and prediction.

`image_file.py` reads files as 8-bit gray or RGB. Pillow's antialiased bicubic filter resizes; an image that already has the size is copied.
`fit.py` says how an image of other proportions becomes one of this size. Sizes are (rows, columns), or one number for a square.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from ..sides import Sides, both
from .fit import check_fit, fitted
from .image_file import MAX_PIXELS, Unreadable, check_max_pixels, decoding, eight_bits, name_of, open_image, upright

LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R 601-2, Pillow's weights


def _of_size(image: Image.Image, image_size: Sides, in_channels: int, fit: str) -> np.ndarray:
    """Returns uint8 (rows, columns, in_channels)."""
    mode = "L" if in_channels == 1 else "RGB"
    image = eight_bits(upright(image))
    image = image if image.mode == mode else image.convert(mode)
    rows, columns = both(image_size)
    return np.asarray(fitted(image, (columns, rows), fit)).reshape(rows, columns, in_channels)


def read_image(source: Any, image_size: Sides, in_channels: int, fit: str = "crop", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image file, by its path, its bytes or open, as uint8 (rows, columns, in_channels).

    Raises Unreadable, also for one of more than `max_pixels`.
    """
    with open_image(source, max_pixels) as image:
        return _of_size(image, image_size, in_channels, fit)


def in_threads(function: Callable[[Any], Any], items: Iterable[Any] | np.ndarray) -> Iterator[Any]:
    """`map(function, items)` in threads, in order, with limited read-ahead; Pillow releases the GIL while decoding.

    `items` is iterated over by the caller's thread alone.
    """
    workers = min(32, os.cpu_count() or 1)
    size = 1
    if isinstance(items, (Sequence, np.ndarray)):
        size = min(32, -(-len(items) // workers)) or 1  # several items per task reduce overhead, but every thread must get some
        tasks = iter([items[i : i + size] for i in range(0, len(items), size)])
    else:
        tasks = ([item] for item in items)
    with ThreadPoolExecutor(workers) as pool:
        ahead = islice(tasks, 4 * workers * (32 // size))
        futures = deque(pool.submit(lambda part: [function(item) for item in part], part) for part in ahead)
        try:
            while futures:
                yield from futures.popleft().result()
                futures.extend(pool.submit(lambda part: [function(item) for item in part], part) for part in islice(tasks, 1))
        finally:
            pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------------------- arrays
def _fit_float(image: np.ndarray, image_size: Sides, in_channels: int, fit: str) -> np.ndarray:
    """Resize and convert an image: float32 (H, W, C) in 0..1 -> float32 (rows, columns, in_channels)."""
    if image.shape[2] == 3 and in_channels == 1:
        image = image @ LUMA[:, None]
    rows, columns = both(image_size)
    planes = [np.asarray(fitted(Image.fromarray(np.ascontiguousarray(plane)), (columns, rows), fit)) for plane in np.moveaxis(image, 2, 0)]
    resized = np.stack(planes, axis=2).clip(0, 1)  # bicubic filters overshoot
    return np.repeat(resized, in_channels, axis=2) if resized.shape[2] < in_channels else resized


def _fit_array(image: np.ndarray, image_size: Sides, in_channels: int, fit: str) -> np.ndarray:
    """Resize and convert one image (H, W, C), uint8 or float32. Raises UserError if the number of channels cannot be converted."""
    channels, dtype = image.shape[2], image.dtype
    convertible = (1, 3, 4) if dtype == np.uint8 else (1, 3)  # gray, RGB and, in bytes, RGBA
    if image.shape == (*both(image_size), in_channels):
        return image
    if channels in convertible and in_channels in (1, 3) and dtype == np.uint8:
        return _of_size(Image.fromarray(np.ascontiguousarray(image[:, :, 0] if channels == 1 else image)), image_size, in_channels, fit)
    if channels != in_channels and not (channels in convertible and in_channels in (1, 3)):
        raise UserError(
            f"{dtype} images of {channels} channels cannot become {in_channels}: convert them first, or set in_channels={channels}"
        )
    resized = _fit_float(image.astype(np.float32) / (255 if dtype == np.uint8 else 1), image_size, in_channels, fit)
    return np.rint(resized * 255).astype(np.uint8) if dtype == np.uint8 else resized


def fit_arrays(images: np.ndarray, image_size: Sides, in_channels: int, fit: str = "crop") -> np.ndarray:
    """Images (n, H, W, C), uint8 or float32, resized and converted to (n, rows, columns, in_channels) if necessary."""
    shape = *both(image_size), in_channels
    if images.shape[1:] == shape:
        return images
    result = np.empty((len(images), *shape), images.dtype)
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


def _prepare_one(item: Any, image_size: Sides, in_channels: int, fit: str, max_pixels: int) -> np.ndarray:
    if is_file(item):
        return read_image(item, image_size, in_channels, fit, max_pixels)
    if isinstance(item, Image.Image):
        with decoding(item):
            return _of_size(item, image_size, in_channels, fit)
    image = _channels_last(check_pixels(item, "image"), in_channels)
    if len(image) != 1:
        raise UserError(f"an image in a list must have the shape (H, W) or (H, W, C), got {np.shape(item)}")
    return _fit_array(image[0], image_size, in_channels, fit)


def prepare(images: Any, *, image_size: Sides, in_channels: int, fit: str = "crop", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Images of any kind as (n, rows, columns, in_channels), decoded and fitted (see above) as for training.

    `images` is an array (n, H, W, C) or (H, W, C), or without C if gray: uint8, or floating-point in 0..1; a path; the bytes of an image
    file, or such a file, open; a PIL image; or a sequence of these. A 3-D array is one image if its last dimension is 1, 3 or 4, otherwise
    n gray images; for a model of 3 channels, an array (3, H, W) or (n, 3, H, W) is an error. The result is uint8, or float32
    if any input is a floating-point array. Raises UserError for a file that cannot be decoded or has more than `max_pixels`, and for pixels
    out of range.
    """
    check_fit(fit)
    check_max_pixels(max_pixels)
    images = as_items(images)
    if not isinstance(images, Sequence):
        return fit_arrays(_channels_last(check_pixels(images), in_channels), image_size, in_channels, fit)
    prepared = list(in_threads(lambda item: _prepare_one(item, image_size, in_channels, fit, max_pixels), images))
    if not prepared:
        raise UserError("no images were given: pass at least one")
    return _stacked(prepared)


def prepare_in_batches(
    images: Iterable[Any],
    batch_size: int,
    skipped: list[Unreadable] | None,
    *,
    image_size: Sides,
    in_channels: int,
    fit: str = "crop",
    max_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[np.ndarray, list[str | int]]]:
    """`prepare` for any number of images, of which only some are in memory at once.

    Yields (pixels (B, rows, columns, in_channels), where they come from), B at most `batch_size`: the path of each, or its place in
    `images`. skipped: a list, to which an Unreadable is added for each image that cannot be decoded, which is then left out; None: the
    first one is raised.
    """
    check_max_pixels(max_pixels)

    def decode(item: Any) -> tuple[str, np.ndarray | Unreadable]:
        name = name_of(item)
        try:
            return name, _prepare_one(item, image_size, in_channels, fit, max_pixels)
        except Unreadable as error:
            if skipped is None:
                raise
            return name, error.with_traceback(None)  # which would keep what the decoder has read

    decoded = zip(count(), in_threads(decode, images))
    while some := list(islice(decoded, batch_size)):
        good = [(name or place, image) for place, (name, image) in some if isinstance(image, np.ndarray)]
        if skipped is not None:
            skipped += [image for _, (_, image) in some if isinstance(image, Unreadable)]
        if good:
            yield _stacked([image for _, image in good]), [source for source, _ in good]


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    """(n, rows, columns, C), float32 if any image is."""
    if len({image.dtype for image in images}) > 1:
        images = [image / np.float32(255) if image.dtype == np.uint8 else image for image in images]
    return np.stack(images)


def is_file(image: Any) -> bool:
    """Whether this is the path, the bytes or the open file of one image."""
    return isinstance(image, (str, os.PathLike, bytes, bytearray)) or hasattr(image, "read")


def as_items(images: Any) -> Any:
    """Images as an array, or as a sequence where one file or PIL image was given."""
    return [images] if is_file(images) or isinstance(images, Image.Image) else images
