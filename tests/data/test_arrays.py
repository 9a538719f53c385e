import numpy as np
import pytest

from minivit.data import load_data
from minivit.errors import UserError

RNG = np.random.default_rng(0)


def images(count=40, size=6, channels=3, dtype=np.uint8):
    values = RNG.integers(0, 256, (count, size, size, channels), np.uint8)
    return values if dtype == np.uint8 else (values / 255).astype(dtype)


def labels(count=40, classes=4):
    return np.arange(count) % classes


def test_split_keeps_pairs_together_and_classes_in_proportion(capsys):
    pixels, truth = images(), labels()
    data = load_data((pixels, truth), test_fraction=0.3, split_seed=2)
    assert np.bincount(data.test_labels).tolist() == [3] * 4
    by_bytes = {image.tobytes(): label for image, label in zip(pixels, truth)}
    both = [*zip(data.train_images, data.train_labels), *zip(data.test_images, data.test_labels)]
    assert len(both) == 40 and all(by_bytes[image.tobytes()] == label for image, label in both)
    assert "28 for training, 12 for testing (test_fraction 0.3, seed 2)" in capsys.readouterr().err


def test_the_split_depends_on_the_seed_alone():
    pixels, truth = images(), labels()
    first, again, other = (load_data((pixels, truth), split_seed=seed, progress=False).test_images for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_four_arrays_stay_as_they_are():
    train, test = images(8), images(4)
    data = load_data((train, labels(8), test, labels(4)))
    assert data.train_images is train and data.test_images is test
    assert data.augmentation == "none"


def test_gray_images_without_a_channel_axis():
    data = load_data((images(channels=1)[..., 0], labels()))
    assert data.train_images.shape[1:] == (6, 6, 1) and data.in_channels == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_become_float32(dtype):
    pixels = images(dtype=dtype)
    data = load_data((pixels, labels(), pixels, labels()))
    assert data.train_images.dtype == np.float32
    np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(data.std, pixels.std((0, 1, 2)), rtol=1e-5)


def test_integers_become_bytes_where_they_fit():
    assert load_data((images().astype(np.int64), labels())).train_images.dtype == np.uint8
    with pytest.raises(UserError, match=r"0\.\.255, got 0\.\.300"):
        load_data((np.full((40, 6, 6, 3), 300) * (labels() > 0)[:, None, None, None], labels()))


def test_bytes_and_the_same_as_floats_have_the_same_statistics():
    pixels = images()
    assert load_data((pixels, labels())).std == pytest.approx(load_data(((pixels / 255).astype(np.float32), labels())).std, rel=1e-5)


def test_a_constant_channel_has_a_deviation_above_zero():
    assert load_data((np.full((40, 6, 6, 1), 7, np.uint8), labels())).std == pytest.approx((1 / 255,))


def test_sizes_are_rows_and_columns():
    wide = images()[:, :4]
    data = load_data((wide, labels()))
    assert data.image_size == (4, 6) and "4×6×3" in data.summary()
    assert load_data((images(), labels())).image_size == 6
    for size in ((6, 9), (5, 5)):
        resized = load_data((wide, labels()), image_size=size)
        assert resized.train_images.shape[1:3] == size
        assert np.array_equal(resized.train_images, data.resized(size).train_images)
    assert data.resized((4, 3)).image_size == (4, 3)
    assert np.array_equal(load_data((wide, labels()), image_size=(4, 2)).train_images, data.train_images[:, :, 2:4])  # the centre


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_resizing_crops_the_centre(dtype):
    pixels = np.zeros((40, 4, 12, 1), dtype)
    pixels[:, :, 3:9] = 255 if dtype == np.uint8 else 1  # the central square and a margin
    data = load_data((pixels, labels()), image_size=8, in_channels=3)
    assert data.train_images.shape[1:] == (8, 8, 3) and data.train_images.dtype == dtype
    assert (data.train_images == pixels.max()).all()


def test_float_images_turn_gray_with_the_weights_of_bytes():
    pixels = images()
    gray = load_data((pixels, labels()), in_channels=1).train_images
    floats = load_data(((pixels / 255).astype(np.float32), labels()), in_channels=1).train_images
    np.testing.assert_allclose(floats, gray / 255, atol=1.1 / 255)


def test_class_names_of_bytes_are_text():
    assert load_data((images(), labels()), class_names=[b"a", b"b", "\u96ea".encode(), "d"]).class_names == (
        "a",
        "b",
        "\u96ea",
        "d",
    )


def test_class_names_allow_classes_without_images():
    data = load_data((images(), labels() * 2), class_names=["a", "b", "c", "d", "e", "f", "g"])
    assert data.num_classes == 7 and data.class_names[6] == "g"


@pytest.mark.parametrize(
    "arrays, message",
    [
        ((images(), labels(39)), r"labels must have the shape \(40,\), one for each image, got \(39,\)"),
        ((images(), labels() - 1), r"labels\[0\] is -1"),
        ((images(), labels() + 0.5), r"labels\[0\] is 0.5: labels must be whole numbers"),
        ((images(), labels() + 1), "no training image has label 0"),
        ((images(), np.where(labels() == 3, 10**12, labels())), "labels run to 1000000000000"),
        ((images(), np.zeros(40, int)), "two classes or more, got 1"),
        ((images(), labels(), images(4), np.array([0, 1, 2, 9])), r"test_labels\[3\] is 9, out of range: .* 0\.\.3"),
        ((images(), labels(), images(4, size=5), labels(4)), r"train_images are uint8 \(6, 6, 3\), but test_images uint8 \(5, 5, 3\)"),
        ((images(), labels(), images(4, dtype=np.float32), labels(4)), "they must agree"),
        ((images(),), "got 1 of them"),
        ((images().astype(np.float32), labels()), r"must lie in 0\.\.1, got 0\.\.255: divide by 255"),
        ((images() > 3, labels()), "got bool"),
        ((images().transpose(0, 3, 1, 2), labels()), r"channels first: pass images.transpose\(0, 2, 3, 1\)"),
        ((images(0), labels(0)), "hold an image"),
        ((np.zeros(40), labels()), "must have the shape"),
        (([np.zeros((2, 2)), np.zeros((3, 3))], [0, 1]), "one array of equal sizes"),
        ((images(4), labels(4)), "none of the 4 images can be held out"),
    ],
)
def test_what_is_wrong_is_named(arrays, message):
    with pytest.raises(UserError, match=message) as caught:
        load_data(arrays)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_pixel_that_is_not_finite_is_named(bad):
    pixels = images(5000, size=2, channels=1, dtype=np.float32)
    pixels[4500, 1, 0, 0] = pixels[4501] = bad
    with pytest.raises(UserError, match=rf"images\[4500, 1, 0, 0\] is {bad}"):
        load_data((pixels, labels(5000)))


def test_names_must_reach_as_far_as_labels():
    with pytest.raises(UserError, match="training label is 3, out of range for 2 classes"):
        load_data((images(), labels()), class_names=["a", "b"])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(test_fraction=0), "test_fraction must lie between 0 and 1, got 0"),
        (dict(test_fraction=1.5), "got 1.5"),
        (dict(split_seed=-1), "seed"),
        (dict(image_size=0), "image_size must be a whole number of at least 1, not 0"),
        (dict(in_channels=2), "images of 3 channels cannot become 2"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        load_data((images(), labels()), **options)


# ------------------------------------------------------------------------------------------------------------------------------ npz
def test_npz_of_either_form(tmp_path):
    pixels = images()
    np.savez(tmp_path / "whole.npz", images=pixels, labels=labels(), class_names=["a", "b", "c", "d"])
    np.savez_compressed(tmp_path / "parts.npz", train_images=pixels, train_labels=labels(), test_images=pixels[:4], test_labels=labels(4))
    whole, parts = load_data(tmp_path / "whole.npz"), load_data(str(tmp_path / "parts.npz"))
    assert whole.class_names == ("a", "b", "c", "d") and whole.name == "whole" and len(whole.test_images) == 8
    np.testing.assert_array_equal(parts.train_images, pixels)
    assert len(parts.test_images) == 4


def test_npz_with_other_names(tmp_path):
    np.savez(tmp_path / "a.npz", image=images(), labels=labels())
    with pytest.raises(UserError, match=r"no array 'images' \(nearest: image, labels\): it must hold images, labels or train_images"):
        load_data(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", train_images=images(), train_label=labels(), test_images=images(), test_labels=labels())
    with pytest.raises(UserError, match=r"no array 'train_labels' \(nearest: train_label"):
        load_data(tmp_path / "b.npz")


def test_npz_that_is_cut_anywhere_or_damaged(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", images=images(), labels=labels())
    content = (tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "cut.npz"
    for length in (0, 1, 4, 30, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cannot read .*cut\.npz"):
            load_data(path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 20]) + content[middle + 20 :])
    with pytest.raises(UserError, match=r"cannot read .*cut\.npz"):
        load_data(path)


def test_npz_with_pickled_objects_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([{}, []], object), labels=labels(2))
    with pytest.raises(UserError, match="cannot read"):
        load_data(tmp_path / "a.npz")
