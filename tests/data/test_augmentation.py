import numpy as np
import pytest

from minivit.data.augmentation import POLICIES, draw, find_policy
from minivit.data.transforms import LUMA, TRANSFORMS
from minivit.errors import UserError


def drawn_by(policy, size=(32, 32), count=500, seed=0, channels=3):
    return draw(np.random.default_rng(seed), find_policy(policy), count, size, channels)


def matrices(policy, size=(32, 32), count=500, seed=0):
    return drawn_by(policy, size, count, seed).matrices.astype(np.float64)


def colours(policy, colour, count=2000):
    """What becomes of a colour (C,) in each of the images: (B, C)."""
    return drawn_by(policy, count=count, channels=len(colour)).colours.astype(np.float64) @ [*colour, 1]


@pytest.mark.parametrize("channels", (1, 3, 4))
def test_none_is_the_identity(channels):
    drawn = drawn_by("none", channels=channels)
    assert (drawn.matrices == np.eye(2, 3)).all() and (drawn.colours == np.eye(channels, channels + 1)).all() and not drawn.holes.any()


def test_flip_mirrors_half_of_the_images():
    drawn = matrices("flip", (6, 10))
    mirrored = drawn[:, 0, 0] == -1
    assert 0.4 < mirrored.mean() < 0.6
    assert (drawn[mirrored] == [[-1, 0, 9], [0, 1, 0]]).all() and (drawn[~mirrored] == np.eye(2, 3)).all()


@pytest.mark.parametrize("size, largest", [(32, 4), (15, 1), (8, 1), (7, 0)])
def test_crop_flip_shifts_by_whole_pixels_up_to_an_eighth(size, largest):
    for shape in ((size, 2 * size), (2 * size, size), (size, size)):
        drawn = matrices("crop-flip", shape, 1000)
        mirrored = drawn[:, 0, 0] == -1
        assert 0.4 < mirrored.mean() < 0.6
        u = np.where(mirrored, drawn[:, 0, 2] - (shape[1] - 1), drawn[:, 0, 2])
        for shift, side in ((u, shape[1]), (drawn[:, 1, 2], shape[0])):
            most = largest if side == size else side // 8
            assert set(shift) == set(range(-most, most + 1))


def test_affine_turns_resizes_and_moves_within_its_limits():
    drawn = matrices([("affine", {"rotation": 10, "scale": 0.1, "shift": 1 / 8})], (8, 16), 5000)
    linear = drawn[:, :, :2]
    factor = 1 / np.sqrt(np.linalg.det(linear))
    angle = np.rad2deg(np.arctan2(linear[:, 1, 0], linear[:, 0, 0]))
    centre = np.einsum("brk,k->br", drawn, [7.5, 3.5, 1]) - (7.5, 3.5)  # where the middle is read from
    for values, low, high in ((factor, 0.9, 1.1), (angle, -10, 10), (centre[:, 0], -2, 2), (centre[:, 1], -1, 1)):
        assert low - 1e-5 <= values.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < values.max() <= high + 1e-5
    np.testing.assert_allclose(np.einsum("bij,bik->bjk", linear, linear), np.eye(2) / factor[:, None, None] ** 2, atol=1e-6)


def test_transforms_act_in_the_order_of_the_policy():
    crop, mirror = ("crop", {"padding": 0.25}), ("flip", {"probability": 1})
    first, second = matrices((crop, mirror), (8, 8), 50), matrices((mirror, crop), (8, 8), 50)
    u = np.random.default_rng(0).integers(-2, 2, (2, 50), endpoint=True)[0]
    np.testing.assert_array_equal(first[:, 0, 2], 7 + u)  # reads where the mirrored pixel of the shifted image lies
    assert (first[:, 0, 0] == -1).all() and (second[:, 0, 0] == -1).all()
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    "policy, message",
    [
        ("afine", r"unknown augmentation 'afine' \(nearest: affine\)"),
        ([("crp", {})], r"unknown transform 'crp' \(nearest: crop\)"),
        ([("crop", {"margin": 1})], "transform 'crop': .*margin"),
        ([("flip", {})], "probability"),
        ([("resized_crop", {"area": 0, "ratio": 1})], "area"),
        ([("resized_crop", {"area": 0.5, "ratio": 0.5})], "ratio"),
        ([("jitter", {"contrast": 1.5})], "contrast"),
        ([("jitter", {"hue": 1})], "hue"),
        ([("trivial", {"strength": 2})], "strength"),
        ([("erase", {"probability": 1, "area": 2})], "area"),
    ],
)
def test_unknown_policies_are_named(policy, message):
    with pytest.raises(UserError, match=message):
        find_policy(policy)


def test_policies_are_plain_data():
    import json

    for name, policy in POLICIES.items():
        again = json.loads(json.dumps(policy))
        for ours, theirs in zip(drawn_by(again), drawn_by(name)):
            np.testing.assert_array_equal(ours, theirs)


# ------------------------------------------------------------------------------------------------------------ the other transforms
def test_a_resized_crop_enlarges_a_box_inside_the_image():
    height, width = 24, 48
    drawn = matrices([("resized_crop", {"area": 0.25, "ratio": 2})], (height, width), 5000)
    assert (drawn[:, 0, 1] == 0).all() and (drawn[:, 1, 0] == 0).all()
    edges = np.array([[-0.5, -0.5, 1], [width - 0.5, height - 0.5, 1]]).T  # the outer edges of the first and the last pixel
    first, last = (drawn @ edges).transpose(2, 0, 1)
    assert first.min() >= -0.501 and (last <= (width - 0.499, height - 0.499)).all()
    parts = (last - first) / (width, height)
    area, ratio = parts.prod(1), parts[:, 0] / parts[:, 1]
    assert 0.1 < area.min() < 0.27 and area.max() == pytest.approx(1, abs=0.01)
    free = (parts < 0.99).all(1)  # of the others a side is as long as the image's
    assert area[free].min() >= 0.2499 and 0.5 <= ratio[free].min() < 0.53 and 1.9 < ratio[free].max() <= 2.0001
    centre = (first + last)[free] / 2 - ((width - 1) / 2, (height - 1) / 2)
    np.testing.assert_allclose(centre.mean(0), 0, atol=0.5)


def test_jitter_changes_brightness_contrast_and_saturation_within_its_limits():
    red = np.array([0.8, 0.4, 0.2])
    level = red @ LUMA
    for name, fixed in (("brightness", 0.0), ("contrast", 0.5), ("saturation", level)):
        factor = (colours([("jitter", {name: 0.4})], red) - fixed) / (red - fixed)
        np.testing.assert_allclose(factor, factor[:, :1].repeat(3, 1), atol=1e-5)
        assert factor.min() + 1e-5 >= 0.6 and factor.min() < 0.61 and 1.39 < factor.max() <= 1.40001
    assert (colours([("jitter", {"saturation": 1})], [0.3]) == pytest.approx(0.3)) and colours(
        [("jitter", {"brightness": 1})], [0.3]
    ).std() > 0


def test_hue_keeps_brightness_and_greys():
    for colour in ([0.8, 0.4, 0.2], [0.5, 0.5, 0.5]):
        turned = colours([("jitter", {"hue": 0.5})], colour)
        np.testing.assert_allclose(turned @ LUMA, np.dot(colour, LUMA), atol=2e-3)  # the matrix of YIQ is rounded
    np.testing.assert_allclose(turned, 0.5, atol=2e-3)
    assert colours([("jitter", {"hue": 0.5})], [0.8, 0.4, 0.2]).std(0).min() > 0.1


def test_grey_has_equal_channels_of_equal_brightness():
    drawn = colours([("grey", {"probability": 0.3})], [0.8, 0.4, 0.2])
    changed = np.abs(drawn - [0.8, 0.4, 0.2]).max(1) > 0.01
    assert 0.27 < changed.mean() < 0.33
    np.testing.assert_allclose(drawn[changed], np.dot([0.8, 0.4, 0.2], LUMA), atol=1e-6)


def test_trivial_changes_one_thing_of_an_image():
    drawn = drawn_by([("trivial", {"strength": 1})], (32, 32), 9000)
    centre = drawn.matrices.astype(np.float64) @ [15.5, 15.5, 1] - 15.5
    linear = drawn.matrices[:, :, :2] - np.eye(2)
    is_shear = [np.abs(linear[:, k, 1 - k]) > 1e-6 for k in (0, 1)]
    turned = is_shear[0] & is_shear[1]
    moved = np.abs(centre) > 1e-4
    coloured = np.abs(drawn.colours - np.eye(3, 4)).max((1, 2)) > 1e-6
    kinds = np.stack([is_shear[0] & ~turned, is_shear[1] & ~turned, turned, *moved.T, coloured])
    assert (kinds.sum(0) <= 1).all()
    np.testing.assert_allclose(kinds.mean(1), [1 / 9] * 5 + [3 / 9], atol=0.02)
    assert np.abs(linear[is_shear[0] & ~turned]).max() == pytest.approx(0.3, abs=0.01) and np.abs(centre).max() == pytest.approx(
        9.6, abs=0.1
    )
    assert np.rad2deg(np.arcsin(linear[turned, 1, 0])).max() == pytest.approx(30, abs=0.5)


def test_erasing_blanks_a_box_inside_the_image():
    top, left, bottom, right = drawn_by([("erase", {"probability": 0.5, "area": 0.25})], (20, 40), 4000).holes.T
    share = (bottom - top) * (right - left) / 800
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= 20).all() and (right <= 40).all() and (share >= 0).all()
    assert 0.45 < (share > 0).mean() < 0.52 and 0.24 < share.max() < 0.28
    assert share[share > 0].mean() == pytest.approx(0.125, abs=0.01)


PARAMETERS = {
    "flip": {"probability": 0.5},
    "crop": {"padding": 0.2},
    "resized_crop": {"area": 0.3, "ratio": 1.3},
    "affine": {"rotation": 10, "scale": 0.1, "shift": 0.1},
    "jitter": {"brightness": 0.4},
    "grey": {"probability": 0.5},
    "trivial": {"strength": 1},
    "erase": {"probability": 0.5, "area": 0.3},
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_repeatable_and_say_what_they_do(name):
    policy = [(name, PARAMETERS[name])]
    for channels in (1, 3):
        first, second, other = (drawn_by(policy, (9, 12), 40, seed, channels) for seed in (0, 0, 1))
        assert all((a == b).all() for a, b in zip(first, second))
        assert any((a != b).any() for a, b in zip(first, other)) or (name == "grey" and channels == 1)
    assert TRANSFORMS[name].__doc__
