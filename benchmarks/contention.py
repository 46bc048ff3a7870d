"""Decoding beside other busy programs: localsteer and bare llama-cpp-python, in turns.

    python benchmarks/contention.py -m MODEL.gguf [--threads N] [--rounds 5] [--seconds 4]

Each variant is a process of its own that decodes one token after another while it is its turn: first with
nothing else running, then beside as many busy processes as there are cores. The variants: localsteer as it
is; the same with libgomp's own spinning (`GOMP_SPINCOUNT=300000`), against which the loss without load is
measured; the same on one thread; and llama-cpp-python's `Llama`. Without load ratios are medians of ratios;
with it they are ratios of medians, because the system's scheduler makes single turns differ by a factor of
ten. Run it with nothing else running. The last line is JSON. Exit status 1 below a bound.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

MAX_LOSS = 0.02  # without load, against libgomp's own spinning
MIN_GAIN = 15.0  # beside busy processes, against llama-cpp-python
OURS, UNBOUNDED, ONE_THREAD, BARE = "localsteer", "localsteer, unbounded", "localsteer, 1 thread", "bare"
N_CTX, N_PROMPT, QUIET_SECONDS = 1024, 4, 0.5


def decoder(variant: str, model: Path, n_threads: int) -> Callable[[list[int], int], object]:
    """A function that decodes tokens at a position."""
    if variant == BARE:
        from llama_cpp import Llama

        llama = Llama(str(model), n_ctx=N_CTX, n_threads=n_threads, n_threads_batch=n_threads, verbose=False)

        def decode(tokens: list[int], position: int) -> object:
            llama.n_tokens = position
            return llama.eval(tokens)

        return decode
    from localsteer import Engine

    context = Engine(model, n_ctx=N_CTX, n_threads=n_threads, n_seq_max=1).context

    def step(tokens: list[int], position: int) -> object:
        n = len(tokens)
        if position == 0:
            context.clear()
        outputs = [False] * (n - 1) + [True]
        return context.decode(tokens, range(position, position + n), [0] * n, outputs)

    return step


def work(variant: str, model: Path, n_threads: int) -> None:
    """The process of one variant: seconds in by line, tokens per second out."""
    decode = decoder(variant, model, n_threads)
    print("ready", flush=True)
    for line in sys.stdin:
        decode(list(range(1, N_PROMPT + 1)), 0)
        started, n = time.perf_counter(), 0
        while time.perf_counter() - started < float(line) and N_PROMPT + n < N_CTX:
            decode([1 + n], N_PROMPT + n)
            n += 1
        print(n / (time.perf_counter() - started), flush=True)


class Worker:
    def __init__(self, variant: str, model: Path, n_threads: int) -> None:
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("GOMP_", "OMP_"))
        }
        if variant == UNBOUNDED:
            environment["GOMP_SPINCOUNT"] = "300000"
        n = 1 if variant == ONE_THREAD else n_threads
        command = [sys.executable, __file__, "-m", str(model), "--threads", str(n), "--work", variant]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(f"{variant} did not start")

    def speed(self, seconds: float) -> float:
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def busy(n: int) -> Iterator[None]:
    """n processes that compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(workers: dict[str, Worker], what: str, rounds: int, seconds: float) -> dict[str, list[float]]:
    speeds: dict[str, list[float]] = {variant: [] for variant in workers}
    turn = list(workers)
    for _ in range(rounds):
        for variant in turn:
            speeds[variant].append(workers[variant].speed(seconds))
        print(what, {variant: round(values[-1], 1) for variant, values in speeds.items()}, file=sys.stderr)
        turn.append(turn.pop(0))
    return speeds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5, help="with load; four times as many without")
    parser.add_argument("--seconds", type=float, default=4.0, help="of one turn with load")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.model, arguments.threads)
        return 0
    n_busy = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        workers = {}
        for variant in (OURS, UNBOUNDED, ONE_THREAD, BARE):
            workers[variant] = Worker(variant, arguments.model, arguments.threads)
            stack.callback(workers[variant].close)
        quiet = measure(workers, "nothing else", 4 * arguments.rounds, QUIET_SECONDS)
        with busy(n_busy):
            loaded = measure(workers, "busy processes", arguments.rounds, arguments.seconds)
    return report(arguments, n_busy, quiet, loaded)


def report(
    arguments: argparse.Namespace, n_busy: int, quiet: dict[str, list[float]], loaded: dict[str, list[float]]
) -> int:
    rows = {}
    for variant in quiet:
        rows[variant] = {
            "quiet": round(median(quiet[variant]), 1),
            "loaded": round(median(loaded[variant]), 1),
            "loaded_range": [round(min(loaded[variant]), 1), round(max(loaded[variant]), 1)],
        }
        print(f"{variant:24} quiet {rows[variant]['quiet']:7.1f}   loaded {rows[variant]['loaded']:6.1f}")
    pairs = zip(quiet[OURS], quiet[UNBOUNDED], strict=True)
    loss = 1 - median(ours / unbounded for ours, unbounded in pairs)
    gain = median(loaded[OURS]) / median(loaded[BARE])
    print(
        f"loss without load {loss:.3f} (at most {MAX_LOSS}), gain with it {gain:.1f} (at least {MIN_GAIN:g})"
    )
    document = {
        "model": arguments.model.name,
        "threads": arguments.threads,
        "busy": n_busy,
        "rounds": arguments.rounds,
        "machine": f"{platform.machine()} {platform.system()}",
        "tokens_per_second": rows,
        "loss": round(loss, 4),
        "gain": round(gain, 2),
        "bounds": {"loss": MAX_LOSS, "gain": MIN_GAIN},
    }
    print(json.dumps(document))
    return 0 if loss <= MAX_LOSS and gain >= MIN_GAIN else 1


if __name__ == "__main__":
    sys.exit(main())
