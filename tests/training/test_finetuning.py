"""Training that begins with the weights of another, and layers that keep theirs."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import minivit
from minivit import UserError
from minivit.cli import main
from minivit.training import setup

SMALL = {"dim": 16, "depth": 2, "heads": 2}
SLOW = {"lr": 1e-12, "weight_decay": 0}  # with which weights stay as they are, nearly


def images(size=8, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (24, size, size, 1), np.uint8), np.arange(24) % classes


def train(out, data, **options):
    return minivit.train(data=data, epochs=1, batch_size=8, out=out, progress=False, **options)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of a model with batch normalisation, of three classes of 8 x 8 images."""
    return train(tmp_path_factory.mktemp("runs") / "first", images(), model="localvit_micro_patch2_8", model_options=SMALL)


def changed(before, after):
    after = after.model.state_dict()
    return {name for name, array in before.model.state_dict().items() if not np.array_equal(array, after[name])}


def test_the_head_is_kept_for_the_same_classes(first, tmp_path):
    again = train(tmp_path / "again", images(), weights=first.folder, **SLOW)
    assert again.model.model.config == first.model.model.config and again.model.model.name == first.model.model.name
    for name, array in first.model.state_dict().items():
        if not name.endswith(("running_mean", "running_var")):
            np.testing.assert_allclose(again.model.state_dict()[name], array, atol=1e-9, err_msg=name)
    assert json.loads((again.folder / "config.json").read_text())["arguments"]["weights"] == str(first.folder / "model.safetensors")


def test_other_images_and_classes(first, tmp_path, capsys):
    other = minivit.train(
        data=images(12, 4), weights=first.folder / "model.safetensors", epochs=1, batch_size=8, out=tmp_path / "other", **SLOW
    )
    old, new = first.model.state_dict(), other.model.state_dict()
    assert new["head.weight"].shape == (4, 16) and other.model.config.image_size == 12
    np.testing.assert_allclose(new["blocks.1.attn.qkv.weight"], old["blocks.1.attn.qkv.weight"], atol=1e-9)
    said = capsys.readouterr().err
    assert "a new head for 4 classes" in said and "pos_embed: resized from (1, 16, 16) to (1, 36, 16)" in said


def test_weights_of_others_need_a_model(tmp_path):
    model = minivit.create_model("vit", image_size=8, patch_size=4, in_channels=1, num_classes=7, **SMALL)
    path = tmp_path / "theirs.safetensors"
    save_file(model.state_dict(), path)
    with pytest.raises(UserError, match="does not say which model its weights are of: give model"):
        train(tmp_path / "run", images(), weights=path)
    run = train(tmp_path / "run", images(), weights=path, model="vit", model_options=SMALL | {"patch_size": 4}, **SLOW)
    np.testing.assert_allclose(run.model.state_dict()["patch_embed.proj.weight"], model.state_dict()["patch_embed.proj.weight"], atol=1e-9)


@pytest.mark.parametrize(
    "freeze, learning", [("backbone", ("head.",)), (0, ("blocks.", "norm.", "head.")), (1, ("blocks.1.", "norm.", "head."))]
)
def test_what_is_frozen_stays(first, tmp_path, freeze, learning):
    """The statistics of batch normalisation too; afterwards all can learn again."""
    run = train(tmp_path / "run", images(), weights=first.folder, freeze=freeze, lr=0.1)
    names = [name for name, _ in first.model.named_parameters()]
    assert changed(first, run) == {name for name in names if name.startswith(learning)}
    model = run.model.model
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in first.model.model.parameters()]
    assert model.train().blocks[0].training
    model.eval()


@pytest.mark.parametrize("resizing", [0.0, 0.5])
def test_features_that_stay_are_computed_once(first, tmp_path, monkeypatch, resizing):
    options = dict(weights=first.folder, freeze="backbone", augmentation="none", mixup=0, cutmix=0, lr=0.1, progressive_resizing=resizing)
    once = minivit.train(data=images(), epochs=4, batch_size=8, out=tmp_path / "once", progress=False, **options)
    monkeypatch.setattr(setup, "learns_from_features", lambda *_: False)
    always = minivit.train(data=images(), epochs=4, batch_size=8, out=tmp_path / "always", progress=False, **options)
    assert "head.weight" in changed(first, once)
    for name, array in once.model.state_dict().items():
        np.testing.assert_allclose(array, always.model.state_dict()[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"freeze": 3}, "freeze=3: localvit_micro_patch2_8 has 2 blocks; backbone freezes all but the head"),
        ({"freeze": "blocks"}, "freeze must be backbone or a number of blocks"),
        ({"freeze": -1}, "freeze=-1: localvit_micro_patch2_8 has 2 blocks"),
        ({"weights": "nowhere"}, "there is no run nowhere"),
        ({"layer_decay": 0}, "layer_decay must be a number above 0"),
    ],
)
def test_what_cannot_be(first, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", images(), **{"weights": first.folder} | options)
    with pytest.raises(UserError, match="give weights or a model that has them, not both"):
        train(tmp_path / "run", images(), weights=first.folder, model=first.model)


def test_on_the_command_line(first, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["--data", "digits", "--limit", "64", "--epochs", "1", "--weights", str(first.folder), "--freeze", "1", "--out", str(out)]
    assert main(["train", *arguments, "--layer-decay", "0.7", "--quiet"]) == 0
    written = json.loads((out / "config.json").read_text())["arguments"]
    assert (written["freeze"], written["layer_decay"], written["model"]) == (1, 0.7, "localvit_micro_patch2_8")
    before, after = first.model.state_dict(), minivit.load(out).state_dict()
    np.testing.assert_array_equal(before["blocks.0.attn.qkv.weight"], after["blocks.0.attn.qkv.weight"])
