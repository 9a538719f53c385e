"""Small image files of many pixels, or that keep a decoder busy: each is told in one line, or read, within 2 s and 500 MB."""

import io
import struct
import sys
import zlib
from functools import partial

import pytest
from mutations import outcome
from PIL import Image

from minivit.data import load_data
from minivit.data.decode import read_image
from minivit.errors import UserError

SIDE = 5792  # pixels of the largest square image that is read

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")


def png(width, height, bits, colour, rows=b""):
    """A PNG with any size in its header."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in parts)


def progressive(copies):
    """A progressive JPEG of the largest size whose last scan is repeated."""
    file = io.BytesIO()
    Image.new("L", (SIDE, SIDE)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * copies + b"\xff\xd9"


def changed_size(form, width, height, old=20):
    """An image of 20 × 20 pixels in whose header another size stands."""
    file = io.BytesIO()
    Image.new("RGB", (old, old)).save(file, form)
    code = {"BMP": "<ii", "TIFF": "<I", "JPEG": ">HH", "GIF": "<HH", "JPEG2000": ">II"}[form]
    if form == "TIFF":
        return file.getvalue().replace(struct.pack("<I", old), struct.pack("<I", width), 2)
    return file.getvalue().replace(struct.pack(code, old, old), struct.pack(code, height, width))


IMAGES = {
    "16 bits": (
        lambda: png(13300, 13300, 16, 0),
        "it has 13300×13300 pixels, and max_pixels is 33554432: make it smaller, or raise max_pixels",
    ),
    "a palette": (lambda: png(100_000, 1000, 1, 3), "it has 100000×1000 pixels"),
    "beyond Pillow's limit": (lambda: png(60_000, 60_000, 8, 2), "exceeds limit"),
    "BMP": (lambda: changed_size("BMP", 13_000, 13_000), "it has 13000×13000 pixels"),
    "TIFF": (lambda: changed_size("TIFF", 13_000, 13_000), "it has 13000×13000 pixels"),
    "JPEG": (lambda: changed_size("JPEG", 13_000, 13_000), "it has 13000×13000 pixels"),
    "JPEG 2000": (lambda: changed_size("JPEG2000", SIDE, SIDE), "which count double in JPEG2000"),
    "many scans": (lambda: progressive(1000), "it goes over its pixels more than 50 times"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", IMAGES)
def test_images(tmp_path, name):
    make, message = IMAGES[name]
    (tmp_path / "a.png").write_bytes(make())
    assert message in outcome(partial(read_image, tmp_path / "a.png", 32, 3))


LARGE = [
    ("PNG", "I;16", {}),
    ("PNG", "RGBA", {"exif": 6}),
    ("PNG", "LA", {}),
    ("PNG", "P", {"transparency": 0}),
    ("JPEG", "RGB", {"progressive": True}),
    ("GIF", "P", {}),
    ("TIFF", "F", {"compression": "tiff_deflate"}),
    ("TIFF", "RGBA", {"compression": "tiff_lzw"}),
    ("WEBP", "RGBA", {"lossless": True, "method": 0}),
    ("JPEG2000", "RGB", {}),
    ("AVIF", "RGB", {"speed": 10}),
]


@pytest.mark.slow
@pytest.mark.parametrize("form, mode, options", LARGE, ids=[f"{form}-{mode}" for form, mode, _ in LARGE])
def test_the_largest_images_are_read(tmp_path, form, mode, options):
    if form not in Image.registered_extensions().values():
        pytest.skip(f"this Pillow writes no {form}")
    side = SIDE if form not in ("WEBP", "JPEG2000") else 4096
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options = {"exif": exif}
    Image.new(mode, (side, side)).save(tmp_path / "a", form, **options)
    assert outcome(partial(read_image, tmp_path / "a", 32, 3)) == ""


def test_the_limit_can_be_raised(tmp_path):
    Image.new("L", (100, 50)).save(tmp_path / "a.png")
    assert "it has 100×50 pixels, and max_pixels is 4999" in outcome(partial(read_image, tmp_path / "a.png", 8, 1, max_pixels=4999))
    assert outcome(partial(read_image, tmp_path / "a.png", 8, 1, max_pixels=5000)) == ""
    with pytest.raises(UserError, match=r"max_pixels must be from 1 to \d+, got 0"):
        load_data(tmp_path, max_pixels=0)
