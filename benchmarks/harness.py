"""Does steering the form of a reply cost the model what it knows? lm-evaluation-harness on sixty questions.

    python benchmarks/harness.py [-m smol] [--steer json,quotation,lowercase]

The tasks are those of examples/harness: questions on short texts, answered freely (right: the reply names
the answer) and chosen among four by likelihood. Plain, steered by each vector, and told in a system
message. Differences are paired by question. Needs pip install "localsteer[harness,smol]". The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
import numpy as np
from lm_eval.tasks import TaskManager

import localsteer
from localsteer.catalog import load_catalog
from localsteer.evaluate.intervals import interval, wilson
from localsteer.plugins import harness

TASKS = Path(__file__).parents[1] / "examples" / "harness"
METRICS = {"reading": ("names_it", "is_json"), "reading_choice": ("acc",)}


def ask(model: harness.HarnessModel, tasks: TaskManager, told: str | None = None) -> dict[str, list[float]]:
    """{metric: the value of each question}."""
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=list(METRICS),
        task_manager=tasks,
        apply_chat_template=True,
        system_instruction=told,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    rows = {}
    for task, metrics in METRICS.items():
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        rows |= {metric: [float(sample[metric]) for sample in samples] for metric in metrics}
    return rows


def figures(values: list[float], plain: list[float]) -> dict[str, Any]:
    """A share with its interval, and the difference from the plain model with its own."""
    low, high = wilson(int(sum(values)), len(values))
    gaps = np.subtract(values, plain)
    least, most = interval(gaps[None])
    return {
        "share": float(np.mean(values)),
        "interval": [low, high],
        "difference": float(gaps.mean()),
        "difference_interval": [least, most],
        "n": len(values),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="smol")
    parser.add_argument("--steer", default="json,quotation,lowercase")
    options = parser.parse_args()
    catalog, tasks = load_catalog(), TaskManager(include_path=str(TASKS), include_defaults=False)
    names = options.steer.split(",")
    arms = [("plain", None, None), *((f"steered: {name}", name, None) for name in names)]
    arms += [(f"told: {name}", None, catalog.get(name).phrasings[0]) for name in names]
    plain: dict[str, list[float]] = {}
    rows = {}
    for title, steer, told in arms:
        started = time.perf_counter()
        model = harness.HarnessModel(options.model, steer)
        values = ask(model, tasks, told)
        model.engine.close()
        plain = plain or values
        rows[title] = {metric: figures(values[metric], plain[metric]) for metric in values}
        shares = ", ".join(f"{metric} {row['share']:.0%}" for metric, row in rows[title].items())
        print(f"{title}: {shares} ({time.perf_counter() - started:.0f} s)", flush=True)
    versions = {"localsteer": localsteer.__version__, "lm_eval": lm_eval.__version__}
    print(json.dumps({"benchmark": "harness", "model": options.model, "versions": versions, "arms": rows}))


if __name__ == "__main__":
    main()
