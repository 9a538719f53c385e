"""Learning curves as PNG files."""
import subprocess
import sys

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
    code = "import sys, minivit.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
