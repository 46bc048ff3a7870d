"""Mixed clients against a real server for minutes: valid, invalid, cancelled and slow, all at once.

    python benchmarks/server_soak.py [--minutes 10] [--clients 12] [-m MODEL.gguf] [--no-kv-unified]

Starts `localsteer serve` as a process on the bundled model with a few of its vectors. Valid requests must end
as they should (a lost reply is one without its end), invalid ones be refused with 4xx, cancelled ones free
their slots, and slow readers get all of their reply or be let go. At the end no slot and no request is left,
and the server's memory has not grown beyond GROWTH since the first quarter. JSON on the last line; exit
status 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

from localsteer import Engine, bundled
from localsteer.catalog import load_catalog
from localsteer.extract import extract

VECTORS = ("json", "lowercase", "uppercase")
SUBJECTS = ("foxes", "rivers", "an owl", "the moon", "a quiet village", "bees", "a long winter", "bread")
GROWTH = 1.10  # of resident memory, end against first quarter
SLACK_MB = 24  # growth that is no sign of anything: allocators and thread stacks
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
        found = answer.json()
        self.tokens += found["usage"]["completion_tokens"]
        if not all(choice["finish_reason"] in ("stop", "length") for choice in found["choices"]):
            self.lost.append(f"a reply without its end: {found['choices']}")

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


async def watch(pid: int, until: float, seen: list[float]) -> None:
    while time.monotonic() < until:
        seen.append(resident_mb(pid))
        await asyncio.sleep(1.0)


async def soak(run: Soak, clients: int, pid: int) -> tuple[list[float], dict]:
    """Resident memory by the second, and what the server counts once all have gone."""
    seen: list[float] = []
    await asyncio.gather(watch(pid, run.until, seen), *(run.client(i) for i in range(clients)))
    async with httpx.AsyncClient(base_url=run.url, timeout=60, trust_env=False) as http:
        for _ in range(100):
            counts = (await http.get("/health")).json()["models"]["soak"]
            if not counts["running"] and not counts["waiting"]:
                break
            await asyncio.sleep(0.1)
        # every slot takes a request yet
        bodies = [run.body(max_tokens=4) for _ in range(counts["slots"])]
        answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=each) for each in bodies))
        counts["slots_usable"] = sum(answer.status_code == 200 for answer in answers)
    return seen, counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-m", "--model", type=Path, help="default: the bundled model")
    parser.add_argument("--no-kv-unified", action="store_true", help="a cache for each of the slots")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, model = Path(temporary) / "vectors", Path(temporary) / "soak.gguf"
        folder.mkdir()
        model.symlink_to((args.model or bundled.gguf_path("instruct", "Q8_0")).resolve())
        write_vectors(model, folder)
        more = ["--no-kv-unified"] if args.no_kv_unified else []
        process, url = start(model, folder, args.threads, *more)
        run = Soak(url, time.monotonic() + 60 * args.minutes, args.seed)
        run.folder = folder
        try:
            seen, counts = asyncio.run(soak(run, args.clients, process.pid))
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
    return report(args, run, seen, counts, status)


def report(args: argparse.Namespace, run: Soak, seen: list[float], counts: dict, status: int) -> int:
    quarter = max(1, len(seen) // 4)
    early, late = max(seen[:quarter]), max(seen[-quarter:])
    checks = {
        "lost replies": len(run.lost) == 0,
        "leaked slots": counts["running"] == counts["waiting"] == 0
        and counts["slots_usable"] == counts["slots"],
        "flat memory": late <= max(early * GROWTH, early + SLACK_MB),
        "clean end": status == 0,
    }
    print(f"{args.minutes:g} minutes, {args.clients} clients, {sum(run.done.values())} requests")
    for kind in KINDS:
        print(f"  {kind:12} {run.done[kind]}")
    print(f"answers by status: {dict(sorted(run.statuses.items()))}; queue full {run.busy} times")
    print(f"resident memory: {early:.0f} MB at most in the first quarter, {late:.0f} MB in the last")
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
        "memory_mb": {"first_quarter": round(early, 1), "last_quarter": round(late, 1)},
        "checks": checks,
    }
    print(json.dumps(document))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
