"""`localsteer serve` beside what people would use in its place, on the same model, in one run.

    python benchmarks/peers.py -m MODEL.gguf --llama-server PATH [--threads N] [--rounds 5]
                               [--clients 1,4,8,16] [--pytorch] [--other NAME=URL] [-o FIGURES.json]

PATH is llama.cpp's own server, built from the very source that llama-cpp-python was built from: its source
distribution holds it under vendor/llama.cpp (`cmake -B build -DLLAMA_CURL=OFF -DLLAMA_BUILD_UI=OFF`,
`cmake --build build --target llama-server`). Both servers have the same number of threads, slots and tokens
of KV cache. llama-server has no copy of idle conversations in memory besides, which would cost it time. They
stay up and take turns, with questions that are new in each round:

    speed     1, 4, 8 and 16 clients ask for one greedy streamed reply each at the same moment, which may not
              end early: tokens per second from the question to the end of the last reply, and the median
              time to the first token. `steered` are the same requests to localsteer, each client with
              another vector that ships for the model
    prefix    a prompt of 2,000 tokens, then another question behind the same beginning: time to the first
              token
    start     from the command to the first reply
    memory    the peak of the process, in MB, after all of this (Linux)

--pytorch adds transformers with a forward hook, as research code steers: float32 weights of the same file,
one reply at a time. --other adds a server that runs already and speaks OpenAI's API, vLLM for one. Ratios are
to llama-server, medians over rounds. -o merges the figures into a file, by model and number of clients, so
that a long run can be made in pieces. The last line is JSON. Exit status 1 below a bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from localsteer import Engine
from localsteer.cache import atomic_path

OURS, STEERED, PEER = "localsteer", "steered", "llama-server"
BOUNDS = {OURS: 1.0, STEERED: 0.95}
N_SLOTS, N_CTX, N_REPLY, N_LONG = 16, 2560, 128, 2000
QUESTION = "Write a long and detailed story about number {} of a family of foxes in a forest."
NO_END: dict[str, float] = {}  # of the model, see main
FACT = "Fact {} of case {}: a fox crossed the river and came back in the evening. "


@dataclass
class Peer:
    """A server that takes part. models: what its clients name, in turn. seconds: from the command to the
    first reply, None for one that was running already."""

    url: str
    models: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None  # none where another peer has it, or it ran already
    seconds: float | None = None
    speeds: dict[int, list[float]] = field(default_factory=dict)
    firsts: dict[int, list[float]] = field(default_factory=dict)
    prefix: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Answered:
    """One streamed reply. first: seconds to its first token."""

    n_tokens: int
    first: float


async def ask(http: httpx.AsyncClient, model: str, question: str, max_tokens: int = N_REPLY) -> Answered:
    """The reply has max_tokens tokens: what would end it is ruled out."""
    body = {
        "model": model, "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, "logit_bias": NO_END,
    }  # fmt: skip
    started, first, usage = time.perf_counter(), None, None
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            event = line.removeprefix("data: ")
            if first is None and re.search(r'"content": ?"[^"]', event):
                first = time.perf_counter() - started
            if '"usage":{' in event.replace(" ", ""):
                usage = json.loads(event)["usage"]
    if first is None or not usage:
        raise SystemExit(f"{http.base_url} answered {model} with no text")
    return Answered(usage["completion_tokens"], first)


def client(peer: Peer) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=peer.url, timeout=600, trust_env=False)


async def together(peer: Peer, clients: int, number: int) -> None:
    """One round of so many clients; number: of the first question."""
    async with client(peer) as http:
        models = [peer.models[k % len(peer.models)] for k in range(clients)]
        started = time.perf_counter()
        replies = await asyncio.gather(
            *(ask(http, model, QUESTION.format(number + k)) for k, model in enumerate(models))
        )
        seconds = time.perf_counter() - started
    peer.speeds.setdefault(clients, []).append(sum(reply.n_tokens for reply in replies) / seconds)
    peer.firsts.setdefault(clients, []).append(median(reply.first for reply in replies))


async def shared_prefix(peer: Peer, number: int, facts: int) -> None:
    text = "".join(FACT.format(k, number) for k in range(facts))
    async with client(peer) as http:
        cold, warm = [
            (await ask(http, peer.models[0], text + question, 8)).first
            for question in ("What crossed the river?", "When did it come back?")
        ]
    peer.prefix.append((cold, warm))


def cells(path: Path) -> int:
    """Of the KV cache that `serve` shares among its slots."""
    with Engine(path, n_ctx=N_CTX, n_seq_max=N_SLOTS, n_threads=1) as engine:
        return engine.n_cells


def no_end(path: Path) -> dict[str, float]:
    """A logit bias against the tokens that end a reply."""
    with Engine(path, n_ctx=256, n_threads=1) as engine:
        model = engine.model
        return {str(token): -100 for token in range(model.n_vocab) if model.is_eog(token)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(command: list[str], port: int) -> Iterator[Peer]:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peer = Peer(f"http://127.0.0.1:{port}", process=process)
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} ended with {process.returncode}")
            try:
                if httpx.get(f"{peer.url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.02)
        peer.models = names(peer.url)[:1]
        asyncio.run(_first_reply(peer))
        peer.seconds = time.perf_counter() - started
        yield peer
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


async def _first_reply(peer: Peer) -> None:
    async with client(peer) as http:
        await ask(http, peer.models[0], "Hello!", 4)


def commands(arguments: argparse.Namespace) -> dict[str, tuple[list[str], int]]:
    """Command and port of each server that is started here."""
    model, threads = str(arguments.model), str(arguments.threads)
    ports = [free_port() for _ in range(2)]
    ours = [sys.executable, "-m", "localsteer", "serve", "-m", model, "-t", threads, "--port", str(ports[0])]
    ours += ["-c", str(N_CTX), "-np", str(N_SLOTS)]
    theirs = [str(arguments.llama_server), "-m", model, "-t", threads, "--port", str(ports[1])]
    theirs += [
        "-c",
        str(cells(arguments.model)),
        "-np",
        str(N_SLOTS),
        "--kv-unified",
        "--no-cache-idle-slots",
    ]
    return {OURS: (ours, ports[0]), PEER: (theirs, ports[1])}


def names(url: str) -> list[str]:
    """What clients may name."""
    return [row["id"] for row in httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]]


def steered(peer: Peer) -> Peer:
    """The same server, with models that are steered."""
    single = [name for name in names(peer.url) if name.count("+") == 1]
    if not single:
        raise SystemExit("no vectors ship for this model, so that nothing can be measured steered.")
    return Peer(peer.url, models=single)


def measure(peers: dict[str, Peer], clients: Sequence[int], rounds: int, facts: int) -> Iterator[int]:
    """The number of each round that is done, so that what is known by then can be kept."""
    for peer in peers.values():  # the first calls touch the pages of the model
        asyncio.run(together(peer, 2, 0))
        peer.speeds.clear(), peer.firsts.clear()
    turn, number = list(peers), 10
    for done in range(rounds):
        print(f"round {done + 1} of {rounds}", file=sys.stderr)
        for count in clients:
            for name in turn:
                asyncio.run(together(peers[name], count, number))
                number += count  # none has seen another's questions
        for name in turn:
            asyncio.run(shared_prefix(peers[name], number, facts))
            number += 1
        turn.reverse()
        yield done + 1


def facts_of(peer: Peer) -> int:
    """How many facts make N_LONG tokens of this model."""

    async def prompt_tokens() -> int:
        body = {"messages": [{"role": "user", "content": FACT.format(10, 10) * 40}], "max_tokens": 1}
        async with client(peer) as http:
            return (await http.post("/v1/chat/completions", json=body)).json()["usage"]["prompt_tokens"]

    return N_LONG * 40 // asyncio.run(prompt_tokens())


def memory(peer: Peer) -> float | None:
    """Peak of the process and its children in MB; None where /proc does not tell."""
    if peer.process is None:
        return None
    try:
        pids = [str(peer.process.pid)]
        for task in Path(f"/proc/{pids[0]}/task").iterdir():
            pids += (task / "children").read_text().split()
        peaks = [re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()) for pid in pids]
    except OSError:
        return None
    return round(sum(int(peak[1]) for peak in peaks if peak) / 1024)


def figures(peers: dict[str, Peer]) -> dict[str, Any]:
    """By contender: medians, and the medians of the rounds' ratios to llama-server, above 1 where it is
    faster or answers sooner."""
    theirs = peers[PEER]
    document: dict[str, Any] = {}
    for name, peer in peers.items():
        by_clients = {}
        for count, speeds in peer.speeds.items():
            firsts = peer.firsts[count]
            by_clients[str(count)] = {
                "tokens_per_second": round(median(speeds), 1),
                "first_token": round(median(firsts), 3),
                "speed_ratio": _ratio(speeds, theirs.speeds[count]),
                "first_token_ratio": _ratio(theirs.firsts[count], firsts),
            }
        document[name] = {
            "clients": by_clients,
            "prefix": [round(median(seconds), 3) for seconds in zip(*peer.prefix, strict=True)],
            "start": None if peer.seconds is None else round(peer.seconds, 2),
            "memory": memory(peer),
        }
    return document


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return round(median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def pytorch(path: Path, threads: int, rounds: int) -> float:
    """Tokens per second of transformers' generate with a hook that adds a constant at one layer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    layers = model.model.layers
    direction = torch.full((model.config.hidden_size,), 0.01)
    layers[len(layers) // 2].register_forward_hook(
        lambda _module, _inputs, output: (
            (output[0] + direction, *output[1:]) if isinstance(output, tuple) else output + direction
        )
    )
    speeds = []
    for number in range(rounds + 1):
        chat = [{"role": "user", "content": QUESTION.format(number)}]
        tokens = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        started = time.perf_counter()
        with torch.inference_mode():
            reply = model.generate(**tokens, max_new_tokens=N_REPLY, do_sample=False)
        speeds.append((reply.shape[1] - tokens["input_ids"].shape[1]) / (time.perf_counter() - started))
    return median(speeds[1:])


def print_table(document: dict[str, Any]) -> None:
    for name, row in document.items():
        for count, cells in row["clients"].items():
            print(
                f"{name:<14} {count:>2} clients: {cells['tokens_per_second']:>6} tokens/s "
                f"({cells['speed_ratio']:.2f} of llama-server), first token {cells['first_token']:.2f} s "
                f"({cells['first_token_ratio']:.2f})"
            )
        cold, warm = row["prefix"]
        print(f"{name:<14} long prompt {cold:.2f} s, same beginning {warm:.2f} s, start {row['start']} s, "
              f"{row['memory']} MB")  # fmt: skip


def main() -> int:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end as well
    others = dict(part.split("=", 1) for part in arguments.other)
    clients = [int(count) for count in arguments.clients.split(",")]
    NO_END.update(no_end(arguments.model))
    with ExitStack() as stack:
        peers = {name: stack.enter_context(serving(*how)) for name, how in commands(arguments).items()}
        peers[STEERED] = steered(peers[OURS])
        peers |= {name: Peer(url, names(url)[:1]) for name, url in others.items()}
        for done in measure(peers, clients, arguments.rounds, facts_of(peers[PEER])):
            document = figures(peers)
            keep(arguments, document, done)
    print_table(document)
    if arguments.pytorch:
        speed = pytorch(arguments.model, arguments.threads, arguments.rounds)
        alone = document[OURS]["clients"].get("1", {}).get("tokens_per_second")
        document["pytorch"] = {"tokens_per_second": round(speed, 1)}
        print(f"{'pytorch':<14}  1 client: {speed:.1f} tokens/s, float32, with a hook; localsteer {alone}")
    result = keep(arguments, document, arguments.rounds)
    print(json.dumps(result))
    return 0 if all(_meets(document[name], bound) for name, bound in BOUNDS.items()) else 1


def keep(arguments: argparse.Namespace, document: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Merged into the file by model; what an earlier piece measured with other numbers of clients stays."""
    result = {
        "threads": arguments.threads,
        "rounds": rounds,
        "machine": f"{platform.machine()} {platform.system()}",
        "bounds": BOUNDS,
        "contenders": document,
    }
    if arguments.output is None:
        return result
    path, model = arguments.output, arguments.model.name
    kept = json.loads(path.read_text()) if path.exists() else {}
    merged = kept.get(model, {}).get("contenders", {})
    for name, row in document.items():
        clients = merged.get(name, {}).get("clients", {}) | row.get("clients", {})
        merged = merged | {name: row | {"clients": clients}}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(kept | {model: result | {"contenders": merged}}, indent=1) + "\n")
    return result


def _meets(row: dict[str, Any], bound: float) -> bool:
    ratios = (cells[of] for cells in row["clients"].values() for of in ("speed_ratio", "first_token_ratio"))
    return all(ratio >= bound for ratio in ratios)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--llama-server", type=Path, required=True, metavar="PATH")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", default="1,4,8,16")
    parser.add_argument("--pytorch", action="store_true")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
