"""A model on two hosts: bytes on the wire and milliseconds per token, plain and steered.

    python benchmarks/rpc.py [-m smol] [--tokens 40]

Two ggml-rpc-server processes on loopback (`localsteer rpc build` makes the program), one thread each. Bytes
are counted by a proxy before each of them, in a run of its own. For the time the variants take turns at every
token: one machine, two hosts, and two hosts as llama.cpp's own client has them, without the relay and without
a callback. Loopback has no latency to speak of: a network adds its own to every exchange, which is counted
too. The last line is JSON. Exit status 1 if plain tokens cost more than twice the bytes of llama.cpp's own
client.
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from localsteer import ControlVector
from localsteer.model_names import path_of
from localsteer.plan import Plan, PositionClass
from localsteer.runtime.bridge import Context, Model, system_info
from localsteer.runtime.rpc import Hosts
from localsteer.runtime.rpc.library import build

N_PROMPT, N_CTX, N_THREADS = 32, 512, 1
MOST = 2.0  # times the bytes of llama.cpp's own client


@contextmanager
def server(program: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [program, "-H", "127.0.0.1", "-p", port, "-t", N_THREADS]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*map(str, words)], **quiet)
    try:
        for _ in range(1000):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.01)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class Meter:
    """Passes bytes on to a host and counts them. exchanges: how often it answered after it was asked."""

    def __init__(self, host: str) -> None:
        name, port = host.split(":")
        self.host = (name, int(port))
        self.sent = self.received = self.exchanges = 0
        self._asked = False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def counts(self) -> np.ndarray:
        return np.array([self.sent, self.received, self.exchanges])

    def _accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            host = socket.create_connection(self.host)
            for end in (client, host):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for ends in ((client, host, True), (host, client, False)):
                threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, to_host: bool) -> None:
        with suppress(OSError):
            while words := source.recv(1 << 20):
                if to_host:
                    self.sent += len(words)
                    self._asked = True
                else:
                    self.received += len(words)
                    self.exchanges += self._asked
                    self._asked = False
                target.sendall(words)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


class Direct:
    """Hosts as llama.cpp's own client has them: nothing between, and nothing that keeps the process alive."""

    lost = None

    def __init__(self, addresses: list[str]) -> None:
        self.addresses = addresses

    def check(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class Variant:
    """A way of running the model, with a context of its own."""

    context: Context
    plan: Plan | None = None
    n_past: int = 0
    seconds: list[float] = field(default_factory=list)

    def run(self, n: int) -> None:
        positions = np.arange(self.n_past, self.n_past + n)
        cls = PositionClass.PROMPT if n > 1 else PositionClass.GENERATION
        plans = None if self.plan is None else [self.plan] * n
        tokens = 1 + positions % (self.context.model.n_vocab - 1)
        start = time.perf_counter()
        rows = self.context.decode(tokens, positions, [0] * n, positions == positions[-1], plans, [cls] * n)
        rows.logits.argmax()  # and with it the answer of the last host
        self.seconds.append(time.perf_counter() - start)
        self.n_past += n


def vector_for(model: Model) -> ControlVector:
    draw = np.random.default_rng(1)
    directions = draw.standard_normal((model.n_layer, model.n_embd)).astype(np.float32)
    ones = np.ones(model.n_layer, np.float32)
    return ControlVector(
        directions=directions, mean_with=ones, mean_without=0 * ones, std_with=ones, std_without=ones,
        layers=(model.n_layer // 3,),  # amid the layers of one host: its graph is sent in two parts
    )  # fmt: skip


def steered(model: Model, *, hook: bool = True) -> dict[str, Variant]:
    def context() -> Context:
        return Context(model, n_ctx=N_CTX, n_batch=N_PROMPT, n_threads=N_THREADS, steering=hook)

    if not hook:
        return {"plain": Variant(context())}
    vector = vector_for(model)
    every = vector.at(layer=range(model.n_layer))
    plans = {
        "plain": None,
        "one layer": Plan.from_vectors([vector]),
        "all layers": Plan.from_vectors([every]),
    }
    return {name: Variant(context(), plan) for name, plan in plans.items()}


def traffic(model: Model, meters: list[Meter], n_tokens: int, *, hook: bool = True) -> dict[str, dict]:
    """Bytes and exchanges per token, both hosts together, after the prompt and two tokens."""
    rows = {}
    for name, variant in steered(model, hook=hook).items():
        for n in (N_PROMPT, 1, 1):
            variant.run(n)
        before = sum(meter.counts for meter in meters)
        for _ in range(n_tokens):
            variant.run(1)
        spent = (sum(meter.counts for meter in meters) - before) / n_tokens
        rows[name] = dict(
            zip(("bytes_sent", "bytes_received", "exchanges"), spent.round(1).tolist(), strict=True)
        )
    return rows


def timed(runs: dict[str, Variant], n_tokens: int) -> dict[str, float]:
    """Milliseconds per token, medians, the variants taking turns."""
    turn = list(runs.values())
    for run in turn:
        for n in (N_PROMPT, 1, 1):
            run.run(n)
        run.seconds.clear()
    for _ in range(n_tokens):
        for run in turn:
            run.run(1)
        turn.append(turn.pop(0))
    return {name: round(1000 * float(np.median(run.seconds)), 2) for name, run in runs.items()}


def measure(path: Path, program: Path, n_tokens: int) -> tuple[dict, dict]:
    with ExitStack() as stack:
        pairs = [[stack.enter_context(server(program)) for _ in range(2)] for _ in range(2)]
        meters = [[Meter(host) for host in pair] for pair in pairs]
        names = [[meter.address for meter in pair] for pair in meters]
        bytes_of = {}
        with Model(path, hosts=Hosts(names[0])) as model:
            rows = traffic(model, meters[0], n_tokens)
            bytes_of |= {f"two hosts, {name}": row for name, row in rows.items()}
        with Model(path, hosts=Direct(names[1])) as model:
            row = traffic(model, meters[1], n_tokens, hook=False)["plain"]
            bytes_of["two hosts, llama.cpp's own client"] = row
        local = stack.enter_context(Model(path))
        remote = stack.enter_context(Model(path, hosts=Hosts(pairs[0])))
        direct = stack.enter_context(Model(path, hosts=Direct(pairs[1])))
        runs = {f"one machine, {name}": run for name, run in steered(local).items()}
        runs |= {f"two hosts, {name}": run for name, run in steered(remote).items()}
        runs["two hosts, llama.cpp's own client"] = steered(direct, hook=False)["plain"]
        return bytes_of, timed(runs, n_tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="smol")
    parser.add_argument("--tokens", type=int, default=40)
    arguments = parser.parse_args()
    path = path_of(arguments.model)
    program = build(say=lambda text: print(text, file=sys.stderr)) / "ggml-rpc-server"
    bytes_of, milliseconds = measure(path, program, arguments.tokens)
    for name, value in milliseconds.items():
        row = bytes_of.get(name, {"bytes_sent": 0, "bytes_received": 0, "exchanges": 0})
        counts = f"{row['bytes_sent'] / 1e3:9.1f} kB there {row['bytes_received'] / 1e3:7.1f} kB back"
        print(f"{name:36} {value:7.2f} ms {counts} {row['exchanges']:5.1f} exchanges")
    own = bytes_of["two hosts, llama.cpp's own client"]["bytes_sent"]
    ratio = bytes_of["two hosts, plain"]["bytes_sent"] / own
    machine = {"machine": platform.machine(), **system_info()}
    document = {"model": path.name, "tokens": arguments.tokens, "plain_bytes_ratio": round(ratio, 3)}
    print(json.dumps({**document, "traffic": bytes_of, "milliseconds": milliseconds, "machine": machine}))
    return 0 if ratio <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
