"""Sheets of images that leave early and late."""

import numpy as np
import pytest

from minivit import UserError, plots

EXITS = np.array([1, 0, 0, 2, 0, 2, 1])
SURE = np.array([0.9, 0.8, 0.99, 0.3, 0.9, 0.6, 0.7])
IMAGES = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.full((1, 4, 4, 1), 10, np.uint8)  # image i is filled with 10 i
LABELS = list("abcdefg")


def shown(figure):
    """Which image each of the axes shows, and the text below it."""
    return [(round(255 * axes.images[0].get_array()[0, 0, 0] / 10), axes.texts[0].get_text()) for axes in figure.axes if axes.images]


def test_the_surest_of_the_first_and_the_least_sure_of_the_last():
    found = shown(plots.exit_sheet(IMAGES, EXITS, SURE, LABELS, columns=2, rows=1))
    assert found == [(2, "c · 99 %"), (4, "e · 90 %"), (3, "d · 30 %"), (5, "f · 60 %")]


def test_no_image_twice_and_the_truth_in_red():
    figure = plots.exit_sheet(IMAGES, EXITS, SURE, LABELS, ["a", "b", "c", "x", "e", "f", "g"])
    found = shown(figure)
    assert [i for i, _ in found] == [2, 4, 1, 3, 5, 6]
    assert found[3][1] == "d · 30 %\ntruth: x"
    colours = [axes.texts[0].get_color() for axes in figure.axes if axes.texts]
    assert colours[3] != "black" and set(colours[:3] + colours[4:]) == {"black"}
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == ["exit 1 · early, the surest first", "exits 2 to 3 · late, the least sure first"]


def test_float_images_in_colour():
    images = np.linspace(0, 1, 4 * 5 * 5 * 3, dtype=np.float32).reshape(4, 5, 5, 3)
    figure = plots.exit_sheet(images, EXITS[:4], SURE[:4], LABELS[:4])
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), images[2])


@pytest.mark.parametrize("number, labels", [(1, LABELS[:1]), (4, LABELS[:3])])
def test_mistakes(number, labels):
    with pytest.raises(UserError, match=f"got {number} images, {number} exits, {number} confidences, {len(labels)} labels"):
        plots.exit_sheet(IMAGES[:number], EXITS[:number], SURE[:number], labels)


def test_an_image_that_has_no_colours():
    with pytest.raises(UserError, match=r"got \(4, 4, 2\)"):
        plots.exit_sheet(np.zeros((4, 4, 4, 2), np.uint8), EXITS[:4], SURE[:4], LABELS[:4])
