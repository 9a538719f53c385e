"""Runs side by side: what their folders tell, and in what they differ."""

import json
import shutil

import pytest
from PIL import Image

import minivit
from minivit.cli import main
from minivit.io.run_folder import CONFIG, METRICS

OPTIONS = {
    "model": "vit_nano_patch2_8",
    "limit": 96,
    "batch_size": 32,
    "model_options": {"dim": 16, "depth": 1, "heads": 2},
    "progress": False,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    first = minivit.train(out=root / "first", epochs=1, **OPTIONS)
    second = minivit.train(out=root / "second", epochs=2, lr=0.01, validation_fraction=0.25, **OPTIONS)
    return first, second


def test_results_and_differences(runs):
    first, second = runs
    result = minivit.compare(first.folder, second.folder)
    for item, run in zip(result.runs, runs):
        line = run.history[-1]
        assert (item.test_accuracy, item.balanced_accuracy, item.test_loss) == tuple(
            line[name] for name in ("test_accuracy", "balanced_accuracy", "test_loss")
        )
        assert item.macs == run.model.cost().total and item.parameters == sum(p.size for p in run.model.parameters())
        assert (item.run, item.model, item.data, item.epochs) == (run.folder.name, "vit_nano_patch2_8", "digits", line["epoch"])
        assert item.minutes == round(sum(line["seconds"] for line in run.history) / 60, 2)
    assert result.options["lr"] == (0.006, 0.01) and result.options["epochs"] == (1, 2)
    assert set(result.options) == {"epochs", "lr", "warmup", "validation_fraction"}
    losses, _ = result.figure().axes
    assert [list(line.get_ydata()) for line in losses.lines] == [
        [line["test_loss"] for line in first.history],
        [line["validation_loss"] for line in second.history[:-1]],
    ]
    assert [line.get_label() for line in losses.lines] == ["first, test", "second, validation"]


def test_the_command(runs, tmp_path, capsys):
    folders = [str(run.folder) for run in runs]
    assert main(["compare", *folders, "--out", str(tmp_path / "both.png")]) == 0
    table, differing, picture = capsys.readouterr().out.strip().split("\n\n")
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [["first", "vit_nano_patch2_8"], ["second", "vit_nano_patch2_8"]]
    assert f"{100 * runs[0].test_accuracy:.1f}" in table.splitlines()[1]
    assert ["lr", "0.006", "0.01"] in [line.split() for line in differing.splitlines()]
    with Image.open(picture) as image:
        assert image.format == "PNG"
    assert main(["compare", *folders, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [item["test_loss"] for item in content["runs"]] == [run.history[-1]["test_loss"] for run in runs]
    assert content["options"]["lr"] == [0.006, 0.01]


def test_equal_names_and_options(runs, tmp_path, capsys):
    other = shutil.copytree(runs[0].folder, tmp_path / "first")
    assert main(["compare", str(runs[0].folder), str(other)]) == 0
    told = capsys.readouterr().out
    assert str(other) in told and "all options are the same" in told


def test_a_run_that_tells_less(runs, tmp_path, capsys):
    """One of an earlier version, and one that was stopped before the end of its first epoch."""
    old, stopped = (shutil.copytree(runs[0].folder, tmp_path / name) for name in ("old", "stopped"))
    line = {name: value for name, value in runs[0].history[0].items() if name in ("epoch", "train_loss", "test_loss", "test_accuracy")}
    (old / METRICS).write_text(json.dumps(line) + "\n")
    (stopped / METRICS).unlink()
    result = minivit.compare(old, stopped)
    assert result.runs[0].balanced_accuracy is None and result.runs[0].test_loss == line["test_loss"]
    assert (result.runs[1].epochs, result.runs[1].test_accuracy) == (0, None)
    assert len(result.figure().axes[0].lines) == 1
    assert main(["compare", str(old), str(stopped)]) == 0
    assert "–" in capsys.readouterr().out


def test_mistakes(runs, tmp_path):
    first, second = (run.folder for run in runs)
    alone = shutil.copytree(first, tmp_path / "alone")
    (alone / CONFIG).unlink()
    for given, message in [
        ((first,), "two runs or more, got 1"),
        ((first, second, first), "given twice"),
        ((first, tmp_path / "none"), "there is no run"),
        ((first, alone), "alone has no config.json"),
    ]:
        with pytest.raises(minivit.UserError, match=message):
            minivit.compare(*given)
    empty = [shutil.copytree(first, tmp_path / name) for name in ("a", "b")]
    for folder in empty:
        (folder / METRICS).unlink()
    with pytest.raises(minivit.UserError, match="before the first epoch"):
        minivit.compare(*empty).save(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
