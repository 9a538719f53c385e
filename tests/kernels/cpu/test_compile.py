"""The cache of compiled kernels: used again, made again where it is damaged, and never a reason to fail."""

import ctypes
import gc
import os
import re
import struct
import subprocess
import sys

import numba
import numpy as np
import pytest

from minivit.kernels.core import cache
from minivit.kernels.core.recording import launch
from minivit.kernels.cpu import compile as compilation
from minivit.kernels.cpu import kernel as kernel_module
from minivit.kernels.cpu.kernel import Calls, compile_missing, kernel, named_kernel


def _add_one(band, bands, y, x):
    for i in range(len(x)):
        y[i] = x[i] + 1


def _nothing(first, second):
    pass


def compiled_again() -> bool:
    """Whether a fresh kernel object was compiled rather than read from the cache; it must compute what it should."""
    x = np.arange(3.0)
    y, fresh = np.empty_like(x), kernel(_add_one)
    launch(fresh, 1, y, x)
    np.testing.assert_array_equal(y, x + 1)
    (entry,) = fresh.entries.values()
    return entry.cache_hits == 0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "kernel_cache", lambda: tmp_path / "kernels")
    cache.say_once.cache_clear()
    return tmp_path / "kernels"


@pytest.mark.parametrize("collects", [True, False])
def test_python_collects_garbage_afterwards_as_before(collects, folder):
    enabled = gc.isenabled()
    try:
        gc.enable() if collects else gc.disable()
        assert compiled_again()
        assert gc.isenabled() == collects
    finally:
        gc.enable() if enabled else gc.disable()


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_kernel_is_compiled_once(folder):
    assert compiled_again()
    assert files(folder)
    assert not compiled_again()


@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[: len(content) // 2], lambda content: b"\x80" * 99])
def test_damaged_files_are_made_again(folder, ending, damage):
    assert compiled_again()
    damaged = [path for path in files(folder) if path.name.endswith(ending)]
    assert damaged
    for path in damaged:
        path.write_bytes(damage(path.read_bytes()))
    assert compiled_again()
    assert not compiled_again()


def test_a_loop_is_compiled_once(folder):
    hits = [sum(compilation.compiled_loop("void(int64, int64)", _nothing).stats.cache_hits.values()) for _ in range(3)]
    assert hits == [0, 1, 1]


def test_code_of_another_signature_does_not_run(folder):
    """What two processes leave behind that saved the code of two signatures under one name at the same time."""

    def results():
        fresh, found = kernel(_add_one), []
        for kind in (np.float64, np.int32):
            x = np.arange(3, dtype=kind)
            found.append(np.zeros_like(x))
            launch(fresh, 1, found[-1], x)
        return found, [entry.cache_hits for entry in fresh.entries.values()]

    assert results()[1] == [0, 0] and results()[1] == [1, 1]
    one, other = (path for path in files(folder) if path.suffix == ".nbc" and "_add_one" in path.name)
    one.write_bytes(other.read_bytes())
    found, hits = results()
    for y in found:
        np.testing.assert_array_equal(y, [1, 2, 3])
    assert sum(hits) < 2
    results()  # the code of the other signature may have gone with the file
    assert results()[1] == [1, 1]


def test_a_folder_that_cannot_be_made_costs_one_line(folder, capfd):
    folder.write_text("a file where the folder should be")
    assert compiled_again()
    assert compiled_again()
    line = capfd.readouterr().err
    assert line.startswith(f"cannot keep compiled kernels in {folder}: ")
    assert line.count("\n") == 1


def test_a_full_disk_costs_one_line_and_a_filled_cache_is_still_read(folder, capfd, monkeypatch):
    assert compiled_again()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(compilation, "make_private", full)
    assert not compiled_again()
    for path in files(folder):
        path.unlink()
    assert compiled_again()
    assert capfd.readouterr().err.endswith("No space left on device; they are compiled for this process alone\n")


def give_up_capabilities():
    """From here on, modes stop root too. Another user might not read these sources."""
    if not os.getuid():
        version, none = 0x20080522, bytes(24)
        assert not ctypes.CDLL(None).capset(struct.pack("Ii", version, 0), none)


@pytest.mark.skipif(sys.platform != "linux", reason="modes stop root too only without Linux's capabilities")
@pytest.mark.parametrize("inner", [False, True])
def test_a_folder_that_may_not_be_looked_into_costs_one_line(folder, inner, capfd):
    assert compiled_again()
    closed = next(folder.iterdir()) if inner else folder.parent
    closed.chmod(0)
    child = os.fork()
    if not child:
        try:
            give_up_capabilities()
            found = compilation.has_compiled_kernels()
            os._exit(0 if compiled_again() and not found else 1)
        finally:
            os._exit(2)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    closed.chmod(0o700)
    assert status == 0
    assert re.fullmatch(r"cannot keep compiled kernels in \S+: Permission denied; .*\n", capfd.readouterr().err)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders have no owner and mode here")
@pytest.mark.parametrize("inner", [False, True])
def test_code_that_others_may_have_written_does_not_run(folder, inner, capfd):
    assert compiled_again()
    (next(folder.iterdir()) if inner else folder).chmod(0o777)
    assert compiled_again()
    assert capfd.readouterr().err.startswith(f"{folder} is not used, since others may write to it")


# ------------------------------------------------------------------------------------------------------------------ side by side
@pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled one after the other here")
def test_a_plan_takes_what_copies_have_compiled(folder, monkeypatch):
    monkeypatch.setattr(kernel_module, "most_threads", lambda: 2)
    monkeypatch.setattr(kernel_module, "compiled_loops", lambda: None)  # which would keep the copy busy

    def add(number):
        def body(band, bands, y, x):
            for i in range(len(x)):
                y[i] = x[i] + number

        return named_kernel(f"_add_{number}", body)

    x, kernels = np.arange(3.0), [add(number) for number in range(8)]
    results = [np.empty_like(x) for _ in kernels]
    calls = [(each, 1, (y, x)) for each, y in zip(kernels, results)]
    compile_missing(calls)
    Calls(calls, 1).run()
    for number, y in enumerate(results):
        np.testing.assert_array_equal(y, x + number)
    hits = [entry.cache_hits for each in kernels for entry in each.entries.values()]
    assert len(hits) == 8 and 0 < sum(hits) < 8


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders have no owner here")
def test_code_of_another_user_does_not_run(folder, monkeypatch):
    assert compiled_again()
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert compiled_again() == (folder.stat().st_uid != 0)  # what root wrote is trusted


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders have no mode here")
def test_the_folder_is_private_whatever_the_umask(folder):
    previous = os.umask(0)
    try:
        assert compiled_again()
    finally:
        os.umask(previous)
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in (folder, *folder.iterdir()))


def test_the_environment_says_where_the_folder_is_and_numba_stays_as_it_was(tmp_path):
    code = """if True:
        import sys
        import numba, numpy as np, minivit
        print(*minivit.functional.softmax(minivit.Tensor(np.zeros((1, 2)))).numpy()[0], numba.config.CACHE_DIR)
        print("numba.np.arraymath" in sys.modules)  # what Numba compiles Python with
    """
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "NUMBA_CACHE_DIR": str(tmp_path)}
    for compiles in (True, False):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == (f"0.5 0.5 {tmp_path}\n{compiles}\n", "")
        assert files(tmp_path / "minivit")


def test_a_user_without_a_home_has_a_private_temporary_folder(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    folder = cache.cache_folder()
    assert folder == cache.cache_folder()
    assert cache.is_trusted(folder.parent)


def test_numba_is_used_as_it_is():
    assert os.environ.get("NUMBA_CACHE_DIR", "") == numba.config.CACHE_DIR
