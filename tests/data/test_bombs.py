"""Small files that claim or unpack to gigabytes, or that keep a decoder busy: each is told in one line, within 2 s and 500 MB."""

import bz2
import gzip
import io
import lzma
import pickle
import struct
import sys
import tarfile
import zipfile
import zlib
from functools import partial

import numpy as np
import pytest
from cifar_files import FORMS, members, python2
from mutations import outcome
from test_idx import write as write_idx

from minivit.data import load_data

ZEROS = bytes(1 << 20)
PYTHON = FORMS["cifar-10-python.tar.gz"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")


# ------------------------------------------------------------------------------------------------------------------------- pickles
def towers(levels, container):
    """Opcodes for a tuple of 0, (0, 0), ((0, 0), (0, 0)), ..., or the same of lists; the last has 2**levels leaves, and 6 bytes a level."""
    made = b"(K\x01q\x00"
    for i in range(levels):
        get, put = b"h" + bytes((i,)), b"q" + bytes((i + 1,))
        made += (get + get + b"\x86" if container is tuple else b"](" + get + get + b"e") + put
    return made + b"t"


LEVELS = 60
LAST = b"h" + bytes((LEVELS,))
TUPLES, LISTS = towers(LEVELS, tuple), towers(LEVELS, list)
PIXELS = python2(np.zeros((1, 3072), np.uint8))[2:-1]
PICKLES = {
    "a memo of 2 billion entries": (b"\x80\x02K\x01r\xff\xff\xff\x7f.", "it holds a int, not a dictionary"),
    "a key that hashes for ever": (b"\x80\x02}" + TUPLES + LAST + b"s.", "a dictionary whose keys are not text"),
    "labels nested for ever": (
        b"\x80\x02}(U\x06labels](" + LISTS + LAST + b"eU\x04data" + PIXELS + b"u.",
        "it does not hold a list of labels",
    ),
    "labels that hold themselves": (b"\x80\x02}(U\x06labels]q\x00h\x00aU\x04data" + PIXELS + b"u.", "it does not hold a list of labels"),
    "a shape nested for ever": (
        b"\x80\x02}(U\x06labels](K\x01eU\x04data" + PIXELS.replace(b"J\x01\0\0\0J\x00\x0c\0\0", TUPLES + LAST) + b"u.",
        "its pixels are not an array of two dimensions",
    ),
    "a name nested for ever": (b"\x80\x02" + TUPLES + LAST + LAST + b"\x93.", "a function whose name is no text"),
    "text encoded again and again": (
        b"\x80\x02c_codecs\nencode\nq\x00X\x00\x00\x10\x00"
        + bytes(1 << 20)
        + b"q\x01U\x06latin1q\x02]("
        + b"h\x00h\x01h\x02\x86R" * 5000
        + b"e.",
        "it encodes",
    ),
    "a number of a million digits": (b"\x80\x02L" + b"9" * 1_000_000 + b"\n.", "the opcode 0x4c, which no CIFAR batch needs"),
    "bytes that are not there": (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "it ends too early"),
    "text that is not there": (b"\x80\x02T\xff\xff\xff\x7f.", "it ends too early"),
    "ten million values": (b"\x80\x02](" + b"N" * 10_000_000 + b"e.", "it has more than 524,288 opcodes"),
    "a name without an end": (b"\x80\x02c" + b"a" * 10_000_000, "it asks for a"),
    "marks without an end": (b"\x80\x02" + b"(" * 1_000_000 + b".", "cannot read data_batch_1"),
    "lists in lists": (b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", "it holds a list, not a dictionary"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(tmp_path, name):
    content, message = PICKLES[name]
    for file, raw in {**members(PYTHON, python2), "data_batch_1": content}.items():
        (tmp_path / file).write_bytes(raw)
    assert message in outcome(partial(load_data, tmp_path, cache_dir=tmp_path / "cache", progress=False))


def test_names_nested_for_ever(tmp_path):
    for file, raw in {**members(PYTHON, python2), "batches.meta": b"\x80\x02}U\x0blabel_names](" + LISTS + LAST + b"es."}.items():
        (tmp_path / file).write_bytes(raw)
    assert "it names something by a" in outcome(partial(load_data, tmp_path, cache_dir=tmp_path / "cache", progress=False))


# ------------------------------------------------------------------------------------------------------------------ IDX and archives
def packed_zeros(size):
    """A gzip file of so many MiB of zeros, in members of one."""
    return gzip.compress(ZEROS) * size


@pytest.mark.parametrize(
    "head, message",
    [
        (bytes((0, 0, 8, 3)) + struct.pack(">3I", 8, 32, 32), "it promises 8 × 32 × 32 bytes, but holds more"),
        (
            bytes((0, 0, 8, 3)) + struct.pack(">3I", 1536, 1024, 1024),
            "it promises 1536 × 1024 × 1024 bytes, too many for a file of its size",
        ),
        (bytes((0, 0, 8, 3)) + b"\xff" * 12, "bytes, too many for a file of its size"),
    ],
)
def test_packed_idx(tmp_path, head, message):
    folder = write_idx(tmp_path / "mnist", packed=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head) + packed_zeros(1536))
    assert message in outcome(partial(load_data, folder))


def test_claims_of_idx(tmp_path):
    folder = write_idx(tmp_path / "mnist")
    (folder / "train-images-idx3-ubyte").write_bytes(bytes((0, 0, 8, 3)) + b"\x7f" * 12 + b"abc")
    assert "too many for a file of its size" in outcome(partial(load_data, folder))


def header(name, size=0, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def times(block, count, pack=gzip.compress):
    """The block so many times, packed in parts."""
    return pack(block * 1000) * (count // 1000)


ARCHIVES = {
    "a member of 1.5 GB": (
        lambda: gzip.compress(header("data_batch_1", 1536 << 20)) + packed_zeros(1536),
        "its files have more than 190 MB",
    ),
    "another member of 1.5 GB": (
        lambda: gzip.compress(header("other", 1536 << 20)) + packed_zeros(1536),
        "it unpacks to more than 256 MiB",
    ),
    "bzip2": (
        lambda: bz2.compress(header("other", 400 << 20) + bytes(10 << 20)) + bz2.compress(bytes(10 << 20)) * 39,
        "it unpacks to more than 256 MiB",
    ),
    "xz": (
        lambda: lzma.compress(header("other", 400 << 20) + bytes(10 << 20)) + lzma.compress(bytes(10 << 20)) * 39,
        "it unpacks to more than 256 MiB",
    ),
    "a million members": (lambda: times(header("a"), 1_000_000), "it has more than 10,000 members"),
    "a million links": (lambda: times(header("test_batch", kind=tarfile.SYMTYPE), 1_000_000), "it has more than 10,000 members"),
    "a name of 1.5 GB": (
        lambda: gzip.compress(header("a", 1536 << 20, tarfile.GNUTYPE_LONGNAME)) + packed_zeros(1536),
        "a name of more than 64 KiB",
    ),
    "an extended header of 1.5 GB": (
        lambda: gzip.compress(header("a", 1536 << 20, tarfile.XHDTYPE)) + packed_zeros(1536),
        "a name of more than",
    ),
    "names of names": (lambda: times(header("a", 1, tarfile.GNUTYPE_LONGNAME) + bytes(512), 100_000), "it has more than 10,000 members"),
    "a negative size": (lambda: gzip.compress(header("a")[:124] + b"\xff" * 12 + header("a")[136:]), "cannot read archive"),
    "one file again and again": (lambda: gzip.compress(header("test_batch", 1 << 20) + ZEROS) * 300, "it unpacks to more than 256 MiB"),
}


SLOW = ("another member of 1.5 GB", "bzip2", "xz", "one file again and again")  # as much as is allowed is unpacked


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ARCHIVES])
def test_archives(tmp_path, name):
    make, message = ARCHIVES[name]
    path = tmp_path / PYTHON.archive
    path.write_bytes(make())
    assert message in outcome(partial(load_data, path, cache_dir=tmp_path / "cache", progress=False))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    path = path.rename(tmp_path / "other.tar.gz")
    line = outcome(partial(load_data, path, cache_dir=tmp_path / "cache", progress=False))
    too_large = "more than" in message and "name" not in message  # then it is no CIFAR at all
    assert ("is not a CIFAR archive: unpack it, and give the folder" in line) == too_large and "other.tar.gz" in line


# ----------------------------------------------------------------------------------------------------------------------------- npz
def npy(descr="|u1", shape="(10, 8, 8)", content=bytes(640)):
    """An .npy file with any text for the type and the shape."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + content


def zipped(images, kind=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        archive.writestr("images.npy", images)
        archive.writestr("labels.npy", npy("|u1", "(10,)", bytes((0, 1) * 5)))
    return file.getvalue()


def zip_of_zeros(size, entries=1):
    """A zip file whose only member is an .npy file of so many MiB of zeros, deflated; listed so many times."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    raw = pack.compress(npy("|u1", f"({size}, 1024, 1024)", b"")) + pack.flush(zlib.Z_FULL_FLUSH)
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    raw += (pack.compress(ZEROS) + pack.flush(zlib.Z_FULL_FLUSH)) * size + b"\x03\0"
    fields = struct.pack("<HHHHIIIHH", 0, 8, 0, 0, 0, len(raw), len(npy("|u1", f"({size}, 1024, 1024)", b"")) + (size << 20), 10, 0)
    local = b"PK\3\4\x14\0" + fields + b"images.npy" + raw
    central = (b"PK\1\2\x14\0\x14\0" + fields + bytes(14) + b"images.npy") * entries
    return local + central + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)


def encrypted(content):
    """The zip file with the flag of a password at each member."""
    return content.replace(b"PK\3\4\x14\0\0", b"PK\3\4\x14\0\1").replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")


NPZ = {
    "1.5 GB of zeros": (lambda: zip_of_zeros(1536), "unpacks images to 1,610,6"),
    "a million members": (lambda: zip_of_zeros(1, 1_000_000), "its list of members has more than 1 MiB"),
    "a terabyte claimed": (lambda: zipped(npy(shape="(1099511627776, 1)")), "images promises 1,099,511,627,776 bytes, but holds 640"),
    "less claimed than there is": (lambda: zipped(npy(shape="(9, 8, 8)")), "images promises 576 bytes, but holds 640"),
    "72 dimensions": (lambda: zipped(npy(shape="(640,%s)" % ("1," * 71))), "cannot read"),
    "negative sizes": (lambda: zipped(npy(shape="(-10, -8, 8)")), "cannot read"),
    "sizes that are no numbers": (lambda: zipped(npy(shape="(10, 'a')")), "cannot read"),
    "objects": (lambda: zipped(npy("|O", "(10,)", pickle.dumps([0] * 10))), "images has the type object: it must hold numbers"),
    "a header in a header": (lambda: zipped(npy(shape="(" * 3000)), "cannot read"),
    "a header without an end": (lambda: zipped(npy(shape="'''")), "cannot read"),
    "records": (lambda: zipped(npy([("a", "<u4")], "(160,)")), "it must hold numbers"),
    "a type of a gigabyte": (lambda: zipped(npy("<U268435456", "(1,)")), "but holds 640"),
    "a type of no bytes": (lambda: zipped(npy("<U0", "(1,)", b"")), "cannot read"),
    "encrypted": (lambda: encrypted(zipped(npy())), "is encrypted, password required"),
    "bzip2": (
        lambda: zipped(npy("|u1", "(400, 1024, 1024)", bytes(640)), zipfile.ZIP_BZIP2),
        "compressed in a way that NumPy does not use",
    ),
}


@pytest.mark.parametrize("name", NPZ)
def test_npz(tmp_path, name):
    make, message = NPZ[name]
    (tmp_path / "a.npz").write_bytes(make())
    assert message in outcome(partial(load_data, tmp_path / "a.npz", progress=False))


@pytest.mark.filterwarnings("error")
def test_a_header_costs_no_warning(tmp_path):
    (tmp_path / "a.npz").write_bytes(zipped(npy(shape=r"(10, '\\d')")))
    assert "cannot read" in outcome(partial(load_data, tmp_path / "a.npz", progress=False))
    (tmp_path / "a.npz").write_bytes(zipped(npy(shape="(10L, 8, 8)")))  # as Python 2 wrote it
    assert outcome(partial(load_data, tmp_path / "a.npz", progress=False)) == ""


def test_the_zip_files_of_these_tests_are_read(tmp_path):
    (tmp_path / "a.npz").write_bytes(zipped(npy()))
    assert load_data(tmp_path / "a.npz", progress=False).image_size == 8


def test_class_names_without_an_end(tmp_path):
    for names, message in (
        (np.zeros(10_000_000, "S1"), "at most 100,000"),
        (np.array("ab"), "must be a list"),
        (["a", "\x1b[2J"], "shown"),
    ):
        np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 8), np.uint8), labels=[0, 1, 0, 1], class_names=names)
        assert message in outcome(partial(load_data, tmp_path / "a.npz", progress=False))
