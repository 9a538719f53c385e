"""`draw_run` and `minivit plot`: which pictures fit which run."""

import json

import numpy as np
import pytest
from PIL import Image

import minivit
from minivit import UserError, plots
from minivit.cli import main
from minivit.models.cascade.calibration import Calibration
from minivit.plots import run as drawing

TINY = dict(dim=8, depth=1)


def trained(folder, model, data="digits", **options):
    return minivit.train(model, data, epochs=1, limit=240, model_options=TINY | options, out=folder, progress=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run of each kind."""
    root = tmp_path_factory.mktemp("runs")
    trained(root / "vit", "vit_nano_patch2_8", heads=2)
    trained(root / "mixer", "mixer_nano_patch2_8")
    trained(root / "dvt", "dvt_nano_8", heads=2)
    data = minivit.load_data("digits")
    cascade = minivit.load(root / "dvt")
    minivit.calibrate(cascade, data.test_images, data.test_labels, [0.3, 0.6, 1.0], unit="share")
    cascade.save(root / "calibrated.safetensors")
    return root


@pytest.fixture
def drawn(folders, tmp_path):
    def draw(name, **options):
        paths = plots.draw_run(folders / name, out=tmp_path / "pictures", progress=False, **options)
        assert sorted(paths) == sorted((tmp_path / "pictures").iterdir())
        for path in paths:
            with Image.open(path) as image:
                assert image.format == "PNG"
                assert len(image.convert("RGB").getcolors(1 << 22)) > 2
        return [path.name for path in paths]

    return draw


@pytest.mark.slow
def test_a_vit(drawn):
    assert drawn("vit") == ["curves.png", "filters.png", "positions.png", "attention.png", "rollout.png"]


def test_a_mixer(drawn):
    assert drawn("mixer") == ["curves.png", "filters.png", "token_mixing.png"]


def test_an_ff_only_model(tmp_path):
    model = minivit.create_model("ff_only", image_size=8, patch_size=2, in_channels=1, num_classes=10, dim=8, depth=2)
    minivit.train(model, "digits", epochs=1, limit=64, out=tmp_path / "run", progress=False)
    paths = plots.draw_run(tmp_path / "run")
    assert [path.name for path in paths] == ["curves.png", "filters.png", "positions.png", "token_mixing.png"]
    assert all(path.parent == tmp_path / "run" and path.is_file() for path in paths)


def test_a_t2t_vit(tmp_path):
    model = minivit.create_model("t2t_vit_nano_8", dim=8, depth=1, heads=2)
    minivit.train(model, "digits", epochs=1, limit=64, out=tmp_path / "run", progress=False)
    names = [path.name for path in plots.draw_run(tmp_path / "run")]
    assert names == ["curves.png", "positions.png", "attention.png", "rollout.png"]


EXITS = [
    "filters_exit1.png",
    "positions_exit1.png",
    "filters_exit2.png",
    "positions_exit2.png",
    "filters_exit3.png",
    "positions_exit3.png",
    "attention_exit1.png",
    "attention_exit2.png",
    "attention_exit3.png",
    "rollout.png",
]


@pytest.mark.slow
def test_a_cascade_before_it_is_calibrated(drawn):
    assert drawn("dvt") == ["curves.png", *EXITS]


@pytest.mark.slow
def test_a_calibrated_cascade(folders, drawn, monkeypatch):
    given = {}
    for name in ("accuracy_cost_curve", "exit_histogram", "exit_sheet"):
        real = getattr(drawing, name)
        monkeypatch.setattr(drawing, name, lambda *a, real=real, name=name: given.setdefault(name, []).append(a) or real(*a))
    assert drawn("calibrated.safetensors", data="digits", budget=0.6) == [
        *EXITS,
        "accuracy_cost.png",
        "accuracy_ms.png",
        "exits.png",
        "exit_sheet.png",
    ]
    (cascade, exits, unit, _), (timed, timed_exits, second, _) = given["accuracy_cost_curve"]
    assert (unit, second) == ("macs", "ms")
    classifier = minivit.load(folders / "calibrated.safetensors")
    assert tuple(cost for cost, _ in exits) == classifier.cost().exits
    assert [a for _, a in exits] == [a for _, a in timed_exits] and [a for _, a in cascade] == [a for _, a in timed]
    assert all(cost > 0 for cost, _ in (*timed, *timed_exits))
    left, number, correct, _ = given["exit_histogram"][0]
    images, *_ = given["exit_sheet"][0]
    expected = classifier.predict(images, 0.6)
    np.testing.assert_array_equal(left, expected.exits)
    assert number == 3 and len(images) == len(correct) == 180  # half of the test images
    at_budget = next(a for cost, a in cascade if cost == pytest.approx(expected.macs.mean()))
    assert at_budget == pytest.approx(correct.mean())


@pytest.mark.parametrize("accuracies, drawn", [((0.8, 0.899, 0.91), 0.4), ((0.8, 0.85, 0.88), 0.7)])
def test_the_budget_that_is_drawn(accuracies, drawn):
    """The smallest that is within 0.2 points of the last exit's 90 %, or the largest."""
    calibration = Calibration(
        unit="share",
        method="exact",
        confidence="max",
        budgets=(0.2, 0.4, 0.7),
        thresholds=((0.0,), (0.5,), (0.7,)),
        accuracies=accuracies,
        mean_costs=(0.2, 0.4, 0.7),
        exit_shares=((1, 0), (0.5, 0.5), (0.3, 0.7)),
        costs=(0.2, 1.0),
        macs=(20.0, 100.0),
        exit_accuracies=(0.8, 0.9),
        images=500,
        fingerprint="",
    )
    assert drawing._as_good(calibration) == drawn


def test_given_images(folders, drawn, tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    pixels = np.arange(0, 256, 4, np.uint8).reshape(8, 8)
    Image.fromarray(pixels).save(path)
    shown = []
    real = drawing.rollout_maps
    monkeypatch.setattr(drawing, "rollout_maps", lambda images, *a: shown.append(images) or real(images, *a))
    drawn("vit", images=[str(path)])
    np.testing.assert_array_equal(shown[0], pixels[None, :, :, None])


# -------------------------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    "name, options, message",
    [
        ("vti", {}, r"there is no run .*vti \(nearest: vit"),
        ("vit", dict(images=["no/such.png"]), r"no/such\.png"),
        ("mixer", dict(images=["picture.png"]), r"images are for laying attention over them, and mixer_nano_patch2_8 has none"),
        ("vit", dict(budget=0.5), r"budget=0\.5 is for a cascade with thresholds: calibrate it first"),
        ("calibrated.safetensors", {}, "does not tell which data it was trained on: give --data"),
        ("calibrated.safetensors", dict(data="digits", budget=0.01), r"no thresholds .* a budget of 1 %"),
    ],
)
def test_mistakes_draw_nothing(folders, tmp_path, name, options, message):
    if name == "calibrated.safetensors":
        (tmp_path / name).write_bytes((folders / name).read_bytes())  # away from the runs
    with pytest.raises(UserError, match=message):
        plots.draw_run((tmp_path if name == "calibrated.safetensors" else folders) / name, out=tmp_path / "pictures", **options)
    assert not (tmp_path / "pictures").exists()


def test_too_few_test_images_for_exits(folders, tmp_path):
    digits = minivit.load_data("digits")
    first = np.unique(digits.test_labels, return_index=True)[1]  # one of each class
    np.savez(
        tmp_path / "few.npz",
        train_images=digits.train_images,
        train_labels=digits.train_labels,
        test_images=digits.test_images[first],
        test_labels=digits.test_labels[first],
    )
    with pytest.raises(UserError, match="each class needs two or more"):
        plots.draw_run(folders / "calibrated.safetensors", str(tmp_path / "few.npz"), out=tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()


def test_damaged_metrics(folders, tmp_path):
    (tmp_path / "run").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "run" / file).write_bytes((folders / "mixer" / file).read_bytes())
    assert [p.name for p in plots.draw_run(tmp_path / "run")] == ["filters.png", "token_mixing.png"]
    (tmp_path / "run" / "metrics.jsonl").write_text('{"epoch": 1')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: line 1 is no JSON"):
        plots.draw_run(tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------- command line
def test_plot_prints_the_paths(folders, tmp_path, capsys):
    out = tmp_path / "pictures"
    assert main(["plot", str(folders / "mixer"), "--out", str(out)]) == 0
    paths = [str(out / name) for name in ("curves.png", "filters.png", "token_mixing.png")]
    assert capsys.readouterr().out.splitlines() == paths
    assert main(["plot", str(folders / "mixer"), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == paths


def test_plot_of_no_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", "nothing"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minivit: there is no run nothing") and err.count("\n") == 1
