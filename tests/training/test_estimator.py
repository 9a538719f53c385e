"""`VisionClassifier`: scikit-learn's own checks, its tools on the digits, and what X, y and the parameters may be."""

import os
import pickle
from inspect import signature

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

import minivit
from minivit import UserError, VisionClassifier
from minivit.training.estimator import NOT_PARAMETERS, OWN
from minivit.training.options import TrainOptions

SMALL = {"model_options": {"dim": 16, "depth": 1, "heads": 2}, "batch_size": 16, "warmup": 0.5}
# The checks fit tables of any number of features: an image of one row has as many pixels.
ON_TABLES = {"image_shape": (1, -1), "model": "vit", "model_options": {"patch_size": 1, "dim": 16, "depth": 1, "heads": 2}}
ON_TABLES |= {"optimizer": "adamw", "lr": 5e-3, "batch_size": 16, "epochs": 30, "test_every": 30, "mixup": 0, "cutmix": 0}
DIGITS, LABELS = (values[:300] for values in load_digits(return_X_y=True))  # (300, 64) of 0.0 ... 16.0


def small(**parameters):
    return VisionClassifier(**SMALL | {"epochs": 2, "random_state": 0, "threads": 1} | parameters)


@pytest.fixture(scope="module")
def fitted():
    return small(epochs=8).fit(DIGITS, LABELS)


# No check is expected to fail.
@parametrize_with_checks([VisionClassifier(**ON_TABLES, threads=1)])
def test_scikit_learn_says_that_it_is_a_classifier(estimator, check):
    check(estimator)


# ----------------------------------------------------------------------------------------------------------- scikit-learn's tools
def test_a_search_over_learning_rates():
    search = GridSearchCV(small(epochs=4), {"lr": [1e-6, 6e-3]}, cv=2, error_score="raise").fit(DIGITS, LABELS)
    assert search.best_params_ == {"lr": 6e-3} and search.score(DIGITS, LABELS) > 0.5


def test_in_a_pipeline_and_in_cross_validation():
    pipeline = make_pipeline(FunctionTransformer(lambda rows: rows / 16), small(epochs=4))
    assert cross_val_score(pipeline, DIGITS, LABELS, cv=2).mean() > 0.5
    pipeline.set_params(visionclassifier__epochs=1)
    assert len(pipeline.fit(DIGITS, LABELS)[-1].history_) == 1


@pytest.mark.slow
def test_in_processes_of_joblib():
    alone, together = (cross_val_score(small(), DIGITS, LABELS, cv=2, n_jobs=jobs) for jobs in (1, 2))
    np.testing.assert_array_equal(alone, together)


def test_a_pickle_answers_as_the_original(fitted):
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict_proba(DIGITS[:9]), fitted.predict_proba(DIGITS[:9]))


def test_the_parameters_are_the_options_of_train():
    parameters = VisionClassifier().get_params()
    options = set(TrainOptions.__dataclass_fields__)
    assert options > NOT_PARAMETERS and parameters.keys() == options - NOT_PARAMETERS | OWN.keys()
    assert set(signature(VisionClassifier).parameters) == set(parameters)
    copy = clone(small(ema=0.9))
    assert copy.ema == 0.9 and repr(copy.set_params(ema=None)) == repr(small())
    with pytest.raises(TypeError, match=r"no parameter 'epoch' \(nearest: epochs, on_epoch\)"):
        VisionClassifier(epoch=1)
    assert all(f"\n{name}: " in VisionClassifier.__doc__ for name in parameters)


# --------------------------------------------------------------------------------------------------------------------------- X
def test_the_same_images_in_any_form_are_the_same_to_it(fitted):
    rows, expected = DIGITS[:20], fitted.predict_proba(DIGITS[:20])
    images = rows.reshape(-1, 8, 8)
    for form in (images, images[..., None], images.tolist(), rows.astype(np.float32), rows.astype(np.int16), rows.astype(np.uint8)):
        np.testing.assert_array_equal(fitted.predict_proba(form), expected)
    assert fitted.image_shape_ == (8, 8, 1) and fitted.n_features_in_ == 64 and fitted.pixel_range_ == (0, 16)
    np.testing.assert_array_equal(small(epochs=8).fit(DIGITS.reshape(-1, 8, 8), LABELS).predict_proba(rows), expected)
    np.testing.assert_array_equal(small(epochs=8).fit(DIGITS / 16 - 0.5, LABELS).predict(rows / 16 - 0.5), fitted.predict(rows))


def test_numbers_beyond_those_of_training_count_as_the_nearest(fitted):
    np.testing.assert_array_equal(fitted.predict_proba(DIGITS[:5] * 100), fitted.predict_proba(np.minimum(DIGITS[:5] * 100, 16)))


def test_bytes_are_pixels_from_0_to_255():
    images = np.random.default_rng(0).integers(100, 120, (24, 4, 6, 3), np.uint8)
    estimator = small().fit(images, np.arange(24) % 3)
    assert estimator.pixel_range_ == (0, 255) and estimator.image_shape_ == (4, 6, 3)
    expected = estimator.classifier_.predict(images).probabilities
    np.testing.assert_array_equal(estimator.predict_proba(images), expected)
    np.testing.assert_allclose(estimator.predict_proba(images.astype(float)), expected, rtol=1e-4)
    table = small(image_shape=(4, -1, 3)).fit(images.reshape(24, -1), np.arange(24) % 3)
    np.testing.assert_array_equal(table.predict_proba(images.reshape(24, -1)), expected)


def test_images_of_another_size_are_resized():
    estimator = small(image_size=4).fit(DIGITS, LABELS)
    assert estimator.classifier_.config.image_size == 4 and estimator.predict(DIGITS[:3]).shape == (3,)


@pytest.mark.parametrize(
    "X, parameters, message",
    [
        (np.zeros((6, 65)), {}, "X has 65 features, no square image: give image_shape, "),
        (np.zeros((6, 64)), {"image_shape": (8, 9)}, r"image_shape=\(8, 9\) does not fit X, which has 64 features"),
        (np.zeros((6, 64)), {"image_shape": 8}, r"image_shape must be \(rows, columns\) or \(rows, columns, channels\), got 8"),
        (np.zeros((6, 64)), {"image_shape": (-1, -1)}, r"image_shape must be .*, got \(-1, -1\)"),
        (np.zeros((6, 8, 8)), {"image_shape": (4, 16)}, r"image_shape=\(4, 16\) does not fit X, which has 8×8×1 features"),
        (np.zeros((6, 2, 2, 8, 8)), {}, r"X must be a table \(N, features\), or images"),
        ([np.zeros((8, 8)), np.zeros((8, 9))] * 3, {}, "X must be one array of images of equal sizes"),
        (np.zeros((6, 64)), {"epochs": 0}, "epochs must be a whole number of at least 1, not 0"),
        (np.zeros((6, 64)), {"optimizer": "adam"}, r"unknown optimizer 'adam' \(nearest: adamw\)"),
    ],
)
def test_what_does_not_fit_is_one_line(X, parameters, message):
    with pytest.raises(UserError, match=message):
        small(**parameters).fit(X, [0, 1, 2] * 2)


def test_images_of_another_shape_are_refused_after_training(fitted):
    with pytest.raises(UserError, match="X has images of 4×16×1, but the classifier was fitted with 8×8×1"):
        fitted.predict(DIGITS.reshape(-1, 4, 16))
    with pytest.raises(ValueError, match="X has 63 features, but VisionClassifier is expecting 64 features as input"):
        fitted.predict(DIGITS[:, 1:])
    with pytest.raises(NotFittedError):
        small().predict(DIGITS)


# --------------------------------------------------------------------------------------------------------------------------- y
@pytest.mark.parametrize(
    "classes",
    [["zwei", "eins"], [7, -3], [True, False], [2.0, 1.0], np.array(["b", "a"], object), ["tab\there", ""]],
    ids=["str", "int", "bool", "float", "object", "odd names"],
)
def test_labels_of_any_kind(classes, fitted):
    y = np.asarray(classes)[LABELS[:60] % 2]
    estimator = small(epochs=1).fit(DIGITS[:60], y)
    assert estimator.classes_.dtype == y.dtype and estimator.classes_.tolist() == sorted(classes)
    answer, probabilities = estimator.predict(DIGITS[:9]), estimator.predict_proba(DIGITS[:9])
    assert answer.dtype == y.dtype and answer.tolist() == [sorted(classes)[k] for k in probabilities.argmax(1)]


def test_classes_weigh_as_told():
    y = (LABELS == 3).astype(int)
    counts = np.bincount(y)
    balanced = {0: 150 / counts[0], 1: 150 / counts[1]}
    answers = {str(w): small(class_weight=w).fit(DIGITS, y).predict_proba(DIGITS) for w in ({0: 99}, {1: 99}, balanced, "balanced")}
    unequal, other, explicit, named = answers.values()
    assert unequal.argmax(1)[y == 1].mean() < 0.1 and other.argmax(1)[y == 1].mean() == 1
    np.testing.assert_array_equal(explicit, named)


# ------------------------------------------------------------------------------------------------------------------- parameters
def test_nothing_is_written_unless_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small().fit(DIGITS, LABELS)
    assert not os.listdir(tmp_path)
    estimator = small(out=tmp_path / "run").fit(DIGITS, LABELS)
    np.testing.assert_array_equal(
        minivit.load(tmp_path / "run").predict(DIGITS[:3].reshape(-1, 8, 8) / 16).probabilities, estimator.predict_proba(DIGITS[:3])
    )


def test_random_state(fitted):
    same = small(epochs=8).fit(DIGITS, LABELS)
    np.testing.assert_array_equal(same.predict_proba(DIGITS), fitted.predict_proba(DIGITS))
    generator = np.random.RandomState(3)
    drawn = [small(random_state=generator).fit(DIGITS, LABELS).predict_proba(DIGITS[:5]) for _ in range(2)]
    again = small(random_state=np.random.RandomState(3)).fit(DIGITS, LABELS).predict_proba(DIGITS[:5])
    assert not np.array_equal(*drawn) and np.array_equal(drawn[0], again)
    np.random.seed(5)
    first = small(random_state=None).fit(DIGITS, LABELS).predict_proba(DIGITS[:5])
    assert not np.array_equal(first, small(random_state=None).fit(DIGITS, LABELS).predict_proba(DIGITS[:5]))


def test_a_whole_number_is_the_seed_of_train():
    run = minivit.train(**SMALL, data=(DIGITS.reshape(-1, 8, 8) / 16, LABELS) * 2, epochs=2, seed=0, threads=1, progress=False, save=False)
    np.testing.assert_array_equal(
        run.model.predict(DIGITS[:5].reshape(-1, 8, 8) / 16).probabilities, small().fit(DIGITS, LABELS).predict_proba(DIGITS[:5])
    )


def test_progress_and_history(capfd):
    estimator = small(validation_fraction=0.2).fit(DIGITS, LABELS)
    assert capfd.readouterr() == ("", "")
    assert [line["epoch"] for line in estimator.history_[:2]] == [1, 2]
    assert {"train_loss", "validation_loss", "validation_accuracy", "learning_rate"} <= estimator.history_[0].keys()
    small(verbose=True, batch_size=10_000).fit(DIGITS, LABELS)
    assert "epoch 2/2" in capfd.readouterr().err


def test_a_given_model_is_trained_but_not_changed():
    model = minivit.create_model("vit", image_size=8, in_channels=1, num_classes=10, patch_size=2, **SMALL["model_options"])
    before = model.state_dict()
    estimator = small(model=model, model_options=None).fit(DIGITS, LABELS)
    assert all(np.array_equal(values, before[name]) for name, values in model.state_dict().items())
    assert not np.array_equal(estimator.classifier_.state_dict()["head.weight"], before["head.weight"])


# ------------------------------------------------------------------------------------------------------------------ partial_fit
def test_partial_fit_goes_on_where_it_was():
    estimator, scores = small(), []
    for _ in range(3):
        for part in (slice(0, 150), slice(150, 300)):
            estimator.partial_fit(DIGITS[part], LABELS[part], classes=range(10))
        scores.append(estimator.score(DIGITS, LABELS))
    assert scores[0] < scores[2] > 0.4
    assert estimator.fit(DIGITS, LABELS).predict_proba(DIGITS).tolist() == small().fit(DIGITS, LABELS).predict_proba(DIGITS).tolist()


def test_partial_fit_keeps_the_classes_and_the_scale_of_the_first_call():
    estimator = small().partial_fit(DIGITS, LABELS % 2, classes=[0, 1, 5])
    before = estimator.predict_proba(DIGITS[:5])
    assert before.shape == (5, 3)
    with pytest.raises(UserError, match="y has the label 3, which is none of the classes"):
        estimator.partial_fit(DIGITS, np.full(300, 3))
    with pytest.raises(UserError, match="are not those of the first call"):
        estimator.partial_fit(DIGITS, LABELS % 2, classes=[0, 1])
    np.testing.assert_array_equal(estimator.predict_proba(DIGITS[:5]), before)
    estimator.partial_fit(DIGITS[:40] / 2, np.full(40, 5))
    assert estimator.pixel_range_ == (0, 16) and estimator.predict_proba(DIGITS[:5])[:, 2].mean() > before[:, 2].mean()
    with pytest.raises(UserError, match="classes must be passed on the first call"):
        small().partial_fit(DIGITS, LABELS)
