"""A server that has too much to do, slow clients, or a signal to end."""

import asyncio
import http.client
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from time import monotonic, sleep

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("python_multipart")
pytest.importorskip("prometheus_client")

from running_server import as_png, classifier, pictures, served

import minivit
from minivit import UserError, serve
from minivit.cli import main
from minivit.inference.classifier import Classifier, Preprocessing
from minivit.serving import serve as serve_module
from minivit.serving.answers import fitting, plan_sizes
from minivit.serving.batcher import Batcher, Overloaded, Upload
from minivit.serving.options import ServeOptions

PNG = as_png(pictures(1)[0])
BEGUN = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nbegin"


# ---------------------------------------------------------------------------------------------------------------- batches
def batched(model, requests, **options):
    """(answers, sizes of batches) of concurrent requests: (pictures, budget, whether attention is told) each."""
    sizes = []
    batcher = Batcher(model, ServeOptions(**options), lambda exits: sizes.append(len(exits)))

    async def all_of_them():
        with batcher.running():
            waiting = [
                batcher.answer([Upload("", BytesIO(as_png(picture))) for picture in some], budget, attention)
                for some, budget, attention in requests
            ]
            found = await asyncio.gather(*waiting, return_exceptions=True)
            assert batcher.works and batcher.queued == 0
            return found

    return asyncio.run(all_of_them()), sizes


def test_concurrent_requests_are_one_batch():
    model = classifier()
    found, sizes = batched(model, [([picture], None, False) for picture in pictures(12)], max_wait=1000)
    assert sizes == [12]
    assert [answer["label"] for (answer,) in found] == model.predict(pictures(12)).names


def test_one_request_waits_for_nobody():
    start = monotonic()
    found, sizes = batched(classifier(), [(pictures(1), None, False)], max_wait=1000)
    assert sizes == [1] and len(found) == 1 and monotonic() - start < 1


def test_plans_for_few_sizes():
    assert plan_sizes(classifier(), 64) == [1, 4, 16, 64] and plan_sizes(classifier(), 1) == [1]
    assert [fitting(n, [1, 4, 16, 32]) for n in (1, 2, 4, 5, 7, 8, 16, 17, 32, 100)] == [
        (1, 1),
        (2, 4),
        (4, 4),
        (4, 4),
        (4, 4),
        (8, 16),
        (16, 16),
        (17, 32),
        (32, 32),
        (32, 32),
    ]


def test_a_full_queue_refuses_what_is_too_many():
    found, _ = batched(classifier(), [(pictures(2), None, False)] * 3, max_queue=4)
    assert [type(each) for each in found] == [list, list, Overloaded]


def test_a_failing_request_leaves_the_others_alone(monkeypatch):
    found, _ = batched(classifier(), [(pictures(1), None, False), (pictures(1), 0.5, False), (pictures(1), None, True)], max_wait=1000)
    assert isinstance(found[1], UserError) and "one exit" in str(found[1])
    assert "attention" not in found[0][0] and "attention" in found[2][0]


def test_logits_that_are_not_finite_are_no_answer():
    model = classifier()
    model.model.head.bias.data[0] = np.nan
    ((found,), _) = batched(model, [(pictures(1), None, False)])
    assert isinstance(found, UserError) and "not finite" in str(found)


def test_a_cascade_tells_its_exits():
    model = classifier("dvt", patches=((4, 4, 0), (2, 2, 0)))
    rng = np.random.default_rng(0)
    minivit.calibrate(model, rng.integers(0, 256, (200, 8, 8, 1), np.uint8), rng.integers(0, 3, 200), [0.4, 1.0], unit="share")
    found, sizes = batched(model, [(pictures(6), 0.4, True), (pictures(6), None, True)], max_wait=1000)
    assert sizes == [4, 2, 4, 2]  # never two budgets in one
    for answers, budget in zip(found, (0.4, None)):
        prediction = model.predict(pictures(6), budget)
        assert [answer["exit"] for answer in answers] == (prediction.exits + 1).tolist()
        assert [answer["macs"] for answer in answers] == prediction.macs.tolist()
        grids = [np.shape(answer["attention"]["maps"][0]) for answer in answers]
        assert grids == [(2, 2) if exit == 0 else (4, 4) for exit in prediction.exits]
    assert {answer["exit"] for answer in found[0]} == {1} and {answer["exit"] for answer in found[1]} == {2}
    with pytest.raises(UserError, match="leave tta out"):
        minivit.Predictor(model.model, tta=True).check_budget(0.4)


def test_both_branches_of_a_crossvit_look():
    model = minivit.create_model("crossvit_nano_8", num_classes=3)
    whole = Classifier(model, ("cat", "dog", "ant"), Preprocessing(8, 1, (0.5,), (0.25,)))
    ((answers,), _) = batched(whole, [(pictures(1), None, True)])
    maps = answers[0]["attention"]["maps"]
    assert [np.shape(heat) for heat in maps] == [tuple(branch.grid) for branch in model.backbones()] and len(maps) == 2


# --------------------------------------------------------------------------------------------------- overload, and the end
def test_overload_is_answered_and_a_signal_loses_nothing(tmp_path):
    with served(tmp_path, "--max-queue", 4, "--batch-size", 1, seconds_a_batch=0.25) as server:
        answers = server.ask_together(12, PNG)
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 503} and statuses.count(200) >= 4
        assert all(1 <= int(headers["Retry-After"]) <= 60 for status, headers, _ in answers if status == 503)
        assert server.ask("/predict", PNG)[0] == 200

        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(server.ask, "/predict", PNG) for _ in range(3)]
            server.wait_until("minivit_queue_images", 3)
            slow = server.connect()  # has sent a part of its body when the signal comes
            slow.putrequest("POST", "/predict")
            slow.putheader("Content-Length", str(len(PNG)))
            slow.endheaders(PNG[:20])
            sleep(0.1)
            ended = pool.submit(server.end)
            sleep(0.2)
            slow.send(PNG[20:])
            assert [answer.result()[0] for answer in waiting] == [200] * 3
            assert slow.getresponse().status == 200
            assert ended.result() == (0, "", "")
        with pytest.raises(OSError):
            server.ask("/healthz")


def ask_until_the_end(server):
    """The statuses of requests over one connection, until an answer says that it is the last."""
    connection, statuses = server.connect(), []
    while True:
        connection.request("POST", "/predict", PNG)
        answer = connection.getresponse()
        answer.read()
        statuses.append(answer.status)
        if answer.headers["Connection"] == "close":
            return statuses


def test_clients_with_kept_connections_are_told_of_the_end(tmp_path):
    with served(tmp_path) as server, ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask_until_the_end, server) for _ in range(4)]
        sleep(0.3)
        assert server.end() == (0, "", "")
        for client in clients:
            statuses = client.result(20)
            assert len(statuses) > 1 and set(statuses) == {200}


def test_slow_and_too_many_clients(tmp_path):
    with served(tmp_path, "--timeout", 1, "--max-connections", 6) as server:

        def opened(text):
            client = socket.create_connection((server.host, server.port), timeout=20)
            client.sendall(text)
            return client

        slow = [opened(text) for text in (b"", b"POST /predict HT", BEGUN)]
        assert server.ask("/predict", PNG)[0] == 200  # meanwhile
        trickling = threading.Thread(target=trickle, args=[opened(b"GET / HTTP/1.1\r\n")])
        trickling.start()
        received = [everything(client) for client in slow]
        assert received[:2] == [b"", b""] and received[2].startswith(b"HTTP/1.1 408 ")
        trickling.join(20)
        assert not trickling.is_alive()
        assert server.ask("/predict", PNG)[0] == 200

        idle = [opened(b"") for _ in range(6)]
        late = opened(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = everything(late)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in answer
        for client in (*idle, *slow, late):
            client.close()
        sleep(0.1)
        assert server.ask("/healthz")[0] == 200


def trickle(client):
    """Send one byte after the other, of a head that never ends, until the server closes the connection."""
    with suppress(OSError):
        for _ in range(200):
            client.sendall(b"x")
            sleep(0.1)
    client.close()


def everything(client):
    """What comes until the server closes the connection."""
    found = b""
    with suppress(ConnectionError):
        while part := client.recv(1000):
            found += part
    return found


def test_a_second_signal_ends_at_once(tmp_path):
    with served(tmp_path, "--batch-size", 1, seconds_a_batch=8) as server:
        thread = threading.Thread(target=ask_in_vain, args=[server])
        thread.start()
        server.wait_until("minivit_queue_images", 1)
        server.process.send_signal(signal.SIGINT)
        sleep(0.6)
        assert server.process.poll() is None
        status, _, errors = server.end(signal.SIGINT)
        assert status == 130 and errors.splitlines()[-1] == "minivit: interrupted"
        thread.join()


def ask_in_vain(server):
    with suppress(OSError, http.client.HTTPException):
        server.ask("/predict", PNG)


# ---------------------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70000}, "port must be a whole number of at most 65,535, not 70000"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"timeout": 0}, "timeout must be a number of at least 0.1"),
        ({"max_pixels": 0}, "max_pixels must be from 1 to"),
        ({"host": "no such host"}, "cannot listen on no such host port 8000: "),
        ({"budget": 0.5, "port": 0}, "budget=0.5: the model has one exit"),
        ({"threads": 0}, "threads must be a whole number"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError) as error:
        serve(classifier(), **options)
    assert message in str(error.value)


def test_a_port_in_use(tmp_path, capsys):
    classifier().save(tmp_path / "model.safetensors")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(tmp_path / "model.safetensors"), "--port", str(port)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"minivit: cannot listen on 127.0.0.1 port {port}: ") and err.count("\n") == 1


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(serve_module, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(UserError, match=r"serving needs uvicorn, which is not installed: pip install 'minivit\[serve\]'"):
        serve(classifier())
