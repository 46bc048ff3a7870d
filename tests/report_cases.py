"""results.json as an evaluation writes it, made up: several suites, every kind of plot, gaps, hostile text.

python tests/report_cases.py FOLDER     # writes results.json, report.md and report.html there, to look at
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONDITIONS = ("none", "steered", "instructed", "both", "random", "other")
FORMATS = (
    "json", "lowercase", "capitals", "capital_words", "bullets", "highlights", "sections", "title",
    "quotation", "no_comma", "end_phrase", "fixed_answer", "postscript", "placeholders", "two_responses",
    "repeat_prompt", "one_sentence", "spanish",
)  # fmt: skip
HOSTILE = '<script>alert("x")</script> & <b>bold</b> | a_b *c* $d$ `e` [f](javascript:g) \x1b[31mred \ud800'
FOREIGN = "按 JSON 回复, répondez; ответь по-русски"
LONG = "json + one_sentence + without the word fox + in Spanish + with a postscript at the very end"
USUAL = {"none": 0.02, "steered": 0.85, "instructed": 0.93, "both": 0.97, "random": 0.03, "other": 0.04}


def results(seed: int = 0) -> dict[str, Any]:
    draw = random.Random(seed)
    return {
        "format": 1,
        "localsteer": "0.1.0",
        "llama_cpp": "0.3.36",
        "machine": "x86_64, 2 cores, AVX512",
        "command": "localsteer eval -m model.gguf --suite all --n 20 --out report",
        "seconds": 734.2,
        "model": {
            "name": "localsteer-instruct", "sha256": "ab" * 32, "architecture": "llama",
            "quantization": "Q8_0", "n_layer": 8, "n_embd": 256,
        },
        "settings": {"n": 20, "seed": 0, "max_tokens": 192, "suites": ["format", "length", "odd"]},
        "files": {"catalog": "cd" * 32, "ifeval": None},
        "vectors": {name: vector(draw) for name in FORMATS},
        "suites": {"format": format_suite(draw), "length": length_suite(draw), "odd <&>": odd_suite(draw)},
    }  # fmt: skip


def vector(draw: random.Random) -> dict[str, Any]:
    digest = f"{draw.getrandbits(256):064x}"
    return {"sha256": digest, "source_sha256": "ab" * 32, "layer": [draw.randrange(5)], **applied(draw)}


def applied(draw: random.Random) -> dict[str, Any]:
    return {"positions": "prompt", "mode": "project", "strength": draw.choice((0.5, 1.0, 1.5))}


def accuracy(share: float | None, n: int) -> dict[str, float | None]:
    if share is None:
        return {"accuracy": None, "low": None, "high": None}
    spread = 1.96 * (share * (1 - share) / n) ** 0.5
    return {"accuracy": share, "low": max(0.0, share - spread), "high": min(1.0, share + spread)}


def figures(draw: random.Random, share: float | None, n: int = 20, settings: Any = None) -> dict[str, Any]:
    return {
        "n": n,
        "strict": accuracy(share, n),
        "loose": accuracy(None if share is None else min(1.0, share + 0.03), n),
        "quality": {
            "perplexity": draw.uniform(2, 9), "perplexity_ratio": draw.choice((0.83, 1.0, 1.27, 14.2)),
            "repetition": draw.uniform(0, 0.1), "words": draw.uniform(8, 40),
            "degenerate": draw.choice((0.0, 0.0, 0.05)), "subject_kept": draw.uniform(0.9, 1),
        },
        "settings": settings,
        "vector_sha256": None,
    }  # fmt: skip


def format_suite(draw: random.Random) -> dict[str, Any]:
    def share(condition: str, k: int) -> float:
        best = USUAL[condition] if not (condition == "steered" and k % 6 == 5) else 0.1
        return round(20 * max(0.0, min(1.0, best + draw.uniform(-0.1, 0.1)))) / 20

    rows = {
        name: {
            condition: figures(
                draw,
                share(condition, k),
                settings={"layer": [k % 5], **applied(draw)} if condition == "steered" else None,
            )
            for condition in CONDITIONS
        }
        for k, name in enumerate(FORMATS)
    }
    together = {condition: figures(draw, USUAL[condition], 20 * len(FORMATS)) for condition in CONDITIONS}
    return {
        "title": "Format instructions",
        "conditions": list(CONDITIONS),
        "instructions": rows,
        "all": together,
        "sections": [paraphrases(draw)],
    }


def paraphrases(draw: random.Random) -> dict[str, Any]:
    rows = [
        [name, {"share": draw.random()}, {"share": 0.9, "low": 0.8, "high": 0.97}] for name in FORMATS[:5]
    ]
    return {
        "title": "Phrasings that the model follows badly",
        "text": "Phrasings that were kept out of training.\n\nThe vector lifts each of them.",
        "tables": [{"columns": ["phrasing", "instructed", "both"], "rows": rows}],
        "plots": [],
    }


def length_suite(draw: random.Random) -> dict[str, Any]:
    strengths = [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]
    conditions = [f"c={strength:g}" for strength in strengths]
    rows = {name: {each: figures(draw, None) for each in conditions} for name in ("conciseness", "verbosity")}
    words = {
        "conciseness": [62.1, 44.0, 37.5, 30.2, 24.8, 17.9, None],
        "verbosity": [10.0, 17.2, 24.1, 30.2, 39.9, 55.0, 80.4],
    }
    followed = {"share": 0.75, "low": 0.6, "high": 0.86}
    return {
        "title": "Length",
        "conditions": conditions,
        "instructions": rows,
        "all": {each: figures(draw, None) for each in conditions},
        "sections": [
            {
                "title": "Words against c",
                "text": "Mean words of the replies.",
                "tables": [
                    {
                        "columns": ["direction", *conditions, "falls or rises all the way"],
                        "rows": [[name, *values, name == "verbosity"] for name, values in words.items()],
                    }
                ],
                "plots": [
                    plot("lines", "Mean words", "c", "words", x=strengths, series=words),
                    plot(
                        "lines",
                        "Follows",
                        "level",
                        "",
                        x=["low", "middle", "high"],
                        series={"a": [0.1, followed, None]},
                    ),
                ],
            },
            {
                "title": "Where it works",
                "text": "",
                "tables": [],
                "plots": [heat(draw, 5, 4), heat(draw, 3, 8, -1.0)],
            },
        ],
    }


def plot(kind: str, title: str, x_label: str = "", y_label: str = "", **data: Any) -> dict[str, Any]:
    return {"kind": kind, "title": title, "x_label": x_label, "y_label": y_label, **data}


def heat(draw: random.Random, n_rows: int, n_columns: int, low: float = 0.0) -> dict[str, Any]:
    values: list[list[Any]] = [[draw.uniform(low, 1) for _ in range(n_columns)] for _ in range(n_rows)]
    values[0][0] = None
    if low == 0:
        values = [[None if value is None else {"share": value} for value in row] for row in values]
    rows, columns = names("layer", n_rows), names("strength", n_columns)
    return plot("heatmap", f"{n_rows} layers", "strength", "layer", rows=rows, columns=columns, values=values)


def names(what: str, n: int) -> list[str]:
    return [f"{what} {i}" for i in range(n)]


def odd_suite(draw: random.Random) -> dict[str, Any]:
    """What a report must bear: hostile, foreign and long names, figures that are missing, empty plots."""
    rows = {
        HOSTILE: {
            "none": figures(draw, 0.0),
            "steered": figures(draw, 0.997, settings=[applied(draw), applied(draw)]),
        },
        FOREIGN: {"none": figures(draw, 0.004), "steered": {"n": 0, "strict": None, "quality": {}}},
        LONG: {
            "steered": {
                "n": 3,
                "quality": {"perplexity_ratio": None, "curl": 3.25},
            }
        },
        "_underscored": {},
    }
    table = {
        "columns": ["name", HOSTILE, ""],
        "rows": [[HOSTILE, None, 12345], [FOREIGN, True, [1, 2.5, None]]],
    }
    return {
        "title": f"Odd {HOSTILE}",
        "conditions": ["none", "steered"],
        "instructions": rows,
        "all": {},
        "sections": [
            {"title": HOSTILE, "text": f"{HOSTILE}\n\n# {FOREIGN}", "tables": [table], "plots": odd_plots()},
            {"title": "Nothing"},
        ],
    }


def odd_plots() -> list[dict[str, Any]]:
    return [
        plot(
            "bars",
            HOSTILE,
            HOSTILE,
            FOREIGN,
            x=[HOSTILE, FOREIGN, LONG, 3],
            series={"_a": [1, None, -2.5, 3], HOSTILE: [None] * 4},
        ),
        plot("bars", "empty", x=[], series={}),
        plot("lines", "gaps", x=["a", "b"], series={"none": [None, None]}),
        plot(
            "heatmap",
            FOREIGN,
            rows=[HOSTILE, "_b"],
            columns=[FOREIGN, 2],
            values=[[None, None], [None, None]],
        ),
        plot("heatmap", "no cells", rows=[], columns=[], values=[]),
    ]


def main(arguments: Sequence[str]) -> None:
    from localsteer.evaluate import report

    folder, found = Path(arguments[0]), results()
    report.write(found, folder)
    (folder / "results.json").write_text(json.dumps(found, indent=1))
    report.terminal.print_report(found)


if __name__ == "__main__":
    main(sys.argv[1:])
