import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivit.data.augmentation import POLICIES, draw_matrices, draw_mixing, find_policy
from minivit.errors import UserError


def matrices(policy, size=(32, 32), count=500, seed=0):
    return draw_matrices(np.random.default_rng(seed), find_policy(policy), count, size).astype(np.float64)


def test_none_is_the_identity():
    assert (matrices("none") == np.eye(2, 3)).all()


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
    ],
)
def test_unknown_policies_are_named(policy, message):
    with pytest.raises(UserError, match=message):
        find_policy(policy)


def test_policies_are_plain_data():
    import json

    for name, policy in POLICIES.items():
        again = json.loads(json.dumps(policy))
        np.testing.assert_array_equal(matrices(again), matrices(name))


# -------------------------------------------------------------------------------------------------------------------------- mixing
@given(
    seed=st.integers(0, 2**32), count=st.integers(1, 40), size=st.tuples(*[st.integers(1, 40)] * 2), alpha=st.sampled_from((0.2, 1.0, 3.0))
)
def test_the_share_of_a_label_is_the_share_of_its_pixels(seed, count, size, alpha):
    for mixup, cutmix in ((alpha, 0), (0, alpha), (alpha, alpha)):
        mixing = draw_mixing(np.random.default_rng(seed), count, size, mixup, cutmix)
        assert sorted(mixing.partner) == list(range(count))
        top, left, bottom, right = mixing.boxes.T
        assert (top >= 0).all() and (left >= 0).all() and (bottom <= size[0]).all() and (right <= size[1]).all()
        assert (top <= bottom).all() and (left <= right).all()
        inside = (bottom - top) * (right - left) / (size[0] * size[1])
        np.testing.assert_allclose(mixing.share, mixing.lam * (1 - inside), atol=1e-6)
        assert (mixing.lam == 1).all() or (inside == 0).all()


def test_mixup_draws_from_a_beta_distribution():
    mixing = draw_mixing(np.random.default_rng(0), 20000, (8, 8), 0.4, 0)
    assert mixing.share.mean() == pytest.approx(0.5, abs=0.01)
    assert mixing.share.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.02)


def test_cutmix_boxes_have_the_drawn_area_where_they_are_not_clipped():
    mixing = draw_mixing(np.random.default_rng(0), 20000, (200, 100), 0, 1.0)
    top, left, bottom, right = mixing.boxes.T
    free = (top > 0) & (left > 0) & (bottom < 200) & (right < 100)
    assert abs((bottom - top) - 2 * (right - left))[free].max() <= 3
    assert mixing.share.mean() > 0.5  # clipping takes from the partner
    assert free.mean() > 0.05


def test_one_of_the_two_is_chosen_for_each_batch():
    random = np.random.default_rng(0)
    cut = [(draw_mixing(random, 4, (32, 32), 0.8, 1.0).lam == 1).all() for _ in range(400)]
    assert 0.4 < np.mean(cut) < 0.6
