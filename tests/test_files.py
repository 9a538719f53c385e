import errno
import os
import resource
import sys

import pytest
from mutations import memory_limit

from minivit import files
from minivit.errors import UserError
from minivit.files import atomic_file, open_regular, reading_untrusted, user_path


def test_the_home_of_a_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/photos") == tmp_path / "photos"


@pytest.mark.parametrize("path", ["~nosuchuser/photos", "a" * 300, "a\0b", "loop"])
def test_what_cannot_be_a_path(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="cannot be a path: "):
        user_path(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path / "pipe", "not a regular file"), (tmp_path, "Is a directory"), ("/dev/zero", "not a regular file")):
        with pytest.raises(OSError, match=message):
            open_regular(path)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_no_memory_is_reserved_for_bytes_that_are_not_there(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    with open_regular(tmp_path / "file") as file, memory_limit(64 << 20):
        assert file.read(3) == b"con" and file.read(1 << 40) == b"tent" and file.read(1 << 40) == b""


def test_what_a_decoder_raises_becomes_one_line():
    class Damaged(UserError):
        pass

    for error, line in (
        (ArithmeticError("two\nlines, \x1b[31m"), r"cannot read image a: two lines, \x1b[31m; fetch it again"),
        (RecursionError(), "cannot read image a: RecursionError; fetch it again"),
        (UserError("as it was"), "as it was"),
    ):
        with pytest.raises(UserError) as caught, reading_untrusted("image a", "fetch it again", Damaged):
            raise error
        assert str(caught.value) == line and isinstance(caught.value, Damaged) == (caught.value is not error)
    with pytest.raises(KeyboardInterrupt), reading_untrusted("image a"):
        raise KeyboardInterrupt


def test_the_name_appears_with_the_whole_content(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_file(path) as file:
        file.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_that_fills_while_flushing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), atomic_file(tmp_path / "file") as file:
        file.write(b"half")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full_before_the_file_is_closed(tmp_path, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"), atomic_file(tmp_path / "file") as file:
            file.write(b"half" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_deleted_and_nothing_else(tmp_path):
    path = tmp_path / "file[1]"
    for name in (".file[1].0a1b2c3d.part", ".file1.0a1b2c3d.part"):
        (tmp_path / name).write_bytes(b"half")
    with atomic_file(path) as one:
        one.write(b"one")
        with atomic_file(path) as other:  # another thread or process that writes the same file
            other.write(b"other")
        assert path.read_bytes() == b"other"
    assert path.read_bytes() == b"one"
    assert sorted(os.listdir(tmp_path)) == [".file1.0a1b2c3d.part", "file[1]"]


def test_a_file_that_is_taken_for_abandoned_before_it_is_locked(tmp_path, monkeypatch):
    calls = []

    def lock(descriptor, real=files.lock):
        calls.append(descriptor)
        if len(calls) == 1:
            files.remove_abandoned(tmp_path, "file")
        real(descriptor)

    monkeypatch.setattr(files, "lock", lock)
    with atomic_file(tmp_path / "file") as file:
        file.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content" and os.listdir(tmp_path) == ["file"]
