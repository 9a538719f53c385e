import subprocess
import sys
from pathlib import Path

import pytest

from minivit.data import load_data
from minivit.errors import UserError


@pytest.mark.parametrize(
    "data, message",
    [
        ("cifar-10", r"unknown dataset 'cifar-10' \(nearest: cifar10, cifar100\)"),
        ("digit", r"unknown dataset 'digit' \(nearest: digits\)"),
        ("mnist", "IDX files"),
        ("no/such/folder", "no/such/folder does not exist: give a folder"),
        (Path("nothing"), "nothing does not exist"),
        ("photos.npz", "photos.npz does not exist"),
        (7, "got int"),
    ],
)
def test_what_is_no_data_is_named(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_data(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("a.png", "is one image: give the folder"),
        ("a.csv", "is not a dataset: give a folder"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, name, message):
    (tmp_path / name).write_text("text")
    with pytest.raises(UserError, match=message):
        load_data(tmp_path / name)


def test_importing_and_loading_bring_in_neither_numba_nor_matplotlib():
    code = (
        "import sys, minivit.data as d; d.load_data('digits'); "
        "sys.exit(', '.join({'numba', 'matplotlib', 'pooch'} & sys.modules.keys()) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
