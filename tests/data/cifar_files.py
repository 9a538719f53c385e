"""The official archives of CIFAR, here with a handful of images each."""

import io
import struct
import tarfile

import numpy as np

from minivit.data import cifar

NAMES = {"cifar10": [f"kind{k}" for k in range(10)], "cifar100": [f"kind{k}" for k in range(100)]}
FORMS = {form.archive: form for form in cifar.FORMS}
EACH = 6  # images a file


def pixels_and_labels(form):
    """For each file: rows of pixels (n, 3072), and labels (n,)."""
    rng = np.random.default_rng(len(NAMES[form.dataset]))
    return {
        name: (rng.integers(0, 256, (EACH, 3072), np.uint8), rng.integers(0, len(NAMES[form.dataset]), EACH))
        for name in (*form.train, *form.test)
    }


def python2(value):
    """A pickle as Python 2 made it in protocol 2: with its byte strings, and NumPy's old module names."""
    return b"\x80\x02" + opcodes(value) + b"."


def opcodes(value):
    if isinstance(value, (str, bytes)):
        raw = value.encode() if isinstance(value, str) else value
        return b"U" + bytes((len(raw),)) + raw if len(raw) < 256 else b"T" + struct.pack("<I", len(raw)) + raw
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(opcodes, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(opcodes(k) + opcodes(v) for k, v in value.items()) + b"u"
    rows, columns = map(opcodes, value.shape)
    kind = b"cnumpy\ndtype\n(" + opcodes("u1") + b"K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + opcodes("b") + b"tR"
    return made + b"(K\x01(" + rows + columns + b"t" + kind + b"\x89" + opcodes(value.tobytes()) + b"tb"


def members(form, pickled):
    """Name and content of each file of a small archive of this form."""
    content = {}
    for name, (pixels, labels) in pixels_and_labels(form).items():
        if form.names_key:
            content[name] = pickled({"batch_label": name, form.labels: labels.tolist(), "data": pixels, "coarse_labels": [0] * EACH})
        else:
            leading = [labels] if form.labels == 1 else [labels // 5, labels]
            content[name] = np.concatenate([np.stack(leading, 1).astype(np.uint8), pixels], 1).tobytes()
    names = NAMES[form.dataset]
    content[form.names] = pickled({form.names_key: names}) if form.names_key else "\n".join(names).encode() + b"\n\n"
    return content


def pack(path, content, folder):
    """Write a .tar.gz of files in a folder."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, raw in content.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path
