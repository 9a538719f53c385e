"""Functions shared by all plots: figures rendered in memory, without windows; colours; PNG files. Matplotlib is imported on first use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

import numpy as np

from ..errors import UserError
from ..files import atomic_file
from ..sides import Sides, both

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, RED = "#4477aa", "#cc3311"  # distinguishable with all kinds of colour vision (P. Tol)
COLOURS = (BLUE, RED, "#228833", "#aa3377", "#ccbb44", "#66ccee", "#bbbbbb")  # of several lines, likewise
DASHES = "-", "--", ":", "-."  # of lines that have the same colour
TILE = 12  # minimum size of a tile of a mosaic in entries, so that gaps are relatively narrow


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, rendered by Agg without using pyplot's state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, atomically; "$" in a name is a dollar sign, not mathematics."""
    _without_mathematics(figure)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def svg_of(figure: Figure) -> bytes:
    """A figure as SVG whose letters are text, the same bytes each time; "$" in a name is a dollar sign, not mathematics."""
    from matplotlib import rc_context

    _without_mathematics(figure)
    with BytesIO() as file, rc_context({"svg.fonttype": "none", "svg.hashsalt": "minivit"}), catch_warnings():
        filterwarnings("ignore", "Glyph .* missing")  # who shows the text has other fonts
        figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()


def _without_mathematics(figure: Figure) -> None:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)


def titled(title: str, what: str) -> str:
    """The description `what`, preceded by the caller's title, if any, such as a model's name."""
    return f"{title}: {what}" if title else what


def panels(rows: int, columns: int, size: float = 1.0, caption: float = 0.0, header: float = 0.0) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), without ticks and frames, for square images `size` inches wide.

    caption: inches below each image; header: inches above all images.
    """
    figure = new_figure(columns * size * 1.05, rows * (size * 1.05 + caption) + header)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure, axes


def mosaic(tiles: np.ndarray, columns: int, between: float = np.nan) -> np.ndarray:
    """Arrange tiles (n, h, w) or (n, h, w, 3) row by row in one array, with gaps of value `between` around each.

    Small tiles are enlarged by an integer factor. Missing tiles in the last row are filled with the gap value.
    """
    factor = max(1, -(-TILE // tiles.shape[1]))
    tiles = tiles.repeat(factor, 1).repeat(factor, 2)
    count, height, width = tiles.shape[:3]
    rows = -(-count // columns)
    result = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, *tiles.shape[3:]), between)
    for n, tile in enumerate(tiles):
        top, left = n // columns * (height + 1) + 1, n % columns * (width + 1) + 1
        result[top : top + height, left : left + width] = tile
    return result


def patch_map(values: np.ndarray, grid: Sides) -> np.ndarray:
    """Values (..., patches) in row-major order as maps (..., rows, columns) of a grid. Raises UserError if the number differs.

    grid: (rows, columns), or one number for a square.
    """
    rows, columns = both(grid)
    if values.shape[-1] != rows * columns:
        raise UserError(f"{values.shape[-1]} patches do not make a grid of {rows}×{columns}: give the model's own grid")
    return values.reshape(*values.shape[:-1], rows, columns)


def as_picture(image: np.ndarray) -> np.ndarray:
    """An image (H, W, 1) or (H, W, 3), uint8 or floating-point in 0..1, as float RGB (H, W, 3). Raises UserError for another shape."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise UserError(f"an image must have the shape (H, W, 1) or (H, W, 3), got {image.shape}")
    scaled = image / 255 if image.dtype == np.uint8 else image.clip(0, 1)
    return np.broadcast_to(scaled, (*image.shape[:2], 3))


def spread(items: Sequence[Any], most: int) -> list[int]:
    """The indices of at most `most` evenly spaced items, including the first and the last."""
    return np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)).tolist()
