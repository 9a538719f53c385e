"""`fit`: how images of other proportions become squares, in data, in training and in prediction."""

import json

import numpy as np
import pytest
from pictures import picture
from PIL import Image

import minivit
from minivit.data import load_data, prepare
from minivit.data.fit import frame
from minivit.errors import UserError
from minivit.inference.run_data import data_of_run
from minivit.io.model_file import save_model

HALVES = np.zeros((8, 16, 3), np.uint8)  # the left half is red, the right half blue
HALVES[:, :8, 0] = HALVES[:, 8:, 2] = 255


def fitted(image, fit, size=8, channels=3):
    return prepare(image, image_size=size, in_channels=channels, fit=fit)[0]


def test_crop_is_the_central_square():
    np.testing.assert_array_equal(fitted(HALVES, "crop"), HALVES[:, 4:12])
    np.testing.assert_array_equal(prepare(HALVES, image_size=8, in_channels=3)[0], HALVES[:, 4:12])


def test_pad_keeps_the_whole_image_and_its_proportions_on_its_mean_colour():
    image = picture(0, (16, 8))
    pixels = fitted(image, "pad")
    inner = np.asarray(image.resize((8, 4), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pixels[2:6], inner)
    assert (pixels[[0, 1, 6, 7]] == np.rint(inner.mean((0, 1)))).all()


def test_pad_of_a_tall_image_and_of_an_odd_rest():
    pixels = fitted(picture(0, (3, 8)), "pad")
    np.testing.assert_array_equal(pixels[:, 2:5], np.asarray(picture(0, (3, 8))))
    assert (pixels[:, [0, 1, 5, 6, 7]] == pixels[0, 0]).all()


def test_stretch_keeps_the_whole_image_without_its_proportions():
    image = picture(0, (16, 8))
    np.testing.assert_array_equal(fitted(image, "stretch", 6), np.asarray(image.resize((6, 6), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_files_images_bytes_and_floats_fit_alike(tmp_path, fit):
    image = picture(0, (12, 7))
    image.save(tmp_path / "a.png")
    expected = fitted(image, fit, 5)
    np.testing.assert_array_equal(fitted(tmp_path / "a.png", fit, 5), expected)
    np.testing.assert_array_equal(fitted(np.asarray(image), fit, 5), expected)
    np.testing.assert_allclose(fitted(np.asarray(image, np.float32) / 255, fit, 5), expected / 255, atol=2 / 255)
    gray = np.asarray(image.convert("L"))
    np.testing.assert_allclose(fitted(gray / np.float32(255), fit, 5, 1), fitted(gray, fit, 5, 1) / 255, atol=2 / 255)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_square_is_the_same_in_every_way(fit):
    np.testing.assert_array_equal(fitted(picture(0), fit), np.asarray(picture(0)))


def test_frames_of_targets_that_are_no_squares():
    assert frame((100, 50), (20, 40), "crop") == ((37, 0, 62, 50), (20, 40), (0, 0))
    assert frame((100, 50), (20, 40), "pad") == ((0, 0, 100, 50), (20, 10), (0, 15))
    assert frame((100, 50), (20, 40), "stretch") == ((0, 0, 100, 50), (20, 40), (0, 0))
    assert frame((1000, 1), (8, 8), "pad").size == (8, 1)


def test_a_folder_is_decoded_as_asked_and_cached_for_each_way(write_images, tmp_path):
    root = write_images(*(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)), size=(16, 8))

    def load(fit, **options):
        return load_data(root, fit=fit, image_size=8, cache_dir=tmp_path / "cache", **options)

    loaded = {fit: load(fit) for fit in ("crop", "pad", "stretch")}
    for fit, data in loaded.items():
        assert data.fit == fit
        paths = [root / f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)]
        expected = {fitted(path, fit).tobytes() for path in paths}
        assert {image.tobytes() for image in [*data.train_images, *data.test_images]} == expected
        again = load(fit)
        assert again.fit == fit
        np.testing.assert_array_equal(again.train_images, data.train_images)
    assert load(None).fit == "crop"


def test_arrays_and_archives(tmp_path):
    images, labels = np.stack([HALVES, HALVES[:, ::-1]] * 2), [0, 1, 0, 1]
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    for data in ((images, labels), (images, labels, images, labels), tmp_path / "a.npz"):
        dataset = load_data(data, image_size=8, fit="stretch")
        assert dataset.fit == "stretch"
        assert {image.tobytes() for image in dataset.train_images} <= {fitted(image, "stretch").tobytes() for image in images}


def test_a_dataset_keeps_how_it_was_made():
    made = load_data((np.stack([HALVES] * 4), [0, 1, 0, 1]), image_size=8, fit="pad")
    assert load_data(made).fit == load_data(made, image_size=4).fit == "pad"
    assert load_data(made, fit="stretch").fit == "stretch"


def test_a_model_keeps_how_it_sees_images(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 16, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(40) % 2)
    small = dict(epochs=1, progress=False, model_options={"dim": 16, "depth": 1, "heads": 2, "patch_size": 4})
    run = minivit.train("vit", tmp_path / "a.npz", image_size=8, fit="pad", out=tmp_path / "run", **small)
    assert json.loads((run.folder / "config.json").read_text())["arguments"]["fit"] == "pad"
    loaded = minivit.load(run.folder)
    padded = prepare(list(images), image_size=8, in_channels=3, fit="pad")
    cropped = prepare(list(images), image_size=8, in_channels=3)
    np.testing.assert_array_equal(loaded.predict(images).probabilities, loaded.predict(padded).probabilities)
    assert not np.allclose(loaded.predict(images).probabilities, loaded.predict(cropped).probabilities)
    tested = data_of_run(run.folder, loaded)
    assert tested.fit == "pad" and {image.tobytes() for image in tested.test_images} <= {image.tobytes() for image in padded}
    again = minivit.train(loaded, (images, np.arange(40) % 2), epochs=1, progress=False, out=tmp_path / "again")
    assert again.model.preprocessing.fit == "pad"


def test_an_unknown_way_is_one_line(write_images):
    with pytest.raises(UserError, match=r"^unknown fit 'padd' \(nearest: pad\): choose crop, pad, stretch$"):
        load_data("digits", fit="padd")
    with pytest.raises(UserError, match=r"^unknown fit 'centre': choose crop, pad, stretch$"):
        prepare(HALVES, image_size=8, in_channels=3, fit="centre")


def test_model_files_that_do_not_say_it_crop(tmp_path):
    model = minivit.create_model("vit_nano_patch2_8", depth=1)
    about = {"class_names": list("0123456789"), "preprocessing": {"image_size": 8, "in_channels": 1, "mean": [0.5], "std": [0.25]}}
    save_model(tmp_path / "old.safetensors", model, about)
    assert minivit.load(tmp_path / "old.safetensors").preprocessing.fit == "crop"
    about["preprocessing"]["fit"] = "centre"
    save_model(tmp_path / "odd.safetensors", model, about)
    with pytest.raises(UserError, match=r"unknown fit 'centre'"):
        minivit.load(tmp_path / "odd.safetensors")
