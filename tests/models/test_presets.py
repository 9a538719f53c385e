"""Names, sizes, options: what `create_model` and `list_models` promise."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from golden_files import golden_path

import minivit
from minivit import UserError
from minivit.models import FAMILIES, PRESETS, ViT, register

PARAMETERS = {  # counted in timm or the authors' code, or by shapes
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_base_patch32_224": 88_224_232,
    "vit_large_patch16_224": 304_326_632,
    "vit_huge_patch14_224": 632_045_800,
    "mixer_s32_224": 19_104_624,
    "mixer_s16_224": 18_528_264,
    "mixer_b32_224": 60_293_428,
    "mixer_b16_224": 59_880_472,
    "mixer_l32_224": 206_939_264,
    "mixer_l16_224": 208_196_168,
    "vit_nano_patch2_8": 202_058,
    "vit_nano_patch4_32": 809_098,
    "vit_tiny_patch4_32": 4_028_170,
    "vit_small_patch4_32": 12_469_258,
    "mixer_nano_patch2_8": 138_762,
    "mixer_tiny_patch4_32": 4_360_970,
    "ff_only_tiny": 7_676_332,
    "ff_only_base": 61_943_020,
    "ff_only_large": 206_363_576,
    "dvt_deit_small": 70_442_232,
    "dvt_nano_8": 825_886,
    "dvt_nano_32": 1_387_461,
    "dvt_tiny_32": 13_420_098,
    "crossvit_nano_8": 288_244,
    "crossvit_tiny_32": 5_161_844,
    "crossvit_tiny_240": 7_014_800,
    "crossvit_small_240": 26_856_272,
    "crossvit_base_240": 105_025_232,
    "crossvit_9_240": 8_553_296,
    "crossvit_15_240": 27_528_464,
    "crossvit_18_240": 43_271_408,
    "deepvit_nano_patch2_8": 169_274,
    "deepvit_tiny_patch4_32": 4_476_370,
    "deepvit_16b": 24_426_664,
    "deepvit_24b": 36_261_448,
    "deepvit_32b": 48_096_232,
    "deepvit_s": 27_312_632,
    "deepvit_l": 58_883_708,
    "crossvit_9_dagger_240": 8_776_592,
    "crossvit_15_dagger_240": 28_209_008,
    "crossvit_18_dagger_240": 44_266_976,
    "t2t_vit_nano_8": 154_028,
    "t2t_vit_tiny_32": 3_615_072,
    "t2t_vit_7": 4_310_222,
    "t2t_vit_10": 5_889_230,
    "t2t_vit_12": 6_941_902,
    "t2t_vit_14": 21_545_550,
    "t2t_vit_19": 39_177_422,
    "t2t_vit_24": 64_105_934,
    "t2t_vit_t_14": 21_541_070,
    "t2t_vit_t_19": 39_172_942,
    "t2t_vit_t_24": 64_101_454,
    "dvt_t2t_vit_12": 22_461_516,
    "dvt_t2t_vit_14": 67_881_836,
    "dvt_t2t_tiny_32": 11_915_988,
    "localvit_tiny": 5_908_696,
    "localvit_tiny_mlp4_act3_r4": 9_376_168,
    "localvit_tiny_mlp6_act1": 7_655_080,
    "localvit_small": 22_433_176,
    "localvit_nano_patch2_8": 146_650,
    "localvit_nano_patch4_32": 851_866,
    "localvit_tiny_patch4_32": 4_171_630,
    "localvit_midi_patch2_8": 582_634,
    "localvit_midi_patch4_32": 1_731_130,
    "localvit_midi_patch8_64": 2_063_098,
    "localvit_micro_patch8_96": 325_050,
    "localvit_mini_patch8_96": 725_218,
    "localvit_midi_patch8_96": 1_852_010,
    "localvit_midi_patch16_128": 2_072_866,
    "localvit_micro_patch2_8": 85_842,
    "localvit_mini_patch2_8": 254_770,
    "localvit_micro_patch4_32": 291_106,
    "localvit_mini_patch4_32": 644_906,
    "localvit_micro_patch8_64": 374_146,
    "localvit_mini_patch8_64": 792_490,
    "localvit_micro_patch16_128": 376_438,
    "localvit_mini_patch16_128": 796_698,
    "ff_only_nano_patch2_8": 144_838,
    "ff_only_nano_patch4_32": 681_158,
}


def small(name, **options):
    return minivit.create_model(name, **{"image_size": 8, "patch_size": 4, "num_classes": 3, "dim": 16, "depth": 2, **options})


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
    model = minivit.create_model(name, init="zeros")
    statistics = set(map(id, model.statistic_parameters()))  # are not counted
    assert sum(p.size for p in model.parameters() if id(p) not in statistics) == PARAMETERS[name]


WHOLE = ("16_224", "14_224", "_tiny", "_base", "_large", "deit_small", "_240", "16b", "24b", "32b", "deepvit_s", "deepvit_l")
COUNTED = [n for n in PARAMETERS if n.endswith(WHOLE) and n != "localvit_tiny"]
COUNTED_T2T = [n for n in PARAMETERS if "t2t_vit_" in n and n[-1].isdigit() and not n.endswith(("_8", "_32", "t_19", "t_24"))]


@pytest.mark.parametrize("name", COUNTED + COUNTED_T2T)
def test_counts_of_the_reference(name):
    path = golden_path(f"names/{name}.json")
    assert json.loads(path.read_text())["parameters"] == PARAMETERS[name]


@pytest.mark.parametrize("name", COUNTED_T2T)
def test_trainable_counts_of_the_reference(name):
    model = minivit.create_model(name, init="zeros")
    trainable = json.loads(golden_path(f"names/{name}.json").read_text())["trainable"]
    assert sum(p.size for p in model.parameters() if p.requires_grad) == trainable < PARAMETERS[name]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s16_224", "ff_only_tiny", "t2t_vit_7", "t2t_vit_t_14"])
def test_names_shapes_and_order(name):
    expected = json.loads(golden_path(f"names/{name}.json").read_text())["state_dict"]
    model = minivit.create_model(name, init="zeros")
    assert [(n, list(p.shape)) for n, p in model.named_parameters()] == list(expected.items())


@pytest.mark.parametrize("name", [n for n in PARAMETERS if n.endswith(("_8", "_32"))])
def test_small_presets_run(name):
    model = minivit.create_model(name)
    config = model.config
    images = np.random.default_rng(0).random((2, config.in_channels, config.image_size, config.image_size))
    assert model(images).shape == (2, 10)
    heads = model.head if isinstance(model.head, list) else [model.head]
    assert model.features(images).shape == (2, sum(head.weight.shape[1] for head in heads))
    assert model.name == name and not model.training


def test_list_models():
    assert minivit.list_models() == sorted(PARAMETERS)
    assert minivit.list_models("mixer_?32_224") == ["mixer_b32_224", "mixer_l32_224", "mixer_s32_224"]
    assert minivit.list_models("resnet*") == []


@pytest.mark.parametrize("name", ["mixer_nano_patch2_8", "dvt_nano_32"])
def test_the_configuration_recreates_the_model(name):
    model = minivit.create_model(name, num_classes=3, drop_path_rate=0.1)
    again = minivit.create_model(model.name, **json.loads(json.dumps(asdict(model.config))))
    assert again.config == model.config
    family = minivit.create_model(model.family, **asdict(model.config))
    assert family.config == model.config


def test_options_replace_fields_of_a_preset():
    model = minivit.create_model("vit_nano_patch2_8", image_size=16, in_channels=3, num_classes=5, pool="cls", class_token=True)
    assert model.pos_embed.shape == (1, 65, 64) and model.patch_embed.proj.weight.shape == (64, 3, 2, 2)
    assert model(np.zeros((1, 3, 16, 16))).shape == (1, 5)


def test_seeds():
    a, b, c = (small("vit", heads=2, seed=seed).state_dict() for seed in (0, 0, 1))
    for name in a:
        assert np.array_equal(a[name], b[name]), name
    assert not np.array_equal(a["blocks.0.attn.qkv.weight"], c["blocks.0.attn.qkv.weight"])
    assert not np.array_equal(a["blocks.0.attn.qkv.weight"], a["blocks.1.attn.qkv.weight"])
    deeper = small("vit", heads=2, depth=3).state_dict()
    assert np.array_equal(deeper["blocks.1.attn.qkv.weight"], a["blocks.1.attn.qkv.weight"])
    double = small("vit", heads=2, dtype="float64").state_dict()
    assert np.array_equal(double["head.weight"].astype(np.float32), a["head.weight"])


def test_reset_head():
    model = small("vit", heads=2).train()
    before = model.state_dict()
    model.reset_head(7)
    assert model.config.num_classes == 7 and model.head.training
    assert model(np.zeros((2, 3, 8, 8))).shape == (2, 7)
    assert model.head.weight.data.std() > 0
    after = model.state_dict()
    assert all(np.array_equal(before[n], after[n]) for n in before if not n.startswith("head."))


def test_images_of_any_dtype_and_kind():
    model = small("mixer", dtype="float64")
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 8, 8))
    expected = model(images.astype(np.float64)).numpy()
    for given in (images, images.astype(np.float32), images.tolist(), minivit.Tensor(images.astype(np.float64))):
        assert np.array_equal(model(given).numpy(), expected)
    with pytest.raises(UserError, match="must have the model's dtype float64, not float32"):
        model(minivit.Tensor(images.astype(np.float32), requires_grad=True))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("vit_tinny_patch4_32", {}, r"unknown model 'vit_tinny_patch4_32' \(nearest: vit_tiny_patch4_32"),
        ("resnet", {}, "unknown model 'resnet'"),
        ("vit", {"dimm": 3}, r"vit has no option 'dimm' \(nearest: dim"),
        ("vit_nano_patch2_8", {"token_hidden": 3}, "vit_nano_patch2_8 has no option 'token_hidden'"),
        ("vit", {"image_size": 32, "patch_size": 5}, "^patch_size must divide image_size: 32 is not a multiple of 5$"),
        ("mixer", {"image_size": 32, "patch_size": 5}, "^patch_size must divide image_size: 32 is not a multiple of 5$"),
        ("vit", {"dim": 192, "heads": 5}, "^heads must divide dim: 192 is not a multiple of 5$"),
        ("vit", {"pool": "avg"}, "pool must be 'cls' or 'mean' or 'attention', not 'avg'"),
        ("vit", {"class_token": False}, "pool='cls' needs a class token"),
        ("vit", {"class_token": 1}, "class_token must be true or false, not 1"),
        ("vit", {"depth": 0}, "depth must be a whole number of at least 1, not 0"),
        ("vit", {"depth": 2.5}, "depth must be a whole number of at least 1, not 2.5"),
        ("vit", {"depth": True}, "depth must be a whole number of at least 1, not True"),
        ("vit", {"mlp_ratio": -1.0}, "mlp_ratio must be a number above 0, not -1.0"),
        ("vit", {"mlp_ratio": 0.001}, "mlp_ratio=0.001 leaves no hidden channel of dim 768"),
        ("vit", {"layer_scale": "small"}, "layer_scale must be a number above 0, not 'small'"),
        ("vit", {"drop_rate": 1.0}, "drop_rate must be a number of at least 0 and below 1, not 1.0"),
        ("vit", {"eps": float("nan")}, "eps must be a number above 0, not nan"),
        ("t2t", {"unfolds": ((7, 4, 2), (3, 2, 1))}, "unfolds must hold 3 values, not 2"),
        ("t2t", {"unfolds": 7}, "unfolds must be a list, not 7"),
        (
            "t2t",
            {"image_size": 8, "unfolds": ((3, 2, 1), (5, 4, 0), (3, 2, 0))},
            "unfolds: number 2 takes patches of 5×5, .* only 4×4 with padding 0",
        ),
        ("t2t", {"tokens": "perfomer"}, r"tokens must be 'performer' or 'transformer', not 'perfomer' \(nearest: performer"),
        ("t2t", {"heads": 5}, "^heads must divide dim: 384 is not a multiple of 5$"),
        ("t2t", {"kernel_features": 0}, "kernel_features must be a whole number of at least 1, not 0"),
        ("t2t", {"patch_size": 4}, "t2t has no option 'patch_size'"),
        ("mixer", {"dtype": "bfloat16"}, "dtype must be 'float32' or 'float64', not 'bfloat16'"),
        ("mixer", {"num_classes": "ten"}, "num_classes must be a whole number of at least 1, not 'ten'"),
        ("mixer", {"seed": -1}, "seed must be a whole number"),
        ("mixer", {"seed": "x"}, "seed must be a whole number"),
    ],
)
def test_bad_values_are_named(name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        minivit.create_model(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (2, 1, 8, 8), (3, 8, 8), (2, 3, 16, 16)])
def test_images_of_another_shape(shape):
    with pytest.raises(UserError, match=r"images have shape .*, the model takes \(B, 3, 8, 8\)"):
        small("vit", heads=2)(np.zeros(shape))


def test_register_a_family():
    class Narrow(ViT):
        family = "narrow"
        presets = {"narrow_8": dict(image_size=8, patch_size=4, dim=8, depth=1, heads=1)}  # noqa: RUF012

    register(Narrow)
    try:
        assert isinstance(minivit.create_model("narrow_8"), Narrow)
        assert "narrow_8" in minivit.list_models("n*")
        with pytest.raises(ValueError, match="there is a model named 'narrow' already"):
            register(Narrow)
    finally:
        del FAMILIES["narrow"], PRESETS["narrow_8"]
