import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivit.data.mixing import draw_mixing


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
