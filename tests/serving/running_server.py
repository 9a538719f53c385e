"""`minivit serve` in a process of its own, and a client for it."""

import http.client
import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from time import monotonic, sleep
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

import minivit
from minivit.inference.classifier import Classifier, Preprocessing

SLOW = """
import sys, time
from minivit.cli import main
from minivit.serving import batcher
quickly = batcher.answers
batcher.answers = lambda *arguments: (time.sleep({seconds}), quickly(*arguments))[1]
sys.exit(main(sys.argv[1:]))
"""


def classifier(name="vit", **options):
    tiny = {"image_size": 8, "in_channels": 1, "num_classes": 3, "dim": 16, "depth": 2, "heads": 2, "seed": 3}
    model = minivit.create_model(name, **tiny | ({"patch_size": 2} if name == "vit" else {}) | options)
    for _, parameter in model.named_parameters():  # so that answers differ
        parameter.data[...] = np.random.default_rng(parameter.size + 3).standard_normal(parameter.shape)
    return Classifier(model, ("cat", "dog", "ant"), Preprocessing(8, 1, (0.5,), (0.25,)))


def pictures(number, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, 8, 8, 1), np.uint8)


def as_png(picture):
    file = BytesIO()
    Image.fromarray(picture[..., 0]).save(file, "PNG")
    return file.getvalue()


def multipart(files):
    """(content type, body) of {name: bytes}."""
    parts = [
        b'--limit\r\nContent-Disposition: form-data; name="image"; filename="%s"\r\n\r\n%s\r\n' % (name.encode(), content)
        for name, content in files.items()
    ]
    return "multipart/form-data; boundary=limit", b"".join(parts) + b"--limit--\r\n"


class Server:
    """A running server. process: of `minivit serve`."""

    def __init__(self, process, address):
        self.process = process
        self.host, self.port = urlsplit(address).hostname, urlsplit(address).port

    def connect(self):
        return http.client.HTTPConnection(self.host, self.port, timeout=30)

    def ask(self, path, body=None, kind="application/octet-stream", method=None):
        """(status, headers, content) of one request; content that is JSON as its value."""
        connection = self.connect()
        try:
            connection.request(
                method or ("GET" if body is None else "POST"), path, body, {"Content-Type": kind} if body is not None else {}
            )
            answer = connection.getresponse()
            content = answer.read()
            is_json = answer.headers["Content-Type"] == "application/json"
            return answer.status, answer.headers, json.loads(content) if is_json else content.decode()
        finally:
            connection.close()

    def send_files(self, files, query=""):
        kind, body = multipart(files)
        return self.ask(f"/predict{query}", body, kind)

    def ask_together(self, number, body):
        """The answers to equal requests that are sent at the same time."""
        gate = threading.Barrier(number)

        def one(_):
            gate.wait()
            return self.ask("/predict", body)

        with ThreadPoolExecutor(number) as pool:
            return list(pool.map(one, range(number)))

    def metric(self, name):
        """The value of a metric."""
        lines = self.ask("/metrics")[2].splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def wait_until(self, name, value):
        end = monotonic() + 20
        while (found := self.metric(name)) != value:
            assert monotonic() < end, f"{name} became {found}, not {value}"
            sleep(0.02)

    def end(self, number=signal.SIGTERM):
        """(exit status, what is left of standard output, standard error) after a signal."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@contextmanager
def served(folder, *options, model=None, seconds_a_batch=0):
    """A server of a tiny model, at a free port. It ends in order at the end of the block, if it has not ended in it."""
    path = folder / "model.safetensors"
    (model or classifier()).save(path)
    program = ["-c", SLOW.format(seconds=seconds_a_batch)] if seconds_a_batch else ["-m", "minivit"]
    command = [sys.executable, *program, "serve", str(path), "--port", "0", "--json", *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = ""
        while not lines.rstrip().endswith("}"):
            line = process.stdout.readline()
            assert line, process.stderr.read()
            lines += line
        server = Server(process, json.loads(lines)["address"])
        yield server
        if process.poll() is None:
            status, _, errors = server.end()
            assert status == 0 and errors == "", f"{status} {errors}"
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
