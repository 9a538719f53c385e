"""Confusions, scores of classes, calibration errors and temperatures, against values that were computed by hand or in another way."""

import numpy as np
import pytest

from minivit.inference.metrics import class_scores, confusion_matrix, fit_temperature, probabilities, reliability


def test_scores_of_classes():
    truth, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 0, 0])
    confusion = confusion_matrix(truth, predicted, 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    scores = class_scores(confusion)
    np.testing.assert_allclose(scores.precision, [2 / 4, 1 / 2, np.nan, np.nan])
    np.testing.assert_allclose(scores.recall, [2 / 3, 1 / 2, np.nan, 0])
    np.testing.assert_allclose(scores.f1, [4 / 7, 1 / 2, np.nan, 0])
    assert scores.support.tolist() == [3, 2, 0, 1]


def test_calibration_error():
    result = reliability(np.array([0.0, 0.2, 0.25, 0.95, 1.0]), np.array([False, True, False, True, True]), bins=5)
    assert result.counts.tolist() == [2, 1, 0, 0, 2]  # a bin has its upper end
    assert result.error == pytest.approx((2 * abs(0.5 - 0.1) + 0.25 + 2 * 0.025) / 5)


def test_a_temperature_is_found_again():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20000, 5))
    labels = (probabilities(logits).cumsum(1) > rng.random((20000, 1))).argmax(1)  # as probable as the logits say
    for scale in (0.25, 1.0, 3.0):
        assert fit_temperature((scale * logits).astype(np.float32), labels) == pytest.approx(scale, rel=0.03)
    temperature = fit_temperature(3 * logits, labels)

    def loss(t):
        return -np.log(probabilities(3 * logits, t)[np.arange(len(labels)), labels]).mean()

    assert loss(temperature) <= min(loss(temperature * 1.001), loss(temperature / 1.001))
    confidences = [probabilities(3 * logits, t) for t in (1.0, temperature)]
    before, after = (reliability(p.max(1), p.argmax(1) == labels).error for p in confidences)
    assert after < 0.02 < 0.1 < before


def test_no_temperature_without_a_lowest_loss():
    logits, labels = np.eye(3), np.arange(3)
    assert fit_temperature(logits, labels) is None  # all are right, so the sharper the better
    assert fit_temperature(-logits, labels) is None  # all are wrong, so the flatter the better
    assert fit_temperature(np.zeros((4, 3)), np.array([0, 1, 2, 0])) is None
