"""python -m benchmarks.serving: how many requests a second `minivit serve` answers, and how soon.

The server runs in a process of its own, on the loopback interface, with the model of the digits' default recipe and weights that are not
trained. Each request is the PNG file of one handwritten digit over a connection that is kept. Two loads take turns:

all at once     some clients, each of which sends its next request as soon as it has an answer: the most requests a second
at a rate       requests are due at even intervals, whether earlier ones are answered or not, and a request's time counts from when it was
                due: so a server that falls behind is not flattered

The clients share the cores with the server. Before anything is measured the answers are compared with those of `Classifier.predict`.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

import minivit
from minivit.inference.classifier import Classifier, Preprocessing

from .measure import Summary, machine, machine_line, option_parser, table, write_result

ROOT = Path(__file__).resolve().parent.parent
MODEL = "localvit_micro_patch2_8"
GOAL_RATE, GOAL_P99 = 200, 0.05  # requests a second on two cores, seconds
COLUMNS = {"load": "<", "requests": ">", "requests/s": ">", "p50, ms": ">", "p99, ms": ">", "failed": ">"}


class Client:
    """One kept connection, for one request after another."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def ask(self, body: bytes) -> tuple[int, bytes]:
        """(status, content) of the answer."""
        head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:"))
        return int(lines[0].split()[1]), await self._reader.readexactly(length)


@asynccontextmanager
async def clients(port: int, number: int) -> AsyncIterator[list[Client]]:
    pairs = [await asyncio.open_connection("127.0.0.1", port) for _ in range(number)]
    try:
        yield [Client(*pair) for pair in pairs]
    finally:
        for _, writer in pairs:
            writer.close()


async def all_at_once(port: int, bodies: Sequence[bytes], requests: int, number: int) -> dict[str, Any]:
    """Of `requests` in all, from `number` clients."""
    remaining, seconds, failed = iter(range(requests)), [], 0

    async def client(one: Client) -> None:
        nonlocal failed
        for i in remaining:
            start = perf_counter()
            status, _ = await one.ask(bodies[i % len(bodies)])
            seconds.append(perf_counter() - start)
            failed += status != 200

    async with clients(port, number) as found:
        start = perf_counter()
        await asyncio.gather(*map(client, found))
        return result(f"{number} clients at once", seconds, perf_counter() - start, failed)


async def at_a_rate(port: int, bodies: Sequence[bytes], requests: int, number: int, rate: float) -> dict[str, Any]:
    """Of `requests`, one due every 1 / `rate` seconds, over `number` connections, whichever is free."""
    free: asyncio.Queue[Client] = asyncio.Queue()
    seconds, failed = [], 0

    async def one_request(due: float, body: bytes) -> None:
        nonlocal failed
        client = await free.get()
        status, _ = await client.ask(body)
        seconds.append(perf_counter() - due)
        failed += status != 200
        free.put_nowait(client)

    async with clients(port, number) as found:
        for client in found:
            free.put_nowait(client)
        start, tasks = perf_counter(), []
        for i in range(requests):
            due = start + i / rate
            await asyncio.sleep(max(0, due - perf_counter()))
            tasks.append(asyncio.create_task(one_request(due, bodies[i % len(bodies)])))
        await asyncio.gather(*tasks)
        return result(f"{rate:g} a second", seconds, perf_counter() - start, failed)


def result(load: str, seconds: Sequence[float], elapsed: float, failed: int) -> dict[str, Any]:
    p50, p99 = np.percentile(seconds, (50, 99))
    return {"load": load, "requests": len(seconds), "rate": len(seconds) / elapsed, "p50": float(p50), "p99": float(p99), "failed": failed}


def digits_model() -> Classifier:
    data = minivit.load_data("digits")
    return Classifier(minivit.create_model(MODEL), data.class_names, Preprocessing.of(data))


def png_files(number: int) -> list[bytes]:
    files = []
    for picture in minivit.load_data("digits").test_images[:number, :, :, 0]:
        file = BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        files.append(file.getvalue())
    return files


async def check(port: int, bodies: Sequence[bytes], model: Classifier) -> None:
    """Raises AssertionError where the server and `Classifier.predict` differ."""
    expected = model.predict([*bodies])
    async with clients(port, 1) as (client,):
        for body, probabilities in zip(bodies, expected.probabilities):
            status, content = await client.ask(body)
            assert status == 200, content
            (prediction,) = json.loads(content)["predictions"]
            np.testing.assert_allclose([*prediction["probabilities"].values()], probabilities, rtol=1e-3, atol=1e-6)


async def rounds(port: int, model: Classifier, requests: int, number: int, rate: float, turns: int) -> list[dict[str, Any]]:
    bodies, found = png_files(64), []
    await check(port, bodies[:16], model)
    for _ in range(turns):
        found.append(await all_at_once(port, bodies, requests, number))
        found.append(await at_a_rate(port, bodies, requests, number, rate))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser("serving", "Requests a second of minivit serve, and their time.")
    parser.add_argument("--requests", type=int, default=4000, help="of each load in each turn (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=32, help="connections at once (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=GOAL_RATE, help="requests a second of the second load (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="of both loads (default: %(default)s)")
    options = parser.parse_args(arguments)
    requests, turns = (100, 1) if options.tiny else (options.requests, options.turns)
    found, model = machine(), digits_model()
    print(machine_line(found))
    with TemporaryDirectory() as folder:
        model.save(Path(folder) / "model.safetensors")
        command = [sys.executable, "-m", "minivit", "serve", str(Path(folder) / "model.safetensors"), "--port", "0"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout
            line = process.stdout.readline()  # "... at http://127.0.0.1:PORT, until Ctrl-C"
            port = int(line.split(",")[0].rpartition(":")[2])
            taken = asyncio.run(rounds(port, model, requests, options.clients, options.rate, turns))
        finally:
            process.terminate()
            process.wait(60)
    print(table(COLUMNS, [row(each) for each in taken]))
    at_rate = taken[1::2]
    p99 = Summary.of([each["p99"] for each in at_rate]).median
    kept = p99 < GOAL_P99 and not any(each["failed"] for each in taken)
    print(f"goal: {GOAL_RATE} requests a second with p99 below {1e3 * GOAL_P99:g} ms on two cores: {'kept' if kept else 'MISSED'}")
    write_result(options, "serving", found, model=MODEL, clients=options.clients, results=taken)
    return process.returncode


def row(found: dict[str, Any]) -> list[str]:
    return [
        str(found["load"]),
        str(found["requests"]),
        f"{found['rate']:.0f}",
        f"{1e3 * found['p50']:.1f}",
        f"{1e3 * found['p99']:.1f}",
        str(found["failed"]),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
