"""Weight files whose headers lie: what they claim is held against what they have, before any memory is taken."""

import io
import json
import zipfile

import numpy as np
import pytest
from mutations import check_outcome, memory_limit
from test_weights import to_google, vit

import minivit
from minivit import UserError

MEMORY = 500 * 2**20  # bytes
POSITIONS = "Transformer/posembed_input/pos_embedding"
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def said(path):
    """The line for a file that must be refused, in little time and memory."""
    lines = []

    def read():
        try:
            minivit.load_weights(vit(), path)
        except UserError as error:
            lines.append(str(error).removeprefix(str(path)))
            raise

    with memory_limit(MEMORY):
        assert not check_outcome(read, path.name)
    return lines[0]


def header(description, version=1):
    """The header of an npy file with any text in it."""
    text = description.encode().ljust(300) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text


def shaped(shape, dtype="'<f4'"):
    return header(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}")


def write_npz(path, name="cls", content=b"", compression=zipfile.ZIP_DEFLATED):
    """A file of Google's, in which one array is replaced."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for key, array in to_google(vit()).items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            archive.writestr(f"{key}.npy", content if key == name else buffer.getvalue())


@pytest.mark.parametrize(
    "content, reason",
    [
        (shaped("(" + "1, " * 72 + ")") + b"\0" * 4, "dimension"),
        (shaped("(1000000000,)") + b"\0" * 4, "cls promises 4,000,000,000 bytes, but holds 4"),
        (shaped("(9999999999999999999999,)") + b"\0" * 4, "cls promises 39,999,999,999,999,999,999,996 bytes, but holds 4"),
        (shaped("(0, 9999999999999999999999)"), "Maximum allowed dimension exceeded"),
        (shaped("(0, 4611686018427387904, 4611686018427387904)"), "too big"),
        (shaped("(-1,)") + b"\0" * 40, "cls promises -4 bytes, but holds 40"),
        (shaped("(1000000000000,)", "'|V0'"), "cls has the type |V0"),
        (shaped("(1,)", "'|O'") + b"\0" * 40, "cls has the type object"),
        (shaped("(1, 1, 16)", "[('a', '<f4')]") + b"\0" * 64, "cls has the type [('a', '<f4')]"),
        (header("(" * 9000), "EOF in multi-line statement"),
        (header("{'descr': '<f4', 'shape': (1,"), "EOF in multi-line statement"),
        (header("[" * 9000 + "]" * 9000, 2), "Header info length"),
        (header("", 9), "Cannot parse header"),
        (b"\x93NUMPY\2\0\xff\xff\xff\x7f" + b" " * 1000, "EOF: reading array header, expected 2147483647 bytes got 1000"),
        (shaped("(1, 1, 26214400)") + bytes(100 * 2**20), "unpacks cls to 104,857,911 bytes"),  # a hundred times what the file has
    ],
    ids=range(15),
)
def test_arrays_of_npz_files(content, reason, tmp_path):
    path = tmp_path / "w.npz"
    write_npz(path, content=content)
    line = said(path)
    assert reason in line and ("it is no .npz file of plain arrays" in line or "unpacks" in line)


def test_a_position_embedding_of_many_channels_is_not_resized(tmp_path):
    path = tmp_path / "w.npz"
    write_npz(path, POSITIONS, shaped("(1, 2, 5000000)") + bytes(40_000_000))
    assert "pos_embed is (1, 2, 5000000), not (1, 5, 16)" in said(path)


@pytest.mark.parametrize(
    "entry, local, value, reason", [(8, 6, 1, "encrypted"), (10, 8, 99, "cls is compressed in a way that NumPy does not use")]
)
def test_members_of_npz_files(entry, local, value, reason, tmp_path):
    path = tmp_path / "w.npz"
    write_npz(path)
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\1\2", entry), (b"PK\3\4", local)):
        content[content.index(signature) + offset] = value
    path.write_bytes(content)
    assert reason in said(path)


def test_npz_files_of_many_arrays(tmp_path):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(2**15 + 1):
            archive.writestr(f"{i}", b"")
    assert "its list of members has more than 1 MiB" in said(path)


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"__metadata__": None, "a": ONE}, "unexpected: a"),
        ({"__metadata__": [], "a": ONE}, "is damaged or no safetensors file"),
        ({"__metadata__": {"a": 1}, "a": ONE}, "is damaged or no safetensors file"),
        ({"a": ONE | {"shape": [1] * 72}}, "dimension"),
        ({"a": ONE | {"shape": [0, 2**63], "data_offsets": [0, 0]}}, "dimension"),
        ({"a": ONE | {"shape": [2**40]}}, "is damaged or no safetensors file"),
        ({"a": ONE | {"dtype": "F4", "shape": [8]}}, "a has dtype F4: convert it to F32"),
        ({"a" * 10**6: ONE}, "unexpected: a"),
        ({"a\n\x1b": ONE}, r"unexpected: a\n\x1b"),
        ({f"n{i}": ONE | {"shape": [0], "data_offsets": [0, 0]} for i in range(10**5)}, "100,000 arrays"),
        ({f"n{i}": ONE | {"shape": [0], "data_offsets": [0, 0]} for i in range(2 * 10**5)}, "a header of 13,"),
        ([], "is damaged or no safetensors file"),
    ],
    ids=range(12),
)
def test_headers_of_safetensors_files(content, reason, tmp_path):
    path = tmp_path / "w.safetensors"
    text = json.dumps(content).encode()
    data = bytes(4) if b'"data_offsets": [0, 4]' in text else b""
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert reason in said(path)


def test_a_length_that_no_header_has(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    assert "a header of 9,223,372,036,854,775,808 bytes" in said(path)
