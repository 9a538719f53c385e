"""LocalViT against its authors' code, with the batch's statistics and with running ones; its variants."""

import json

import numpy as np
import pytest
from golden_files import assert_matches, golden_path, part, read_golden

import minivit
from minivit import Predictor, Tensor, UserError, no_grad, plots

NAMES = {  # ours: the authors'
    "localvit_tiny": "localvit_tiny_mlp4_act3_r192",
    "localvit_tiny_mlp4_act3_r4": "localvit_tiny_mlp4_act3_r4",
    "localvit_tiny_mlp6_act1": "localvit_tiny_mlp6_act1",
    "localvit_small": "localvit_small_mlp4_act3_r384",
}
STATISTICS = ("running_mean", "running_var")
UNTRACKED = "num_batches_tracked"


def golden(name, dtype="float64"):
    arrays, config = read_golden(f"{name}.safetensors")
    fields = ("image_size", "patch_size", "in_channels", "num_classes", "dim", "depth", "heads", "mlp_ratio", "activation")
    options = {field: config[field] for field in (*fields, "channel_attention")}
    options |= {"eps": config["norm_eps"], "se_reduction": config["se_reduction"] or 192, "dtype": dtype}
    model = minivit.create_model("localvit", **options)
    model.load_state_dict(part(arrays, "weights/"))
    return model, arrays


def small(**options):
    return minivit.create_model(
        "localvit", **dict(image_size=8, patch_size=4, in_channels=2, num_classes=3, dim=8, depth=2, heads=2, se_reduction=8) | options
    )


def images(size=4, seed=0):
    return np.random.default_rng(seed).standard_normal((size, 2, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("mode", ["", "train/"])
@pytest.mark.parametrize("name", ["localvit", "localvit_relu6"])
def test_authors(name, mode):
    model, arrays = golden(name)
    model.train(bool(mode))
    source = Tensor(arrays["input"], requires_grad=True)
    logits = model(source)
    logits.backward(arrays["R"])
    assert_matches(logits.numpy(), arrays[f"{mode}logits"], "logits")
    assert_matches(source.grad.numpy(), arrays[f"{mode}input_gradient"], "input gradient")
    gradients, parameters = part(arrays, f"{mode}gradients/"), dict(model.named_parameters())
    assert gradients.keys() == {n for n, p in parameters.items() if p.requires_grad}
    for parameter, expected in gradients.items():
        assert_matches(parameters[parameter].grad.numpy(), expected, parameter)
    statistics = part(arrays, "train/running/") if mode else {n: a for n, a in part(arrays, "weights/").items() if n.endswith(STATISTICS)}
    assert statistics.keys() == parameters.keys() - gradients.keys()
    for parameter, expected in statistics.items():
        assert_matches(parameters[parameter].numpy(), expected, parameter)


@pytest.mark.parametrize("name", ["localvit", "localvit_relu6"])
def test_folded_statistics_give_the_same_logits(name):
    model, arrays = golden(name)
    assert_matches(Predictor(model, "float64").logits(arrays["input"])[0], arrays["logits"], "logits", tolerance=1e-6)  # are float32
    with no_grad():
        assert_matches(model(arrays["input"]).numpy(), arrays["logits"], "logits")


def test_a_plan_folds_once_and_again_after_a_change():
    model = small().eval()
    for parameter in model.parameters():
        parameter.data += 0.1
    predictor = Predictor(model)
    predictor(images())
    labels = [kernel for _, kernel in predictor.plans[0].labels]
    assert "gather" in labels and not {"fold_weight", "fold_bias", "by_tap", "pack", "normalise"} & set(labels)
    for parameter in model.parameters():
        parameter.data *= 1.5
    np.testing.assert_allclose(predictor(images()), model(images()).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_counts_and_names(name):
    model = minivit.create_model(name, init="zeros")
    reference = json.loads(golden_path(f"names/{NAMES[name]}.json").read_text())
    assert sum(p.size for p in model.parameters() if p.requires_grad) == reference["parameters"]
    if "state_dict" in reference:
        expected = {n: shape for n, shape in reference["state_dict"].items() if not n.endswith(UNTRACKED)}
        assert [(n, list(p.shape)) for n, p in model.named_parameters()] == list(expected.items())


def test_authors_files(tmp_path):
    first, second = small(seed=1), small(seed=2)
    state = first.state_dict() | {f"blocks.0.conv.conv.{i}.{UNTRACKED}": np.array(3) for i in (1, 4, 8)}
    state["blocks.0.conv.conv.1.running_mean"][...] = 7
    second.load_state_dict(state)
    minivit.save_weights(second, tmp_path / "a.safetensors")
    third = small(seed=3)
    minivit.load_weights(third, tmp_path / "a.safetensors")
    for name, value in third.state_dict().items():
        np.testing.assert_array_equal(value, state[name])


@pytest.mark.parametrize(
    "options",
    [
        dict(channel_attention="eca"),
        dict(channel_attention="eca_hard", activation="relu6"),
        dict(channel_attention=None, depthwise="none"),
        dict(depthwise="first", se_reduction=4),
    ],
    ids=str,
)
def test_variants_train_and_fold(options):
    model = small(**options, dtype="float64", seed=1)
    x = images(6).astype(np.float64)
    trainer = minivit.Trainer(model, lr=0.01)
    losses = [trainer.step(x, np.arange(6) % 3) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    with no_grad():
        folded = model(x).numpy()
    np.testing.assert_allclose(folded, model(Tensor(x, requires_grad=True)).numpy(), rtol=1e-9, atol=1e-12)


def test_class_tokens_pass_the_convolutions_by():
    block = small(depth=1).blocks[0]
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    before = block(Tensor(x)).numpy()
    for parameter in block.conv.parameters():
        parameter.data += 1
    after = block(Tensor(x)).numpy()
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert not np.allclose(before[:, 1:], after[:, 1:])


def test_cost_of_a_block():
    layers = small(depth=1).cost().layers
    assert layers["blocks.0.conv.conv.0"] == layers["blocks.0.conv.conv.7"] == 4 * 8 * 32
    assert layers["blocks.0.conv.conv.3"] == 4 * 9 * 32
    assert layers["blocks.0.conv.conv.6.fc.0"] == layers["blocks.0.conv.conv.6.fc.2"] == 32 * 4


@pytest.mark.parametrize("relationship_reuse", [True, False])
def test_stages_of_a_cascade(relationship_reuse):
    options = dict(image_size=8, in_channels=2, num_classes=3, dim=8, depth=2, heads=2, patches=((4, 4, 0), (2, 2, 0)))
    model = minivit.create_model(
        "dvt", backbone="localvit", relationship_reuse=relationship_reuse, options=dict(se_reduction=8), dtype="float64", **options
    )
    x = images().astype(np.float64)
    trainer = minivit.Trainer(model, lr=0.01)
    assert trainer.parts(64) == 1
    losses = [trainer.step(x, np.arange(4) % 3) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    with no_grad():
        assert len(model.eval().exits(x)) == 2


@pytest.mark.parametrize(
    "options, line",
    [
        (dict(heads=3), "heads must divide dim: 8 is not a multiple of 3"),
        (dict(patch_size=3), "patch_size must divide image_size: 8 is not a multiple of 3"),
        (dict(se_reduction=33), "a reduction of 33 leaves no hidden unit of 32 channels"),
        (dict(mlp_ratio=0.01), "mlp_ratio=0.01 leaves no hidden channel of dim 8"),
        (dict(activation="gelu"), "activation must be 'hswish' or 'relu6', not 'gelu'"),
        (dict(channel_attention="cbam"), "channel_attention must be"),
    ],
    ids=str,
)
def test_bad_options(options, line):
    with pytest.raises(UserError) as error:
        small(**options)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_training_on_data_whose_last_batch_would_be_one_image(tmp_path):
    rng = np.random.default_rng(0)
    data = (rng.integers(0, 256, (26, 8, 8, 1), np.uint8), np.arange(26) % 2)
    run = minivit.train("localvit_nano_patch2_8", data, epochs=1, batch_size=5, test_fraction=0.2, out=tmp_path / "run", progress=False)
    assert len(run.history) == 1
    with pytest.raises(UserError, match="two images or more at once, got 1"):
        minivit.train("localvit_nano_patch2_8", data, epochs=1, batch_size=1, out=tmp_path / "other", progress=False)


@pytest.mark.slow
def test_pictures(tmp_path):
    options = dict(dim=8, depth=1, heads=2, se_reduction=2)
    minivit.train("localvit_nano_patch2_8", "digits", epochs=1, limit=240, model_options=options, out=tmp_path / "run", progress=False)
    pictures = [path.name for path in plots.draw_run(tmp_path / "run", out=tmp_path / "pictures", progress=False)]
    assert pictures == ["curves.png", "filters.png", "positions.png", "attention.png", "rollout.png"]
