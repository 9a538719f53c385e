"""Folders that hold what is no file, no image to read, or no name to show."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from mutations import outcome
from pictures import picture
from test_image_bombs import png

from minivit.cli.main import main
from minivit.data import load_data
from minivit.errors import UserError

WHOLE = [f"{name}/{i}.png" for name in ("cat", "dog", "eel") for i in range(10)]


@pytest.fixture
def load(tmp_path):
    return partial(load_data, cache_dir=tmp_path / "cache")


def test_a_link_that_goes_in_a_circle_is_told(write_images, load):
    root = write_images(*WHOLE)
    for name in ("loop", "cat/loop", "cat/loop.png"):
        (root / name).symlink_to(root / name)
    with pytest.raises(UserError, match=r"cannot read image .*cat/loop\.png: Too many levels of symbolic links; repair or remove it"):
        load(root)
    (root / "cat" / "loop.png").unlink()
    assert load(root).class_names == ("cat", "dog", "eel")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(write_images, load):
    root = write_images(*WHOLE)
    os.mkfifo(root / "cat" / "pipe.png")
    with pytest.raises(UserError, match=r"cannot read image .*cat/pipe\.png: not a regular file"):
        load(root)
    assert len(load(root, skip_bad_images=True).train_images) == 24
    for name in ("a.npz", "cifar-10-python.tar.gz", "a.tar", "a.png"):
        os.mkfifo(root / name)
        with pytest.raises(UserError, match=rf"{name}: not a regular file|is one image"):
            load(root / name)


@pytest.mark.skipif(sys.platform != "linux", reason="the longest path is Linux's")
def test_folders_in_folders_without_an_end_are_told(write_images, load):
    root = write_images(*WHOLE)
    at = os.open(root / "cat", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("in", dir_fd=at)
        at, above = os.open("in", os.O_RDONLY, dir_fd=at), at
        os.close(above)
    os.close(at)
    try:
        with pytest.raises(UserError, match="more than 32 folders deep"):
            load(root)
        for depth, message in ((1000, "more than 32 folders deep"), (1490, "cannot be a path: File name too long")):
            with pytest.raises(UserError, match=message) as caught:
                load(root / "cat" / "/".join(["in"] * depth))
            assert len(str(caught.value)) <= 300
    finally:
        subprocess.run(["rm", "-r", root / "cat"], check=True)  # shutil.rmtree would need a call for each


def test_names_are_said_on_one_line(write_images, load, capsys):
    load(write_images(*(f"{part}/{path}" for path in WHOLE for part in ("train", "test")), "a\nb\x1b[2J/cat/1.png"))
    assert r"not used: a\nb\x1b[2J of " in capsys.readouterr().err


def test_the_command_line_shows_no_warning_of_pillow(write_images, recwarn, capsys):
    root = write_images(*WHOLE)
    (root / "cat" / "0.png").write_bytes(png(10_000, 10_000, 8, 0))  # of which Pillow warns
    assert main(["train", "--data", str(root)]) == 2
    assert not recwarn.list
    assert "cat/0.png: it has 10000×10000 pixels" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="no users here")
@pytest.mark.parametrize("mode, message", [(0o700, "Permission denied"), (0o744, "cannot list folder|Permission denied")])
def test_a_folder_that_may_not_be_searched_is_told(mode, message):
    def read():
        if os.getuid() == 0:
            os.setuid(65534)  # root may search every folder
        else:
            os.chmod(folder, mode & 0o077)
        load_data(folder / "data", progress=False)

    folder = Path(tempfile.mkdtemp())  # others may not look into tmp_path
    try:
        (folder / "data" / "cat").mkdir(parents=True)
        folder.chmod(mode if mode == 0o700 else 0o755)
        (folder / "data").chmod(mode)
        assert re.search(message, outcome(read))
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_an_image_of_too_many_pixels_can_be_left_out(write_images, load, capsys):
    root = write_images(*WHOLE)
    picture(0, (50, 40)).save(root / "cat" / "0.png")
    with pytest.raises(UserError, match=r"cat/0\.png: it has 50×40 pixels, and max_pixels is 1999: .* raise max_pixels \(--max-pixels\)"):
        load(root, max_pixels=1999)
    data = load(root, max_pixels=1999, skip_bad_images=True)
    assert len(data.train_images) + len(data.test_images) == 29
    assert "cat/0.png: it has 50×40 pixels" in capsys.readouterr().err
    data = load(root, max_pixels=2000, skip_bad_images=True)
    assert len(data.train_images) + len(data.test_images) == 30
