"""Rectangular images, patches and grids: against timm (ViT, Mixer) and PyTorch (T2T, a cascade) in float64, and from files to pictures."""

import json

import numpy as np
import pytest
from golden_files import assert_matches, part, read_golden
from PIL import Image

import minivit
from minivit import Tensor, UserError
from minivit.cli.main import main
from minivit.models.positions import resize

FAMILIES = ("vit", "mixer", "t2t", "dvt")


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_pytorch(family):
    arrays, configs = read_golden("rectangular.safetensors")
    arrays = part(arrays, f"{family}/")
    model = minivit.create_model(family, dtype="float64", **configs[family])
    model.load_state_dict(part(arrays, "weights/"))
    images = Tensor(arrays["input"], requires_grad=True)
    outputs = model.exits(images) if model.num_exits > 1 else [model(images)]
    logits = np.stack([output.numpy() for output in outputs])
    assert_matches(logits.reshape(arrays["logits"].shape), arrays["logits"], "logits")
    loss = sum((output * Tensor(weight)).sum() for output, weight in zip(outputs, arrays["R"].reshape(logits.shape)))
    loss.backward()
    assert_matches(images.grad.numpy(), arrays["input_gradient"], "input gradient")
    parameters = dict(model.named_parameters())
    gradients = part(arrays, "gradients/")
    assert gradients.keys() == {name for name, parameter in parameters.items() if parameter.requires_grad}
    for name, expected in gradients.items():
        assert_matches(parameters[name].grad.numpy(), expected, name)


@pytest.mark.parametrize(
    "family, options, grids",
    [
        ("vit", {"patch_size": (2, 4)}, [(4, 3)]),
        ("mixer", {"patch_size": 4}, [(2, 3)]),
        ("ff_only", {"patch_size": (4, 2), "position_grid": (3, 5)}, [(2, 6)]),
        ("localvit", {"patch_size": (2, 3), "heads": 2, "dim": 16, "se_reduction": 8}, [(4, 4)]),
        ("deepvit", {"patch_size": (4, 2), "stem": "convolution", "dim": 24}, [(2, 6)]),
        ("t2t", {"unfolds": ((3, 1, 1), (3, 2, 1), (3, (1, 2), 1))}, [(4, 3)]),
        ("crossvit", {"branch_sizes": ((8, 12), (9, 6)), "patch_sizes": (2, 3), "dims": (8, 16), "heads": (2, 2)}, [(4, 6), (3, 2)]),
        ("dvt", {"patches": ((4, 4, 0), ((2, 4), (2, 4), 0))}, [(2, 3), (4, 3)]),
    ],
)
def test_the_grid_is_rows_and_columns(family, options, grids):
    model = minivit.create_model(
        family,
        image_size=(8, 12),
        in_channels=1,
        num_classes=3,
        **{"depths" if family == "crossvit" else "depth": (1, 1) if family == "crossvit" else 1} | options,
    )
    assert [part.grid for part in model.backbones()] == grids
    assert model.config.image_shape == (1, 8, 12) and model.cost().total > 0
    for backbone, grid in zip(model.backbones(), grids):
        if backbone.position_embedding() is not None and family != "ff_only":
            assert backbone.position_embedding()[1] == grid
    x = np.random.default_rng(0).standard_normal((2, 1, 8, 12))
    assert model(x).shape == (2, 3)
    with pytest.raises(UserError, match=r"images have shape \(2, 1, 12, 8\), the model takes \(B, 1, 8, 12\)"):
        model(x.transpose(0, 1, 3, 2))


def test_equal_sides_are_a_number():
    config = minivit.create_model("vit", image_size=[16, 16], patch_size=(4, 4), depth=1).config
    assert config == minivit.create_model("vit", image_size=16, patch_size=4, depth=1).config
    assert (config.image_size, config.patch_size) == (16, 4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": (8, 0)}, r"image_size\[1\] must be a whole number of at least 1, not 0"),
        ({"image_size": (8, 8, 8)}, "image_size must hold 2 values, not 3"),
        ({"image_size": (8, 10), "patch_size": 4}, "patch_size must divide image_size: 10 is not a multiple of 4"),
        ({"image_size": 8, "patch_size": (4, 3)}, "patch_size must divide image_size: 8 is not a multiple of 3"),
        ({"image_size": 8, "patch_size": 4, "patch_stride": (5, 1)}, "patch_stride must be at most patch_size: 5 is more than 4"),
        ({"image_size": "8x12"}, "image_size must be a whole number of at least 1, not '8x12'"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        minivit.create_model("vit", depth=1, **options)


def test_positions_of_a_square_become_those_of_a_rectangle(tmp_path):
    small = dict(patch_size=4, num_classes=3, dim=16, depth=1, heads=2)
    square, wide = (minivit.create_model("vit", image_size=size, **small) for size in (16, (8, 24)))
    minivit.save_weights(square, tmp_path / "w.safetensors")
    minivit.load_weights(wide, tmp_path / "w.safetensors")
    expected = resize(square.pos_embed.numpy(), (2, 6), 1, "bicubic_antialias")
    np.testing.assert_array_equal(wide.pos_embed.numpy(), expected)
    wide.resize((16, 12))
    np.testing.assert_array_equal(wide.pos_embed.numpy(), resize(expected, (4, 3), 1, "bicubic_antialias", (2, 6)))
    assert wide.config.image_size == (16, 12)


@pytest.fixture
def photographs(tmp_path):
    """Pictures of 24 × 40 and other sizes: a bright left or a bright lower half."""
    rng = np.random.default_rng(0)
    for name in ("left", "lower"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(24):
            height, width = (24, 40) if i % 2 else (30, 44)
            pixels = rng.integers(0, 60, (height, width, 3))
            pixels[(slice(None), slice(width // 2)) if name == "left" else (slice(height // 2, None), slice(None))] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    "model, options",
    [
        ("vit_nano_patch4_32", {}),
        ("mixer_nano_patch2_8", {"patch_size": 4}),
        ("t2t_vit_nano_8", {}),
        ("dvt_nano_8", {}),
    ],
)
def test_from_the_command_line(model, options, photographs, tmp_path, capsys):
    """Train on rectangular photographs, then predict, test and draw."""
    out = tmp_path / "run"
    extra = [part for name, value in options.items() for part in ("--model-option", f"{name}={value}")]
    arguments = ["train", "--data", str(photographs), "--model", model, "--image-size", "12x20", "--epochs", "4", "--batch-size", "8"]
    assert main([*arguments, "--lr", "3e-3", *extra, "--quiet", "--out", str(out)]) == 0
    assert float(capsys.readouterr().out.split()[2]) >= 80
    assert json.loads((out / "config.json").read_text())["arguments"]["image_size"] == [12, 20]
    classifier = minivit.load(out)
    assert classifier.preprocessing.image_size == classifier.model.config.image_size == (12, 20)
    assert classifier.predict(str(photographs / "left" / "0.png")).names == ["left"]
    assert main(["eval", str(out)]) == main(["plot", str(out)]) == 0
    assert (out / "curves.png").exists() and len([*out.glob("*.png")]) >= 3
