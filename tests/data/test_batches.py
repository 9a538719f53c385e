import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivit.data import POLICIES, Batches
from minivit.errors import UserError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def images(count=20, size=8, dtype=np.uint8):
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return pixels if dtype == np.uint8 else (pixels / 255).astype(dtype)


def batches(pixels=None, labels=None, **options):
    pixels = images() if pixels is None else pixels
    labels = np.arange(len(pixels)) % 5 if labels is None else labels
    return Batches(pixels, labels, **{"batch_size": 6, "num_classes": 5, "mean": MEAN, "std": STD, **options})


def normalised(pixels):
    """(n, C, H, W) float64."""
    scaled = pixels / 255 if pixels.dtype == np.uint8 else pixels.astype(np.float64)
    return ((scaled - MEAN) / STD).transpose(0, 3, 1, 2)


def everything(source, epoch=0, start=0):
    return [array for pair in source.epoch(epoch, start) for array in pair]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_evaluation_visits_every_image_once_in_order(dtype):
    pixels = images(dtype=dtype)
    source = batches(pixels, shuffle=False, drop_last=False)
    inputs, targets = zip(*source.epoch(0))
    assert [len(i) for i in inputs] == [6, 6, 6, 2] and len(source) == 4
    assert all(i.dtype == np.float32 and t.dtype == np.int64 for i, t in zip(inputs, targets))
    np.testing.assert_allclose(np.concatenate(inputs), normalised(pixels), atol=2e-6)
    np.testing.assert_array_equal(np.concatenate(targets), np.arange(20) % 5)


def test_training_shuffles_and_keeps_images_with_their_labels():
    pixels = images()
    source = batches(pixels, np.arange(20), num_classes=20)
    inputs, targets = map(np.concatenate, zip(*source.epoch(0)))
    assert len(targets) == 18 and len(set(targets)) == 18 and len(source) == 3
    assert targets.tolist() != sorted(targets)
    np.testing.assert_allclose(inputs, normalised(pixels)[targets], atol=2e-6)


def test_each_epoch_leaves_other_images_out():
    source = batches(labels=np.arange(20), num_classes=20)
    left = {frozenset(range(20)) - set(np.concatenate([t for _, t in source.epoch(e)])) for e in range(5)}
    assert len(left) > 1


FULL = {"augmentation": "affine", "mixup": 0.4, "cutmix": 1.0}


def test_a_repeated_image_stands_in_a_batch_and_is_changed_anew():
    source = batches(repeats=3, augmentation="photo")
    assert len(source) == len(batches())
    shown = set()
    for epoch in range(12):
        index = source.order(epoch)[:18].reshape(-1, 6)  # of each batch
        assert [np.unique(row).size for row in index] == [2, 2, 2] and (index[:, 0] == index[:, 2]).all()
        for (inputs, targets), row in zip(source.epoch(epoch), index):
            np.testing.assert_array_equal(targets, row % 5)
            assert len({image.tobytes() for image in inputs}) == 6
        shown |= set(index.ravel().tolist())
    assert shown == set(range(20))


def test_an_epoch_repeats_bit_for_bit_and_resumes_anywhere():
    first, again = everything(batches(**FULL), 3), everything(batches(**FULL), 3)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again))
    resumed = everything(batches(**FULL), 3, start=2)
    assert len(resumed) == 2 and all(a.tobytes() == b.tobytes() for a, b in zip(first[4:], resumed))


def test_epochs_and_seeds_differ():
    outcomes = {everything(batches(seed=seed, **FULL), epoch)[0].tobytes() for seed in (0, 1, 2**64 - 1) for epoch in (0, 1, 2)}
    assert len(outcomes) == 9


def test_the_number_of_threads_changes_nothing(set_threads):
    outcomes = set()
    for threads in (1, 2):
        set_threads(threads)
        outcomes.add(b"".join(a.tobytes() for a in everything(batches(**FULL))))
    assert len(outcomes) == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_crops_and_flips_copy_pixels_exactly(dtype):
    pixels = images(6, 16, dtype)
    source = batches(pixels, np.arange(6), num_classes=6, augmentation="crop-flip", mean=(0,) * 3, std=(1,) * 3)
    seen = set()
    for epoch in range(40):
        for inputs, targets in source.epoch(epoch):
            for image, label in zip(inputs, targets):
                original = np.pad(pixels[label], ((2, 2), (2, 2), (0, 0))).astype(np.float32)
                original = (original / 255 if dtype == np.uint8 else original).transpose(2, 0, 1)
                found = [
                    (i, j, mirror)
                    for i in range(5)
                    for j in range(5)
                    for mirror in (1, -1)
                    if np.allclose(original[:, i : i + 16, j : j + 16][:, :, ::mirror], image, atol=1e-7, rtol=0)
                ]
                assert len(found) == 1
                seen |= {*found}
    assert [set(values) for values in zip(*seen)] == [{*range(5)}, {*range(5)}, {1, -1}]  # shifts by up to 2 pixels, mirrored or not


def test_a_warp_reads_between_pixels():
    ramp = np.broadcast_to(np.arange(16, dtype=np.float32)[None, None, :, None] / 15, (6, 16, 16, 3)).copy()
    source = batches(
        ramp,
        np.arange(6),
        num_classes=6,
        augmentation=[("affine", {"rotation": 0, "scale": 0, "shift": 1 / 8})],
        mean=(0,) * 3,
        std=(1,) * 3,
    )
    ((inputs, _),) = source.epoch(0)
    shifts = inputs[:, 0, 8, 3:13] * 15 - np.arange(3, 13)  # (B, 10): a ramp stays a ramp, moved
    assert abs(shifts).max() <= 2 and np.ptp(shifts, axis=1).max() < 1e-4 and np.ptp(shifts) > 1


@pytest.mark.parametrize("mixup, cutmix", [(0.5, 0), (0, 1.0), (0.5, 1.0)])
@pytest.mark.parametrize("augmentation", ["none", "affine"])
def test_targets_say_how_much_of_each_image_is_there(mixup, cutmix, augmentation):
    constant = np.broadcast_to(np.eye(3, dtype=np.uint8)[:, None, None, :] * 255, (3, 16, 16, 3))  # class k fills channel k
    pixels, labels = np.tile(constant, (8, 1, 1, 1)), np.tile(np.arange(3), 8)
    source = Batches(
        np.ascontiguousarray(pixels),
        labels,
        batch_size=8,
        num_classes=3,
        mean=(0,) * 3,
        std=(1,) * 3,
        mixup=mixup,
        cutmix=cutmix,
        augmentation="none",
    )
    for epoch in range(5):
        for inputs, targets in source.epoch(epoch):
            assert targets.dtype == np.float32 and targets.shape == (8, 3)
            np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
            np.testing.assert_allclose(inputs.mean((2, 3)), targets, atol=1e-6)
    soft = np.concatenate([t for e in range(5) for _, t in source.epoch(e)])
    assert ((soft > 0.01) & (soft < 0.99)).any()


RECOLOURED = ("photo", "trivial")  # whose colours may leave 0..1


@given(
    size=st.integers(1, 20),
    channels=st.integers(1, 4),
    count=st.integers(1, 9),
    policy=st.sampled_from([name for name in POLICIES if name not in RECOLOURED]),
    mix=st.booleans(),
    dtype=st.sampled_from(("uint8", "float32")),
)
def test_every_pixel_stays_within_the_range_of_what_it_came_from(size, channels, count, policy, mix, dtype):
    pixels = np.random.default_rng(size).integers(0, 256, (count, size, size, channels), np.uint8)
    pixels = pixels if dtype == "uint8" else (pixels / 255).astype(np.float32)
    source = Batches(
        pixels,
        np.arange(count),
        batch_size=count,
        num_classes=count,
        mean=(0,) * channels,
        std=(1,) * channels,
        augmentation=policy,
        mixup=mix * 0.3,
        cutmix=mix * 1.0,
    )
    ((inputs, _),) = source.epoch(0)
    assert inputs.shape == (count, channels, size, size)
    assert inputs.min() >= 0 and inputs.max() <= 1 + 1e-6


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batch_size=0), "batch_size must be 1 or more, got 0"),
        (dict(repeats=0), "repeats must be 1 or more, got 0"),
        (dict(batch_size=21), "batch_size 21 is larger than the 20 images"),
        (dict(num_classes=4), r"labels\[4\] is 4, out of range for 4 classes"),
        (dict(labels=np.arange(19)), r"labels must have the shape \(20,\)"),
        (dict(mixup=-1), "mixup must be 0"),
        (dict(cutmix=float("nan")), "cutmix must be 0"),
        (dict(seed=-3), "got -3"),
        (dict(augmentation="crop-flop"), "nearest: crop-flip"),
    ],
)
def test_what_is_wrong_is_named(options, message):
    with pytest.raises(UserError, match=message):
        batches(**options)
