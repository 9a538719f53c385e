"""calibrate(): what it promises of a budget is what predicting with that budget does."""

import re

import numpy as np
import pytest

from minivit import UserError, create_model
from minivit.data.train_test_overlap import hash_sample
from minivit.inference.calibrate import BUDGETS, calibrate, halves, measured_exits, stage_milliseconds
from minivit.inference.classifier import Classifier, Preprocessing
from minivit.inference.predictor import Predictor
from minivit.models.cascade.calibration import CONFIDENCES, METHODS, check, confidence
from minivit.models.cascade.thresholds import SLACK

PREPROCESSING = Preprocessing(8, 1, (0.5,), (0.25,))
NUMBER = 130


@pytest.fixture
def model():
    """A cascade with random weights, large enough that its exits differ in what they say and how surely."""
    patches = ((4, 4, 0), (2, 2, 0), (2, 1, 0))
    model = create_model("dvt", image_size=8, in_channels=1, num_classes=3, patches=patches, dim=8, depth=1, heads=1)
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * rng.standard_normal(parameter.shape).astype(np.float32)
    return model


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(1).integers(0, 256, (NUMBER, 8, 8, 1), np.uint8)


@pytest.fixture(scope="module")
def images(pixels):
    return np.concatenate([*PREPROCESSING.batches(pixels)])


@pytest.fixture
def labels(model, images):
    """Of each image what one of its exits says."""
    said = Predictor(model).logits(images).argmax(-1)  # (3, n)
    return said[np.random.default_rng(2).integers(0, 3, NUMBER), np.arange(NUMBER)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CONFIDENCES)
def test_predicting_with_a_budget_does_what_was_found(model, images, labels, method, kind):
    macs = np.array(model.cost().exits)
    budgets = [1.3 * macs[0], 0.5 * macs[2], macs[2]]
    found = calibrate(model, images, labels, budgets[::-1], method=method, confidence=kind)
    assert model.calibration is found and found.budgets == tuple(budgets) and found.images == NUMBER
    assert (found.unit, found.method, found.confidence) == ("macs", method, kind) and found.costs == found.macs == tuple(macs)
    check(found, model)
    predictor = Predictor(model)
    for budget, accuracy, cost, shares in zip(budgets, found.accuracies, found.mean_costs, found.exit_shares):
        answer = predictor.predict(images, budget)
        assert (answer.labels == labels).mean() == pytest.approx(accuracy) and answer.macs.mean() == pytest.approx(cost)
        np.testing.assert_allclose(np.bincount(answer.exits, minlength=3) / NUMBER, shares)
        assert cost <= budget * SLACK
    alone = (predictor.logits(images).argmax(-1) == labels).mean(1)
    assert found.exit_accuracies == pytest.approx(tuple(alone)) and len(set(found.exit_accuracies)) > 1


def test_exact_is_never_worse_than_the_sweep(model, images, labels):
    budgets = np.linspace(*np.array(model.cost().exits)[[0, 2]], 20)
    swept, solved = (calibrate(model, images, labels, budgets, method=method) for method in ("sweep", "exact"))
    assert all(better >= worse for better, worse in zip(solved.accuracies, swept.accuracies))
    assert sum(solved.accuracies) > sum(swept.accuracies)


def test_all_that_holds_a_cascade_is_calibrated_alike(model, pixels, images, labels):
    found = calibrate(model, images, labels, [0.5], unit="share")
    assert found.costs[-1] == 1 and found.macs == tuple(model.cost().exits)
    assert calibrate(Predictor(model), images, labels, [0.5], unit="share", batch_size=50).thresholds == found.thresholds
    classifier = Classifier(model, ("a", "b", "c"), PREPROCESSING)
    assert calibrate(classifier, pixels, labels, [0.5], unit="share").thresholds == found.thresholds
    answer = classifier.predict(pixels, budget=0.5)
    assert (answer.labels == labels).mean() == pytest.approx(found.accuracies[0])


def test_without_budgets_there_are_eight(model, images, labels):
    found = calibrate(model, images, labels)
    assert len(found.budgets) == BUDGETS and (found.budgets[0], found.budgets[-1]) == (found.costs[0], found.costs[-1])


def test_milliseconds_are_measured(model, images, labels):
    times = stage_milliseconds(model, images, batch_size=16)
    assert len(times) == 3 and 0 < times[0] < times[1] < times[2]
    assert stage_milliseconds(model, images[:3], batch_size=16)[0] > 0  # fewer images than the batch
    found = calibrate(model, images, labels, [1e3], unit="ms", batch_size=16)
    assert found.costs != found.macs and 0 < found.costs[0] < found.costs[2] < 1e3 and found.accuracies[0] >= found.exit_accuracies[2]
    assert found.measured.endswith("batch 16")


def test_confidences_and_answers_by_exit(model, images, labels):
    sure, correct = measured_exits(Predictor(model), [images[:100], images[100:]], labels, "margin")
    logits = Predictor(model).logits(images)
    np.testing.assert_allclose(sure, confidence(logits, "margin").T, atol=1e-6)
    np.testing.assert_array_equal(correct, (logits.argmax(-1) == labels).T)


def test_halves_share_the_images_of_each_class():
    labels = np.random.default_rng(0).integers(0, 5, 301)
    one, other = halves(labels)
    assert sorted([*one, *other]) == list(range(301))
    assert (abs(np.bincount(labels[one]) - np.bincount(labels[other])) <= 1).all()


# --------------------------------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    "options, message",
    [
        ({"unit": "mac"}, "unknown unit 'mac' (nearest: macs): choose macs, ms, share"),
        ({"method": "best"}, "unknown method 'best'"),
        ({"confidence": "sure"}, "unknown confidence 'sure'"),
        ({"budgets": []}, "budgets must be a list of one number or more, got []"),
        ({"budgets": 5}, "budgets must be a list"),
        ({"budgets": "5"}, "budgets must be a list"),
        ({"budgets": [1, "2"]}, "a budget must be"),
        ({"budgets": [0.0]}, "a budget must be a number above 0, got 0.0"),
        ({"budgets": [float("nan")]}, "a budget must be a number above 0"),
        ({"budgets": [1.5], "unit": "share"}, "at most 1, got 1.5"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"budgets": [10]}, "no thresholds meet a budget of 10 multiply-adds: the cheapest, all images at exit 1, costs "),
        ({"budgets": [1e-9], "unit": "ms"}, "no thresholds meet a budget of 1e-09 ms an image: the cheapest, all images at exit 1, costs "),
    ],
)
def test_wrong_options_are_told(model, images, labels, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        calibrate(model, images, labels, **options)
    assert model.calibration is None


def test_an_infeasible_budget_names_the_cheapest_and_the_dearest(model, images, labels):
    first, _, last = model.cost().exits
    with pytest.raises(UserError, match=f"costs {first / 1e6:.4g} M; the dearest, all at exit 3, {last / 1e6:.4g} M"):
        calibrate(model, images, labels, [1.0])


def test_wrong_data_is_told(model, images, labels):
    for data, message in (
        ((images[:99], labels[:99]), "thresholds need at least 100 images, got 99"),
        ((images, labels[:-1]), r"labels must have the shape \(130,\)"),
        ((images, np.where(np.arange(NUMBER) == 7, 3, labels)), r"labels\[7\] is 3, out of range for 3 classes"),
        ((images, labels - 1), "labels must be 0 or more"),
        ((images[:, :, :4], labels), "images"),
    ):
        with pytest.raises(UserError, match=message):
            calibrate(model, *data)
    model.stages[2].head.bias.data[...] = np.nan
    with pytest.raises(UserError, match="logits are not finite"):
        calibrate(model, images, labels)


def test_a_model_with_one_exit_is_told(images, labels):
    plain = create_model("vit", image_size=8, patch_size=4, in_channels=1, num_classes=3, dim=8, depth=1, heads=1)
    with pytest.raises(UserError, match="vit has one exit: thresholds are for cascades"):
        calibrate(plain, images, labels)
    with pytest.raises(UserError, match="takes a cascade of create_model, not Linear"):
        calibrate(plain.head, images, labels)


def test_training_images_are_told(model, pixels, labels):
    classifier = Classifier(model, ("a", "b", "c"), PREPROCESSING)
    classifier.training_sketch = hash_sample(pixels[:20])
    with pytest.raises(UserError, match="about 15 % of these images are of the training set"):
        calibrate(classifier, pixels, labels)
    classifier.training_sketch = hash_sample(pixels[:5])
    assert calibrate(classifier, pixels, labels).images == NUMBER
