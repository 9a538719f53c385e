"""A sketch recognises the images it was made of, and no others."""

import numpy as np
import pytest

from minivit.data.train_test_overlap import SIZE, hash_sample, overlap


def images(number, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, 4, 4, 3), np.uint8)


@pytest.mark.parametrize("number", [SIZE - 1, SIZE, 3000])
def test_the_images_of_the_set_are_known_and_others_are_not(number):
    known = hash_sample(images(number))
    assert len(known) == min(number, SIZE) and list(known) == sorted(set(known)) and known[0] >= 0 and known[-1] < 2**63
    assert overlap(known, images(number)) == 1
    assert overlap(known, images(number)[::2]) == 1
    assert overlap(known, images(number, seed=1)) == 0


def test_a_small_set_is_known_exactly():
    known = hash_sample(images(100))
    assert overlap(known, np.concatenate((images(30), images(70, seed=1)))) == 0.3


def test_a_part_of_a_large_set_is_estimated():
    known = hash_sample(images(2000))
    mixed = np.concatenate((images(2000)[:1000], images(1000, seed=1)))
    assert overlap(known, mixed) == pytest.approx(0.5, abs=0.15)


def test_one_picture_that_occurs_twice_is_no_overlap():
    known = hash_sample(images(100))
    assert overlap(known, np.concatenate((images(1), images(5, seed=1)))) == 0


def test_bytes_and_the_same_floats_are_one():
    assert hash_sample(images(20)) == hash_sample(images(20).astype(np.float32) / 255) == hash_sample(images(20)[::-1])
    assert hash_sample(images(20)) == hash_sample(np.concatenate((images(20), images(20))))


def test_nothing_is_known_of_nothing():
    assert overlap((), images(5)) == 0 and overlap(hash_sample(images(5)), images(0)) == 0
