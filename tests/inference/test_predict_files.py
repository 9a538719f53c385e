"""Prediction on files of every kind, on folders, and past files that cannot be read."""

import io
from itertools import count

import numpy as np
import pytest
from PIL import Image

from minivit import UserError, create_model
from minivit.data import decode, prepare
from minivit.inference.classifier import Classifier, Preprocessing

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def classifier():
    model = create_model("vit", image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2)
    return Classifier(model, ("cat", "dog", "eel"), Preprocessing(8, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))


@pytest.fixture
def folder(tmp_path):
    """Five images in sorted order of their paths, among other files."""
    root = tmp_path / "photos"
    for path, pixels in zip(("a.png", "b/1.png", "b/10.png", "b/2.png", "c.PNG"), PIXELS):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / path)
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_text("no image")
    return root


def content(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_bytes_and_open_files_are_images(classifier, folder):
    expected = classifier.predict(PIXELS[:1]).probabilities
    with open(folder / "a.png", "rb") as file:
        kinds = [content(PIXELS[0]), bytearray(content(PIXELS[0])), io.BytesIO(content(PIXELS[0])), file, folder / "a.png"]
        for kind in kinds[:2] + kinds[3:]:
            np.testing.assert_array_equal(classifier.predict(kind).probabilities, expected)
            if kind is file:
                file.seek(0)
        together = classifier.predict([*kinds, Image.fromarray(PIXELS[0]), PIXELS[0]])
    np.testing.assert_allclose(together.probabilities, np.repeat(expected, 7, 0), rtol=1e-5)
    assert together.sources == (0, 1, 2, str(folder / "a.png"), str(folder / "a.png"), 5, 6)


def test_a_file_that_cannot_seek(classifier):
    class Pipe(io.RawIOBase):
        def read(self, size=-1):
            return content(PIXELS[0])

    np.testing.assert_array_equal(classifier.predict(Pipe()).probabilities, classifier.predict(PIXELS[:1]).probabilities)


@pytest.mark.parametrize("kind", [str, lambda path: path, lambda path: [path]], ids=["str", "Path", "list"])
def test_a_folder_stands_for_its_images_in_sorted_order(classifier, folder, kind):
    answer = classifier.predict(kind(folder))
    assert answer.sources == tuple(str(folder / path) for path in ("a.png", "b/1.png", "b/10.png", "b/2.png", "c.PNG"))
    np.testing.assert_array_equal(answer.probabilities, classifier.predict(PIXELS).probabilities)


def test_folders_and_files_together(classifier, folder):
    answer = classifier.predict([folder / "c.PNG", folder / "b", PIXELS[0]])
    np.testing.assert_array_equal(answer.probabilities, classifier.predict(PIXELS[[4, 1, 2, 3, 0]]).probabilities)
    assert answer.sources[0] == str(folder / "c.PNG") and answer.sources[4] == 4 and answer.skipped == ()


def test_bad_images_are_left_out_if_asked(classifier, folder):
    (folder / "b" / "3.png").write_bytes(b"no image")
    images = [folder, b"nor this", folder / "none.png", PIXELS[0]]
    answer = classifier.predict(images, skip_bad_images=True)
    np.testing.assert_array_equal(answer.probabilities, classifier.predict(PIXELS[[0, 1, 2, 3, 4, 0]]).probabilities)
    assert answer.sources[-1] == 8 and len(answer.sources) == len(answer) == 6
    assert answer.skipped == (
        f"cannot read image {folder / 'b' / '3.png'}: not an image of a known format",
        "cannot read image given: not an image of a known format",
        f"cannot read image {folder / 'none.png'}: No such file or directory",
    )
    with pytest.raises(UserError, match=r"^cannot read image .*3\.png: not an image of a known format$"):
        classifier.predict(images)


@pytest.mark.parametrize(
    "images, options, message",
    [
        ([b"no", b"nor"], {"skip_bad_images": True}, "none of the 2 images can be read: cannot read image given: not an image"),
        ([], {}, "no images were given: pass at least one"),
        (b"no", {}, "cannot read image given: not an image of a known format"),
        (io.StringIO("text"), {}, "cannot read image given: it is open for reading text, not bytes: open it with mode 'rb'"),
    ],
)
def test_what_is_no_image_is_one_line(classifier, images, options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        classifier.predict(images, **options)


def test_a_folder_without_images_is_named(classifier, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no images: no file in it ends in \.avif"):
        classifier.predict(tmp_path / "empty", skip_bad_images=True)


def test_batches_follow_one_another(classifier, folder):
    batches = list(classifier.predict_in_batches([folder, *PIXELS], batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    np.testing.assert_allclose(
        np.concatenate([batch.probabilities for batch in batches]),
        classifier.predict(np.concatenate([PIXELS] * 2)).probabilities,
        rtol=1e-5,
    )
    assert [len(batch) for batch in classifier.predict_in_batches(PIXELS, batch_size=2)] == [2, 2, 1]
    assert [batch.sources for batch in classifier.predict_in_batches(PIXELS, batch_size=2)] == [(0, 1), (2, 3), (4,)]


def test_many_files_are_never_in_memory_at_once(classifier, folder, monkeypatch):
    """Of 2000 images, those that are decoded and not yet labelled are at most the batch and what two threads decode ahead."""
    monkeypatch.setattr(decode.os, "cpu_count", lambda: 2)
    read_image, decoded, labelled, most = decode.read_image, count(1), 0, 0

    def counting(*arguments):
        nonlocal most
        most = max(most, next(decoded) - labelled)
        return read_image(*arguments)

    monkeypatch.setattr(decode, "read_image", counting)
    for batch in classifier.predict_in_batches([folder / "a.png"] * 2000, batch_size=64):
        labelled += len(batch)
    assert labelled == 2000 and 64 <= most < 500


def test_prepare_takes_files_too():
    np.testing.assert_array_equal(prepare(content(PIXELS[1]), image_size=8, in_channels=3), PIXELS[1:2])
    np.testing.assert_array_equal(prepare([io.BytesIO(content(p)) for p in PIXELS], image_size=8, in_channels=3), PIXELS)
