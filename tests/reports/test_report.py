"""The page about a run: well-formed, alone, escaped, and with the numbers of `evaluate`."""

import json
import re
import xml.etree.ElementTree as ET
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
from browser import browser, needs_chromium
from PIL import Image

import minivit
from minivit.cli import main
from minivit.inference.calibrate import halves
from minivit.inference.metrics import fit_temperature
from minivit.io.run_folder import CURVES, REPORT
from minivit.plots import confusion_picture, reliability_diagram
from minivit.reports import report as report_module
from minivit.reports import sections
from minivit.training import loop

NAMES = ("<script>alert(1)</script>", "a & b", "日本", '"quoted" $x^2$')
OPTIONS = {
    "model": "vit_nano_patch2_8",
    "epochs": 3,
    "batch_size": 32,
    "model_options": {"dim": 16, "depth": 1, "heads": 2},
    "progress": False,
}
LOADS = {"src", "href", "srcset", "data", "action", "poster", "background"}  # attributes by which a browser loads something


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of four classes, hard to tell apart, whose names mean something to HTML and Matplotlib, or have letters that no font has."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "odd.npz"
    parts = {}
    for part, count in (("train", 160), ("test", 60)):
        labels = rng.integers(0, 4, count)
        images = rng.integers(0, 200, (count, 8, 8, 3)) + 12 * labels[:, None, None, None]
        parts |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": labels}
    np.savez(path, **parts, class_names=NAMES)
    return path


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return minivit.train(data=data, out=tmp_path_factory.mktemp("runs") / "run", **OPTIONS)


def parsed(path):
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    assert root.tag == "html"
    return root


def text_of(root):
    return " ".join(" ".join(root.itertext()).split())


def rows_of(root, heading):
    """The rows of the table below a heading."""
    body = [*root.find("body")]
    start = next(i for i, part in enumerate(body) if "".join(part.itertext()) == heading)
    table = next(part.find("table") for part in body[start:] if part.find("table") is not None)
    return [["".join(cell.itertext()) for cell in row] for row in table.find("tbody")]


def test_training_writes_a_page_that_stands_alone(run):
    root = parsed(run.folder / REPORT)
    assert not [tag for tag in root.iter() if tag.tag in ("script", "link", "iframe", "object", "base", "form")]
    loaded = [value for tag in root.iter() for name, value in tag.attrib.items() if name in LOADS]
    assert len(loaded) > 20 and all(value.startswith("data:image/") for value in loaded)
    assert "url(" not in root.find("head/style").text and "@import" not in root.find("head/style").text
    assert "://" not in re.sub(r'src="[^"]*"', "", (run.folder / REPORT).read_text())
    assert (run.folder / CURVES).exists()


@needs_chromium
def test_a_browser_loads_nothing_else(run, tmp_path):
    address = (run.folder / REPORT).resolve().as_uri()
    with browser(tmp_path / "profile") as page:
        page.open(address)
        assert page.requests == [address] and not page.errors
        pictures = page.value("[...document.images].map(each => each.complete && each.naturalWidth > 0)")
        assert len(pictures) > 4 and all(pictures)
        assert page.value("document.documentElement.scrollWidth <= innerWidth")


def test_pictures_are_whole(run):
    kinds = {"svg+xml": 0, "png": 0}
    for picture in parsed(run.folder / REPORT).iter("img"):
        kind, _, content = picture.attrib["src"].removeprefix("data:image/").partition(";base64,")
        kinds[kind] += 1
        if kind == "png":
            with Image.open(BytesIO(b64decode(content))) as image:
                assert image.size == (8, 8)
        else:
            svg = ET.fromstring(b64decode(content))
            links = [v for tag in svg.iter() for name, v in tag.attrib.items() if name.endswith("href")]
            assert all(link.startswith(("#", "data:")) for link in links)
        assert picture.attrib["alt"]
    assert kinds["svg+xml"] == 3 and kinds["png"] > 20


def test_numbers_are_those_of_the_test(run, data, capsys):
    root, last = parsed(run.folder / REPORT), run.history[-1]
    boxes = [["".join(part.itertext()) for part in box] for box in root.find("body/div[@class='key']")]
    told = {what: value for value, what in boxes}
    assert told["test accuracy"] == f"{100 * last['test_accuracy']:.1f} %"
    assert told["balanced accuracy"] == f"{100 * last['balanced_accuracy']:.1f} %"
    assert told["test loss"] == f"{last['test_loss']:.4f}"
    arrays = np.load(data)
    predicted = run.model.predict(arrays["test_images"]).labels
    for k, row in enumerate(rows_of(root, "Scores of each class")):
        own, taken = arrays["test_labels"] == k, predicted == k
        right = (own & taken).sum()
        wanted = [f"{100 * right / n:.1f} %" if n else "–" for n in (taken.sum(), own.sum(), (own.sum() + taken.sum()) / 2)]
        assert row[1:] == [*wanted, str(own.sum()), str((arrays["train_labels"] == k).sum())]


def test_the_worst_mistakes_are_the_surest(run, data):
    arrays, sheets = np.load(data), parsed(run.folder / REPORT).findall("body/div[@class='sheet']")
    prediction = run.model.predict(arrays["test_images"])
    wrong, confidence = prediction.labels != arrays["test_labels"], prediction.confidence
    worst, unsure = ([int(re.search(r"image (\d+)", "".join(figure.itertext()))[1]) for figure in sheet] for sheet in sheets)
    assert worst == sorted(np.flatnonzero(wrong), key=lambda i: -confidence[i])[: sections.SHOWN]
    assert unsure == sorted(range(60), key=lambda i: confidence[i])[: sections.SHOWN]


def test_names_are_escaped(run):
    source = (run.folder / REPORT).read_text(encoding="utf-8")
    assert "<script" not in source
    names = [row[0] for row in rows_of(parsed(run.folder / REPORT), "Scores of each class")]
    assert names == [*NAMES]


def test_the_temperature_is_fitted_on_other_images_than_are_judged(run, data):
    arrays = np.load(data)
    fitting, judged = halves(arrays["test_labels"])
    logits = run.model.predictor.logits(np.concatenate([*run.model.preprocessing.batches(arrays["test_images"])]))[-1]
    temperature = fit_temperature(logits[fitting], arrays["test_labels"][fitting])
    told = text_of(parsed(run.folder / REPORT))
    assert f"{len(fitting)} of the test images, half of each class, and judged on the other {len(judged)}" in told
    assert (f"temperature {temperature:.3f}" if temperature else "No temperature was found") in told


def test_a_validation_part_is_what_the_temperature_is_fitted_on(data, tmp_path, monkeypatch):
    tested = []
    monkeypatch.setattr(loop, "evaluate", lambda *given, original=loop.evaluate: tested.append(given) or original(*given))
    run = minivit.train(data=data, out=tmp_path / "run", validation_fraction=0.25, **OPTIONS | {"epochs": 2})
    first = parsed(run.folder / REPORT)
    assert f"the {len(tested[0][1])} images of the validation part, and judged on the test images" in text_of(first)
    counts = [int(row[-1]) for row in rows_of(first, "Scores of each class")]
    assert sum(counts) == 160 - len(tested[0][1])
    assert main(["report", str(run.folder), "--out", str(tmp_path / "again.html"), "--quiet"]) == 0
    again = parsed(tmp_path / "again.html")
    speeds = r"[\d,.]+ (images a second|ms|images/s)"
    assert re.sub(speeds, "", text_of(again)) == re.sub(speeds, "", text_of(first))  # the same weights, parts and temperature


def test_choices_have_reasons(run, tmp_path):
    rows = {row[0]: row[1:] for row in rows_of(parsed(run.folder / REPORT), "What was chosen, and why")}
    assert rows["model"] == ["vit_nano_patch2_8", "given"] and rows["epochs"] == ["3", "given"]
    assert "but for what was given: batch_size" in rows["recipe"][1] and "optimizer muon" in rows["recipe"][0]
    assert rows["precision"][1].startswith("the fastest that trains as well as float32")
    assert "no class has more than three times" in rows["weights of classes"][1]
    config = json.loads((run.folder / "config.json").read_text())
    assert config["reasons"]["augmentation"] == "the policy of this kind of data"


def test_a_failing_report_does_not_end_the_run(data, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(report_module, "write_report", fail)
    run = minivit.train(data=data, out=tmp_path / "run", **OPTIONS | {"epochs": 1})
    assert run.test_accuracy == run.history[-1]["test_accuracy"] and not (run.folder / REPORT).exists()
    assert f"no {REPORT}: no font; minivit report {run.folder} writes it" in capsys.readouterr().err


def test_a_cascade_has_its_exits(tmp_path, capsys):
    options = ["--epochs", "1", "--limit", "240", "--model-option", "dim=16", "--model-option", "depth=1", "--model-option", "heads=2"]
    assert main(["train", "--model", "dvt_nano_8", *options, "--quiet", "--out", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / REPORT
    assert "No image stops early yet" in text_of(parsed(path))
    accuracies = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]["exit_accuracies"]
    assert [row[-1] for row in rows_of(parsed(path), "Exits")] == [f"{100 * a:.1f} %" for a in accuracies]
    capsys.readouterr()
    assert main(["calibrate", str(tmp_path / "run"), "--quiet", "--json", "--budgets", "0.5", "1"]) == 0
    unseen = json.loads(capsys.readouterr().out)["unseen"]
    assert main(["report", str(tmp_path / "run"), "--quiet"]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    (table,) = [t for t in parsed(path).iter("table") if t.find("thead/tr/th").text == "budget"]
    told = [[cell.text for cell in row][1] for row in table.find("tbody")]
    assert told == [f"{100 * result['accuracy']:.1f} %" for result in unseen["outcomes"]]


def test_other_data(run, tmp_path, capsys):
    """All right on few images: no temperature, no training images in the table; and a class without any image."""
    images = np.random.default_rng(5).integers(0, 256, (6, 8, 8, 3), np.uint8)
    labels = run.model.predict(images).labels
    names = [NAMES[k] for k in labels]
    np.savez(tmp_path / "right.npz", images=images, labels=names)
    path = minivit.report(run.folder, str(tmp_path / "right.npz"), tmp_path / "right.html", progress=False)
    told = text_of(parsed(path))
    assert "all images were recognised" in told and "training images" not in told.split("Scores of each class")[1].split("Precision")[0]
    assert "all 6 images of right" in told
    assert [row[4] for row in rows_of(parsed(path), "Scores of each class")] == [str((labels == k).sum()) for k in range(4)]


def test_images_of_files_are_named_by_them(run, tmp_path):
    folder = tmp_path / "photos"
    for seed, path in enumerate(f"{name}/{i}.png" for name in ("日本", "a & b") for i in range(4)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(folder / path)
    told = text_of(parsed(minivit.report(run.folder, str(folder), tmp_path / "photos.html", progress=False)))
    assert all(f"{name}/{i}.png" in told for name in ("日本", "a & b") for i in range(4)) and "image 0" not in told


def test_mistakes(tmp_path, run):
    for arguments, message in [((tmp_path / "none",), "there is no run"), ((run.folder, "nowhere"), "nowhere")]:
        with pytest.raises(minivit.UserError, match=message):
            minivit.report(*arguments, progress=False)
    with pytest.raises(minivit.UserError, match="2 names for a confusion matrix of 3 classes"):
        confusion_picture(np.eye(3, dtype=int), ["a", "b"])


def test_pictures_hold_what_they_were_given():
    (axes,) = confusion_picture(np.array([[3, 1], [0, 0]]), ["cat", "dog"]).axes
    assert np.array_equal(axes.images[0].get_array(), [[0.75, 0.25], [0, 0]]) and [t.get_text() for t in axes.texts] == ["3", "1"]
    result = sections.reliability(np.array([0.9, 0.8]), np.array([True, False]), 2)
    upper, lower = reliability_diagram({"before": result}).axes
    assert [bar.get_height() for bar in upper.containers[0]] == [0.5]
    assert [bar.get_height() for bar in lower.containers[0]] == [0, 100]
    large = confusion_picture(np.eye(100, dtype=int), list(map(str, range(100))))
    assert not large.axes[0].texts
