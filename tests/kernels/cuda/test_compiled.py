"""The cache of compiled CUDA kernels, with a compiler that only counts."""

import os
from types import SimpleNamespace

import pytest

from minivit.kernels.core import cache
from minivit.kernels.cuda import compiled as compilation

CODE = b"\x7fELF\n" + bytes(range(256))  # with line ends in it


@pytest.fixture
def compile(tmp_path, monkeypatch):
    """A function that asks for a kernel and says how often the compiler was called for it."""
    calls = []

    def compile_kernel(kernel, architecture):
        calls.append(architecture)
        return SimpleNamespace(name="_Z6kernel", code=CODE)

    monkeypatch.setattr(compilation, "_folder", lambda source, architecture: tmp_path / architecture)
    monkeypatch.setattr(compilation, "source_of", lambda kernel: "")
    monkeypatch.setattr(compilation, "compile_kernel", compile_kernel)
    cache.say_once.cache_clear()

    def ask() -> int:
        calls.clear()
        assert compilation.compiled(SimpleNamespace(expression="kernel<float>"), "sm_90") == ("_Z6kernel", CODE)
        return len(calls)

    return ask


def test_a_kernel_is_compiled_once(compile):
    assert (compile(), compile()) == (1, 0)


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-1], lambda content: b"\xff" * len(content)])
def test_a_damaged_file_is_made_again(compile, tmp_path, damage):
    compile()
    (file,) = (tmp_path / "sm_90").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert (compile(), compile()) == (1, 0)


def test_a_folder_that_cannot_be_made_costs_one_line(compile, tmp_path, capfd):
    (tmp_path / "sm_90").write_text("")
    assert (compile(), compile()) == (1, 1)
    assert capfd.readouterr().err.count("\n") == 1


def test_another_version_of_the_compiler_has_a_folder_of_its_own(monkeypatch):
    folders = set()
    for version in ((13, 0), (13, 1), (13, 0)):
        monkeypatch.setattr(compilation, "version", lambda version=version: version)
        compilation._folder.cache_clear()
        folders.add(compilation._folder("source", "sm_90"))
    compilation._folder.cache_clear()
    assert len(folders) == 2


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders have no mode here")
def test_code_that_others_may_have_written_does_not_run(compile, tmp_path):
    compile()
    (tmp_path / "sm_90").chmod(0o777)
    assert (compile(), compile()) == (1, 1)
