"""Mixed clients against a real server for minutes: valid, invalid, cancelled and slow, all at once.

    python benchmarks/server_soak.py [--minutes 10] [--clients 6] [--hostile 4] [-m MODEL.gguf]

Starts `localsteer serve` as a process on the bundled model with a few of its vectors. Valid requests must end
as they should (a lost reply is one without its end), invalid ones be refused with 4xx, cancelled ones free
their slots, and slow readers get all of their reply or be let go. Beside them plain clients ask for what they
know the answer of, and must get it. After the first quarter hostile clients join: bodies that are large, odd
or never end, connections that say nothing, streams that nobody reads, whole contexts, files that are no
vectors, and a second model whose chat template loops without end or makes prompts of millions of tokens. The
plain clients' slowest answers (p99) may then take twice as long, and /health must answer within
HEALTH_SECONDS. At the end no slot and no request is left, and the server's memory has not grown beyond GROWTH
since the second quarter. JSON on the last line; exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from localsteer import Engine, bundled
from localsteer.catalog import load_catalog
from localsteer.extract import extract

VECTORS = ("json", "lowercase", "uppercase")
SUBJECTS = ("foxes", "rivers", "an owl", "the moon", "a quiet village", "bees", "a long winter", "bread")
GROWTH = 1.10  # of resident memory, end against first quarter
SLOWER = 2.0  # p99 of plain clients, beside hostile ones against before
HEALTH_SECONDS = 0.1
PLAIN = 2  # clients
SLACK_MB = 24  # growth that is no sign of anything: allocators and thread stacks
ODD = (
    b'{"messages":' + b"[" * (2 << 20),
    b'{"prompt":[' + b"1," * (1 << 20) + b"1]}",
    b'{"x":[' + b'{"":0},' * 400_000 + b"0]}",
    b'{"x":[' + b",".join([b"9" * 4000] * 500) + b"]}",
    json.dumps({"messages": [{"role": "user", "content": [1] * 1000}] * 200}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "\x00[" * 200_000}]}).encode(),
)
HOSTILE = ("odd", "idle", "half", "unread", "context", "upload", "template")
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'endless' %}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% elif m.content == 'long' %}{{ 'a ' * 1999999 }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
KINDS = ("chat", "stream", "ensure", "schema", "completion", "invalid", "cancelled", "slow", "steering")
INVALID = (
    {"temperature": 9},
    {"model": "none"},
    {"messages": []},
    {"steering": ["../json"]},
    {"n": 10**6},
    {"stop": ["x" * 5000]},
    {"messages": [{"role": "user", "content": "fox " * 3000}]},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
)


def write_vectors(model: Path, folder: Path) -> None:
    catalog = load_catalog("bundled")
    with Engine(model, n_threads=1, n_seq_max=8) as engine:
        for name in VECTORS:
            instruction = catalog.get(name)
            queries = catalog.queries_for(instruction, "extraction")
            vector = extract(engine, instruction, queries, n_pairs=16)
            vector.at(layer=2, positions="prompt").save(folder / f"{name}.gguf")


def write_hostile_model(model: Path, path: Path) -> None:
    command = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--chat-template", TEMPLATE]
    subprocess.run([*command, str(model), str(path)], check=True, capture_output=True)


def start(model: Path, folder: Path, threads: int, *more: str) -> tuple[subprocess.Popen, str]:
    """The server and its address."""
    command = [sys.executable, "-m", "localsteer", "serve", "-m", model, "--vectors", folder, "--port", "0"]
    command += ["--json", "-t", str(threads), "--max-queue", "8", "--parallel", "4", "--predict", "80", *more]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    text = ""
    while not text.endswith("}\n"):
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start")
        text += line
    return process, json.loads(text)["url"]


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


class Soak:
    """What all clients share. lost: what should have come and did not, in words."""

    def __init__(self, url: str, until: float, seed: int) -> None:
        self.url, self.until = url, until
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.busy = 0
        self.hostile_from = time.monotonic() + (until - time.monotonic()) / 4
        self.answers: dict[str, str] = {}
        # by whether hostile ones were there
        self.plain_seconds: dict[bool, list[float]] = {False: [], True: []}
        self.health_seconds: list[float] = []
        self.lost: list[str] = []
        self.tokens = 0

    def body(self, **more: object) -> dict:
        draw = self.random
        model = "soak" + draw.choice(["", *(f"+{name}" for name in VECTORS), "+json+lowercase"])
        question = f"Tell me about {draw.choice(SUBJECTS)}."
        messages = [{"role": "user", "content": question}]
        return {"model": model, "messages": messages, "seed": draw.randrange(10**6), "max_tokens": 60, **more}

    def count(self, answer: httpx.Response) -> bool:
        """Whether it was taken; a full queue is an answer as well."""
        self.statuses[answer.status_code] += 1
        if answer.status_code == 429:
            self.busy += 1
        return answer.status_code == 200

    async def client(self, number: int) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=120, trust_env=False) as http:
            while time.monotonic() < self.until:
                kind = self.random.choice(KINDS)
                try:
                    await getattr(self, f"_{kind}")(http)
                    self.done[kind] += 1
                except Exception as error:  # whatever it is: the reply did not come
                    self.lost.append(f"{kind}: {type(error).__name__} {error}")

    async def plain(self, number: int) -> None:
        """Asks again what it knows the answer of."""
        async with httpx.AsyncClient(base_url=self.url, timeout=120, trust_env=False) as http:
            while time.monotonic() < self.until:
                subject = SUBJECTS[self.random.randrange(len(SUBJECTS))]
                started = time.monotonic()
                answer = await http.post("/v1/chat/completions", json=plain_body(subject))
                if answer.status_code == 429:
                    await asyncio.sleep(0.1)
                    continue
                self.plain_seconds[started > self.hostile_from].append(time.monotonic() - started)
                text = answer.json()["choices"][0]["message"]["content"]
                if text != self.answers.setdefault(subject, text):
                    self.lost.append(f"plain: {subject}: {text!r} in the place of {self.answers[subject]!r}")
                self.done["plain"] += 1
                await asyncio.sleep(0.05)

    async def hostile(self, number: int) -> None:
        await asyncio.sleep(max(0.0, self.hostile_from - time.monotonic()))
        while time.monotonic() < self.until:
            kind = HOSTILE[self.random.randrange(len(HOSTILE))]
            # whatever comes of it: what counts is what others notice
            with contextlib.suppress(httpx.HTTPError, OSError, asyncio.TimeoutError):
                # no TLS: to read the certificates takes longer than most of these requests
                async with httpx.AsyncClient(
                    base_url=self.url, timeout=30, trust_env=False, verify=False
                ) as http:
                    await getattr(self, f"_{kind}")(http)
            self.done[kind] += 1
            await asyncio.sleep(self.random.random())

    # -- kinds of hostile clients -------------------------------------------------------------------

    async def _odd(self, http: httpx.AsyncClient) -> None:
        path = self.random.choice(["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
        headers = {"Content-Type": "application/json"}
        answer = await http.post(path, content=self.random.choice(ODD), headers=headers)
        if answer.status_code >= 500:
            self.lost.append(f"an odd body was answered {answer.status_code}")

    async def _idle(self, http: httpx.AsyncClient, begun: bytes = b"") -> None:
        url = httpx.URL(self.url)
        opened = [await asyncio.open_connection(url.host, url.port) for _ in range(100)]
        for _, writer in opened:
            writer.write(begun)
        await asyncio.sleep(2)
        for _, writer in opened:
            writer.close()

    async def _half(self, http: httpx.AsyncClient) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\n"
        await self._idle(http, head + b" " * 20_000)

    async def _unread(self, http: httpx.AsyncClient) -> None:
        body = self.body(stream=True, logprobs=True, top_logprobs=20)
        async with http.stream("POST", "/v1/chat/completions", json=body):
            await asyncio.sleep(3)

    async def _context(self, http: httpx.AsyncClient) -> None:
        text = " ".join(self.random.choice(SUBJECTS) for _ in range(90))
        await http.post("/v1/completions", json={"prompt": text, "max_tokens": 1})

    async def _upload(self, http: httpx.AsyncClient) -> None:
        data = b"GGUF" + bytes(8 << 20)
        await http.post("/v1/steering", params={"name": "x", "replace": True}, content=data)

    async def _template(self, http: httpx.AsyncClient) -> None:
        message = {"role": "user", "content": self.random.choice(["endless", "long"])}
        body = {"model": "hostile", "messages": [message], "max_tokens": 1}
        answer = await http.post("/v1/chat/completions", json=body)
        if answer.status_code not in (400, 429):
            self.lost.append(f"a hostile template was answered {answer.status_code}: {answer.text[:200]}")

    # -- kinds of clients ---------------------------------------------------------------------------

    async def _chat(self, http: httpx.AsyncClient) -> None:
        self._whole(await http.post("/v1/chat/completions", json=self.body(n=self.random.choice([1, 1, 2]))))

    async def _schema(self, http: httpx.AsyncClient) -> None:
        wanted = {"type": "json_object"}
        self._whole(await http.post("/v1/chat/completions", json=self.body(response_format=wanted)))

    async def _ensure(self, http: httpx.AsyncClient) -> None:
        body = self.body(model="soak", ensure=["lowercase"])
        self._whole(await http.post("/v1/chat/completions", json=body))

    async def _completion(self, http: httpx.AsyncClient) -> None:
        body = {"model": "soak", "prompt": ["The fox", "The owl"], "max_tokens": 12, "logprobs": 2}
        self._whole(await http.post("/v1/completions", json=body))

    async def _stream(self, http: httpx.AsyncClient) -> None:
        await self._read(http, self.body(stream=True), pause=0.0)

    async def _slow(self, http: httpx.AsyncClient) -> None:
        await self._read(http, self.body(stream=True, max_tokens=20), pause=0.05)

    async def _cancelled(self, http: httpx.AsyncClient) -> None:
        body = self.body(stream=self.random.random() < 0.5, n=4, max_tokens=80)
        with contextlib.suppress(asyncio.TimeoutError, httpx.TimeoutException):
            await asyncio.wait_for(http.post("/v1/chat/completions", json=body), self.random.random() * 0.3)

    async def _invalid(self, http: httpx.AsyncClient) -> None:
        answer = await http.post("/v1/chat/completions", json=self.body(**self.random.choice(INVALID)))
        self.count(answer)
        if not (400 <= answer.status_code < 500 and answer.json()["error"]["message"]):
            self.lost.append(f"invalid: answered {answer.status_code}")

    async def _steering(self, http: httpx.AsyncClient) -> None:
        name = f"own{self.random.randrange(4)}"
        path = self.folder / f"{self.random.choice(VECTORS)}.gguf"
        added = await http.post(f"/v1/steering?name={name}&replace=true", content=path.read_bytes())
        await http.post("/v1/chat/completions", json=self.body(steering=[name], max_tokens=5))
        gone = await http.delete(f"/v1/steering/{name}")
        if added.status_code != 201 or gone.status_code not in (200, 404):
            self.lost.append(f"steering: answered {added.status_code} and {gone.status_code}")

    folder: Path

    def _whole(self, answer: httpx.Response) -> None:
        if not self.count(answer):
            if answer.status_code != 429:
                self.lost.append(f"answered {answer.status_code}: {answer.text[:200]}")
            return
        document = answer.json()
        self.tokens += document["usage"]["completion_tokens"]
        if not all(choice["finish_reason"] in ("stop", "length") for choice in document["choices"]):
            self.lost.append(f"a reply without its end: {document['choices']}")

    async def _read(self, http: httpx.AsyncClient, body: dict, pause: float) -> None:
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if not self.count(answer):
                await answer.aread()
                return self._whole_refusal(answer)
            last = ""
            async for line in answer.aiter_lines():
                last = line or last
                await asyncio.sleep(pause)
            if last != "data: [DONE]":
                self.lost.append(f"a stream without its end: {last[:200]}")

    def _whole_refusal(self, answer: httpx.Response) -> None:
        if answer.status_code != 429:
            self.lost.append(f"answered {answer.status_code}: {answer.text[:200]}")


def plain_body(subject: str) -> dict:
    question = f"Tell me about {subject}."
    return {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24}


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.99 * len(seconds))] if seconds else 0.0


def watch_health(url: str, seconds: float, found: Any) -> None:
    """In a process of its own: this one is busy."""
    client = http.client.HTTPConnection(httpx.URL(url).host, httpx.URL(url).port, timeout=60)
    until, taken = time.monotonic() + seconds, []
    while time.monotonic() < until:
        started = time.monotonic()
        client.request("GET", "/health")
        client.getresponse().read()
        taken.append(time.monotonic() - started)
        time.sleep(0.1)
    found.put(taken)


async def watch(pid: int, until: float, seen: list[float]) -> None:
    while time.monotonic() < until:
        seen.append(resident_mb(pid))
        await asyncio.sleep(1.0)


async def soak(run: Soak, args: argparse.Namespace, pid: int) -> tuple[list[float], dict]:
    """Resident memory by the second, and what the server counts once all have gone."""
    seen: list[float] = []
    async with httpx.AsyncClient(base_url=run.url, timeout=60, trust_env=False) as http:
        for subject in SUBJECTS:  # one at a time: these are the references
            answer = await http.post("/v1/chat/completions", json=plain_body(subject))
            run.answers[subject] = answer.json()["choices"][0]["message"]["content"]
    await asyncio.gather(
        watch(pid, run.until, seen),
        *(run.client(i) for i in range(args.clients)),
        *(run.plain(i) for i in range(PLAIN)),
        *(run.hostile(i) for i in range(args.hostile)),
    )
    async with httpx.AsyncClient(base_url=run.url, timeout=60, trust_env=False) as http:
        for _ in range(100):
            counts = (await http.get("/health")).json()["models"]["soak"]
            if not counts["running"] and not counts["waiting"]:
                break
            await asyncio.sleep(0.1)
        # every slot takes a request yet
        bodies = [run.body(max_tokens=4) for _ in range(counts["slots"])]
        answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=body) for body in bodies))
        counts["slots_usable"] = sum(answer.status_code == 200 for answer in answers)
    return seen, counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--hostile", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-m", "--model", type=Path, help="default: the bundled model")
    parser.add_argument("--no-kv-unified", action="store_true", help="a cache for each of the slots")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, model = Path(temporary) / "vectors", Path(temporary) / "soak.gguf"
        folder.mkdir()
        model.symlink_to((args.model or bundled.gguf_path("instruct", "F32")).resolve())
        write_vectors(model, folder)
        more = ["--no-kv-unified"] if args.no_kv_unified else []
        if args.hostile:
            write_hostile_model(model.resolve(), Path(temporary) / "hostile.gguf")
            more += ["-m", str(Path(temporary) / "hostile.gguf")]
        process, url = start(model, folder, args.threads, *more)
        run = Soak(url, time.monotonic() + 60 * args.minutes, args.seed)
        run.folder = folder
        health = multiprocessing.Queue()
        watching = multiprocessing.Process(target=watch_health, args=(url, 60 * args.minutes, health))
        watching.start()
        try:
            seen, counts = asyncio.run(soak(run, args, process.pid))
        finally:
            run.health_seconds = health.get()
            watching.join()
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
    return report(args, run, seen, counts, status)


def report(args: argparse.Namespace, run: Soak, seen: list[float], counts: dict, status: int) -> int:
    quarter = max(1, len(seen) // 4)
    early, late = max(seen[quarter : 2 * quarter]), max(seen[-quarter:])
    quiet, beside = p99(run.plain_seconds[False]), p99(run.plain_seconds[True])
    health = p99(run.health_seconds)
    checks = {
        "lost replies": len(run.lost) == 0,
        "leaked slots": counts["running"] == counts["waiting"] == 0
        and counts["slots_usable"] == counts["slots"],
        "flat memory": late <= max(early * GROWTH, early + SLACK_MB),
        "plain p99": not args.hostile or beside <= SLOWER * quiet,
        "health p99": health <= HEALTH_SECONDS,
        "clean end": status == 0,
    }
    print(f"{args.minutes:g} minutes, {args.clients} clients, {sum(run.done.values())} requests")
    for kind in (*KINDS, "plain", *HOSTILE):
        print(f"  {kind:12} {run.done[kind]}")
    print(f"answers by status: {dict(sorted(run.statuses.items()))}; queue full {run.busy} times")
    print(f"resident memory: {early:.0f} MB at most in the second quarter, {late:.0f} MB in the last")
    print(f"plain clients, p99: {quiet:.2f} s before hostile ones came, {beside:.2f} s beside them")
    print(f"/health: p99 {1000 * health:.0f} ms, slowest {1000 * max(run.health_seconds):.0f} ms")
    for words in run.lost[:10]:
        print(f"lost: {words}")
    for name, passed in checks.items():
        print(f"{name:14} {'passed' if passed else 'FAILED'}")
    document = {
        "machine": f"{platform.machine()} {platform.system()}",
        "python": platform.python_version(),
        "minutes": args.minutes,
        "clients": args.clients,
        "requests": dict(run.done),
        "statuses": {str(key): value for key, value in sorted(run.statuses.items())},
        "lost": len(run.lost),
        "counts": counts,
        "memory_mb": {"second_quarter": round(early, 1), "last_quarter": round(late, 1)},
        "plain_p99_seconds": {"quiet": round(quiet, 3), "hostile": round(beside, 3)},
        "health_p99_seconds": round(health, 4),
        "checks": checks,
    }
    print(json.dumps(document))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
