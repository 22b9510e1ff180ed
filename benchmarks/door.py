"""Attacks the door of ``exsim serve``, and says what happened to it and to everybody else.

    python -m benchmarks.door [--report FILE]        (results/door.md)

A door is opened as a user opens it, on a local Ray, with an untrained model of 8 x 8 pixels. Attacks come one after the
other: crowds, races, slow heads and bodies, bodies too large or without end, requests that can be read in two ways,
JSON bombs. During each attack another account asks one image at a time. The table has the attack's replies, the other
account's latency, its errors, and the largest memory of the door's process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import requests

from benchmarks.measure import machine
from simulator.models import build, save_model
from simulator.seeding import generator_for

ROOT = Path(__file__).parents[1]
ACCOUNTS, BUDGET = 80, 100_000
#: seconds that an attack without an end goes on
LASTING = 12.0
HEAD = "POST /v1/predict HTTP/1.1\r\nHost: door\r\nContent-Type: {kind}\r\nAuthorization: Bearer {token}\r\n"
NPY, JSON = "application/octet-stream", "application/json"


@dataclass
class Door:
    """An open door: where it is, who may ask, and its process."""

    host: str
    port: int
    tokens: list[str]
    process: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def memory(self) -> int:
        """Bytes of the door's process in memory."""
        return int(Path(f"/proc/{self.process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def head(self, token: str, rest: str, kind: str = NPY) -> bytes:
        return (HEAD.format(kind=kind, token=token) + rest + "\r\n\r\n").encode()

    def ask(self, token: str, body: bytes, kind: str = NPY) -> requests.Response:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": kind}
        return requests.post(self.url + "/v1/predict", body, headers=headers, timeout=300)


@contextlib.contextmanager
def opened() -> Iterator[Door]:
    """A door of its own, inside the block."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(
            build("naivenet", channels=1, size=8, classes=10, generator=generator_for("victim")), folder / "model"
        )
        command = [sys.executable, "-W", "ignore", "-m", "simulator", "serve", "--model", "model", "--port", "0"]
        command += ["--budget", str(BUDGET), "--accounts", str(ACCOUNTS), "--dir", "dir", "--tokens", "tokens"]
        command += ["--address-parallel", "2000"]  # everybody here has one address
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                host, port = re.findall(r"http://([\d.]+):(\d+)", process.stdout.readline())[0]
                tokens = list(json.loads((folder / "tokens").read_bytes()).values())
                yield Door(host, int(port), tokens, process.pid)
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=120)


def npy(count: int = 1) -> bytes:
    """A query of so many images, unlike every other."""
    file = io.BytesIO()
    np.save(file, np.random.default_rng().integers(256, size=(count, 1, 8, 8), dtype=np.uint8))
    return file.getvalue()


@dataclass
class Watch:
    """Another account, which asks image by image, and the door's memory."""

    door: Door
    seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    memory: int = 0

    def __enter__(self) -> Watch:
        self._end = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._asks, self._looks)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _asks(self) -> None:
        while not self._end.wait(0.05):
            start = time.monotonic()
            try:
                status = self.door.ask(self.door.tokens[-1], npy()).status_code
            except requests.RequestException as error:
                self.failures[type(error).__name__] += 1
                continue
            self.seconds.append(time.monotonic() - start)
            if status != 200:
                self.failures[str(status)] += 1

    def _looks(self) -> None:
        while not self._end.wait(0.05):
            self.memory = max(self.memory, self.door.memory())


# -- attacks ---------------------------------------------------------------------------------------------------------


def told(codes: Counter[Any]) -> str:
    """``200 x 10, 429 x 190``."""
    return ", ".join(f"{code} x {count}" for code, count in sorted(codes.items(), key=str)) or "nothing"


def at_once(count: int, work: Callable[[int], Awaitable[str]]) -> str:
    """What so many clients got, who work at the same time."""

    async def one(number: int) -> str:
        try:
            return await work(number)
        except (OSError, asyncio.IncompleteReadError):
            return "cut off"

    async def everybody() -> list[str]:
        return await asyncio.gather(*(one(number) for number in range(count)))

    return told(Counter(asyncio.run(everybody())))


async def status_of(reader: asyncio.StreamReader) -> str:
    """The status of the next reply, or that the connection ended."""
    line = await reader.readline()
    return line.split()[1].decode() if line.startswith(b"HTTP/") else "cut off"


def sender(door: Door, start: bytes, more: bytes = b"", pause: float = 0.0) -> Callable[[int], Awaitable[str]]:
    """A client that sends ``start``, and then ``more`` again and again until it is cut off or the time is over."""

    async def work(_: int) -> str:
        reader, writer = await asyncio.open_connection(door.host, door.port)
        reply, end = asyncio.ensure_future(status_of(reader)), time.monotonic() + LASTING
        try:
            writer.write(start)
            await writer.drain()
            while time.monotonic() < end and (more or not reply.done()):
                writer.write(more)
                await writer.drain()
                await asyncio.sleep(pause or (0 if more else 0.1))
            return await asyncio.wait_for(reply, 1) if reply.done() else "still open"
        except OSError:
            return await reply if reply.done() and not reply.exception() else "cut off"
        finally:
            reply.cancel()
            writer.close()

    return work


def crowd(door: Door) -> str:
    """1,000 connections at the same time, each of which asks three times."""

    async def work(number: int) -> str:
        body, token = npy(), door.tokens[number % (ACCOUNTS - 1)]
        reader, writer = await asyncio.open_connection(door.host, door.port)
        codes = []
        for _ in range(3):
            writer.write(door.head(token, f"Content-Length: {len(body)}") + body)
            codes.append(await status_of(reader))
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.findall(rb"(?i)content-length: (\d+)", head)[0]))
        writer.close()
        return " ".join(codes)

    return at_once(1000, work)


def race(door: Door) -> str:
    """200 requests race for the last ten images of an account; who is told to come again does."""
    token = door.tokens[0]
    spent = requests.get(door.url + "/v1/account", headers={"Authorization": f"Bearer {token}"}, timeout=60).json()
    for _ in range((spent["remaining"] - 10) // 4000):
        assert door.ask(token, npy(4000)).status_code == 200
    left = (spent["remaining"] - 10) % 4000
    assert not left or door.ask(token, npy(left)).status_code == 200

    def work(_: int) -> int:
        body = npy()
        while "Retry-After" in (reply := door.ask(token, body)).headers:
            time.sleep(0.2)
        return reply.status_code

    with ThreadPoolExecutor(200) as threads:
        found = told(Counter(threads.map(work, range(200))))
    after = requests.get(door.url + "/v1/account", headers={"Authorization": f"Bearer {token}"}, timeout=60).json()
    return f"{found}; {after['spent']} of {after['budget']} images charged"


def bombs(door: Door) -> str:
    """Eight times 15 MiB, and eight times 4 MiB, of JSON with images of one pixel, at once."""
    tiny = [b'{"images":[' + b",".join([b"[[[0]]]"] * count) + b"]}" for count in (1_960_000, 520_000)]

    def work(number: int) -> int:
        return door.ask(door.tokens[number % 8], tiny[number % 2], JSON).status_code

    with ThreadPoolExecutor(16) as threads:
        return told(Counter(threads.map(work, range(16))))


AMBIGUOUS = [
    "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0",
    "Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
    "Content-Length: +4\r\n\r\nabcd",
    "Transfer-Encoding: xchunked\r\n\r\n0",
    "Transfer-Encoding: chunked, chunked\r\n\r\n0",
    "Transfer-Encoding : chunked\r\n\r\n0",
    "X-A: b\r\n Transfer-Encoding: chunked\r\n\r\n0",
    "Idempotency-Key: a\r\nIdempotency-Key: b\r\nContent-Length: 0",
    "Host: other\r\nContent-Length: 0",
    "Transfer-Encoding: chunked\r\n\r\nzz",
]


def smuggling(door: Door) -> str:
    """Requests that two readers could read in two ways, each with another request behind it."""
    behind = b"GET /v1/account HTTP/1.1\r\nHost: door\r\n\r\n"

    async def work(number: int) -> str:
        return await sender(door, door.head(door.tokens[1], AMBIGUOUS[number]) + behind)(number)

    return at_once(len(AMBIGUOUS), work)


def attacks(door: Door) -> dict[str, Callable[[], str]]:
    """Every attack, by what it is called in the table."""
    token, big = door.tokens[1], 100 << 20
    chunked = door.head(token, "Transfer-Encoding: chunked")
    megabyte = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    return {
        "nobody": lambda: time.sleep(5) or "",  # type: ignore[func-returns-value]
        "1,000 connections, three queries each": lambda: crowd(door),
        "200 requests for the last 10 images": lambda: race(door),
        "900 heads of a byte a second": lambda: at_once(900, sender(door, b"GET / HTTP/1.1\r\nX: ", b"a", 1)),
        "300 unfinished bodies, one token": lambda: at_once(300, sender(door, chunked + b"4\r\nabcd\r\n")),
        "16 bodies of a byte a second": lambda: at_once(16, sender(door, chunked, b"1\r\na\r\n", 1)),
        "16 bodies in chunks of one byte": lambda: at_once(16, sender(door, chunked, b"1\r\na\r\n" * 10_000)),
        "16 bodies of 100 MB": lambda: at_once(
            16, sender(door, door.head(token, f"Content-Length: {big}"), bytes(1 << 20))
        ),
        "16 bodies without end": lambda: at_once(16, sender(door, chunked, megabyte)),
        "16 bodies without end, no token": lambda: at_once(
            16, sender(door, door.head("guess", "Transfer-Encoding: chunked"), megabyte)
        ),
        "JSON bombs, 15 and 4 MiB": lambda: bombs(door),
        "smuggling": lambda: smuggling(door),
    }


def line(name: str, result: str, watch: Watch, seconds: float) -> str:
    """A row of the table."""
    median, worst = (1000 * float(np.quantile(watch.seconds or [0], at)) for at in (0.5, 1.0))
    failed = told(watch.failures) if watch.failures else "0"
    cells = (name, result, f"{seconds:.0f} s", len(watch.seconds), failed, f"{median:.0f}", f"{worst:.0f}")
    return "| " + " | ".join(map(str, (*cells, f"{watch.memory / 2**20:.0f}"))) + " |"


def main() -> int:
    """Prints the table, and writes it where ``--report`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path)
    report = parser.parse_args().report
    lines = ["# The door under attack", "", "`python -m benchmarks.door --report results/door.md`", ""]
    lines += [f"    {machine()}", ""]
    lines += ["| attack | replies | took | others' queries | failed | ms, median | ms, worst | door, MiB |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    with opened() as door:
        for name, attack in attacks(door).items():
            with Watch(door) as watch:
                start = time.monotonic()
                result = attack()
                seconds = time.monotonic() - start
                time.sleep(0.5)
            lines.append(line(name, result, watch, seconds))
            print(lines[-1], flush=True)
    if report:
        report.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
