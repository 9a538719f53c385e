import gzip
import struct

import numpy as np
import pytest

from minivit.data import load_data
from minivit.errors import UserError

RNG = np.random.default_rng(0)
ARRAYS = {
    "train-images": RNG.integers(0, 256, (20, 8, 8), np.uint8),
    "train-labels": np.arange(20, dtype=np.uint8) % 10,
    "t10k-images": RNG.integers(0, 256, (10, 8, 8), np.uint8),
    "t10k-labels": np.arange(10, dtype=np.uint8),
}


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder, separator="-", packed=False):
    folder.mkdir(exist_ok=True)
    for name, array in ARRAYS.items():
        content = idx(array)
        path = folder / f"{name}{separator}idx{array.ndim}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("separator, packed", [("-", False), ("-", True), (".", False)])
def test_pixels_labels_and_names(tmp_path, separator, packed):
    data = load_data(write(tmp_path / "mnist", separator, packed))
    np.testing.assert_array_equal(data.train_images[..., 0], ARRAYS["train-images"])
    np.testing.assert_array_equal(data.test_images[..., 0], ARRAYS["t10k-images"])
    np.testing.assert_array_equal(data.train_labels, ARRAYS["train-labels"])
    assert data.class_names == tuple("0123456789") and data.name == "mnist"


def test_a_missing_file_is_named(tmp_path):
    (write(tmp_path / "mnist") / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="lacks the IDX file t10k-labels-idx1-ubyte"):
        load_data(tmp_path / "mnist")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kept", [0, 3, 10, 0.5, 0.999])
def test_a_cut_file_is_named(tmp_path, packed, kept):
    folder = write(tmp_path / "mnist", packed=packed)
    path = next(folder.glob("train-images*"))
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(UserError, match="train-images"):
        load_data(folder)


def test_more_labels_than_images(tmp_path):
    folder = write(tmp_path / "mnist")
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(21, np.uint8)))
    with pytest.raises(UserError, match=r"train_labels must have the shape \(20,\)"):
        load_data(folder)


def test_another_kind_of_numbers(tmp_path):
    folder = write(tmp_path / "mnist")
    (folder / "train-images-idx3-ubyte").write_bytes(bytes((0, 0, 13, 3)) + bytes(100))
    with pytest.raises(UserError, match="starts with 00 00 0d 03"):
        load_data(folder)
