"""A server in a process of its own: its answers, and what it refuses."""

import base64
import http.client
import json
import re
import struct
import zlib
from io import BytesIO
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("python_multipart")
pytest.importorskip("prometheus_client")

from browser import browser, needs_chromium
from running_server import as_png, classifier, multipart, pictures, served

import minivit

MIB = 2**20
REQUESTS = 'minivit_requests_total{{path="/predict",status="{}"}}'  # of a status


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("served"), "--max-upload", 1, "--max-queue", 8, "--max-pixels", 10**6) as server:
        yield server


@pytest.fixture(scope="module")
def expected():
    return classifier().predict(pictures(5))


def bomb():
    """A PNG file of a few bytes that claims 9,000 times 9,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------------------------ answers
def test_files_are_labelled_in_their_order(server, expected):
    status, _, content = server.send_files({f"käse {i}.png": as_png(picture) for i, picture in enumerate(pictures(5))})
    assert status == 200 and content["milliseconds"] > 0
    found = content["predictions"]
    assert [each["name"] for each in found] == [f"käse {i}.png" for i in range(5)]
    assert [each["label"] for each in found] == expected.names and len(set(expected.names)) > 1
    for each, probabilities in zip(found, expected.probabilities):
        assert list(each["probabilities"]) == ["cat", "dog", "ant"]
        np.testing.assert_allclose([*each["probabilities"].values()], probabilities, rtol=1e-4)
        assert each["probability"] == max(each["probabilities"].values()) and "attention" not in each and "exit" not in each


def test_the_body_may_be_the_file(server, expected):
    for kind in ("image/png", "application/x-www-form-urlencoded"):  # the second is what curl --data-binary says
        status, _, content = server.ask("/predict", as_png(pictures(5)[1]), kind)
        (found,) = content["predictions"]
        assert (status, found["name"], found["label"]) == (200, "", expected.names[1])


def test_concurrent_requests_get_their_own_answers(server, expected):
    server.ask_together(8, as_png(pictures(5)[0]))
    connection = server.connect()
    for i in (2, 0, 4):  # over one connection
        connection.request("POST", "/predict", as_png(pictures(5)[i]))
        assert json.loads(connection.getresponse().read())["predictions"][0]["label"] == expected.names[i]
    connection.close()


def test_where_the_model_looks(server):
    large = np.kron(pictures(1)[0], np.ones((4, 4, 1), np.uint8))
    _, _, content = server.ask("/predict?attention=true", as_png(large))
    attention = content["predictions"][0]["attention"]
    (heat,) = attention["maps"]
    assert np.shape(heat) == (4, 4) and np.min(heat) == 0 and np.max(heat) == 1
    picture = Image.open(BytesIO(base64.b64decode(attention["picture"].split(",")[1])))
    np.testing.assert_array_equal(np.asarray(picture), classifier().preprocessing.pixels(large)[0, :, :, 0])


def test_what_is_served(server):
    _, _, content = server.ask("/model")
    assert content == {"model": "vit", "classes": ["cat", "dog", "ant"], "input": [1, 8, 8], "exits": 1, "budgets": [], "attention": True}
    assert server.ask("/healthz")[::2] == (200, {"status": "ok"})


def test_metrics_count(server):
    before = [server.metric(name) for name in ("minivit_images_total", "minivit_batch_images_sum", "minivit_batch_images_count")]
    server.send_files({str(i): as_png(picture) for i, picture in enumerate(pictures(8))})
    after = [server.metric(name) for name in ("minivit_images_total", "minivit_batch_images_sum", "minivit_batch_images_count")]
    images, of_batches, batches = np.subtract(after, before)
    assert images == of_batches == 8 and 1 <= batches < 8
    assert server.metric("minivit_queue_images") == 0
    server.ask("/no/such/path")
    text = server.ask("/metrics")[2]
    assert 'minivit_requests_total{path="other",status="404"}' in text and "no/such" not in text
    assert 'minivit_request_seconds_bucket{le="0.05",path="/predict"}' in text


def test_the_openapi_document_describes_what_is_answered(server):
    _, _, document = server.ask("/openapi.json")
    schemas = document["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))) <= set(schemas)
    _, _, answer = server.ask("/predict?attention=1", as_png(pictures(1)[0]))
    assert set(answer) == set(schemas["Answer"]["properties"])
    assert set(answer["predictions"][0]) == set(schemas["Prediction"]["properties"])
    assert set(server.ask("/model")[2]) == set(schemas["Model"]["properties"])
    for path, operations in document["paths"].items():
        assert server.ask(path, method=next(iter(operations)).upper())[0] in (200, 400)


# ----------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("query", "body", "status", "message"),
    [
        ("", b"", 400, "no image was sent"),
        ("", b"hello", 422, "cannot read image given: not an image"),
        ("", as_png(pictures(1)[0])[:60], 422, "cannot read image given"),
        ("", bomb(), 422, "9000×9000 pixels, and max_pixels is 1000000"),
        ("?atention=1", b"hello", 400, "unknown parameter 'atention' (nearest: attention)"),
        ("?attention=perhaps", b"hello", 400, "attention must be true or false, not 'perhaps'"),
        ("?budget=small", b"hello", 400, "budget must be a number, not 'small'"),
        ("?budget=0.5", b"hello", 400, "budget=0.5: the model has one exit"),
    ],
)
def test_what_cannot_be_answered(server, query, body, status, message):
    found, _, content = server.ask(f"/predict{query}", body)
    assert found == status and list(content) == ["error"] and message in content["error"]


def test_one_bad_file_is_named(server):
    status, _, content = server.send_files({"good.png": as_png(pictures(1)[0]), "bad.png": b"no image"})
    assert (status, content) == (422, {"error": "cannot read image bad.png: not an image of a known format"})


def test_bodies_that_are_no_forms(server):
    for kind, body in (
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"--c\r\n"),
        ("multipart/form-data; boundary=b", b""),
    ):
        assert server.ask("/predict", body, kind)[0] == 400
    kind, body = multipart({"whole.png": as_png(pictures(1)[0]), "cut.png": as_png(pictures(1)[0])})
    status, _, content = server.ask("/predict", body[:-30], kind)
    assert status == 400 and "does not end with its boundary" in content["error"]
    status, _, content = server.send_files({str(i): b"x" for i in range(9)})
    assert status == 400 and "Maximum number of files is 8" in content["error"]


def test_other_paths_and_methods(server):
    assert server.ask("/predict")[::2] == (405, {"error": "Method Not Allowed"})
    assert server.ask("/predictions")[::2] == (404, {"error": "Not Found"})
    assert server.ask("/metrics", b"x")[0] == 405


def chunks(size):
    return (bytes(64 * 1024) for _ in range(size // (64 * 1024)))


def test_a_body_that_is_too_long_takes_no_memory(server):
    before = server.metric("process_resident_memory_bytes")
    for body in (bytes(2 * MIB), bytes(40 * MIB), chunks(40 * MIB)):  # with its length, and in chunks
        status, _, content = server.ask("/predict", body)
        assert status == 413 and "at most 1 MiB" in content["error"]
    for _ in range(4):
        server.ask("/predict", bomb())
    assert server.metric("process_resident_memory_bytes") < before + 16 * MIB


def test_many_bodies_that_stall_take_little_memory(server):
    refused, left = (server.metric(REQUESTS.format(status)) for status in (503, 499))
    waiting = []
    for _ in range(18):  # of 0.95 MiB each, where all bodies together may have 16
        connection = server.connect()
        connection.putrequest("POST", "/predict")
        connection.putheader("Content-Length", str(MIB))
        connection.endheaders(bytes(MIB - 50_000))
        waiting.append(connection)
    server.wait_until(REQUESTS.format(503), refused + 2)
    for connection in waiting:
        connection.close()
    server.wait_until(REQUESTS.format(499), left + 16)
    assert server.ask("/predict", as_png(pictures(1)[0]))[0] == 200


def test_a_connection_is_of_use_after_a_refusal(server):
    connection = server.connect()
    statuses = []
    for body in (bytes(3 * MIB), b"no image", as_png(pictures(1)[0])):
        connection.request("POST", "/predict", body)
        answer = connection.getresponse()
        answer.read()
        statuses.append(answer.status)
    connection.close()
    assert statuses == [413, 422, 200]


# -------------------------------------------------------------------------------------------------------------------- page
def test_the_page_asks_nobody_else(server):
    status, headers, text = server.ask("/")
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.findall(r"https?:|//\w+\.\w", text) and "innerHTML" not in text


@needs_chromium
def test_the_page_labels_images_that_are_chosen_or_dropped(server, expected, tmp_path):
    path, answers = tmp_path / "käse 1.png", "document.querySelectorAll('article')"
    path.write_bytes(as_png(pictures(2)[0]))
    with browser(tmp_path / "profile") as page:
        page.open(f"http://{server.host}:{server.port}/")
        page.wait("find('model').textContent")
        assert page.value("find('model').textContent") == "vit: 3 classes, 8×8 pixels, gray"
        page.choose("#files", path)
        page.wait("document.querySelector('canvas')")
        page.drop("b.png", as_png(pictures(2)[1]))
        page.wait(f"{answers}.length === 2 && {answers}[0].querySelector('canvas')")
        for number, name in enumerate(["b.png", "käse 1.png"]):  # the newest one first
            picture = 1 - number
            label, share = expected.names[picture], expected.probabilities[picture].max()
            shown = page.value(f"[...{answers}[{number}].querySelectorAll('h2, .answer, dt')].map(each => each.textContent)")
            order = np.argsort(-expected.probabilities[picture])
            assert shown == [name, f"{label}, {100 * share:.1f} %", *(expected.class_names[k] for k in order)]
            attention = f"{answers}[{number}].querySelector('canvas')"
            colours = f"new Set(new Uint32Array({attention}.getContext('2d').getImageData(0, 0, 384, 384).data.buffer)).size"
            assert page.value(colours) > 4
        assert not page.errors
        page.drop("c.png", b"no image")
        page.wait("document.querySelector('.error')")
        assert "not an image of a known format" in page.value("document.querySelector('.error').textContent")
        assert {urlsplit(url).netloc for url in page.requests} == {f"{server.host}:{server.port}"}
        assert page.screenshot()[:4] == b"\x89PNG"


@needs_chromium
def test_the_page_tells_the_exit_of_a_cascade(tmp_path):
    model = classifier("dvt", patches=((4, 4, 0), (2, 2, 0)))
    rng = np.random.default_rng(0)
    minivit.calibrate(model, rng.integers(0, 256, (200, 8, 8, 1), np.uint8), rng.integers(0, 3, 200), [0.4, 1.0], unit="share")
    with served(tmp_path, model=model) as server, browser(tmp_path / "profile") as page:
        page.open(f"http://{server.host}:{server.port}/")
        page.wait("!find('budget-option').hidden")
        page.drop("a.png", as_png(pictures(1)[0]))
        page.wait("document.body.textContent.includes('exit 2 of 2, ')")
        page.value("find('budget').value = '0.4'")
        page.drop("a.png", as_png(pictures(1)[0]))
        page.wait("document.body.textContent.includes('exit 1 of 2, ')")


# ------------------------------------------------------------------------------------------------------------------ clients
def test_invalid_requests_do_no_harm(server):
    for text in (
        b"\x00\xff" * 100,
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 20_000,
        b"POST /predict HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        connection = server.connect()
        connection.connect()
        connection.sock.sendall(text)
        assert connection.sock.recv(100).startswith(b"HTTP/1.1 400")
        connection.close()
    assert server.ask("/healthz")[0] == 200


def test_clients_that_leave_do_no_harm(server):
    left = server.metric(REQUESTS.format(499))
    for text in (b"", b"POST /pre", b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nbegin"):
        connection = server.connect()
        connection.connect()
        connection.sock.sendall(text)
        connection.close()
    server.wait_until(REQUESTS.format(499), left + 1)
    kind = {"Content-Type": "image/png"}
    connection = http.client.HTTPConnection(server.host, server.port)
    connection.request("POST", "/predict", as_png(pictures(1)[0]), kind)
    connection.close()  # without reading the answer
    server.wait_until("minivit_queue_images", 0)
    assert server.ask("/predict", as_png(pictures(1)[0]))[0] == 200
