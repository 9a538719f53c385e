"""Weights of classes: PyTorch's numbers, parts that add up, and tables, names and balance."""

import json
import pickle

import numpy as np
import pytest
from small_models import batches, nano

import minivit
from minivit import Trainer, UserError, train
from minivit.functional import cross_entropy
from minivit.tensor import Tensor
from minivit.training.class_weights import class_weights

RNG = np.random.default_rng(0)
LOGITS, LABELS, WEIGHTS = RNG.normal(size=(6, 4)), np.array([0, 3, 1, 1, 2, 0]), np.array([0.5, 2, 1, 3])
TEN = (0.1, 1, 2, 0.5, 3, 1, 1, 0, 4, 2)
SMALL = dict(epochs=1, limit=96, batch_size=32, progress=False, model_options={"dim": 16, "depth": 1, "heads": 2})


def log_probabilities(logits):
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


# ------------------------------------------------------------------------------------------------------------------ the function
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_classes_weigh_as_in_pytorch(smoothing):
    """The formulas of torch.nn.CrossEntropyLoss(weight, label_smoothing=...): Σ w·nll / Σ w, and Σ_k w_k·nll_k / K for the smoothing."""
    logs, w = log_probabilities(LOGITS), WEIGHTS[LABELS]
    nll = -(w * logs[np.arange(6), LABELS]).sum() / w.sum()
    smooth = -(WEIGHTS * logs).sum() / w.sum()
    expected = (1 - smoothing) * nll + smoothing / 4 * smooth
    assert cross_entropy(Tensor(LOGITS), LABELS, smoothing, weight=WEIGHTS).item() == pytest.approx(expected, rel=1e-12)


def test_probabilities_weigh_inside_and_the_mean_is_over_rows():
    targets = RNG.dirichlet(np.ones(4), 6)
    expected = -(WEIGHTS * targets * log_probabilities(LOGITS)).sum() / 6
    assert cross_entropy(Tensor(LOGITS), targets, weight=WEIGHTS).item() == pytest.approx(expected, rel=1e-12)


def test_equal_weights_change_nothing_for_classes():
    plain = cross_entropy(Tensor(LOGITS), LABELS, 0.1).item()
    assert cross_entropy(Tensor(LOGITS), LABELS, 0.1, weight=[7] * 4).item() == pytest.approx(plain, rel=1e-12)


def test_parts_of_a_batch_add_up():
    whole, logits = Tensor(LOGITS, requires_grad=True), Tensor(LOGITS, requires_grad=True)
    loss = cross_entropy(whole, LABELS, 0.1, weight=WEIGHTS)
    loss.backward()
    parts = [cross_entropy(logits[a:b], LABELS[a:b], 0.1, weight=WEIGHTS, batch=LABELS) for a, b in ((0, 1), (1, 4), (4, 6))]
    for part in parts:
        part.backward()
    assert sum(part.item() for part in parts) == pytest.approx(loss.item(), rel=1e-12)
    np.testing.assert_allclose(logits.grad.numpy(), whole.grad.numpy(), rtol=1e-12)


def test_rows_that_all_weigh_nothing_have_no_loss_and_no_gradient():
    logits = Tensor(LOGITS[:2], requires_grad=True)
    loss = cross_entropy(logits, np.array([1, 1]), weight=[1, 0, 1, 1])
    loss.backward()
    assert loss.item() == 0 and not logits.grad.numpy().any()


@pytest.mark.parametrize(
    "weight, message",
    [
        ([1, 2, 3], r"class weights must be 4 numbers, one for each class, got the shape \(3,\)"),
        ([1, 2, -3, 1], "the weight of class 2 is -3.0: a weight must be finite, and 0 or more"),
        ([1, np.nan, 3, 1], "the weight of class 1 is nan"),
        ([1, np.inf, 3, 1], "the weight of class 1 is inf"),
        ([0, 0, 0, 0], "all class weights are 0: nothing would be learned"),
        ("balanced", "class weights must be 4 numbers, one for each class, got 'balanced'"),
    ],
)
def test_weights_that_are_none_are_one_line(weight, message):
    with pytest.raises(UserError, match=f"^{message}"):
        cross_entropy(Tensor(LOGITS), LABELS, weight=weight)


# ------------------------------------------------------------------------------------------------------------------- the trainer
@pytest.mark.parametrize("soft", [False, True])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(soft):
    states = []
    for accumulate in (1, 2, 3, 8):
        trainer = Trainer(nano(dtype="float64"), accumulate=accumulate, optimizer="sgd", lr=0.1, class_weights=TEN, label_smoothing=0.1)
        losses = [trainer.step(images, labels) for images, labels in batches(3, soft=soft)]
        states.append((losses, trainer.gradient_norm))
    for losses, norm in states[1:]:
        np.testing.assert_allclose(losses, states[0][0], rtol=1e-12)
        assert norm == pytest.approx(states[0][1], rel=1e-12)
    plain = Trainer(nano(dtype="float64"), optimizer="sgd", lr=0.1, label_smoothing=0.1)
    assert plain.step(*next(batches(1, soft=soft))) != pytest.approx(states[0][0][0], rel=1e-3)


def test_a_part_may_weigh_nothing():
    images, _ = next(batches(1))
    labels = np.array([7, 7, 7, 7, 0, 1, 2, 3])  # class 7 weighs 0: the first of two parts does
    losses = [Trainer(nano(dtype="float64"), accumulate=a, class_weights=TEN).step(images, labels) for a in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_recorded_step_weighs_each_batch_anew():
    results = []
    for plan in (True, False):
        trainer = Trainer(nano(), plan=plan, accumulate=2, class_weights=TEN)
        results.append([trainer.step(images, labels) for images, labels in batches(4)])
    assert results[0] == results[1]


def test_a_copy_of_a_trainer_keeps_its_weights():
    trainer = Trainer(nano(), class_weights=TEN)
    copy = pickle.loads(pickle.dumps(trainer))
    images, labels = next(batches(1))
    assert copy.step(images, labels) == trainer.step(images, labels)


def test_weights_for_other_classes_than_the_models():
    with pytest.raises(UserError, match=r"^class weights must be 10 numbers, one for each class, got the shape \(3,\)"):
        Trainer(nano(), class_weights=[1, 2, 3])


# ------------------------------------------------------------------------------------------------------------------------- train
NAMES, COUNTS = ("cat", "dog", "eel"), np.array([0, 0, 0, 0, 1, 1, 2, 2])


def test_balanced_weights_are_those_of_scikit_learn():
    assert class_weights("balanced", COUNTS, NAMES) == pytest.approx((8 / (3 * 4), 8 / (3 * 2), 8 / (3 * 2)))


@pytest.mark.parametrize(
    "given, expected",
    [
        (None, None),
        ({"dog": 2}, (1, 2, 1)),
        ({"eel": 0, "cat": 3, "dog": 1.5}, (3, 1.5, 0)),
        ([1, 2, 3], (1, 2, 3)),
        (np.array([1, 2, 3]), (1, 2, 3)),
    ],
)
def test_tables(given, expected):
    assert class_weights(given, COUNTS, NAMES) == expected


@pytest.mark.parametrize(
    "given, message",
    [
        ({"dgo": 2}, r"class_weights: there is no class 'dgo' \(nearest: dog\)"),
        ({7: 2}, "class_weights: there is no class 7"),
        ({"dog": -1}, "the weight of class 1 is -1.0"),
        ({"dog": "two"}, "class weights must be 3 numbers"),
        ({"cat": 0, "dog": 0, "eel": 0}, "all class weights are 0"),
        ([1, 2], r"class weights must be 3 numbers, one for each class, got the shape \(2,\)"),
        ("balance", "class_weights must be 'balanced' or a table, got 'balance'"),
        (2.0, "class weights must be 3 numbers"),
    ],
)
def test_tables_that_do_not_fit(given, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        class_weights(given, COUNTS, NAMES)
    assert "\n" not in str(error.value)


def test_a_class_without_images_cannot_be_balanced():
    with pytest.raises(UserError, match=r"^class 'eel' has no training image to balance its weight by"):
        class_weights("balanced", COUNTS[:6], NAMES)


def test_train_weighs_and_keeps_the_weights(tmp_path):
    runs = {
        name: train(class_weights=given, out=tmp_path / name, **SMALL)
        for name, given in {"plain": None, "table": {"3": 5}, "numbers": [1, 1, 1, 5, 1, 1, 1, 1, 1, 1], "balanced": "balanced"}.items()
    }
    losses = {name: run.history[0]["train_loss"] for name, run in runs.items()}
    assert losses["table"] == losses["numbers"] != losses["plain"] != losses["balanced"]
    kept = {name: json.loads((run.folder / "config.json").read_text())["arguments"]["class_weights"] for name, run in runs.items()}
    assert kept["plain"] is None and kept["table"] == kept["numbers"] == [1, 1, 1, 5, 1, 1, 1, 1, 1, 1]
    labels = minivit.load_data("digits").limited(96).train_labels
    assert kept["balanced"] == pytest.approx((96 / (10 * np.bincount(labels))).tolist())
    again = train(class_weights=kept["balanced"], out=tmp_path / "again", **SMALL)
    assert again.history[0]["train_loss"] == losses["balanced"]
