"""The cache of decoded images: what in it counts, and what is done where it cannot be used."""

import json
import os
import stat

import pytest
from mutations import mutations

from minivit.data import cache, load_data
from minivit.errors import UserError
from minivit.kernels.core.cache import say_once

PATHS = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(5)]


@pytest.fixture
def load(write_images, tmp_path):
    """Loads one folder of images with a cache; `load.root` and `load.cache` are the two."""
    say_once.cache_clear()  # a line is said once in a process

    def load(**options):
        return load_data(load.root, **{"cache_dir": load.cache, "progress": False, **options})

    load.root, load.cache = write_images(*PATHS), tmp_path / "cache"
    return load


def values(data):
    """All that a dataset holds, apart from the file to which it is mapped."""
    arrays = data.train_images, data.train_labels, data.test_images, data.test_labels
    return *(array.tolist() for array in arrays), data.name, data.class_names, data.mean, data.std, data.augmentation


def entry(load):
    (path,) = load.cache.glob("*.json")
    return path, path.with_suffix(".npy")


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_entry_is_made_again_silently(load, capfd, count, which):
    expected = values(load())
    path = entry(load)[which]
    content = path.read_bytes()
    for damaged in mutations(content, count, which):
        path.write_bytes(damaged)
        assert values(load()) == expected
    assert capfd.readouterr().err == ""


def test_an_intact_entry_is_used(load, monkeypatch):
    load()
    monkeypatch.setattr(cache, "store", None)
    load()


@pytest.mark.parametrize(
    "changed",
    [
        {"labels": [0]},
        {"labels": [10**30] * 10},
        {"train": "all"},
        {"class_names": None},
        {"mean": [[0.5]]},
        {"shape": [10, 8, 8]},
        {"notes": []},
        None,
    ],
)
def test_a_forged_description_does_not_count(load, changed):
    expected = values(load())
    path, _ = entry(load)
    digest, _, content = path.read_bytes().partition(b"\n")
    forged = json.dumps({**json.loads(content), **changed} if changed else []).encode()
    path.write_bytes(digest + b"\n" + forged)
    assert values(load()) == expected


def test_an_entry_under_another_key_does_not_count(load):
    expected = values(load()), values(load(image_size=5))
    first, second = sorted(load.cache.glob("*.json"))
    for suffix in (".json", ".npy"):
        os.replace(first.with_suffix(suffix), second.with_suffix(suffix))
    assert values(load()) == expected[0]
    assert values(load(image_size=5)) == expected[1]


def test_pixels_that_changed_do_not_count(load):
    expected = values(load())
    _, path = entry(load)
    path.write_bytes(path.read_bytes()[:-1] + b"\x2a")
    assert values(load()) == expected


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_its_place_does_not_hang(load):
    expected = values(load())
    for path in entry(load):
        path.unlink()
        os.mkfifo(path)
        assert values(load()) == expected


# ---------------------------------------------------------------------------------------------------------- where nothing is kept
def one_line(capfd):
    (line,) = capfd.readouterr().err.splitlines()
    assert line.isprintable()
    return line


def full_disk(monkeypatch, good=0):
    """A disk on which so many files can be written, and no more."""
    written = iter(range(100))

    def fsync(handle):
        if next(written) >= good:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("good", [0, 1])  # the array file fails, or the one that describes it
def test_a_full_disk_costs_a_line_and_leaves_nothing(load, capfd, monkeypatch, good):
    expected = values(load(cache_dir=load.root.parent / "other"))
    full_disk(monkeypatch, good)
    assert values(load()) == expected
    assert one_line(capfd) == (
        f"cannot keep decoded images in {load.cache}: No space left on device; decoded images stay in memory; "
        "give another folder as cache_dir to keep them"
    )
    assert os.listdir(load.cache) == []


def test_skipped_images_are_named_once_where_the_disk_is_full(load, capfd, monkeypatch):
    (load.root / PATHS[0]).write_bytes(b"")

    full_disk(monkeypatch)
    data = load(skip_bad_images=True, progress=True)
    assert len(data.train_images) + len(data.test_images) == 9
    assert capfd.readouterr().err.count("cat/0.png") == 1


@pytest.mark.parametrize("place", ["a file", "below a file", "/proc/none/cache"])
def test_a_folder_that_cannot_be_made_costs_a_line(load, capfd, tmp_path, place):
    (tmp_path / "file").write_text("")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "cache"}.get(place, place)
    assert values(load(cache_dir=folder)) == values(load())
    assert one_line(capfd).startswith(f"cannot keep decoded images in {folder}: ")


def test_a_folder_that_others_may_write_to_is_not_used(load, capfd, monkeypatch):
    expected = values(load())
    load.cache.chmod(0o777)
    monkeypatch.setattr(cache, "_mapped", None)
    for _ in range(2):
        assert values(load()) == expected
    assert one_line(capfd) == (
        f"{load.cache} is not used, since others may write to it; decoded images stay in memory; "
        "give another folder as cache_dir to keep them"
    )


def test_a_folder_of_another_user_is_not_used(load, capfd, monkeypatch):
    load()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(cache, "_mapped", None)
    if load.cache.stat().st_uid == 0:
        os.chown(load.cache, 54321, -1)
    load()
    assert one_line(capfd).startswith(f"{load.cache} is not used")


def test_the_folder_is_private(load):
    before = os.umask(0)
    try:
        load()
    finally:
        os.umask(before)
    assert stat.S_IMODE(load.cache.stat().st_mode) == 0o700


def test_too_little_memory_is_told(load, tmp_path, monkeypatch):
    def no_room(*_):
        raise MemoryError

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "_write", no_room)
    with pytest.raises(UserError, match=r"the decoded images have no room in memory, nor in .*file: give another folder as cache_dir"):
        load(cache_dir=tmp_path / "file")
