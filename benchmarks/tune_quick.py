"""What the quick search of `localsteer tune` saves and loses, beside the full one, on the bundled model.

    python benchmarks/tune_quick.py [--instructions json,lowercase,...] [--quant Q8_0] [-n 8] [--test 20]

For each instruction: replies asked, seconds, validation score and TEST score of both winners. The test
queries are about subjects that neither search has seen. Then both searches on simulated models with the grid
of a deep model (39 settings), where the truth is known. The last line is JSON. Exit status 1 if quick asks
for more than half of the replies, or loses more than 2 points on test or in the simulation.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from localsteer import ControlVector, __version__, bundled
from localsteer.bridge import default_threads
from localsteer.catalog import Catalog, Instruction, Query, load_catalog
from localsteer.engine import Engine
from localsteer.evaluate.best_first import best_first
from localsteer.evaluate.conditions import run_conditions
from localsteer.evaluate.journal import Journal, Remembered
from localsteer.evaluate.study import spread
from localsteer.evaluate.tune import Tuned, tune
from localsteer.evaluate.workers import Workers
from localsteer.extract import extract

MAX_LOSS, MAX_SHARE = 0.02, 0.5
SIMULATED = 1000
N_CTX, N_SEQ_MAX = 256, 16
MAX_TOKENS = 128


def compare(
    engine: Engine, catalog: Catalog, instruction: Instruction, n: int, n_test: int
) -> dict[str, Any]:
    """One instruction: `full`, `quick` and their test scores."""
    vector = extract(engine, instruction, catalog.queries_for(instruction, "extraction"), mode="project")
    queries = spread(catalog.queries_for(instruction, "validation"), n)
    test = spread(catalog.queries_for(instruction, "test"), n_test)
    row: dict[str, Any] = {"instruction": instruction.id}
    for name in ("full", "quick"):
        remembering = Remembered(engine, Journal(None, {}))  # in memory, one for each: both have to decode
        started = time.perf_counter()
        tuned = tune(remembering, vector, instruction, queries, quick=name == "quick", max_tokens=MAX_TOKENS)
        seconds = time.perf_counter() - started
        score = _test_score(remembering, instruction, tuned.vector, test)
        row[name] = _figures(tuned) | {"test": score, "seconds": round(seconds, 2)}
    return row


def _figures(tuned: Tuned) -> dict[str, Any]:
    setting = tuned.setting
    where = None if setting is None else f"{setting.layer} {setting.positions}"
    return {"setting": where, "replies": tuned.record["replies"], "validation": tuned.scores["steered"]}


def _test_score(
    engine: Engine, instruction: Instruction, vector: ControlVector, test: Sequence[Query]
) -> float:
    """The share of good replies to test queries."""
    steered = run_conditions(
        engine, instruction, vector, test, conditions=("steered",), scored=(), max_tokens=MAX_TOKENS,
        must_end=True,
    )["steered"].replies  # fmt: skip
    return sum(reply.good for reply in steered) / len(steered)


# --- simulated models: the truth is known ---


def simulate(n_models: int, n_queries: int, seed: int = 0) -> dict[str, Any]:
    """How far the chosen setting's true chance stays behind the best one's, and the replies, on average.

    13 blocks x 3 positions: a bump over the blocks, positions that differ in height, queries that succeed at
    random; 15% of the settings far from the bump's top give degenerate replies now and then.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list[tuple[float, int]]] = {"full": [], "quick": []}
    same = 0
    for _ in range(n_models):
        chances, broken = _model(rng)
        bad = rng.random((len(chances), n_queries)) < broken[:, None]
        good = (rng.random(bad.shape) < chances[:, None]) & ~bad
        worth = chances * (1 - broken)
        searches = {"full": _full(good, bad), "quick": _quick(good, bad)}
        for name, (winner, replies) in searches.items():
            found[name].append((float(worth.max() - worth[winner]), replies))
        same += searches["full"][0] == searches["quick"][0]
    means = {name: np.mean(each, axis=0) for name, each in found.items()}
    rows = {
        name: {"replies": round(float(replies), 1), "loss": round(float(loss), 4)}
        for name, (loss, replies) in means.items()
    }
    rows["quick"] |= {"most_replies": max(replies for _, replies in found["quick"]), "same": same / n_models}
    return rows


def _model(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(chance of a good reply, chance of a degenerate one) of each setting; row 0 is the model alone."""
    top, centre, width = rng.uniform(0.3, 1.0), rng.uniform(1, 11), rng.uniform(1.5, 4)
    heights = rng.permutation([1.0, 0.8, 0.5])
    bump = np.exp(-(((np.arange(13) - centre) / width) ** 2))
    chances = (top * bump[:, None] * heights[None, :]).reshape(-1)
    broken = np.where((rng.random(39) < 0.15) & (chances < 0.7 * chances.max()), 0.3, 0.0)
    return np.concatenate(([0.0], chances)), np.concatenate(([0.0], broken))


def _key(good: np.ndarray, bad: np.ndarray, i: int) -> tuple[float, int, int]:
    """What the real search sorts by: score, the model alone before its equals, the lower block."""
    return (0.0 if bad[i].any() else -good[i].mean(), _block(i), i)


def _block(i: int) -> int:
    return -1 if i == 0 else (i - 1) // 3


def _full(good: np.ndarray, bad: np.ndarray) -> tuple[int, int]:
    """(winner, replies)."""
    return min(range(len(good)), key=lambda i: _key(good, bad, i)), good.size


def _quick(good: np.ndarray, bad: np.ndarray) -> tuple[int, int]:
    """(winner, replies), by the real search's code."""
    seen = np.zeros(good.shape, bool)

    def run(cells: Sequence[tuple[int, int]]) -> None:
        for cell in cells:
            seen[cell] = True

    def failures(i: int) -> int:
        return good.shape[1] if bad[i, seen[i]].any() else int((~good[i, seen[i]]).sum())

    finished = best_first(*good.shape, run, failures, _block)
    return min(finished, key=lambda i: _key(good, bad, i)), int(seen.sum())


# --- what is printed ---


def report(rows: Sequence[dict[str, Any]], simulated: dict[str, Any]) -> dict[str, Any]:
    print(f"{'':18}{'replies':>12}{'seconds':>12}{'validation':>13}{'test':>13}  settings")
    for row in rows:
        full, quick = row["full"], row["quick"]
        print(
            f"{row['instruction']:18}{full['replies']:>6}{quick['replies']:>6}"
            f"{full['seconds']:>6.1f}{quick['seconds']:>6.1f}"
            f"{full['validation']:>7.0%}{quick['validation']:>6.0%}{full['test']:>7.0%}{quick['test']:>6.0%}"
            f"  {full['setting']} | {quick['setting']}"
        )
    keys = ("replies", "seconds", "validation", "test")
    means = {
        name: {key: float(np.mean([row[name][key] for row in rows])) for key in keys}
        for name in ("full", "quick")
    }
    for name, each in means.items():
        scores = f"validation {each['validation']:.1%}, test {each['test']:.1%}"
        print(f"mean, {name:6} replies {each['replies']:.0f}, {each['seconds']:.1f} s, {scores}")
    for name, each in simulated.items():
        print(f"simulated, {name:6} replies {each['replies']}, {each['loss']:.1%} below the best setting")
    return means


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instructions", help="[default: all of the bundled catalogue that need no word]")
    parser.add_argument("--quant", default=bundled.DEFAULT_QUANT)
    parser.add_argument("-n", type=int, default=8, help="validation queries")
    parser.add_argument("--test", type=int, default=20, help="test queries")
    parser.add_argument("--workers", type=int, default=default_threads())
    options = parser.parse_args()
    started = time.perf_counter()
    catalog = load_catalog(bundled.CATALOG)
    chosen = _chosen(catalog, options.instructions)
    path = bundled.gguf_path("instruct", options.quant)
    with Workers(path, options.workers, n_ctx=N_CTX, n_seq_max=N_SEQ_MAX) as workers:
        rows = workers.map(
            lambda engine, each: compare(engine, catalog, each, options.n, options.test), chosen
        )
    simulated = simulate(SIMULATED, options.n)
    machine = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    queries = f"{options.n} validation and {options.test} test queries"
    print(f"localsteer {__version__}, {path.name}, {machine}, {queries}")
    means = report(rows, simulated)
    lost = means["full"]["test"] - means["quick"]["test"]
    simulated_loss = simulated["quick"]["loss"] - simulated["full"]["loss"]
    share, time_share = (means["quick"][key] / means["full"][key] for key in ("replies", "seconds"))
    same = sum(row["full"]["setting"] == row["quick"]["setting"] for row in rows)
    print(
        f"quick asks for {share:.0%} of the replies in {time_share:.0%} of the time, finds the same setting "
        f"for {same} of {len(rows)} instructions and loses {100 * lost:.1f} points on test"
    )
    document = {"rows": rows, "mean": means, "simulated": simulated, "share_of_replies": share}
    document |= {"share_of_time": time_share, "same": same, "lost_on_test": lost}
    document |= {"n": options.n, "n_test": options.test, "model": path.name}
    print(json.dumps(document | {"seconds": round(time.perf_counter() - started, 1)}))
    return int(max(lost, simulated_loss) > MAX_LOSS or share > MAX_SHARE)


def _chosen(catalog: Catalog, names: str | None) -> list[Instruction]:
    if names is not None:
        return [catalog.get(each) for each in names.split(",")]
    needing_no_word = (
        name for name, each in catalog.instructions.items() if set(each.open_slots) <= set(each.slots)
    )
    found = [catalog.get(name) for name in needing_no_word]
    return [each for each in found if each.verifier is not None]


if __name__ == "__main__":
    sys.exit(main())
