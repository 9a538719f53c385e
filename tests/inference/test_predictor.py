"""Predictor and Classifier: the model's own numbers, for images of every kind."""

import numpy as np
import pytest
from PIL import Image

import minivit
from minivit import Predictor, Trainer, UserError, create_model
from minivit.inference.classifier import Classifier, Preprocessing
from minivit.inference.evaluate import evaluate
from minivit.inference.predictor import FIRST_PLANS
from minivit.kernels.cpu import run

NAMES = ("cat", "dog", "eel")


NANO = {"image_size": 8, "patch_size": 4, "in_channels": 3, "num_classes": 3, "dim": 16, "depth": 2, "heads": 2}


def nano(**options):
    return create_model("vit", **NANO | options)


@pytest.fixture(scope="module")
def model():
    return nano(seed=1, drop_path_rate=0.5)


@pytest.fixture
def classifier(model):
    return Classifier(model, NAMES, Preprocessing(8, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)


def images(count):
    return np.random.default_rng(count).standard_normal((count, 3, 8, 8)).astype(np.float32)


def direct(model, x):
    with minivit.no_grad():
        return model.eval()(x).numpy()


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 20])
def test_logits_are_the_models(model, count):
    predictor = Predictor(model, batch_size=8)
    for _ in range(2):  # recorded, then replayed
        logits = predictor(images(count))
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, direct(model, images(count)), rtol=1e-5, atol=1e-6)


def test_any_number_of_threads_gives_the_same_logits(model):
    one, all_of_them = (Predictor(model, threads=threads) for threads in (1, None))
    for _ in range(2):
        np.testing.assert_array_equal(one(images(9)), all_of_them(images(9)))
    assert [plan.threads for plan in one.plans] == [1] and run.threads() == run.most_threads() == all_of_them.threads


def test_few_plans_serve_all_batch_sizes(model):
    predictor = Predictor(model)
    for count in (*range(1, 20), 3, 40, 1):
        np.testing.assert_allclose(predictor(images(count)), direct(model, images(count)), rtol=1e-5, atol=1e-6)
        assert len(predictor._plans[0]) <= FIRST_PLANS


def test_results_do_not_change_later(model):
    predictor = Predictor(model)
    first = predictor(images(4))
    kept = first.copy()
    predictor(images(4)[::-1].copy())
    np.testing.assert_array_equal(first, kept)


def test_predictor_follows_the_weights():
    model = nano()
    predictor = Predictor(model)
    predictor(images(4))
    model.head.bias.data += 1.0  # in place
    np.testing.assert_allclose(predictor(images(4)), direct(model, images(4)), rtol=1e-5, atol=1e-6)
    trainer = Trainer(model, lr=0.1)  # moves them
    trainer.step(images(4), np.array([0, 1, 2, 0]))
    np.testing.assert_allclose(predictor(images(4)), direct(model, images(4)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bf16x3", "bfloat16", "int8"])
def test_packed_weights_follow_their_parameters(precision):
    model = nano()
    predictor, trainer, seen = Predictor(model, precision), Trainer(model, lr=0.1), set()

    def check():
        logits = predictor(images(4))
        np.testing.assert_array_equal(logits, Predictor(model, precision)(images(4)))
        seen.add(logits.tobytes())

    check()
    for _ in range(2):
        trainer.step(images(4), np.array([0, 1, 2, 0]))
        check()
    model.load_state_dict(nano(seed=5).state_dict())
    model.head.weight.data[...] = 1
    check()
    model.blocks[0].mlp.fc1.weight.data[1, 2] += 9  # a single number may go unnoticed
    predictor.refresh()
    check()
    assert len(seen) == 5


def test_predictor_leaves_the_mode_alone(model):
    model.train()
    Predictor(model)(images(2))
    assert model.training and model.blocks[0].training
    model.eval()


def test_float64_models_predict_float32_logits():
    model = nano(dtype="float64")
    logits = Predictor(model, precision="float64")(images(2))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, direct(model, images(2)), rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"precision": "float64"}, "create it with dtype='float64'"),
        ({"precision": "int4"}, "precision='int4' is not available"),
        ({"device": "tpu"}, "device='tpu' is not available: choose 'cpu' or 'cuda'"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"threads": -1}, "threads must be a whole number"),
    ],
)
def test_settings_out_of_range_are_told(model, options, message):
    with pytest.raises(UserError, match=message):
        Predictor(model, **options)


def test_images_of_a_wrong_shape_are_told(model):
    for wrong in (np.zeros((3, 8, 8)), np.zeros((0, 3, 8, 8)), np.zeros((2, 3, 9, 9))):
        with pytest.raises(UserError, match="images"):
            Predictor(model)(wrong)


# ------------------------------------------------------------------------------------------------------------------------ predict
def test_predictions_are_the_softmax_of_normalised_images(classifier, pixels):
    normalised = (pixels / 255 - np.array([0.4, 0.5, 0.6])) / np.array([0.2, 0.25, 0.3])
    logits = direct(classifier.model, normalised.transpose(0, 3, 1, 2).astype(np.float32)).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    prediction = classifier.predict(pixels)
    np.testing.assert_allclose(prediction.probabilities, expected, rtol=1e-4)
    np.testing.assert_array_equal(prediction.labels, expected.argmax(1))
    np.testing.assert_allclose(prediction.confidence, expected.max(1), rtol=1e-4)
    assert prediction.names == [NAMES[k] for k in expected.argmax(1)]
    assert len(prediction) == 5


def test_every_kind_of_image_gives_the_same(classifier, pixels, tmp_path):
    expected = classifier.predict(pixels).probabilities
    pictures = [Image.fromarray(p) for p in pixels]
    paths = [tmp_path / f"{i}.png" for i in range(len(pixels))]
    for picture, path in zip(pictures, paths):
        picture.save(path)
    for given in (pictures, paths, [str(p) for p in paths], [pixels[0], pictures[1], paths[2], pixels[3], pixels[4]]):
        np.testing.assert_array_equal(classifier.predict(given).probabilities, expected)
    np.testing.assert_allclose(classifier.predict(paths[2]).probabilities, expected[2:3], rtol=1e-5)
    assert classifier.predict(pictures[0].resize((40, 30))).probabilities.shape == (1, 3)


def test_an_unreadable_image_is_told(classifier, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"bad\.png"):
        classifier.predict(tmp_path / "bad.png")


def test_a_classifier_is_its_model(classifier, model):
    assert list(classifier.state_dict()) == list(model.state_dict())
    np.testing.assert_array_equal(classifier(images(2)).numpy(), direct(model, images(2)))
    assert classifier.config is model.config
    assert classifier.train().model.training and not classifier.eval().model.training


def test_saved_classifiers_come_back(classifier, pixels, tmp_path):
    classifier.save(tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        found = minivit.load(path)
        assert found.class_names == NAMES and found.preprocessing == classifier.preprocessing
        np.testing.assert_array_equal(found.predict(pixels).probabilities, classifier.predict(pixels).probabilities)


def test_weights_without_preprocessing_are_told(model, tmp_path):
    minivit.save_weights(model, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="load its weights with load_weights"):
        minivit.load(tmp_path)


def test_evaluate_is_exact_with_a_remainder(classifier):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (23, 8, 8, 3), np.uint8), rng.integers(0, 3, 23)
    probabilities = classifier.predict(pixels).probabilities.astype(np.float64)
    kept = classifier.preprocessing
    loss, [accuracy], balanced, [logits] = evaluate(classifier.predictor, pixels, labels, kept.mean, kept.std, 3, batch_size=8)
    assert loss == pytest.approx(-np.log(probabilities[np.arange(23), labels]).mean(), rel=1e-5)
    right = probabilities.argmax(1) == labels
    np.testing.assert_array_equal(logits.argmax(1), probabilities.argmax(1))
    assert accuracy == right.mean()
    assert balanced == pytest.approx(np.mean([right[labels == k].mean() for k in range(3)]))


def test_balanced_accuracy_leaves_out_classes_without_images(classifier):
    pixels, labels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8), np.array([0] * 8 + [2])
    right = classifier.predict(pixels).labels == labels
    kept = classifier.preprocessing
    found = evaluate(classifier.predictor, pixels, labels, kept.mean, kept.std, 3)
    assert found.balanced_accuracy == pytest.approx((right[:8].mean() + right[8]) / 2)


@pytest.mark.parametrize("name", ("vit_nano_patch2_8", "dvt_nano_8"))
def test_tta_is_the_mean_over_mirror_images(name):
    model = create_model(name, seed=1)
    images = np.random.default_rng(0).normal(size=(5, 1, 8, 8)).astype(np.float32)
    plain, averaged = Predictor(model), Predictor(model, tta=True)
    mirrored = images[..., ::-1]
    np.testing.assert_array_equal(averaged(images), (plain(images) + plain(mirrored)) / 2)
    np.testing.assert_array_equal(averaged(images), averaged(mirrored))
    np.testing.assert_array_equal(averaged.logits(images), (plain.logits(images) + plain.logits(mirrored)) / 2)
    assert [len(p) for p in averaged.exits(images)] == [5] * plain.stages
