import os
import sys

import numpy as np
import pytest
from pictures import picture
from PIL import Image

from minivit.data import folder, load_data
from minivit.data.folder import training_size
from minivit.errors import UserError

PARTED = [f"{part}/{name}/{i}.png" for part in ("train", "test") for name in ("cat", "dog") for i in range(4 if part == "train" else 2)]
WHOLE = [f"{name}/{i}.png" for name in ("cat", "dog", "eel") for i in range(10)]


@pytest.fixture
def load(tmp_path):
    def load(root, **options):
        return load_data(root, cache_dir=tmp_path / "cache", **options)

    return load


# ------------------------------------------------------------------------------------------------------------------------ layouts
@pytest.mark.parametrize("test", ["test", "val"])
def test_folders_for_training_and_testing(write_images, load, test):
    root = write_images(*(path.replace("test/", f"{test}/") for path in PARTED))
    data = load(root)
    assert data.class_names == ("cat", "dog") and data.name == "pictures" and data.augmentation == "crop-flip"
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4 and data.test_labels.tolist() == [0, 0, 1, 1]
    for image, path in zip([*data.train_images, *data.test_images], PARTED):
        np.testing.assert_array_equal(image, np.asarray(Image.open(root / path.replace("test/", f"{test}/"))))


@pytest.mark.parametrize("inside", ["", "train/"])
def test_a_split_by_chance_is_stratified_and_said(write_images, load, capsys, inside):
    data = load(write_images(*(inside + path for path in WHOLE)), test_fraction=0.3, split_seed=1)
    assert np.bincount(data.train_labels).tolist() == [7] * 3 and np.bincount(data.test_labels).tolist() == [3] * 3
    assert "21 for training, 9 for testing (test_fraction 0.3, seed 1)" in capsys.readouterr().err


def test_another_seed_splits_anew(write_images, load):
    root = write_images(*WHOLE)
    first, again, other = (load(root, split_seed=seed).test_images.copy() for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_other_files_and_folders_inside_classes(write_images, load):
    root = write_images("cat/a/1.png", "cat/2.PNG", "cat/10.png", "dog/1.png", "dog/2.png")
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "cat" / ".hidden.png").write_text("nor is this")
    (root / ".git").mkdir()
    data = load(root)
    assert data.class_names == ("cat", "dog") and len(data.train_images) + len(data.test_images) == 5


@pytest.mark.parametrize(
    "train, test",
    [
        ("Train", "Test"),
        ("Training", "Testing"),
        ("training_set", "test_set"),
        ("trainset", "testset"),
        ("train", "Test"),
        ("train", "dev"),
        ("TRAIN-DATA", "Validation"),
    ],
)
def test_other_names_of_the_parts(write_images, load, capsys, train, test):
    root = write_images(*(path.replace("train/", f"{train}/").replace("test/", f"{test}/") for path in PARTED))
    data = load(root)
    assert (data.class_names, len(data.train_images), len(data.test_images)) == (("cat", "dog"), 8, 4)
    assert f"{test} is the folder for testing\n" in capsys.readouterr().err


def test_a_part_that_is_not_used_is_said(write_images, load, capsys):
    data = load(write_images(*PARTED, *(path.replace("test/", "validation/") for path in PARTED), "other/cat/1.png"))
    assert (len(data.train_images), len(data.test_images)) == (8, 4)
    assert "not used: other, validation of " in capsys.readouterr().err


@pytest.mark.parametrize(
    "folders, message",
    [
        (("images_train", "images_val"), "the folders images_train, images_val of .* look like parts of the data"),
        (("1_train", "2_test"), "the folders 1_train, 2_test of .* look like parts of the data"),
        (("cat_test", "cat_train", "cat_val"), "the folders cat_test, cat_train, cat_val of .* look like parts of the data"),
        (("val", "test"), "the folders test, val of .* look like parts of the data, not like classes"),
        (("Train", "train", "test"), "Train and train of .* both look like the folder for train: "),
        (("train", "test", "testing"), "test and testing of .* both look like the folder for test: "),
    ],
)
def test_parts_that_cannot_be_told_are_an_error(write_images, load, folders, message):
    with pytest.raises(UserError, match=message):
        load(write_images(*(f"{folder}/{name}/1.png" for folder in folders for name in ("cat", "dog"))))


def test_parts_without_classes_are_no_classes(write_images, load):
    with pytest.raises(UserError, match=r"the folders test, train of .* look like parts of the data"):
        load(write_images("train/1.png", "train/2.png", "test/1.png", "test/2.png"))


def test_what_is_left_out_is_counted(write_images, load, capsys):
    root = write_images(*WHOLE)
    for i in range(3):
        (root / "cat" / f"IMG_{i}.HEIC").write_bytes(b"...")
    (root / "dog" / "notes").write_text("no image")
    assert len(load(root).train_images) == 24
    assert "left out, since the ending is none of an image that minivit reads: 3 .heic, 1 without an ending\n" in capsys.readouterr().err


def test_hidden_and_system_folders_are_passed_over(write_images, load, capsys):
    hidden = ("cat/@eaDir/0.png/SYNOPHOTO_THUMB_S.png", "__MACOSX/cat/._0.png", "cat/._1.png", ".git/cat/1.png", "$RECYCLE.BIN/dog/1.png")
    data = load(write_images(*WHOLE, *hidden))
    assert (data.class_names, len(data.train_images) + len(data.test_images)) == (("cat", "dog", "eel"), 30)
    assert "left out" not in capsys.readouterr().err


def test_a_loop_of_links_is_told(write_images, load):
    root = write_images(*WHOLE)
    (root / "cat" / "again").symlink_to(root / "cat", target_is_directory=True)
    with pytest.raises(UserError, match="more than 32 folders deep: is there a link to a folder above it") as caught:
        load(root)
    assert "\n" not in str(caught.value)


def test_a_class_may_be_called_train(write_images, load):
    assert load(write_images("train/1.png", "train/2.png", "bus/1.png", "bus/2.png")).class_names == ("bus", "train")


# --------------------------------------------------------------------------------------------------------------- sizes and channels
def test_the_shared_size_and_kind_are_kept(write_images, load):
    assert load(write_images(*WHOLE, size=(11, 11))).train_images.shape[1:] == (11, 11, 3)
    assert load(write_images(*WHOLE, size=(11, 11), mode="L", folder="gray")).train_images.shape[1:] == (11, 11, 1)


def test_a_mix_of_sizes_and_modes_becomes_32_in_colour(write_images, load, capsys):
    root = write_images(*WHOLE, mode="L")
    picture(0, (50, 70)).save(root / "cat" / "0.png")
    data = load(root)
    assert data.train_images.shape[1:] == (32, 32, 3)
    assert "images of 2 shapes become 32×32" in capsys.readouterr().err


@pytest.mark.parametrize(
    "size, others, expected",
    [
        ((11, 11), None, 11),
        ((64, 64), None, 64),
        ((80, 80), None, 64),
        ((80, 60), None, 64),
        ((40, 100), None, 32),
        ((20, 20), (50, 70), 32),
    ],
)
def test_the_size_for_training_suits_the_images(write_images, size, others, expected):
    root = write_images(*WHOLE, size=size)
    if others:
        picture(0, others).save(root / "cat" / "0.png")
    assert training_size(root) == expected


def test_unreadable_images_do_not_decide_the_size(write_images):
    root = write_images(*WHOLE, size=(80, 60))
    for path in WHOLE[::3]:
        (root / path).write_bytes(b"no image")
    assert training_size(root) == 64


def test_the_policy_does_not_come_from_the_cache(write_images, load, monkeypatch):
    root = write_images(*WHOLE, size=(50, 50))
    assert load(root).augmentation == "photo"
    monkeypatch.setattr(folder, "PHOTO", 51)
    assert load(root).augmentation == "crop-flip"


def test_wanted_sizes_and_channels(write_images, load):
    data = load(write_images(*WHOLE, size=(30, 20)), image_size=16, in_channels=1)
    assert data.train_images.shape[1:] == (16, 16, 1) and len(data.mean) == 1


# -------------------------------------------------------------------------------------------------------------------------- caching
def test_the_second_load_reads_no_image(write_images, load, tmp_path):
    root = write_images(*WHOLE)
    first = load(root)
    times = {path: os.stat(root / path) for path in WHOLE}
    for path in WHOLE:  # the same names, sizes and times, but no images any more
        (root / path).write_bytes(bytes(times[path].st_size))
        os.utime(root / path, ns=(times[path].st_atime_ns, times[path].st_mtime_ns))
    second = load(root)
    np.testing.assert_array_equal(first.train_images, second.train_images)
    np.testing.assert_array_equal(first.test_labels, second.test_labels)
    assert (first.mean, first.std, first.class_names) == (second.mean, second.std, second.class_names)
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".json", ".npy"]


@pytest.mark.parametrize("change", ["content", "time", "added", "removed", "renamed"])
def test_a_change_is_noticed(write_images, load, change):
    root = write_images(*WHOLE)
    before = load(root)
    path = root / "cat" / "3.png"
    if change == "content":
        picture(99).save(path)
    elif change == "time":
        content = os.stat(path)
        picture(99).save(path)
        os.truncate(path, max(content.st_size, path.stat().st_size))
        os.utime(path, ns=(0, content.st_mtime_ns + 1))
    elif change == "added":
        picture(99).save(root / "cat" / "99.png")
    elif change == "removed":
        path.unlink()
    else:
        path.rename(root / "dog" / "99.png")
    after = load(root)
    assert (before.train_images.tobytes(), before.test_images.tobytes(), before.train_labels.tobytes()) != (
        after.train_images.tobytes(),
        after.test_images.tobytes(),
        after.train_labels.tobytes(),
    )


def test_a_cut_cache_is_made_anew(write_images, load, tmp_path):
    root = write_images(*WHOLE)
    expected = load(root).train_images.copy()
    for suffix in (".npy", ".json"):
        path = next((tmp_path / "cache").glob(f"*{suffix}"))
        os.truncate(path, path.stat().st_size // 2)
        np.testing.assert_array_equal(load(root).train_images, expected)


def test_writing_into_the_images_does_not_reach_the_cache(write_images, load):
    root = write_images(*WHOLE)
    data = load(root)
    expected = data.train_images.copy()
    data.train_images[...] = 0
    np.testing.assert_array_equal(load(root).train_images, expected)


def test_an_interrupt_leaves_nothing(write_images, load, tmp_path, monkeypatch):
    calls = iter(range(100))

    def interrupted(handle):
        if next(calls) == 1:  # the array is there, its description not yet
            raise KeyboardInterrupt

    root = write_images(*WHOLE)
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(root)
    assert [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".npy")] == []
    assert len(load(root).train_images) == 24


# ----------------------------------------------------------------------------------------------------------------------- bad images
def test_a_bad_image_is_named(write_images, load, tmp_path):
    root = write_images(*WHOLE)
    path = root / "dog" / "4.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"cannot read image .*dog/4\.png: .*truncated.*--skip-bad-images"):
        load(root)
    assert os.listdir(tmp_path / "cache") == []


def test_bad_images_are_skipped_counted_and_named_where_wanted(write_images, load, capsys):
    root = write_images(*WHOLE)
    (root / "dog" / "4.png").write_bytes(b"")
    (root / "eel" / "7.png").write_text("text")
    (root / "eel" / "8.png").unlink()
    (root / "eel" / "8.png").symlink_to("nowhere.png")
    for _ in range(2):  # the second time from the cache
        data = load(root, skip_bad_images=True)
        assert len(data.train_images) + len(data.test_images) == len(data.train_labels) + len(data.test_labels) == 27
        said = capsys.readouterr().err
        assert "skipped 3 unreadable images" in said and all(name in said for name in ("dog/4.png", "eel/7.png", "eel/8.png"))
        assert {*data.train_files, *data.test_files} == {*WHOLE} - {"dog/4.png", "eel/7.png", "eel/8.png"}
    check_files(data, root)


def check_files(data, root):
    """The images are those of the files that the dataset names, and of their classes."""
    for part in ("train", "test"):
        images, labels, files = (getattr(data, f"{part}_{what}") for what in ("images", "labels", "files"))
        assert len(images) == len(labels) == len(files)
        for image, label, path in zip(images, labels, files):
            assert data.class_names[label] in path.split("/")
            np.testing.assert_array_equal(image, np.asarray(Image.open(root / path)))


@pytest.mark.parametrize("paths", [PARTED, WHOLE])
def test_parts_of_a_dataset_know_their_files(write_images, load, paths):
    root = write_images(*paths)
    data = load(root)
    assert sorted(data.train_files + data.test_files) == sorted(paths)
    for part in (data, data.limited(3), data.validating(0.3, seed=1), data.limited(6).resized(8), data.whole()):
        check_files(part, root)


def test_a_class_without_a_readable_image(write_images, load, tmp_path):
    root = write_images(*PARTED)
    for i in range(4):
        (root / "train" / "cat" / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="too few images can be read: 4 of 12 were skipped; cannot read image"):
        load(root, skip_bad_images=True)
    assert os.listdir(tmp_path / "cache") == []


# ---------------------------------------------------------------------------------------------------------------------- bad folders
@pytest.mark.parametrize(
    "paths, message",
    [
        (["cat/1.png", "cat/2.png"], "holds one class, 'cat'"),
        (["1.png", "2.png"], "2 images lie in it directly; put each class into a folder of its own"),
        (["train/cat/1.png", "test/cat/1.png"], "holds one class, 'cat'"),
        (["train/cat/1.png", "train/dog/1.png", "test/dg/1.png"], r"class 'dg' .* is no class of .*train \(nearest: dog\)"),
        (["train/cat/1.png", "train/dog/1.png", "test/1.png"], "test has no class folders with images"),
        (["cat/1.png", "dog/1.png"], "none of the 2 images can be held out"),
    ],
)
def test_bad_layouts_are_named(write_images, load, paths, message):
    with pytest.raises(UserError, match=message) as caught:
        load(write_images(*paths))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text here")
@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb", b"\x1b[31m"])
def test_names_that_cannot_be_shown_are_told(write_images, load, name):
    root = write_images(*WHOLE)
    os.rename(root / "cat", os.path.join(os.fsencode(root), name))
    with pytest.raises(UserError, match=r"class folder .* has a name that cannot be shown or is not UTF-8: rename it") as caught:
        load(root)
    assert str(caught.value).isprintable()


def test_empty_folders_are_named(write_images, load, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no class folders with images: no file ends in \.avif"):
        load(tmp_path / "empty")
    root = write_images(*WHOLE)
    (root / "fox").mkdir()
    with pytest.raises(UserError, match=r"class folder .*fox holds no images: remove it"):
        load(root)
