"""Models in the folders of transformers, and state dicts of other programs."""

import json
import shutil

import numpy as np
import pytest
from golden_files import GOLDEN
from safetensors.numpy import load_file, save_file

import minivit
from minivit import UserError
from minivit.cli.main import main

FOLDER = GOLDEN / "hugging_face"
SMALL = dict(image_size=8, patch_size=4, num_classes=3, dim=16, depth=2, heads=2)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER / "vit", tmp_path / "vit")


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refused(function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) <= 300
    return message


# ----------------------------------------------------------------------------------------------------------------------- folders
@pytest.mark.parametrize("name", ["vit", "deit", "deit_with_teacher"])
def test_the_logits_are_those_of_transformers(name):
    model = minivit.load(FOLDER / name)
    with np.load(FOLDER / name / "answers.npz") as answers:
        np.testing.assert_allclose(model.model(answers["images"]).numpy(), answers["logits"], rtol=1e-5, atol=1e-5)
    assert model.class_names == ("ant", "bee", "cat")
    assert model.preprocessing.mean == (0.485, 0.456, 0.406) and model.preprocessing.std == (0.229, 0.224, 0.225)
    assert model.preprocessing.fit == ("stretch" if name == "vit" else "crop")


def test_its_file_of_weights_stands_for_the_folder(folder):
    images = np.zeros((1, 8, 8, 3), np.uint8)
    expected, found = (minivit.load(path).predict(images).probabilities for path in (folder, folder / "model.safetensors"))
    np.testing.assert_array_equal(found, expected)


def test_it_is_saved_and_labels_images(tmp_path, capsys):
    minivit.load(FOLDER / "deit").save(tmp_path / "a.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)
    given, expected = (minivit.load(path).predict(pixels).probabilities for path in (tmp_path / "a.safetensors", FOLDER / "deit"))
    np.testing.assert_array_equal(given, expected)
    assert main(["info", str(tmp_path / "a.safetensors")]) == 0 and "vit" in capsys.readouterr().out


@pytest.mark.parametrize("name, has_classifier", [("vit", True), ("vit", False), ("deit_with_teacher", True)])
def test_a_training_begins_with_its_weights(name, has_classifier, tmp_path):
    """The model is that of config.json, of which no other file is needed."""
    folder = shutil.copytree(FOLDER / name, tmp_path / name)
    (folder / "preprocessor_config.json").unlink()
    if not has_classifier:
        state = load_file(folder / "model.safetensors")
        bare = {name.removeprefix("vit."): array for name, array in state.items() if not name.startswith("classifier.")}
        save_file(bare, folder / "model.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
    given = dict(data=(pixels, np.arange(10) % 2), epochs=1, batch_size=4, lr=1e-9, min_lr=1e-9, warmup=0, progress=False)
    run = minivit.train(weights=folder, freeze="backbone", out=tmp_path / "run", **given)
    theirs, ours = minivit.load(FOLDER / name).model, run.model.model
    assert ours.config.num_classes == 2 and (ours.config.depth, ours.config.distillation) == (
        theirs.config.depth,
        theirs.config.distillation,
    )
    for block in ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "norm.weight"):
        np.testing.assert_array_equal(ours.state_dict()[block], theirs.state_dict()[block])


def test_weights_of_several_files_go_into_a_model():
    model = minivit.load(FOLDER / "deit").model
    own = minivit.create_model("vit", **vars(model.config) | {"seed": 1})
    for path in (FOLDER / "deit", FOLDER / "deit" / "model.safetensors.index.json"):
        own.restart(2)
        minivit.load_weights(own, path)
        assert all(np.array_equal(a, own.state_dict()[name]) for name, a in model.state_dict().items())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "swin"}, "model_type is 'swin', and minivit reads 'vit' and 'deit'"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"hidden_size": 24}, "wrong shape"),
        ({"num_hidden_layers": 10**6}, "parameter arrays"),
        ({"num_hidden_layers": 1}, "unexpected: blocks.1"),
        ({"num_attention_heads": 5}, "heads must divide dim"),
        ({"patch_size": "4"}, "patch_size"),
    ],
)
def test_a_configuration_that_does_not_fit(folder, changes, message):
    edit(folder / "config.json", **changes)
    assert message in refused(minivit.load, folder)


@pytest.mark.parametrize("changes, message", [({"do_rescale": False}, "not divided by 255"), ({"image_std": [0, 1, 1]}, "image_std")])
def test_preprocessing_that_there_is_not(folder, changes, message):
    edit(folder / "preprocessor_config.json", **changes)
    assert message in refused(minivit.load, folder)


def test_what_is_missing(folder):
    (folder / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json" in refused(minivit.load, folder)
    shutil.copy(FOLDER / "vit" / "preprocessor_config.json", folder)
    state = load_file(folder / "model.safetensors")
    save_file({name: a for name, a in state.items() if not name.startswith("classifier")}, folder / "model.safetensors")
    assert "has no classifier" in refused(minivit.load, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refused(minivit.load, folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", ""])
def test_an_index_names_files_beside_it_only(tmp_path, name):
    folder = shutil.copytree(FOLDER / "deit", tmp_path / "deit")
    edit(folder / "model.safetensors.index.json", weight_map={"deit.layernorm.bias": name})
    assert "no name of a file beside it" in refused(minivit.load, folder)


def test_an_index_of_weights_that_are_not_there(tmp_path):
    folder = shutil.copytree(FOLDER / "deit", tmp_path / "deit")
    edit(folder / "model.safetensors.index.json", weight_map={"another": "model-00001-of-00002.safetensors"})
    assert "names weights that its files have not: another" in refused(minivit.load, folder)


# -------------------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin", "a.ckpt", "b" * 200 + ".pth"])
def test_pickles_are_refused_with_the_line_that_converts_them(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for function, arguments in ((minivit.load, ()), (minivit.load_weights, (minivit.create_model("vit", **SMALL),))):
        message = refused(function, *arguments, tmp_path / name)
        assert "weights_only=True" in message and "'model.safetensors')" in message
        assert "is a pickle" in message or len(name) > 100


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_a_state_dict_of_dino(tmp_path, prefix):
    model = minivit.create_model("vit", **SMALL, layer_scale=0.5, seed=1)
    state = {prefix + name: array for name, array in model.state_dict().items() if not name.startswith("head.")}
    head = {prefix.replace("backbone.", "") + "head.mlp.0.weight": np.zeros((4, 16), np.float32)}
    save_file(state | head | {prefix + "mask_token": np.zeros((1, 16), np.float32)}, tmp_path / "dino.safetensors")
    own = minivit.create_model("vit", **SMALL, layer_scale=0.1, seed=2)
    before = own.head.weight.numpy().copy()
    minivit.load_weights(own, tmp_path / "dino.safetensors", head=False)
    assert all(np.array_equal(own.state_dict()[name], array) for name, array in model.state_dict().items() if not name.startswith("head"))
    assert np.array_equal(own.head.weight.numpy(), before)


def test_register_tokens_are_refused(tmp_path):
    model = minivit.create_model("vit", **SMALL)
    save_file(model.state_dict() | {"register_tokens": np.zeros((1, 4, 16), np.float32)}, tmp_path / "a.safetensors")
    assert "register tokens" in refused(minivit.load_weights, model, tmp_path / "a.safetensors")


# ------------------------------------------------------------------------------------------------------------------- distillation
def test_distillation():
    model = minivit.create_model("vit", **SMALL, distillation="head")
    assert model.prefix == 2 and model.pos_embed.shape == (1, 6, 16)
    model.reset_head(7)
    assert model(np.zeros((1, 3, 8, 8), np.float32)).shape == (1, 7)
    assert "set pool='cls'" in refused(minivit.create_model, "vit", **SMALL, distillation="head", pool="mean")
    options = dict(image_size=8, patches=((4, 4, 0), (2, 2, 0)), dim=16, depth=1, heads=2, options={"distillation": "token"})
    assert "no option 'distillation'" in refused(minivit.create_model, "dvt", **options)
