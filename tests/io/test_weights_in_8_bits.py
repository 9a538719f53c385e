"""Weights in 8 bits in a file: a quarter of the size, nearly the same model, and the very same predictions in 8 bits."""

import numpy as np
import pytest
import safetensors.numpy

import minivit
from minivit import UserError
from minivit.inference.classifier import Classifier, Preprocessing
from minivit.io.int8 import SCALE, restored, rounded
from minivit.io.weights import read_safetensors

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
FAMILIES = {
    "vit": dict(patch_size=2, heads=2),
    "mixer": dict(patch_size=2),
    "t2t": dict(heads=2, token_dim=32, unfolds=((3, 1, 1), (3, 2, 1), (3, 1, 1))),
    "localvit": dict(patch_size=2, heads=2, se_reduction=16),
    "dvt": dict(patches=((4, 4, 0), (4, 2, 0)), heads=2),
}


def classifier(family, **options):
    model = minivit.create_model(family, image_size=8, in_channels=1, num_classes=10, dim=64, depth=2, **FAMILIES[family], **options)
    rng = np.random.default_rng(1)
    for parameter in model.parameters():  # away from a zero head
        parameter.data += (0.05 * rng.standard_normal(parameter.shape)).astype(np.float32)
    return Classifier(model, [*"0123456789"], Preprocessing(8, 1, (0.3,), (0.4,)), range(20) if model.num_exits > 1 else ())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_predicts_nearly_the_same(family, tmp_path):
    whole = classifier(family)
    whole.save(tmp_path / "whole.safetensors")
    whole.save(tmp_path / "small.safetensors", precision="int8")
    assert (tmp_path / "small.safetensors").stat().st_size < 0.45 * (tmp_path / "whole.safetensors").stat().st_size
    small, high = minivit.load(tmp_path / "small.safetensors"), whole.predict(PIXELS).probabilities
    assert 0 < np.abs(small.predict(PIXELS).probabilities - high).max() < 0.05
    state, kept = small.model.state_dict(), whole.model.state_dict()
    assert {name for name in kept if (state[name] != kept[name]).any()} == {
        name.removesuffix(SCALE) for name in safetensors.numpy.load_file(tmp_path / "small.safetensors") if name.endswith(SCALE)
    }
    for name, array in state.items():
        np.testing.assert_allclose(array, kept[name], rtol=0, atol=np.abs(kept[name]).max() / 200)
        assert "head" not in name or (array == kept[name]).all()


def test_predictions_in_8_bits_do_not_change(tmp_path):
    whole = classifier("vit")
    whole.save(tmp_path / "small.safetensors", precision="int8")
    before = Classifier(whole.model, whole.class_names, whole.preprocessing, precision="int8").predict(PIXELS).probabilities
    after = minivit.load(tmp_path / "small.safetensors", precision="int8").predict(PIXELS).probabilities
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-6)


def test_thresholds_of_the_exact_weights_are_not_used(tmp_path):
    whole = classifier("dvt")
    images = np.random.default_rng(2).standard_normal((100, 1, 8, 8)).astype(np.float32)
    minivit.calibrate(whole.model, images, np.arange(100) % 10, unit="share")
    whole.predict(PIXELS, budget=1.0)
    whole.save(tmp_path / "small.safetensors", precision="int8")
    small = minivit.load(tmp_path / "small.safetensors")
    assert len(small.predict(PIXELS)) == 20
    with pytest.raises(UserError, match=r"thresholds of another model.*calibrate it anew"):
        small.predict(PIXELS, budget=1.0)
    minivit.calibrate(small.model, images, np.arange(100) % 10, unit="share")
    assert len(small.predict(PIXELS, budget=1.0)) == 20


def test_weights_come_back_into_a_model(tmp_path):
    source, target = classifier("vit").model, classifier("vit", seed=5).model
    minivit.save_weights(source, tmp_path / "w.safetensors", precision="int8")
    minivit.load_weights(target, tmp_path / "w.safetensors")
    np.testing.assert_allclose(target.blocks[0].mlp.fc1.weight.data, source.blocks[0].mlp.fc1.weight.data, rtol=0, atol=2e-3)


def test_what_is_rounded():
    rng = np.random.default_rng(0)
    state = {
        "a.weight": rng.standard_normal((4, 40)).astype(np.float32),
        "conv.weight": rng.standard_normal((4, 8, 3, 3)).astype(np.float32),
        "narrow.weight": rng.standard_normal((40, 31)).astype(np.float32),
        "head.weight": rng.standard_normal((4, 40)).astype(np.float32),
        "double.weight": rng.standard_normal((4, 40)),
        "norm.weight": np.ones(40, np.float32),
        "broken.weight": np.full((4, 40), np.nan, np.float32),
        "pos_embed": rng.standard_normal((1, 4, 40)).astype(np.float32),
    }
    state["a.weight"][1] = 0
    stored = rounded(state, lambda name: "head" in name)
    assert {name for name in stored if stored[name].dtype == np.int8} == {"a.weight", "conv.weight"}
    assert stored.keys() == state.keys() | {"a.weight.scale", "conv.weight.scale"}
    back = restored(stored)
    assert back.keys() == state.keys()
    for name in state:
        steps = np.abs(state[name]).reshape(len(state[name]), -1).max(1) / 127 if name in ("a.weight", "conv.weight") else np.zeros(1)
        error = np.abs(np.nan_to_num(back[name]) - np.nan_to_num(state[name])).reshape(len(state[name]), -1).max(1)
        assert (error <= 0.51 * steps).all(), name
    again = rounded(back, lambda name: "head" in name)
    np.testing.assert_array_equal(again["a.weight"], stored["a.weight"])  # rounding again changes nothing


@pytest.mark.parametrize("shape, kind", [((3,), np.float32), ((4, 1), np.float32), ((4,), np.float64)])
def test_a_scale_that_does_not_fit_is_told(tmp_path, shape, kind):
    safetensors.numpy.save_file({"a.weight": np.ones((4, 40), np.int8), "a.weight.scale": np.ones(shape, kind)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"is damaged or no safetensors file \(a\.weight\.scale has"):
        read_safetensors(tmp_path / "a.safetensors")


def test_whole_numbers_of_others_stay_as_they_are(tmp_path):
    arrays = {"a.weight": np.ones((4, 40), np.int8), "b.scale": np.ones(3, np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    state, _ = read_safetensors(tmp_path / "a.safetensors")
    assert {name: array.dtype for name, array in state.items()} == {name: array.dtype for name, array in arrays.items()}


def test_another_precision_is_told(tmp_path):
    with pytest.raises(UserError, match="precision='int4': weights are saved as they are, or in int8"):
        classifier("vit").save(tmp_path / "a.safetensors", precision="int4")
