"""One path from any image to an array, for training and prediction alike."""

import io

import numpy as np
import pytest
from pictures import picture
from PIL import Image

from minivit.data import prepare
from minivit.data.image_file import read_header
from minivit.errors import UserError


def one(image, in_channels=3, image_size=None):
    size = image_size or min(image.size)
    return prepare(image, image_size=size, in_channels=in_channels)[0]


# ------------------------------------------------------------------------------------------------------------------------- pixels
@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_the_right_size_is_copied(mode, channels):
    image = picture(0, (8, 8), mode)
    np.testing.assert_array_equal(one(image, channels), np.asarray(image).reshape(8, 8, channels))


def test_equal_to_resizing_the_shorter_side_and_cropping():
    image = picture(0, (36, 12))
    expected = np.asarray(image.resize((24, 8), Image.Resampling.BICUBIC))[:, 8:16]
    np.testing.assert_array_equal(one(image, image_size=8), expected)


def test_cropping_alone_copies():
    image = picture(0, (9, 14))
    np.testing.assert_array_equal(one(image), np.asarray(image)[2:11])


def test_gray_becomes_three_equal_channels_and_colour_its_luma():
    gray, colour = picture(0, mode="L"), picture(1)
    assert (one(gray) == np.asarray(gray)[..., None]).all()
    np.testing.assert_allclose(one(colour, 1)[..., 0], np.asarray(colour) @ (0.299, 0.587, 0.114), atol=0.51)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "PA"])
def test_transparent_pixels_are_white(mode):
    image = Image.fromarray(np.full((4, 4, 4), (0, 0, 0, 255), np.uint8))
    image.putpixel((1, 2), (0, 0, 0, 0))
    if mode == "PA":
        image = image.convert("P").convert("PA")
        image.putalpha(Image.fromarray(np.where(np.arange(16).reshape(4, 4) == 9, 0, 255).astype(np.uint8)))
    else:
        image = image.convert(mode)
    pixels = one(image)
    assert pixels[2, 1].tolist() == [255, 255, 255]
    assert pixels.sum() == 3 * 255


def test_a_transparent_colour_of_a_palette_or_gray_file_is_white(tmp_path):
    image = Image.fromarray(np.eye(4, dtype=np.uint8) * 3)
    for mode in "LP":
        image.convert(mode).save(tmp_path / "a.png", transparency=image.convert(mode).getpixel((0, 0)))
        pixels = prepare(tmp_path / "a.png", image_size=4, in_channels=3)[0]
        assert (pixels[np.eye(4, dtype=bool)] == 255).all() and (pixels[~np.eye(4, dtype=bool)] == 0).all()


def test_palette_and_bilevel():
    image = picture(0).quantize(4)
    np.testing.assert_array_equal(one(image), np.asarray(image.convert("RGB")))
    assert set(one(picture(0, mode="L").convert("1"), 1).ravel()) == {0, 255}


def test_cmyk_files(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    red = prepare(tmp_path / "red.jpg", image_size=8, in_channels=3)[0, 4, 4].astype(int)
    assert red[0] > 240 and red[1] < 15 and red[2] < 15


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_become_8(tmp_path, suffix):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(prepare(tmp_path / f"a.{suffix}", image_size=8, in_channels=1)[0, ..., 0], np.rint(levels / 257))


def test_floating_files(tmp_path):
    levels = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(prepare(tmp_path / "a.tif", image_size=8, in_channels=1)[0, ..., 0], np.rint(levels * 255))
    Image.fromarray(levels * 1000).save(tmp_path / "b.tif")
    with pytest.raises(UserError, match=r"b\.tif: pixels of mode F must lie in 0\.\.1, got 0\.\.1000"):
        prepare(tmp_path / "b.tif", image_size=8, in_channels=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:, 8:16] = 255, 0, 0  # the left half of the central square is red
    upright[:8, 16:24] = 0, 0, 255  # the upper right quarter blue
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a[:, ::-1], -1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo(upright))).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(prepare(tmp_path / "a.png", image_size=16, in_channels=3)[0], upright[:, 8:24])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("block", [b"garbage bytes here", b"II*\0", bytes(40), b"\0\0\x08\0\x02\x01\x12\0\x03"])
def test_damaged_exif_leaves_the_pixels(tmp_path, form, block):
    image = Image.new("RGB", (16, 16), (200, 30, 30))
    path = tmp_path / f"a.{form.lower()}"
    options = {"lossless": True} if form == "WEBP" else {"dpi": (72, 72)}
    image.save(path, form, exif=b"Exif\0\0" + block, **options)
    with Image.open(path) as stored:
        expected = np.asarray(stored.convert("RGB"))
    np.testing.assert_array_equal(prepare(path, image_size=16, in_channels=3)[0], expected)
    assert read_header(path).width == 16


# ------------------------------------------------------------------------------------------------------------------- what may be given
@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 8, 8)])
def test_channels_first_is_told(shape):
    with pytest.raises(UserError, match="look channels-first: move the axis of length 3 to the end"):
        prepare(np.zeros(shape, np.uint8), image_size=8, in_channels=3)
    assert len(prepare(np.zeros((3, 8, 8), np.uint8), image_size=8, in_channels=1)) == 3  # three gray images


def test_every_kind_of_input_gives_the_same(tmp_path):
    image = picture(0, (10, 7))
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    expected = prepare(image, image_size=5, in_channels=3)
    assert expected.shape == (1, 5, 5, 3) and expected.dtype == np.uint8
    for same in (tmp_path / "a.png", str(tmp_path / "a.png"), array, array[None], [array], [image], [tmp_path / "a.png"]):
        np.testing.assert_array_equal(prepare(same, image_size=5, in_channels=3), expected)
    mixed = prepare([image, array, str(tmp_path / "a.png")], image_size=5, in_channels=3)
    np.testing.assert_array_equal(mixed, np.repeat(expected, 3, axis=0))


def test_gray_arrays_need_no_channel_axis():
    batch = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    np.testing.assert_array_equal(prepare(batch, image_size=8, in_channels=1), batch[..., None])
    np.testing.assert_array_equal(prepare(batch[0], image_size=8, in_channels=1), batch[:1, ..., None])


def test_floats_stay_floats_and_agree_with_bytes():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 3), np.uint8)
    floats = prepare(pixels / 255, image_size=6, in_channels=1)
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats, prepare(pixels, image_size=6, in_channels=1) / 255, atol=2 / 255)
    mixed = prepare([pixels[0], pixels[1] / 255], image_size=9, in_channels=3)
    np.testing.assert_allclose(mixed, pixels / 255, atol=1e-6)


def test_other_numbers_of_channels():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 5), np.uint8)
    np.testing.assert_array_equal(prepare(pixels, image_size=8, in_channels=5), pixels)
    assert prepare(pixels, image_size=4, in_channels=5).shape == (2, 4, 4, 5)
    with pytest.raises(UserError, match="uint8 images of 5 channels cannot become 3"):
        prepare(pixels, image_size=8, in_channels=3)


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "no images"),
        (np.zeros((2, 3, 4, 5, 6), np.uint8), "must have the shape"),
        (np.zeros((0, 8, 8, 3), np.uint8), "must have the shape"),
        (np.full((8, 8, 3), np.nan), r"images\[0, 0, 0\] is nan"),
        (np.full((8, 8, 3), 2.0), r"0\.\.1, got 2\.\.2"),
        (np.array(["a"]), "must be uint8"),
        ([np.zeros((2, 8, 8, 3), np.uint8)], "an image in a list"),
    ],
)
def test_what_is_wrong_is_named(given, message):
    with pytest.raises(UserError, match=message):
        prepare(given, image_size=8, in_channels=3)


# --------------------------------------------------------------------------------------------------------------------- damaged files
@pytest.mark.parametrize(
    "file_format, mode",
    [
        ("JPEG", "RGB"),
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("TIFF", "RGB"),
        ("WEBP", "RGB"),
        ("PPM", "RGB"),
        ("JPEG2000", "RGB"),
        ("AVIF", "RGB"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_file_cut_or_changed_anywhere_never_ends_in_another_error(tmp_path, file_format, mode):
    if file_format not in Image.registered_extensions().values():
        pytest.skip(f"this Pillow writes no {file_format}")
    buffer = io.BytesIO()
    picture(0, (20, 20)).convert(mode).save(buffer, file_format)
    content = buffer.getvalue()
    rng = np.random.default_rng(0)
    path = tmp_path / "cut.jpg"
    refused = 0
    for length in {0, 1, 10, *rng.integers(0, len(content), 15).tolist()}:
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            changed[place] = rng.integers(256)
        for damaged in (content[:length], bytes(changed)):
            path.write_bytes(damaged)
            try:
                prepare(path, image_size=8, in_channels=3)
            except UserError as error:
                refused += 1
                assert "cut.jpg" in str(error) and "\n" not in str(error)
    assert refused > 3


@pytest.mark.parametrize("content", [b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"GIF89a"])
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "no.png").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read image .*no\.png"):
        prepare(tmp_path / "no.png", image_size=8, in_channels=3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read image .*none\.png: No such file or directory"):
        prepare(tmp_path / "none.png", image_size=8, in_channels=3)
