"""Confidences by their definitions; calibrations that survive JSON, answer for a budget, and belong to one model."""

import json
import re
from dataclasses import MISSING, fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivit import UserError, create_model
from minivit.models.cascade.calibration import CONFIDENCES, Calibration, check, check_feasible, confidence, describe_cost, fingerprint


@pytest.fixture(scope="module")
def model():
    return create_model("vit", image_size=8, patch_size=4, in_channels=1, num_classes=3, dim=8, depth=1, heads=1)


@pytest.fixture
def calibration(model):
    return Calibration(
        "macs",
        "exact",
        "max",
        (1e6, 2e6, 4e6),
        ((0.0, 0.0), (0.7, 0.6), (0.9, 2.0)),
        (0.6, 0.7, 0.8),
        (1e6, 1.9e6, 4e6),
        ((1.0, 0.0, 0.0), (0.5, 0.3, 0.2), (0.2, 0.0, 0.8)),
        (1e6, 2e6, 5e6),
        (1e6, 2e6, 5e6),
        (0.6, 0.7, 0.75),
        200,
        fingerprint(model),
    )


# --------------------------------------------------------------------------------------------------------------------- confidence
def by_definition(logits, kind):
    powers = np.exp(logits.astype(np.float64))
    p = powers / powers.sum(-1, keepdims=True)
    ordered = np.sort(p, -1)
    return {
        "max": ordered[..., -1],
        "margin": (ordered[..., -1] - ordered[..., -2]) / (ordered[..., -1] + ordered[..., -2]),
        "entropy": 1 + (p * np.log(p)).sum(-1) / np.log(p.shape[-1]),
    }[kind]


@pytest.mark.parametrize("kind", CONFIDENCES)
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-6), (np.float64, 1e-14)])
@pytest.mark.parametrize("shape", [(2,), (5, 3), (2, 4, 10)])
def test_confidences_are_as_defined(kind, dtype, tolerance, shape):
    logits = (3 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)
    found = confidence(logits, kind)
    assert found.dtype == dtype and found.shape == shape[:-1]
    np.testing.assert_allclose(found, by_definition(logits, kind), atol=tolerance)


@pytest.mark.parametrize("kind", CONFIDENCES)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=6))
def test_confidences_stay_within_their_range(kind, logits):
    for dtype in (np.float32, np.float64):
        found = confidence(np.array(logits, dtype), kind)
        assert 0 <= found <= 1
        shifted = confidence(np.array(logits, dtype)[::-1].copy(), kind)
        assert found == pytest.approx(shifted, abs=1e-5)


@pytest.mark.parametrize("kind, even", [("max", 0.25), ("entropy", 0), ("margin", 0)])
def test_confidences_at_their_ends(kind, even):
    assert confidence(np.zeros(4), kind) == pytest.approx(even, abs=1e-15)
    assert confidence(np.array([0, 1000.0, 0, 0]), kind) == 1
    assert confidence(np.array([[2.0]]), kind) == 1  # one class


def test_an_unknown_confidence_is_told():
    with pytest.raises(UserError, match=r"unknown confidence 'entorpy' \(nearest: entropy\): choose max, entropy, margin"):
        confidence(np.zeros(4), "entorpy")


# ---------------------------------------------------------------------------------------------------------------------- calibration
def test_the_largest_budget_that_is_not_above(calibration):
    for budget, place in ((1e6, 0), (1.99e6, 0), (2e6, 1), (2e6 * (1 - 1e-12), 1), (3.9e6, 1), (4e6, 2), (1e9, 2), (np.float32(4e6), 2)):
        assert calibration.for_budget(budget) == calibration.thresholds[place]


@pytest.mark.parametrize(
    "budget, message",
    [
        (
            0.1e6,
            "no thresholds meet a budget of 0.1 M multiply-adds: the cheapest, all images at exit 1, costs 1 M; the dearest, all at exit "
            "3, 5 M",
        ),
        (0, "a budget must be a number above 0, got 0"),
        (float("nan"), "a budget must be"),
        (float("inf"), "a budget must be"),
        (True, "a budget must be"),
        ("1", "a budget must be"),
        (-1.0, "a budget must be"),
    ],
)
def test_budgets_that_cannot_be_met_are_told(calibration, budget, message):
    with pytest.raises(UserError, match=re.escape(message)):
        calibration.for_budget(budget)


def test_budgets_without_thresholds_are_told(calibration):
    fewer = replace(calibration, budgets=(2e6, 4e6), thresholds=calibration.thresholds[1:])
    with pytest.raises(UserError, match=r"no thresholds for a budget of 1\.5 M multiply-adds: .* cheapest is 2 M, its dearest 4 M"):
        fewer.for_budget(1.5e6)
    with pytest.raises(UserError, match=r"at most 1, got 1\.5"):
        replace(calibration, unit="share").for_budget(1.5)


def test_json_gives_the_same_back(calibration):
    text = json.dumps(calibration.to_json(), allow_nan=False)
    assert Calibration.from_text(text) == calibration


def damaged(content):
    yield from (
        content | {"unit": "hours"},
        content | {"method": "luck"},
        content | {"confidence": None},
        content | {"budgets": []},
        content | {"budgets": [2e6, 1e6, 4e6]},
        content | {"thresholds": content["thresholds"][:2]},
        content | {"thresholds": [[0.5]] * 3},
        content | {"thresholds": [[0.5, "x"]] * 3},
        content | {"costs": [1e6, 2e6]},
        content | {"macs": [1, float("nan"), 3]},
        content | {"images": "many"},
        content | {"images": None},
        [content],
        None,
        3,
        "text",
    )
    yield from (
        {name: value for name, value in content.items() if name != field.name} for field in fields(Calibration) if field.default is MISSING
    )


def test_damaged_content_is_told(calibration):
    for content in damaged(calibration.to_json()):
        with pytest.raises(UserError, match="the thresholds that were saved with the model are damaged"):
            Calibration.from_text(json.dumps(content))


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0.3, "share", "30 % of all multiply-adds"),
        (0.1234, "ms", "0.123 ms an image"),
        (1.145e9, "macs", "1.145 G multiply-adds"),
        (9.8e6, "macs", "9.8 M multiply-adds"),
        (1e5, "macs", "0.1 M multiply-adds"),
        (12, "macs", "12 multiply-adds"),
    ],
)
def test_costs_as_text(value, unit, text):
    assert describe_cost(value, unit) == text and text.startswith(describe_cost(value, unit, short=True))


def test_budgets_are_checked_in_their_unit():
    check_feasible([0.25, 1.0], (0.25, 0.5, 1.0), "share")
    with pytest.raises(UserError, match=r"a budget of 20 % of all multiply-adds: the cheapest, .*, costs 25 %; .*, 100 %"):
        check_feasible([0.25, 0.2], (0.25, 0.5, 1.0), "share")


# --------------------------------------------------------------------------------------------------------------------- fingerprint
def test_thresholds_belong_to_weights(model, calibration):
    three = replace(calibration, costs=(1e6,))
    check(three, model)  # a plain model has one exit
    with pytest.raises(UserError, match="thresholds of another model: they are for 3 exits"):
        check(calibration, model)
    other = create_model("vit", image_size=8, patch_size=4, in_channels=1, num_classes=3, dim=8, depth=1, heads=1)
    assert fingerprint(other) == fingerprint(model) and len(fingerprint(model)) == 32
    other.head.bias.data[0] += 1
    with pytest.raises(UserError, match="thresholds of another model"):
        check(three, other)


def test_a_fingerprint_sees_names_and_shapes():
    one, other = (create_model("vit", image_size=8, patch_size=4, in_channels=1, num_classes=3, dim=8, depth=1, heads=h) for h in (1, 2))
    assert fingerprint(one) == fingerprint(other)  # what has no parameters is not seen
    one.head.weight.data = one.head.weight.data.reshape(8, 3)
    assert fingerprint(one) != fingerprint(other)
