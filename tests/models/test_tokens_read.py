"""The last block computes what comes after its attention for the tokens alone that the head reads."""

import numpy as np
import pytest

from minivit import create_model
from minivit.models import FAMILIES, PRESETS
from minivit.models.base import Backbone
from minivit.training.trainer import Trainer

SMALL = {"image_size": 16, "dim": 16, "depth": 2, "heads": 2, "num_classes": 3, "dtype": "float64"}
READING = [
    pytest.param("vit", {"patch_size": 4}, id="vit"),
    pytest.param("vit", {"patch_size": 4, "layer_scale": 0.5}, id="vit with layer scale"),
    pytest.param("deepvit", {"patch_size": 4, "reattention_blocks": (1,)}, id="deepvit"),
    pytest.param("t2t", {"token_dim": 8}, id="t2t"),
]


def results(model, features):
    """The features and the gradients of all parameters."""
    weight = np.random.default_rng(1).normal(size=features.shape)
    for parameter in model.parameters():
        parameter.grad = None
    (features * weight).sum().backward()
    return features.numpy(), {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family, options", READING)
@pytest.mark.parametrize("training", [True, False])
def test_features_and_gradients_are_those_of_all_tokens(family, options, training):
    model = create_model(family, **SMALL | options, seed=0)
    model.train() if training else model.eval()
    images = np.random.default_rng(0).normal(size=(4, 3, 16, 16))
    assert model.tokens_read == 1
    random = model.random.state.copy()  # T2T-ViT has dropout by default
    features, gradients = results(model, model.features(images))
    model.random.state[...] = random
    of_all, gradients_of_all = results(model, model.pool(model.tokens(images)))
    np.testing.assert_allclose(features, of_all, rtol=1e-12, atol=1e-13)
    assert gradients.keys() == gradients_of_all.keys() >= {"blocks.1.mlp.fc1.weight", "blocks.0.attn.qkv.weight"}
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, gradients_of_all[name], rtol=1e-9, atol=1e-12, err_msg=name)
    assert model.tokens(images).shape[1] > 1


def test_all_families_whose_head_reads_one_token_are_tested():
    reading = {
        name
        for name, family in FAMILIES.items()
        if issubclass(family, Backbone) and getattr(create_model(next(p for p in PRESETS if PRESETS[p] is family)), "tokens_read", None)
    }
    assert reading <= {parameter.values[0] for parameter in READING}


def test_a_step_takes_less_arithmetic():
    """Of two blocks the second multiplies one token of 17 by its projection and its MLP, and the cost is counted as in papers."""
    images, labels = np.zeros((4, 3, 16, 16)), np.arange(4) % 3
    operations, macs = {}, {}
    for pool in ("cls", "mean"):
        model = create_model("vit", **SMALL | {"patch_size": 4, "pool": pool, "class_token": True}, seed=0)
        trainer = Trainer(model, precision="float64", threads=1)
        trainer.step(images, labels)
        calls = {id(call): call for call, _ in trainer.plans[0].labels if call}
        operations[pool], macs[pool] = sum(call.least()[0] for call in calls.values()), model.cost().total
    assert operations["cls"] < 0.75 * operations["mean"]
    assert abs(macs["cls"] - macs["mean"]) < 0.01 * macs["mean"]
