"""What the quick search of `localsteer tune` saves and loses, beside the full one, on the bundled model.

    python benchmarks/tune_quick.py [--instructions json,lowercase,...] [--quant Q8_0] [-n 8] [--test 20]

For each instruction: replies asked, validation score and TEST score of both winners, and the ratio of the
test scores. The test queries are about subjects that neither search has seen. Then both searches on simulated
models with the grid of a deep model (39 settings), where the truth is known. The last line is JSON. Exit
status 1 if quick asks for more than half of the replies, or loses more than 5 points on test or in the
simulation.
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
from localsteer.evaluate.conditions import run_conditions
from localsteer.evaluate.journal import Journal, Remembered
from localsteer.evaluate.pick import Round, halve, runs_of, spread_ties
from localsteer.evaluate.study import spread
from localsteer.evaluate.tune import Tuned, quick_rounds, tune
from localsteer.evaluate.workers import Workers
from localsteer.extract import extract

INSTRUCTIONS = ("json", "lowercase", "bullets", "title", "spanish", "no_comma", "postscript", "one_sentence")
MAX_LOSS, MAX_SHARE = 0.05, 0.5
SIMULATED = 1000
N_CTX = 256
MAX_TOKENS = 128


def compare(
    engine: Engine, catalog: Catalog, instruction: Instruction, n: int, test: Sequence[Query]
) -> dict[str, Any]:
    """One instruction: `full`, `quick` and their test scores."""
    vector = extract(engine, instruction, catalog.queries_for(instruction, "extraction"), mode="project")
    queries = spread(catalog.queries_for(instruction, "validation"), n)
    # in memory: quick's replies are among those of full, and figures do not depend on which came first
    remembering = Remembered(engine, Journal(None, {}))
    row: dict[str, Any] = {"instruction": instruction.id}
    for name in ("full", "quick"):
        tuned = tune(remembering, vector, instruction, queries, quick=name == "quick", max_tokens=MAX_TOKENS)
        row[name] = _figures(tuned) | {"test": _test_score(remembering, instruction, tuned.vector, test)}
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
    """How far the chosen setting's true chance stays behind the best one's, on average.

    13 blocks x 3 positions: a bump over the blocks, positions that differ in height, queries that succeed at
    random; 15% of the settings far from the bump's top give degenerate replies now and then.
    """
    rng = np.random.default_rng(seed)
    n_settings = 39
    rounds = {"full": (Round(10**6, n_queries),), "quick": quick_rounds(n_settings, n_queries)}
    regrets: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(n_models):
        chances, broken = _model(rng)
        good = rng.random((len(chances), n_queries)) < chances[:, None]
        bad = rng.random(good.shape) < broken[:, None]
        for name, each in rounds.items():
            winner = _search(good & ~bad, bad, each)
            worth = chances * (1 - broken)
            regrets[name].append(float(worth.max() - worth[winner]))
    runs = {name: runs_of(1 + n_settings, n_queries, each) for name, each in rounds.items()}
    return {name: {"replies": runs[name], "loss": round(float(np.mean(regrets[name])), 4)} for name in rounds}


def _model(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(chance of a good reply, chance of a degenerate one) of each setting; row 0 is the model alone."""
    top, centre, width = rng.uniform(0.3, 1.0), rng.uniform(1, 11), rng.uniform(1.5, 4)
    heights = rng.permutation([1.0, 0.8, 0.5])
    bump = np.exp(-(((np.arange(13) - centre) / width) ** 2))
    chances = (top * bump[:, None] * heights[None, :]).reshape(-1)
    broken = np.where((rng.random(39) < 0.15) & (chances < 0.7 * chances.max()), 0.3, 0.0)
    return np.concatenate(([0.0], chances)), np.concatenate(([0.0], broken))


def _search(good: np.ndarray, bad: np.ndarray, rounds: Sequence[Round]) -> int:
    """The winner, by the same rounds, rule and order as the real search."""
    seen = np.zeros(len(good), int)

    def run(cells: Sequence[tuple[int, int]]) -> None:
        for i, j in cells:
            seen[i] = max(seen[i], j + 1)

    def score(i: int) -> float:
        return 0.0 if bad[i, : seen[i]].any() else good[i, : seen[i]].mean()

    def rank(live: Sequence[int], keep: int) -> list[int]:
        if keep > 1:
            live = [i for i in live if i == 0 or not bad[i, : seen[i]].any()]
            return spread_ties(live, [score(i) for i in live], keep)
        return sorted(live, key=lambda i: (-score(i), i != 0, (i - 1) // 3))

    return halve(*good.shape, rounds, run, rank)[0]


# --- what is printed ---


def report(rows: Sequence[dict[str, Any]], simulated: dict[str, Any]) -> dict[str, Any]:
    print(f"{'':14}{'replies':>14}{'validation':>14}{'test':>14}{'ratio':>7}  settings")
    for row in rows:
        full, quick = row["full"], row["quick"]
        row["ratio"] = quick["test"] / full["test"] if full["test"] else None
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        print(
            f"{row['instruction']:14}{full['replies']:>7}{quick['replies']:>7}"
            f"{full['validation']:>7.0%}{quick['validation']:>7.0%}{full['test']:>7.0%}{quick['test']:>7.0%}"
            f"{ratio:>7}  {full['setting']} | {quick['setting']}"
        )
    means = {
        name: {
            key: float(np.mean([row[name][key] for row in rows])) for key in ("replies", "validation", "test")
        }
        for name in ("full", "quick")
    }
    for name, each in means.items():
        scores = f"validation {each['validation']:.1%}, test {each['test']:.1%}"
        print(f"mean, {name:6} replies {each['replies']:.0f}, {scores}")
    for name, each in simulated.items():
        print(f"simulated, {name:6} replies {each['replies']}, {each['loss']:.1%} below the best setting")
    return means


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instructions", default=",".join(INSTRUCTIONS))
    parser.add_argument("--quant", default=bundled.DEFAULT_QUANT)
    parser.add_argument("-n", type=int, default=8, help="validation queries")
    parser.add_argument("--test", type=int, default=20, help="test queries")
    parser.add_argument("--workers", type=int, default=default_threads())
    options = parser.parse_args()
    started = time.perf_counter()
    catalog = load_catalog(bundled.CATALOG)
    chosen = [catalog.get(each) for each in options.instructions.split(",")]
    test = spread(catalog.queries["test"], options.test)
    path = bundled.gguf_path("instruct", options.quant)
    with Workers(path, options.workers, n_ctx=N_CTX, n_seq_max=8) as workers:
        rows = workers.map(lambda engine, each: compare(engine, catalog, each, options.n, test), chosen)
    simulated = simulate(SIMULATED, options.n)
    machine = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    queries = f"{options.n} validation and {options.test} test queries"
    print(f"localsteer {__version__}, {path.name}, {machine}, {queries}")
    means = report(rows, simulated)
    lost = means["full"]["test"] - means["quick"]["test"]
    simulated_loss = simulated["quick"]["loss"] - simulated["full"]["loss"]
    share = means["quick"]["replies"] / means["full"]["replies"]
    print(f"quick asks for {share:.0%} of the replies and loses {100 * lost:.1f} points on test")
    document = {"rows": rows, "mean": means, "simulated": simulated, "share_of_replies": share}
    document |= {"lost_on_test": lost, "n": options.n, "n_test": options.test, "model": path.name}
    print(json.dumps(document | {"seconds": round(time.perf_counter() - started, 1)}))
    return int(max(lost, simulated_loss) > MAX_LOSS or share > MAX_SHARE)


if __name__ == "__main__":
    sys.exit(main())
