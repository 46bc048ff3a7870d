"""`localsteer serve` beside llama-server on the same model: streamed chat replies, unsteered.

    python benchmarks/server_speed.py -m MODEL.gguf --llama-server PATH [--threads N] [--rounds 5]

PATH is llama.cpp's own server, best built from the very source that llama-cpp-python was built from: its
source distribution holds it under vendor/llama.cpp (`cmake -B build -DLLAMA_CURL=OFF -DLLAMA_BUILD_UI=OFF
-DLLAMA_USE_PREBUILT_UI=OFF`, `cmake --build build --target llama-server`). Both servers stay up, with the
same number of threads, slots and context; they take turns. In a round, 1, 4 and 8 clients ask for one greedy
reply each at the same moment; counted are tokens per second from the question to the end of the last reply.
Ratios are medians over rounds. The last line is JSON. Exit status 1 below a bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import httpx

MIN_RATIO = 0.95
CLIENTS = (1, 4, 8)
N_SLOTS, N_CTX, N_REPLY = 8, 1024, 128
QUESTION = "Write a long and detailed story about number {} of a family of foxes in a forest."


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(command: list[str], url: str) -> Iterator[str]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} ended with {process.returncode}")
            try:
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def servers(arguments: argparse.Namespace) -> dict[str, tuple[list[str], str]]:
    """Command and address of each."""
    model, threads = str(arguments.model), str(arguments.threads)
    ports = [str(free_port()) for _ in range(2)]
    ours = [sys.executable, "-m", "localsteer", "serve", "-m", model, "-t", threads, "--port", ports[0]]
    ours += ["-c", str(N_CTX), "-np", str(N_SLOTS)]
    theirs = [str(arguments.llama_server), "-m", model, "-t", threads, "--port", ports[1], "--no-webui"]
    theirs += ["-c", str(N_SLOTS * N_CTX), "-np", str(N_SLOTS), "--kv-unified"]
    return {
        "localsteer": (ours, f"http://127.0.0.1:{ports[0]}"),
        "llama-server": (theirs, f"http://127.0.0.1:{ports[1]}"),
    }


async def reply(http: httpx.AsyncClient, number: int) -> int:
    """Tokens of one streamed reply."""
    body = {
        "messages": [{"role": "user", "content": QUESTION.format(number)}],
        "max_tokens": N_REPLY, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    usage = None
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if '"usage":{' in line.replace(" ", ""):
                usage = json.loads(line.removeprefix("data: "))["usage"]
    return usage["completion_tokens"]


async def speed(url: str, clients: int, first: int) -> float:
    """Tokens per second of all clients together."""
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as http:
        started = time.perf_counter()
        counts = await asyncio.gather(*(reply(http, first + k) for k in range(clients)))
        return sum(counts) / (time.perf_counter() - started)


def measure(urls: dict[str, str], rounds: int) -> dict[int, dict[str, list[float]]]:
    speeds = {clients: {name: [] for name in urls} for clients in CLIENTS}
    for name in urls:  # the first calls touch the pages of the model
        asyncio.run(speed(urls[name], 2, 0))
    turn, first = list(urls), 10
    for done in range(rounds):
        print(f"round {done + 1} of {rounds}", file=sys.stderr)
        for clients in CLIENTS:
            for name in turn:
                speeds[clients][name].append(asyncio.run(speed(urls[name], clients, first)))
            first += clients
        turn.reverse()
    return speeds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--llama-server", type=Path, required=True, metavar="PATH")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        urls = {name: stack.enter_context(serving(*how)) for name, how in servers(arguments).items()}
        speeds = measure(urls, arguments.rounds)
    rows = {clients: row(speeds[clients]) for clients in CLIENTS}
    for clients, figures in rows.items():
        print(f"{clients} clients: {figures}")
    document = {
        "model": arguments.model.name,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "machine": f"{platform.machine()} {platform.system()}",
        "clients": rows,
        "bound": MIN_RATIO,
    }
    print(json.dumps(document))
    return 0 if all(figures["ratio"] >= MIN_RATIO for figures in rows.values()) else 1


def row(speeds: dict[str, list[float]]) -> dict[str, float]:
    pairs = zip(speeds["localsteer"], speeds["llama-server"], strict=True)
    figures = {name: round(median(values), 1) for name, values in speeds.items()}
    return {**figures, "ratio": round(median(ours / theirs for ours, theirs in pairs), 3)}


if __name__ == "__main__":
    sys.exit(main())
