"""Models against timm's, their authors' and Google's code: logits, the image gradient and every parameter's gradient, in float64."""

import numpy as np
import pytest
from golden_files import assert_matches, part, read_golden

import minivit
from minivit import Tensor


def create(config, family, dtype="float64"):
    """A model of a golden file's configuration."""

    def given(*names):
        return next(config[name] for name in names if name in config)

    if family == "crossvit":
        (small, large), stages = config["blocks_per_stage_per_branch"][0], len(config["blocks_per_stage_per_branch"])
        return minivit.create_model(
            family,
            image_size=config["input_image_size"],
            branch_sizes=config["branch_image_sizes"],
            patch_sizes=config["patch_sizes"],
            num_classes=config["classes"],
            dims=config["dims"],
            depths=(small, large),
            stages=stages,
            heads=config["heads"],
            mlp_ratios=config["mlp_ratios"],
            dtype=dtype,
        )
    if family == "t2t":
        names = ("image_size", "num_classes", "dim", "depth", "heads", "mlp_ratio", "token_dim", "in_channels")
        unfolds, features = config["unfolds_kernel_stride_padding"], config.get("kernel_features")
        own = dict(tokens=config["tokens_type"], unfolds=unfolds, kernel_features=features, eps=config["norm_eps"])
        return minivit.create_model(family, **{name: config[name] for name in names}, **own, dtype=dtype)
    common = dict(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        in_channels=given("channels", "in_channels"),
        num_classes=given("classes", "num_classes"),
        dim=config["dim"],
        depth=config["depth"],
        eps=given("layer_norm_eps", "norm_eps"),
        dtype=dtype,
        activation={"gelu_erf": "gelu", "gelu_tanh": "gelu_tanh"}[config["activation"]],
    )
    if family == "mixer":
        own = dict(token_hidden=config["token_mlp_hidden"], channel_hidden=config["channel_mlp_hidden"])
    elif family == "ff_only":
        own = dict(mlp_ratio=config["mlp_ratio"], position_grid=config["position_grid"][0])
    elif family == "deepvit":
        names = ("heads", "mlp_ratio", "reattention_blocks", "reattention_scale", "residual_scale", "stem")
        own = {name: config[name] for name in names} | {"stem_width": config.get("stem_width", 64)}
    else:
        own = dict(
            heads=config["heads"],
            mlp_ratio=config["mlp_hidden"] / config["dim"],
            class_token=config["class_token"],
            layer_scale=config.get("layer_scale_init"),
            pool="cls" if config["pooling"] == "cls token" else "mean",
        )
    return minivit.create_model(family, **common, **own)


def run(model, images, weights):
    """(logits, image gradient) of one pass with the loss Σ weights·logits; parameters get their gradients."""
    images = Tensor(images, requires_grad=True)
    logits = model(images)
    logits.backward(weights)
    return logits.numpy(), images.grad.numpy()


@pytest.mark.parametrize(
    "name, family",
    [
        ("vit", "vit"),
        ("vit_gap", "vit"),
        ("mixer", "mixer"),
        ("ff_only", "ff_only"),
        ("ff_only_resize", "ff_only"),
        ("crossvit", "crossvit"),
        ("deepvit", "deepvit"),
        ("t2t_vit_performer", "t2t"),
        ("t2t_vit_transformer", "t2t"),
    ],
)
class TestTimmAndAuthors:
    def test_float64(self, name, family):
        arrays, config = read_golden(f"{name}.safetensors")
        model = create(config, family)
        model.load_state_dict(part(arrays, "weights/"))
        logits, image_gradient = run(model, arrays["input"], arrays["R"])
        assert_matches(logits, arrays["logits"], "logits")
        assert_matches(image_gradient, arrays["input_gradient"], "input gradient")
        expected = part(arrays, "gradients/")
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert expected.keys() == trained.keys()
        for parameter_name, parameter in trained.items():
            assert_matches(parameter.grad.numpy(), expected[parameter_name], parameter_name)

    def test_float32(self, name, family):
        arrays, config = read_golden(f"{name}.safetensors")
        model = create(config, family, "float32")
        model.load_state_dict(part(arrays, "weights/"))
        logits, image_gradient = run(model, arrays["input"].astype(np.float32), arrays["R"].astype(np.float32))
        assert logits.dtype == image_gradient.dtype == np.float32
        for given, expected in ((logits, arrays["logits"]), (image_gradient, arrays["input_gradient"])):
            assert np.abs(given - expected).max() < 1e-4 * np.abs(expected).max()


ZERO = "reatten_matrix.bias"  # whose gradient is zero in training, but for rounding: the mean is subtracted after it is added


@pytest.mark.parametrize("name, family", [("deepvit", "deepvit")])
def test_batch_statistics_in_training(name, family):
    arrays, config = read_golden(f"{name}.safetensors")
    model = create(config, family)
    model.load_state_dict(part(arrays, "weights/"))
    logits, image_gradient = run(model.train(), arrays["input"], arrays["R"])
    assert_matches(logits, arrays["train/logits"], "logits")
    assert_matches(image_gradient, arrays["train/input_gradient"], "input gradient")
    parameters = dict(model.named_parameters())
    for parameter_name, expected in part(arrays, "train/gradients/").items():
        gradient = parameters[parameter_name].grad.numpy()
        if parameter_name.endswith(ZERO):
            assert np.abs(gradient - expected).max() < 1e-9
        else:
            assert_matches(gradient, expected, parameter_name)
    for statistic, expected in part(arrays, "train/running/").items():
        assert_matches(parameters[statistic].numpy(), expected, statistic)


@pytest.mark.parametrize("family", ["vit", "mixer"])
def test_google(family, tmp_path):
    arrays, config = read_golden(f"google_{family}.npz")
    path = tmp_path / "released.npz"

    def loaded(values):
        np.savez(path, **values)
        model = create(config, family)
        minivit.load_weights(model, path)
        return model

    model = loaded({name: array for name, array in arrays.items() if not name.startswith("golden/")})
    logits, image_gradient = run(model, arrays["golden/input"].transpose(0, 3, 1, 2), arrays["golden/R"])
    assert_matches(logits, arrays["golden/logits"], "logits")
    assert_matches(image_gradient, arrays["golden/input_gradient"].transpose(0, 3, 1, 2), "input gradient")
    expected = loaded(part(arrays, "golden/gradients/")).state_dict()  # gradients lie as their parameters do
    for name, parameter in model.named_parameters():
        assert_matches(parameter.grad.numpy(), expected[name], name)
