"""`minivit predict` on what people have: patterns, paths from standard input, other formats, many images, and images that are damaged."""

import csv
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import minivit
from minivit import create_model
from minivit.cli import main
from minivit.data import decode
from minivit.inference.classifier import Classifier, Preprocessing

NAMES = ("cat", "dog, small", "eel")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    backbone = create_model("vit", image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, in_channels=1)
    backbone.load_state_dict({"head.weight": np.random.default_rng(1).standard_normal((3, 16), np.float32) / 4}, strict=False)
    Classifier(backbone, NAMES, Preprocessing(8, 1, (0.5,), (0.25,))).save(path)
    return str(path)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Five images in sorted order of their paths, relative to the folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    paths = ["photos/a.png", "photos/b.png", "photos/deep/c.png", "photos/deep/er/d.png", "photos/odd [1].png"]
    for path, pixels in zip(paths, np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / path)
    return paths


def given_on_standard_input(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def printed(capsys, *arguments, status=0):
    assert main(["predict", *map(str, arguments)]) == status
    return capsys.readouterr()


def paths_of(output):
    return [line.split("\t")[0] for line in output.splitlines()]


# ------------------------------------------------------------------------------------------------------------- where images come from
@pytest.mark.parametrize(
    "pattern, found",
    [
        ("photos/*.png", [0, 1, 4]),
        ("photos/**/*.png", [0, 1, 2, 3, 4]),
        ("photos/**", [0, 1, 2, 3, 4]),
        ("photos/[ab].png", [0, 1]),
        ("photos/odd [1].png", [4]),
        ("pho*", [0, 1, 2, 3, 4]),
    ],
)
def test_patterns(model, photos, capsys, pattern, found):
    assert paths_of(printed(capsys, model, pattern).out) == [photos[k] for k in found]


def test_a_pattern_without_a_file_is_one_line(model, photos, capsys):
    out, err = printed(capsys, model, "photos/*.jpg", status=2)
    assert (out, err) == ("", "minivit: no file matches photos/*.jpg: is the pattern right, and relative to this folder?\n")


def test_paths_from_standard_input(model, photos, capsys, monkeypatch):
    given_on_standard_input(monkeypatch, b"photos/b.png\r\n\nphotos/odd [1].png\nphotos/deep")
    assert paths_of(printed(capsys, model, photos[0], "-", photos[0]).out) == [photos[k] for k in (0, 1, 4, 2, 3, 0)]
    given_on_standard_input(monkeypatch, b"\n")
    assert printed(capsys, model, "-", status=2).err == "minivit: no images were given: pass at least one\n"
    given_on_standard_input(monkeypatch, b"photos/*.png\n")
    assert printed(capsys, model, "-", status=2).err.startswith("minivit: cannot read image photos/*.png: No such file or directory; ")
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in printed(capsys, model, "-", status=2).err


# ------------------------------------------------------------------------------------------------------------------------- formats
def test_the_most_probable_labels(model, photos, capsys):
    answer = minivit.load(model).predict(photos)
    order = np.argsort(-answer.probabilities, axis=1)
    expected = [
        [path, *(text for k in order[i, :2] for text in (NAMES[k], f"{answer.probabilities[i, k]:.4f}"))] for i, path in enumerate(photos)
    ]
    assert [line.split("\t") for line in printed(capsys, model, *photos, "--top", 2).out.splitlines()] == expected
    rows = [json.loads(line) for line in printed(capsys, model, *photos, "--top", 2, "--format", "jsonl").out.splitlines()]
    assert [[row["path"], *row["probabilities"]] for row in rows] == [line[:2] + line[3:4] for line in expected]
    assert json.loads(printed(capsys, model, *photos, "--top", 2, "--json").out) == rows
    assert printed(capsys, model, photos[0], "--top", 9).out.count("\t") == 6
    assert "--top must be 1 or more, got 0" in printed(capsys, model, photos[0], "--top", 0, status=2).err


def test_lines_of_json(model, photos, capsys):
    listed = json.loads(printed(capsys, model, "photos", "--json").out)
    lines = printed(capsys, model, "photos", "--format", "jsonl").out.splitlines()
    assert [json.loads(line) for line in lines] == listed and [*listed[0]["probabilities"]] == [*NAMES]
    assert "give --json" in printed(capsys, model, "photos", "--json", "--format", "jsonl", status=2).err


def test_csv(model, photos, capsys):
    rows = list(csv.DictReader(io.StringIO(printed(capsys, model, "photos", "--format", "csv", "--top", 2).out)))
    listed = json.loads(printed(capsys, model, "photos", "--json").out)
    assert [*rows[0]] == ["path", "label", "probability", "label_2", "probability_2"]
    for row, other in zip(rows, listed, strict=True):
        first, second = sorted(other["probabilities"], key=other["probabilities"].get, reverse=True)[:2]
        assert [row["path"], row["label"], row["label_2"]] == [other["path"], first, second]
        assert float(row["probability_2"]) == pytest.approx(other["probabilities"][second], abs=1e-6)
    assert printed(capsys, model, photos[0], "--format", "csv").out.splitlines()[0] == "path,label,probability"


# --------------------------------------------------------------------------------------------------------------- many, and damaged
def test_the_first_image_that_cannot_be_read_ends_the_command_unless_such_are_skipped(model, photos, capsys, monkeypatch):
    monkeypatch.setattr("minivit.inference.classifier.LARGEST_BATCH", 2)
    for name in ("photos/b.png", "photos/deep/c.png"):
        with open(name, "wb") as file:
            file.write(b"no image")
    reasons = [f"cannot read image {path}: not an image of a known format" for path in (photos[1], photos[2])]
    out, err = printed(capsys, model, "photos", "--format", "csv", status=2)
    assert err == f"minivit: {reasons[0]}; leave such images out with --skip-bad-images\n"
    out, err = printed(capsys, model, "photos", "--format", "csv", "--skip-bad-images")
    assert [row["path"] for row in csv.DictReader(io.StringIO(out))] == [photos[k] for k in (0, 3, 4)]
    assert err == f"skipped: {reasons[0]}\nskipped: {reasons[1]}\nskipped 2 unreadable images\n"


class Lines(io.StringIO):
    """Counts the lines that are printed."""

    count = 0

    def write(self, text):
        self.count += text.count("\n")
        return len(text)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("options, total", [(["photos", "photos/*.png"], "8/8"), (["-"], "8image"), (["photos", "--quiet"], "")])
def test_a_bar_shows_how_far_it_is(model, photos, capsys, monkeypatch, options, total):
    given_on_standard_input(monkeypatch, b"photos\nphotos/a.png\n" + b"photos/b.png\n" * 2)
    monkeypatch.setattr(sys, "stderr", Terminal())
    output = printed(capsys, model, *options).out
    assert total in sys.stderr.getvalue().replace(" ", "") and bool(total) == bool(sys.stderr.getvalue())
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda stream: True, raising=False)
    given_on_standard_input(monkeypatch, b"photos\nphotos/a.png\n" + b"photos/b.png\n" * 2)
    assert printed(capsys, model, *options).out == output and sys.stderr.getvalue() == ""  # the results on the terminal are enough


def test_standard_input_is_read_as_images_are_labelled(model, photos, monkeypatch):
    """Of 3000 paths, a third of which are bad, at most two batches and what two threads decode ahead are read and not yet told of."""
    monkeypatch.setattr(decode.os, "cpu_count", lambda: 2)
    told, ahead = Lines(), []

    def lines():
        for number in range(3000):
            ahead.append(number - told.count)
            yield f"photos/{('a', 'b', 'none')[number % 3]}.png\n".encode()

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=lines()))
    monkeypatch.setattr(sys, "stdout", told)
    monkeypatch.setattr(sys, "stderr", told)
    assert main(["predict", model, "-", "--skip-bad-images", "--quiet"]) == 0
    assert told.count == 3001 and max(ahead) < 2 * 256 + 256 + 10


def test_an_iterator_over_paths(model, photos):
    classifier = minivit.load(model)
    batches = list(classifier.predict_in_batches(iter(photos), batch_size=2))
    assert [batch.sources for batch in batches] == [tuple(photos[:2]), tuple(photos[2:4]), (photos[4],)]
    np.testing.assert_array_equal(classifier.predict(path for path in photos).labels, classifier.predict(photos).labels)
