"""Does steering harm prompts that hold the instruction already, and does leaving it out there mend that?

    python benchmarks/do_no_harm.py -m MODEL.gguf --vectors DIR --prompts PROMPTS.jsonl [--journal FILE]

PROMPTS.jsonl: IFEval-form lines with one instruction and `prompt_without_instruction`, as the paper's test
set has them. DIR: vector files, with the settings that they carry; a line is asked where one of them has its
verifier (and its texts, as the phrase to end with). Greedy replies:

    none     the plain model                      steered  the vector, no word of it
    told     the instruction in the prompt        both     told and steered
    decided  as run, chat and serve have `both`: the vector is left out where its file says that it does harm
    and
             the prompt asks already (localsteer/asked.py)

A reply counts where IFEval's strict verifier passes it and it is not degenerate; intervals are Wilson's, 95%.
`asked` counts prompts of which the state, or a phrasing, says that they ask: with the instruction, and
without. `decided - told` has its 95% interval by prompts; where all of it lies below 0 steering does harm,
and the exit status is 1. --journal keeps replies, so that a run that was stopped goes on. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from localsteer import ControlVector, __version__
from localsteer.asked import asks, considerate, told_and_both
from localsteer.cache import file_hash
from localsteer.engine import Engine
from localsteer.evaluate.intervals import interval, wilson
from localsteer.evaluate.suites.ifeval_items import Item, read_items
from localsteer.evaluate.suites.ifeval_match import CASELESS
from localsteer.runtime.journal import Journal, Remembered
from localsteer.runtime.reply import Reply
from localsteer.runtime.sampling import GREEDY
from localsteer.verify.quality import is_degenerate
from localsteer.verify.verdicts import verify

CONDITIONS = ("none", "told", "steered", "both")
SHOWN = (*CONDITIONS, "decided")
N_SEQ_MAX = 8


def matches(vector: ControlVector, item: Item) -> bool:
    """Whether a line asks for the vector's instruction; numbers may differ, since a direction is of a
    kind."""
    origin = vector.provenance
    if len(item.checks) != 1 or item.base is None or item.checks[0].verifier != origin.get("verifier"):
        return False
    return _texts(item.checks[0].kwargs) == _texts(origin.get("kwargs") or {})


def _texts(kwargs: dict[str, Any]) -> dict[str, str]:
    texts = {name: value for name, value in kwargs.items() if isinstance(value, str)}
    return {
        name: value.lower() if name in CASELESS else value
        for name, value in texts.items()
        if "relation" not in name
    }


def replies_of(
    engine: Engine, vector: ControlVector, items: Sequence[Item], max_tokens: int
) -> dict[str, list[Reply]]:
    """By condition, one to each item. A batch for each: what a run that was stopped has to repeat at most."""
    found = {}
    for name in CONDITIONS:
        prompts = [item.prompt if name in ("told", "both") else str(item.base) for item in items]
        steer = [vector] if name in ("steered", "both") else []
        found[name] = engine.generate_batch(prompts, steer=steer, max_tokens=max_tokens, sampling=GREEDY)
    return found


def follows(item: Item, reply: Reply) -> bool:
    check = item.checks[0]
    return is_degenerate(reply.text) is None and verify(
        check.verifier, reply.text, check.kwargs, prompt=item.base
    )


def measure(engine: Engine, vector: ControlVector, items: Sequence[Item], max_tokens: int) -> dict[str, Any]:
    """One instruction's row."""
    replies = replies_of(engine, vector, items, max_tokens)
    passed = {name: list(map(follows, items, found)) for name, found in replies.items()}
    left_out = [bool(considerate(engine, [vector], item.prompt)[1]) for item in items]
    sides = zip(left_out, passed["told"], passed["both"], strict=True)
    passed["decided"] = [told if left else both for left, told, both in sides]
    return {
        "instruction": vector.name,
        "settings": settings_of(vector),
        "file": told_and_both(vector),
        "left_out": sum(left_out),
        "asked": [sum(bool(asks(engine, vector, text)) for text in texts) for texts in _sides(items)],
        "degenerate": {name: sum(map(_degenerate, found)) for name, found in replies.items()},
    } | figures(passed)


def figures(passed: dict[str, list[bool]]) -> dict[str, Any]:
    n = len(passed["told"])
    gains = [int(ours) - int(told) for ours, told in zip(passed["decided"], passed["told"], strict=True)]
    low, high = interval([gains])
    return {
        "n": n,
        "passed": {name: sum(passed[name]) for name in SHOWN},
        "interval": {name: wilson(sum(passed[name]), n) for name in SHOWN},
        "gain": [sum(gains) / n, low, high],
        "verdicts": {name: [int(value) for value in passed[name]] for name in SHOWN},
    }


def _sides(items: Sequence[Item]) -> tuple[list[str], list[str]]:
    return [item.prompt for item in items], [str(item.base) for item in items]


def _degenerate(reply: Reply) -> bool:
    return is_degenerate(reply.text) is not None


def together(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All prompts as one instruction."""
    passed = {name: [bool(v) for row in rows for v in row["verdicts"][name]] for name in SHOWN}
    sums = {"left_out": sum(row["left_out"] for row in rows)}
    asked = [sum(counts) for counts in zip(*(row["asked"] for row in rows), strict=True)]
    return {"instruction": "all", "settings": None, "asked": asked} | sums | figures(passed)


def settings_of(vector: ControlVector) -> dict[str, Any]:
    return {
        "layers": list(vector.layers),
        "mode": vector.mode,
        "positions": vector.positions,
        "strength": vector.strength,
    }


def read_vectors(folder: Path) -> list[ControlVector]:
    paths = sorted(folder.glob("*.gguf"))
    if not paths:
        sys.exit(f"{folder} holds no vector file (*.gguf).")
    return [ControlVector.load(path) for path in paths]


# --- what is printed ---------------------------------------------------------------------------------------


def show(rows: Sequence[dict[str, Any]]) -> None:
    columns = ("", "n", *SHOWN, "left out", "asked", "decided - told", "setting")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        n, (gain, low, high) = row["n"], row["gain"]
        cells = [row["instruction"], n]
        cells += [_cell(row["passed"][name], n, row["interval"][name]) for name in SHOWN]
        cells += [row["left_out"], f"{row['asked'][0]} / {row['asked'][1]}"]
        cells += [f"{100 * gain:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"]
        cells += [_setting(row["settings"]) if row["settings"] else ""]
        print(f"| {' | '.join(map(str, cells))} |")


def _cell(passed: int, n: int, bounds: Sequence[float]) -> str:
    low, high = bounds
    return f"{passed / n:.0%} [{100 * low:.0f}, {100 * high:.0f}]"


def _setting(settings: dict[str, Any]) -> str:
    layers = ",".join(map(str, settings["layers"]))
    return f"{settings['mode']} {layers} {settings['positions']} {settings['strength']:g}"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--vectors", type=Path, required=True, help="a folder of vector files")
    parser.add_argument("--prompts", type=Path, required=True, help="IFEval-form lines")
    parser.add_argument("--journal", type=Path, help="keeps replies, for a run that is stopped")
    parser.add_argument("--only", default="", metavar="A,B", help="these vectors, by name")
    parser.add_argument("--max-tokens", type=int, default=384)
    parser.add_argument("-t", "--threads", type=int, default=None)
    return parser.parse_args()


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    items = read_items(args.prompts)
    wanted = {name for name in args.only.split(",") if name}
    vectors = [v for v in read_vectors(args.vectors) if not wanted or v.name in wanted]
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(args.model, n_seq_max=N_SEQ_MAX, n_threads=args.threads))
        identity = {"model": file_hash(args.model), "max_tokens": args.max_tokens}
        journal = stack.enter_context(Journal(args.journal, identity))
        rows = []
        for vector in vectors:
            lines = [item for item in items if matches(vector, item)]
            if lines:
                rows.append(measure(Remembered(engine, journal), vector, lines, args.max_tokens))
                print(f"{vector.name}: {len(lines)} prompts done", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    args = parsed()
    document = {"benchmark": "do_no_harm", "localsteer": __version__, "machine": platform.machine()}
    if not args.prompts.is_file():
        print(f"skipped: there are no prompts at {args.prompts}.")
        print(json.dumps(document | {"skipped": f"no prompts at {args.prompts}"}))
        return 0
    rows = run(args)
    if not rows:
        sys.exit(f"no line of {args.prompts} has the verifier of a vector in {args.vectors}.")
    rows.append(together(rows))
    show(rows)
    harmed = [row["instruction"] for row in rows if row["gain"][2] < 0]
    document |= {"model": args.model.name, "max_tokens": args.max_tokens, "harmed": harmed, "rows": rows}
    print(json.dumps(document))
    return 1 if harmed else 0


if __name__ == "__main__":
    sys.exit(main())
