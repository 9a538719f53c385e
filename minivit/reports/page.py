"""HTML that stands alone: texts escaped, pictures inline, no script. It is well-formed XML too."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import printable
from ..plots.figure import as_picture, svg_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_SIDE = 160  # pixels of an image of a sheet
SMOOTH = 32  # pixels of a side, below which pixels are shown as squares
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # what a browser may load: nothing from elsewhere

STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.5rem; padding-top: 0.6rem; border-top: 1px solid #ddd; break-after: avoid }
h3 { font-size: 1rem; margin: 1.2rem 0 0.3rem; break-after: avoid }
p { margin: 0.4rem 0; max-width: 46rem; overflow-wrap: anywhere }
.note { color: #555; font-size: 0.875rem }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 0.6rem; margin: 1rem 0 }
.key div { border: 1px solid #ddd; border-radius: 6px; padding: 0.5rem 0.7rem }
.key b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums }
.key span { color: #555; font-size: 0.8rem }
.wide { overflow-x: auto; margin: 0.5rem 0 }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.22rem 0.9rem 0.22rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid #e6e6e6; white-space: nowrap }
th:first-child, td:first-child, .text td, .text th { text-align: left }
.text td + td { white-space: normal; min-width: 11rem; overflow-wrap: break-word }
.wide img { display: block; height: auto }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: 0.7rem; margin: 0.6rem 0 }
figure { margin: 0; break-inside: avoid }
figure img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #f2f2f2 }
.small { image-rendering: pixelated }
figcaption { font-size: 0.75rem; line-height: 1.3; overflow-wrap: anywhere }
.wrong { color: #b32a0d }
@page { margin: 15mm }
@media print {
  body { font-size: 10pt; padding: 0; max-width: none }
  .wide { overflow: visible }
  .wide img { max-width: 100%; min-width: 0 !important; break-inside: avoid }
  tr { break-inside: avoid }
}
"""


def text(value: Any) -> str:
    """Any text as HTML shows it: what means something to HTML is escaped, and what cannot be printed."""
    return escape(printable(str(value)))


def page(title: str, parts: Iterable[str]) -> bytes:
    """A whole page of HTML parts."""
    head = (
        f'<meta charset="utf-8"/>\n<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}"/>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"/>\n<title>{text(title)}</title>\n<style>{STYLE}</style>'
    )
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'.encode()


def heading(title: str, level: int = 2) -> str:
    return f"<h{level}>{text(title)}</h{level}>"


def paragraph(sentences: str, note: bool = False) -> str:
    kind = "note" if note else "told"
    return f'<p class="{kind}">{text(sentences)}</p>'


def key_figures(figures: Iterable[tuple[str, str]]) -> str:
    """Boxes of a value and what it is."""
    boxes = "".join(f"<div><b>{text(value)}</b><span>{text(what)}</span></div>" for value, what in figures)
    return f'<div class="key">{boxes}</div>'


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]], of_text: bool = False) -> str:
    """A table that scrolls sideways where the screen is narrow. of_text: cells are text, not numbers."""
    head = "".join(f"<th>{text(cell)}</th>" for cell in headings)
    body = "\n".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    kind = "text" if of_text else "numbers"
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def picture(figure: Figure, description: str) -> str:
    """A figure as an inline SVG picture in its own size, at most as wide as the page; on a phone it scrolls sideways."""
    width = round(96 * figure.get_size_inches()[0])
    data = b64encode(svg_of(figure)).decode()
    style = f"width:100%;max-width:{width}px;min-width:{min(width, 560)}px"
    return f'<div class="wide"><img style="{style}" alt="{text(description)}" src="data:image/svg+xml;base64,{data}"/></div>'


def sheet(images: np.ndarray, captions: Sequence[Sequence[tuple[str, bool]]]) -> str:
    """Images (n, H, W, C) with lines below each: (text, whether it is red)."""
    return f'<div class="sheet">{"".join(map(_captioned, images, captions))}</div>'


def _captioned(image: np.ndarray, lines: Sequence[tuple[str, bool]]) -> str:
    shown = "<br/>".join(f'<span class="wrong">{text(line)}</span>' if red else text(line) for line, red in lines)
    alt, kind = text(", ".join(line for line, _ in lines)), "small" if max(image.shape[:2]) < SMOOTH else "large"
    return f'<figure><img class="{kind}" alt="{alt}" src="data:image/png;base64,{_png(image)}"/><figcaption>{shown}</figcaption></figure>'


def _png(image: np.ndarray) -> str:
    pixels = (255 * as_picture(image)).round().astype(np.uint8)  # (H, W, 3)
    with BytesIO() as file, Image.fromarray(pixels[..., 0] if image.shape[2] == 1 else pixels) as drawn:
        drawn.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        drawn.save(file, "PNG")
        return b64encode(file.getvalue()).decode()
