"""Learning curves, accuracy against cost, exit histograms: what is drawn is what was given."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from minivit import UserError, plots

HISTORY = [{"epoch": n, "train_loss": 2.0 / n, "test_loss": 1.5 / n, "test_accuracy": 1 - 0.5 / n} for n in range(1, 5)]


@pytest.mark.parametrize("epochs", [1, 4])
def test_curves_are_drawn(tmp_path, epochs):
    path = plots.save_learning_curves(HISTORY[:epochs], tmp_path / "curves.png", "a title")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("title", ["$a", "a$b$c", "$\\frac$"])
def test_a_dollar_in_a_name_is_no_mathematics(tmp_path, title):
    assert plots.save_learning_curves(HISTORY, tmp_path / "curves.png", title).exists()


def test_curves_hold_the_history():
    losses, accuracies = plots.learning_curves(HISTORY).axes
    train, test = losses.lines
    assert list(train.get_ydata()) == [line["train_loss"] for line in HISTORY]
    assert list(test.get_ydata()) == [line["test_loss"] for line in HISTORY]
    assert list(accuracies.lines[0].get_ydata()) == [100 * line["test_accuracy"] for line in HISTORY]


def test_no_epoch_no_curves():
    with pytest.raises(UserError, match="before the first epoch"):
        plots.learning_curves([])


def test_matplotlib_waits_until_a_picture_is_drawn():
    code = "import sys, minivit.plots, minivit.training; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------- accuracy against cost
CASCADE = [(2.0e9, 0.85), (0.5e9, 0.7), (1.0e9, 0.8)]
EXITS = [(0.4e9, 0.65), (4.0e9, 0.84)]


@pytest.mark.parametrize(
    "unit, shrink, divisor, label",
    [
        ("macs", 1, 1e9, "multiply-adds an image, billions"),
        ("macs", 1e-3, 1e6, "multiply-adds an image, millions"),
        ("macs", 1e-6, 1e3, "multiply-adds an image, thousands"),
        ("macs", 1e-9, 1, "mean multiply-adds an image"),
        ("ms", 1, 1, "milliseconds"),
        ("share", 2.5e-10, 0.01, "% of the last exit's"),
    ],
)
def test_accuracy_against_cost(unit, shrink, divisor, label):
    (axes,) = plots.accuracy_cost_curve([(shrink * c, a) for c, a in CASCADE], [(shrink * c, a) for c, a in EXITS], unit, "title").axes
    curve, points = axes.lines
    costs = np.array(sorted(CASCADE))[:, 0] * shrink / divisor
    np.testing.assert_allclose(curve.get_xydata(), np.column_stack([costs, [70, 80, 85]]))  # in the order of cost
    np.testing.assert_allclose(points.get_xydata(), [[0.4e9 * shrink / divisor, 65], [4e9 * shrink / divisor, 84]])
    assert points.get_linestyle() == "None"  # an exit is a point
    assert axes.get_xlabel().endswith(label)
    assert [text.get_text() for text in axes.texts] == ["exit 1", "exit 2"]
    assert axes.get_title() == "title"


def test_a_curve_or_points_alone():
    assert len(plots.accuracy_cost_curve(CASCADE, []).axes[0].lines) == 1
    assert len(plots.accuracy_cost_curve([], EXITS).axes[0].lines) == 1


@pytest.mark.parametrize("cascade, unit, message", [([], "macs", "no accuracy to draw"), (CASCADE, "hours", "not 'hours'")])
def test_mistakes_in_costs(cascade, unit, message):
    with pytest.raises(UserError, match=message):
        plots.accuracy_cost_curve(cascade, [], unit)


# --------------------------------------------------------------------------------------------------------------------- exits
def bars(axes):
    return [[bar.get_height() for bar in container] for container in axes.containers]


def test_exit_histogram():
    exits = np.array([0, 0, 0, 2, 2, 0])
    (axes,) = plots.exit_histogram(exits, 4).axes
    assert bars(axes) == [[4, 0, 2, 0]]
    (axes,) = plots.exit_histogram(exits, 4, np.array([1, 1, 0, 1, 0, 1], bool)).axes
    wrong = axes.containers[1]
    assert bars(axes) == [[3, 0, 1, 0], [1, 0, 1, 0]]
    assert [bar.get_y() for bar in wrong] == [3, 0, 1, 0]  # on top of the right ones
    assert [text.get_text() for text in axes.texts] == ["66.7 %\n75.0 % right", "0.0 %", "33.3 %\n50.0 % right", "0.0 %"]
    assert axes.get_ylim()[1] > 4


@pytest.mark.parametrize("exits, got", [([], "none"), ([0, 3], "0..3"), ([-1], "-1..-1")])
def test_exits_out_of_range(exits, got):
    with pytest.raises(UserError, match=rf"in 0\.\.2, got {got}"):
        plots.exit_histogram(np.array(exits, int), 3)
