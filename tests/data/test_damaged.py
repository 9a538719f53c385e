"""Every kind of data file, damaged in many ways, also below its compression: it is read, or one line tells what is wrong."""

import gzip
import io
import pickle
import sys
import tarfile
import zipfile
from functools import partial

import numpy as np
import pytest
from cifar_files import FORMS, members, python2
from mutations import MEMORY, check_outcome, memory_limit, mutations, twice_its_memory, with_enough_memory
from pictures import picture
from PIL import Image
from test_idx import write as write_idx

from minivit.data import load_data
from minivit.data.decode import read_image

PYTHON, BINARY = FORMS["cifar-10-python.tar.gz"], FORMS["cifar-100-binary.tar.gz"]
COUNTS = [50, pytest.param(1000, marks=pytest.mark.slow)]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
]


def same(content):
    return content


def zipped(kind, images):
    """An .npz file in which this is the member of the images."""
    file, labels = io.BytesIO(), io.BytesIO()
    np.save(labels, np.arange(10) % 2)
    with zipfile.ZipFile(file, "w", kind) as archive:
        archive.writestr("images.npy", images)
        archive.writestr("labels.npy", labels.getvalue())
    return file.getvalue()


def files(folder):
    """All that lies in a folder, but for the cache."""
    return sorted(path for path in folder.rglob("*") if path.parent.name != "cache")


def npy():
    file = io.BytesIO()
    np.save(file, np.random.default_rng(0).integers(0, 256, (10, 8, 8), np.uint8))
    return file.getvalue()


def idx(folder, packed, pack):
    """A folder with IDX files."""
    content = (write_idx(folder / "plain") / "train-images-idx3-ubyte").read_bytes()
    path = write_idx(folder / "mnist", packed=packed) / f"train-images-idx3-ubyte{'.gz' if packed else ''}"
    return path, content if pack is gzip.compress or not packed else gzip.compress(content), pack, path.parent


def npz(folder, content, pack):
    return folder / "a.npz", content, pack, folder / "a.npz"


def cifar(folder, pickled, file):
    """A folder with the files of CIFAR-10."""
    folder = folder / PYTHON.folder
    folder.mkdir()
    for name, content in members(PYTHON, pickled).items():
        (folder / name).write_bytes(content)
    return folder / file, (folder / file).read_bytes(), same, folder


def tar(folder, suffix, pack, packed=same, kind=tarfile.GNU_FORMAT):
    """An archive of CIFAR-100, with one name that is too long for its header."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for number, (name, raw) in enumerate(members(BINARY, None).items()):
            member = tarfile.TarInfo(f"{'long/' * 25 if number == 0 else ''}{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return folder / f"a{suffix}", packed(file.getvalue()), pack, folder / f"a{suffix}"


FORMATS = {  # a function of a folder that gives the path of a file, its content, how that is packed into it, and the data to load
    "IDX": lambda folder: idx(folder, False, same),
    "IDX.gz": lambda folder: idx(folder, True, same),
    "IDX in gzip": lambda folder: idx(folder, True, gzip.compress),
    "npz": lambda folder: npz(folder, zipped(zipfile.ZIP_DEFLATED, npy()), same),
    "npz, not packed": lambda folder: npz(folder, zipped(zipfile.ZIP_STORED, npy()), same),
    "npy in npz": lambda folder: npz(folder, npy(), partial(zipped, zipfile.ZIP_DEFLATED)),
    "batch of Python 2": lambda folder: cifar(folder, python2, "data_batch_1"),
    "batch of Python 3": lambda folder: cifar(folder, partial(pickle.dumps, protocol=4), "data_batch_1"),
    "names": lambda folder: cifar(folder, python2, "batches.meta"),
    "tar": lambda folder: tar(folder, ".tar", same),
    "tar, pax": lambda folder: tar(folder, ".tar", same, kind=tarfile.PAX_FORMAT),
    "tar.gz": lambda folder: tar(folder, ".tar.gz", same, gzip.compress),
    "tar in gzip": lambda folder: tar(folder, ".tar.gz", partial(gzip.compress, compresslevel=1)),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", FORMATS)
def test_data_files(tmp_path, name, count):
    path, content, pack, data = FORMATS[name](tmp_path)
    read = partial(load_data, data, cache_dir=tmp_path / "cache", progress=False)
    path.write_bytes(pack(content))
    read()
    before, allowed = files(tmp_path), twice_its_memory(read)
    outcomes = set()
    for number, damaged in enumerate(mutations(content, count, seed=1)):
        path.write_bytes(pack(damaged))
        with memory_limit(allowed):
            outcomes.add(check_outcome(with_enough_memory(read), f"{name} {number}"))
    assert False in outcomes
    assert files(tmp_path) == before


def saved(form, mode, **options):
    """An image file in memory."""
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (20, 20), np.uint16))
    elif mode == "F":
        image = Image.fromarray(rng.random((20, 20), np.float32))
    else:
        image = picture(0, (20, 20), mode if mode in ("L", "RGBA") else "RGB").convert(mode)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


IMAGES = {
    "JPEG": ("JPEG", "RGB", {}),
    "JPEG, progressive": ("JPEG", "RGB", {"progressive": True}),
    "JPEG of CMYK": ("JPEG", "CMYK", {}),
    "PNG": ("PNG", "RGB", {}),
    "PNG, transparent": ("PNG", "RGBA", {}),
    "PNG of 16 bits": ("PNG", "I;16", {}),
    "PNG with a palette": ("PNG", "P", {"transparency": 3}),
    "GIF": ("GIF", "P", {}),
    "BMP": ("BMP", "RGB", {}),
    "BMP with a palette": ("BMP", "P", {}),
    "TIFF": ("TIFF", "RGB", {}),
    "TIFF of floats": ("TIFF", "F", {}),
    "TIFF, LZW": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "TIFF, deflate": ("TIFF", "RGBA", {"compression": "tiff_deflate"}),
    "TIFF, JPEG": ("TIFF", "RGB", {"compression": "jpeg"}),
    "TIFF, fax": ("TIFF", "1", {"compression": "group4"}),
    "WebP": ("WEBP", "RGB", {}),
    "WebP, lossless": ("WEBP", "RGBA", {"lossless": True}),
    "PPM": ("PPM", "RGB", {}),
    "JPEG 2000": ("JPEG2000", "RGB", {}),
    "AVIF": ("AVIF", "RGB", {}),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", IMAGES)
def test_images(tmp_path, name, count):
    form, mode, options = IMAGES[name]
    if form not in Image.registered_extensions().values():
        pytest.skip(f"this Pillow writes no {form}")
    content = saved(form, mode, **options)
    path = tmp_path / "image"
    path.write_bytes(content)
    read = partial(read_image, path, 8, 3)
    read()
    outcomes = set()
    for number, damaged in enumerate(mutations(content, count, seed=1)):
        path.write_bytes(damaged)
        with memory_limit(MEMORY):  # its header may claim any size
            outcomes.add(check_outcome(with_enough_memory(read), f"{name} {number}"))
    assert False in outcomes
