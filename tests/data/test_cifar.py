"""The official archives, here with a handful of images each."""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer, SimpleHTTPRequestHandler

import numpy as np
import pytest
from cifar_files import FORMS, NAMES, members, pack, pixels_and_labels, python2

from minivit.data import cifar, load_data
from minivit.errors import UserError

SAFE = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and later warn or ask for it


@pytest.fixture
def load(tmp_path):
    return partial(load_data, cache_dir=tmp_path / "cache", progress=False)


@pytest.fixture
def archive(tmp_path):
    """A small archive under its official name, with some of its files replaced."""

    def archive(name="cifar-10-python.tar.gz", folder="elsewhere", pickled=python2, **replaced):
        form = FORMS[name]
        content = members(form, pickled)
        for key, raw in replaced.items():
            content = {n: raw if n == key else c for n, c in content.items()}
        return pack(tmp_path / folder / name, {n: c for n, c in content.items() if c is not None}, form.folder)

    return archive


def check(data, form):
    files = pixels_and_labels(form)
    for images, labels, names in ((data.train_images, data.train_labels, form.train), (data.test_images, data.test_labels, form.test)):
        expected = np.concatenate([files[n][0] for n in names]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, np.concatenate([files[n][1] for n in names]))
    assert data.class_names == tuple(NAMES[form.dataset])
    assert (data.name, data.augmentation) == (form.dataset, "crop-flip")
    assert data.train_images.flags.c_contiguous


# -------------------------------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("name", FORMS)
def test_every_form_as_an_archive_and_unpacked(archive, load, tmp_path, name):
    form = FORMS[name]
    path = archive(name)
    check(load(path), form)
    with tarfile.open(path) as packed:
        packed.extractall(tmp_path / "unpacked", **SAFE)
    check(load(tmp_path / "unpacked" / form.folder), form)
    check(load(tmp_path / "unpacked"), form)
    path.rename(tmp_path / "renamed.tar.gz")
    check(load(tmp_path / "renamed.tar.gz"), form)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_archives_that_python_3_pickled(archive, load, protocol):
    pickled = partial(pickle.dumps, protocol=protocol)
    check(load(archive(pickled=pickled)), FORMS["cifar-10-python.tar.gz"])


def test_the_second_load_comes_from_the_cache(archive, load):
    path = archive()
    load(path)
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    check(load(path), FORMS[path.name])
    os.utime(path)
    with pytest.raises(UserError, match="is missing"):
        load(path)


# -------------------------------------------------------------------------------------------------------------------------- hostile
class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function, argument", [(os.system, "touch {}"), (os.mkdir, "{}"), (eval, "open({!r}, 'w')"), (np.save, "{}")])
@pytest.mark.parametrize("file", ["data_batch_1", "batches.meta"])
def test_a_hostile_pickle_is_refused_and_nothing_runs(archive, load, tmp_path, file, function, argument):
    touched = str(tmp_path / "touched")
    hostile = pickle.dumps({"labels": Hostile(function, argument.format(touched), *([0] if function is np.save else []))}, 2)
    with pytest.raises(UserError, match=rf"cannot read {file} in .*: it asks for .*{function.__name__}, which no CIFAR batch needs"):
        load(archive(**{file: hostile}))
    assert not os.path.exists(touched)


def test_members_are_never_extracted(archive, load, tmp_path):
    path = archive()
    with tarfile.open(path) as old:
        content = [(m, old.extractfile(m).read()) for m in old.getmembers()]
    with tarfile.open(path, "w:gz") as new:
        for member, raw in content:
            new.addfile(member, io.BytesIO(raw))
        for name in ("../../escaped", str(tmp_path / "escaped")):
            member = tarfile.TarInfo(name)
            member.size = 4
            new.addfile(member, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("test_batch")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        new.addfile(link)
    before = sorted(p.name for p in tmp_path.iterdir())
    check(load(path), FORMS[path.name])
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == before


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_with_odd_names(load, tmp_path, form):
    content = members(FORMS["cifar-10-binary.tar.gz"], None)
    odd = ["/absolute", "../../up", "a/../../up", ".", "", "\udcff\udcfe", "a\nb\x1b[2J", "ü", "/".join(["deep"] * 18)]
    path = tmp_path / "archive.tar.gz"
    with tarfile.open(path, "w:gz", format=form, errors="surrogateescape") as archive:
        for kind in (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            for name in (*odd, "test_batch.bin" if kind != tarfile.REGTYPE else "other.bin"):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "../../../etc/passwd"
                archive.addfile(member)
        for name, raw in content.items():
            member = tarfile.TarInfo(f"{'long/' * (40 if form != tarfile.USTAR_FORMAT else 20)}{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    check(load(path), FORMS["cifar-10-binary.tar.gz"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["archive.tar.gz", "cache"]


def test_class_names_that_cannot_be_shown_are_told(archive, load):
    with pytest.raises(UserError, match=r"the class name 'a\\x1b\[2J' has characters that cannot be shown: rename the class"):
        load(archive(**{"batches.meta": python2({"label_names": ["a\x1b[2J", "b"]})}))


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "cannot read data_batch_3"),
        (b"not a pickle", "cannot read data_batch_3"),
        (pickle.dumps([1, 2], 2), "it holds a list, not a dictionary"),
        (pickle.dumps({"labels": [1], "date": 2}, 2), r"it has no 'data' \(nearest: date\)"),
        (python2({"labels": [1, 2], "data": np.zeros((3, 3072), np.uint8)}), "2 labels, but pixels of shape"),
        (python2({"labels": [10], "data": np.zeros((1, 3072), np.uint8)}), "labels from 10 to 10, but there are 10 classes"),
        (pickle.dumps({"labels": [1], "data": np.zeros((1, 3072), np.int16)}, 2), "not an array of bytes"),
        (pickle.dumps({"labels": [1], "data": "text"}, 2), "cannot read data_batch_3"),
        (None, "is not a whole cifar-10-python.tar.gz: data_batch_3 is missing"),
    ],
)
def test_a_bad_file_is_named(archive, load, raw, message):
    with pytest.raises(UserError, match=message) as caught:
        load(archive(data_batch_3=raw))
    assert "\n" not in str(caught.value)


def test_records_that_are_cut(archive, load):
    with pytest.raises(UserError, match=r"cannot read test\.bin in .*: its 3075 bytes are not a whole number of records of 3074"):
        load(archive("cifar-100-binary.tar.gz", **{"test.bin": bytes(3075)}))


@pytest.mark.parametrize("part", [0, 0.01, 0.3, 0.7, 0.9, 0.999])
def test_an_archive_cut_anywhere_is_named(archive, load, part):
    path = archive()
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(UserError, match="cifar-10-python"):
        load(path)


def test_a_pickle_changed_anywhere_never_ends_in_another_error(archive, load, tmp_path):
    path = archive()
    with tarfile.open(path) as packed:
        packed.extractall(tmp_path, **SAFE)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    content = batch.read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(200):
        changed = bytearray(content)
        changed[rng.choice([*range(300), *range(len(content) - 20, len(content))])] = rng.integers(256)
        batch.write_bytes(changed)
        try:
            load(batch.parent)
            outcomes.add("read")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_another_archive_is_no_cifar(load, tmp_path):
    with pytest.raises(UserError, match="is not a CIFAR archive"):
        load(pack(tmp_path / "other.tar.gz", {"a": b"b"}, "folder"))
    (tmp_path / "cut.tgz").write_bytes(gzip.compress(b"x" * 2000)[:10])
    with pytest.raises(UserError, match=r"cannot read archive [^\\]*; it is damaged or not whole: fetch it again$"):
        load(tmp_path / "cut.tgz")


# -------------------------------------------------------------------------------------------------------------------------- by name
@pytest.mark.parametrize("name", FORMS)
def test_what_lies_in_the_cache_folder_is_used_if_its_checksum_is_right(archive, load, monkeypatch, name):
    form, path = FORMS[name], archive(name, folder="cache")
    with pytest.raises(UserError, match=rf"{name} has the MD5 checksum [0-9a-f]{{32}}, the published one is {form.md5}: delete it"):
        load(form.dataset)
    publish(monkeypatch, path)
    check(load(form.dataset), form)


def publish(monkeypatch, path):
    """Make this archive the official one."""
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(cifar, "FORMS", [replace(form, md5=md5) if form.archive == path.name else form for form in cifar.FORMS])


def test_an_unpacked_folder_in_the_cache_folder(archive, load, tmp_path):
    with tarfile.open(archive("cifar-100-binary.tar.gz")) as packed:
        packed.extractall(tmp_path / "cache", **SAFE)
    check(load("cifar100"), FORMS["cifar-100-binary.tar.gz"])


@pytest.fixture
def serve(monkeypatch):
    """A web server on this machine in the place of the official one."""
    servers = []

    def serve(handler):
        server = HTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(cifar, "HOST", f"http://127.0.0.1:{server.server_port}/")

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


class Files(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Broken(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


def test_a_download_happens_once(archive, load, serve, monkeypatch, tmp_path):
    path = archive()
    publish(monkeypatch, path)
    serve(partial(Files, directory=path.parent))
    check(load("cifar10"), FORMS[path.name])
    assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes()
    serve(Broken)
    check(load("cifar10"), FORMS[path.name])


def test_a_download_with_another_checksum_is_refused(archive, load, serve, tmp_path):
    serve(partial(Files, directory=archive().parent))
    with pytest.raises(UserError, match=r"cannot download http.*hash.*; or put the file into .*cache yourself"):
        load("cifar10")
    assert not any((tmp_path / "cache").iterdir())


def test_a_failed_download_says_what_to_do(load, serve, tmp_path):
    serve(Broken)
    with pytest.raises(UserError, match=r"cannot download http\S*cifar-100-python\.tar\.gz: .*404.*; or put the file into .*cache"):
        load("cifar100")
    assert not any((tmp_path / "cache").iterdir())
