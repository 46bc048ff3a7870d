"""What tests/hostile/test_server_*.py share: a vector that costs nothing to make, and requests by hand."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from cli_runs import command_line

import localsteer


def add_vector(server, folder: Path, name: str = "odd") -> None:
    """Upload one that fits the model: it steers to nothing, and has a verifier."""
    engine = next(iter(server.state.models.values())).engine
    directions = np.ones((engine.model.n_layer, engine.model.n_embd), np.float32)
    provenance = {"verifier": "change_case:english_lowercase", "kwargs": {}}
    vector = localsteer.ControlVector(
        directions, None, None, None, None, layers=(1,), mode="add", name=name, provenance=provenance
    )
    vector.save(folder / f"{name}.gguf")
    with server.http() as http:
        data = (folder / f"{name}.gguf").read_bytes()
        answer = http.post("/v1/steering", params={"name": name}, content=data)
        assert answer.status_code == 201, answer.text


def raw_request(path: str, document: object, **headers: str) -> bytes:
    body = json.dumps(document).encode()
    given = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **headers,
    }
    lines = "".join(f"{key}: {value}\r\n" for key, value in given.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


class Process:
    """`localsteer serve` as a program, with nothing of the test in it."""

    def __init__(self, process: subprocess.Popen, url: str) -> None:
        self.process, self.url = process, url
        self.address = ("127.0.0.1", int(url.rpartition(":")[2]))

    def http(self):
        import httpx

        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def plain(self) -> http.client.HTTPConnection:
        """A client that costs this process next to nothing."""
        return http.client.HTTPConnection(*self.address, timeout=60)

    @property
    def resident(self) -> int:
        """Bytes of memory; Linux alone."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


@contextmanager
def serving_process(*args: object) -> Iterator[Process]:
    command = command_line("serve", "--port", 0, "--json", "-t", 1, *args)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            assert line, "it did not start"
            text += line
        yield Process(process, json.loads(text)["url"])
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    finally:
        process.kill()
