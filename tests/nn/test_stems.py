import numpy as np
import pytest

from minivit import UserError, create_model
from minivit.models.deepvit import DeepViT
from minivit.nn.stems import ConvolutionStem, halvings

FAMILIES = ("vit", "localvit", "mixer", "ff_only")


def make(family="vit", **options):
    defaults = {"image_size": 16, "patch_size": 4, "num_classes": 3, "dim": 24, "depth": 1, "stem": "convolution", "stem_width": 6}
    heads = {"heads": 2} if family in ("vit", "localvit") else {}
    se = {"se_reduction": 8} if family == "localvit" else {}
    return create_model(family, seed=1, **defaults | heads | se | options)


def stem_of(model):
    return next(module for module in model.modules() if isinstance(module, ConvolutionStem))


@pytest.mark.parametrize("patch_size, expected", [(4, (2, 2)), ((2, 8), (1, 3)), (1, (0, 0)), (6, None), ((4, 12), None)])
def test_halvings(patch_size, expected):
    assert halvings(patch_size) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("patch_size, widths", [(4, [6, 12, 24]), ((2, 8), [6, 12, 24, 24]), (1, [24]), (2, [6, 24])])
def test_a_patch_becomes_one_token(family, patch_size, widths):
    model = make(family, patch_size=patch_size, image_size=(16, 24))
    stem = stem_of(model)
    assert [layer.weight.shape[0] for layer in stem.convs.layers[::3]] == widths
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 24)).astype(np.float32)
    rows, columns = np.array([16, 24]) // patch_size
    assert stem(model.begin(images)).shape == (2, rows * columns, 24) and model.grid == (rows, columns)
    assert model(images).shape == (2, 3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("image_size, grid", [((15, 22), (4, 6)), ((13, 5), (4, 2)), (3, (1, 1))])
def test_images_of_any_size(family, image_size, grid):
    model = make(family, image_size=image_size)
    rows, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
    images = np.random.default_rng(0).normal(size=(2, 3, rows, columns)).astype(np.float32)
    assert model.grid == grid and stem_of(model)(model.begin(images)).shape == (2, grid[0] * grid[1], 24)
    assert model(images).shape == (2, 3)


def test_a_token_sees_its_neighbourhood_alone():
    """The convolutions of patches of 4 reach a pixel and less than a patch to either side."""
    stem = stem_of(make(dtype="float64"))
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 16))
    changed = images.copy()
    changed[:, :, 9, 9] += 1
    stem.eval()
    moved = np.abs(stem(changed).numpy() - stem(images).numpy()).max((0, 2)).reshape(4, 4) > 0
    rows, columns = np.nonzero(moved)
    assert moved[2, 2] and {*rows, *columns} <= {1, 2, 3}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", ("timm", "jax", "zeros"))
def test_convolutions_are_initialised_alike_in_every_family(family, init):
    convs = stem_of(make(family, init=init)).convs.layers
    if init == "zeros":
        assert not any(layer.weight.numpy().any() for layer in convs[::3])
    else:
        for layer in convs[::3]:
            assert layer.weight.numpy().std() == pytest.approx(np.prod(layer.weight.shape[1:]) ** -0.5, rel=0.3)
    for norm in convs[1::3]:
        assert (norm.weight.numpy() == 1).all() and (norm.running_var.numpy() == 1).all()
        assert not norm.bias.numpy().any() and not norm.running_mean.numpy().any()
    assert not convs[-1].bias.numpy().any()


@pytest.mark.parametrize("options", ({"patch_size": 6, "image_size": 12}, {"patch_stride": 2}, {"patch_padding": 1}))
@pytest.mark.parametrize("family", FAMILIES)
def test_other_patches_are_refused(family, options):
    with pytest.raises(UserError, match="power of 2"):
        make(family, **options)


def test_deepvit_has_its_own():
    model = create_model("deepvit", image_size=16, patch_size=4, num_classes=3, dim=24, depth=1, heads=2, stem="convolution")
    assert isinstance(model, DeepViT) and not any(isinstance(module, ConvolutionStem) for module in model.modules())


def test_gray_images_and_a_resized_vit():
    model = make(in_channels=1)
    assert model.patch_filters().shape == (6, 1, 3, 3)
    model.resize(24)
    assert model(np.zeros((2, 1, 24, 24), np.float32)).shape == (2, 3)


@pytest.mark.parametrize("channel_attention", ("se", None))
def test_localvit_with_mean_pooling_has_no_class_token(channel_attention):
    model = make("localvit", pool="mean", channel_attention=channel_attention, dtype="float64")
    assert model.prefix == 0 and model.cls_token is None and model.pos_embed.shape == (1, 16, 24)
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 16))
    tokens = model.tokens(images)
    assert tokens.shape == (2, 16, 24)
    mean = tokens.numpy().mean(1)
    normal = (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, keepdims=True) + model.config.eps)
    np.testing.assert_allclose(model.features(images).numpy(), normal, rtol=1e-9)
