"""Weights for images of another number of channels, by timm's rule."""

import numpy as np
import pytest

import minivit
from minivit import UserError
from minivit.models.channels import convert

SMALL = dict(image_size=8, patch_size=4, num_classes=3, dim=16, depth=2)
FAMILIES = {
    "vit": (dict(**SMALL, heads=2), ["patch_embed"]),
    "mixer": (SMALL, ["stem"]),
    "ff_only": (SMALL, ["patch_embed"]),
    "dvt": (
        dict(image_size=8, num_classes=3, patches=((4, 4, 0), (2, 2, 0)), dim=16, depth=2, heads=2),
        ["stages.0.patch_embed", "stages.1.patch_embed"],
    ),
}
GRAY = np.random.default_rng(0).normal(size=(2, 1, 8, 8))


def make(name, channels, seed=1):
    return minivit.create_model(name, in_channels=channels, dtype="float64", seed=seed, **FAMILIES[name][0])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("theirs, ours, how", [(3, 1, "summed"), (1, 3, "repeated and scaled")])
def test_a_gray_image_gives_the_same_in_gray_and_in_rgb(name, theirs, ours, how, tmp_path):
    source, model = make(name, theirs), make(name, ours, seed=2)
    minivit.save_weights(source, tmp_path / "w.safetensors")
    report = minivit.load_weights(model, tmp_path / "w.safetensors")
    assert report == tuple(f"{stem}.proj.weight: {theirs} channels became {ours}, {how}" for stem in FAMILIES[name][1])
    expected, found = (m(np.repeat(GRAY, m.config.in_channels, 1)).numpy() for m in (source, model))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_timms_rule():
    weight = np.random.default_rng(0).normal(size=(2, 3, 4, 4))
    np.testing.assert_allclose(convert(weight, 1), weight.sum(1, keepdims=True))
    np.testing.assert_allclose(convert(weight, 5), weight[:, [0, 1, 2, 0, 1]] * 3 / 5)
    np.testing.assert_allclose(convert(weight, 2), weight[:, :2] * 3 / 2)
    assert convert(weight, 3) is weight and convert(weight.astype(np.float32), 1).dtype == np.float32


def test_googles_files_are_converted_too(tmp_path):
    source, model = make("mixer", 3), make("mixer", 1, seed=2)
    state = source.state_dict()
    names = source.google_names([])
    arrays = {}
    for ours, theirs in names.items():
        array = state[ours]
        arrays[theirs] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    np.savez(tmp_path / "w.npz", **arrays)
    assert minivit.load_weights(model, tmp_path / "w.npz") == ("stem.proj.weight: 3 channels became 1, summed",)
    np.testing.assert_allclose(model(GRAY).numpy(), source(np.repeat(GRAY, 3, 1)).numpy(), rtol=1e-12, atol=1e-12)


def test_the_report_names_resized_positions_and_is_empty_for_a_file_that_fits(tmp_path):
    source = make("vit", 3)
    minivit.save_weights(source, tmp_path / "w.safetensors")
    assert minivit.load_weights(make("vit", 3, seed=2), tmp_path / "w.safetensors") == ()
    larger = minivit.create_model("vit", in_channels=1, **FAMILIES["vit"][0] | {"image_size": 16})
    assert minivit.load_weights(larger, tmp_path / "w.safetensors") == (
        "pos_embed: resized from (1, 5, 16) to (1, 17, 16), bicubic_antialias",
        "patch_embed.proj.weight: 3 channels became 1, summed",
    )


def test_other_patches_still_do_not_fit(tmp_path):
    minivit.save_weights(make("mixer", 3), tmp_path / "w.safetensors")
    model = minivit.create_model("mixer", in_channels=1, **SMALL | {"patch_size": 2})
    with pytest.raises(UserError, match=r"stem\.proj\.weight is \(16, 1, 4, 4\), not \(16, 1, 2, 2\)"):
        minivit.load_weights(model, tmp_path / "w.safetensors")
