"""How many examples of one's own it takes to learn a style that the model can't be told.

    python benchmarks/styles.py -m smol -o FOLDER [--style field_card] [--sizes 4,8,16,32] [-n 20]

The styles are those of examples/styles/: a form of four lines, and the manner of a support desk. For each
number of examples `localsteer learn --examples` at its defaults, then greedy replies to unseen questions,
plain, told in words (a description and an example in the prompt), and under the vector. A reply counts where
it has the form and is not degenerate; ppl: its perplexity under the plain model. FOLDER keeps the vectors, so
that a run that was stopped goes on. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from localsteer import ControlVector, Engine, __version__
from localsteer.catalog import Instruction, Query, load_catalog, spread
from localsteer.evaluate.intervals import wilson
from localsteer.learn import Recipe, learn
from localsteer.learn.examples import of_pairs
from localsteer.model_names import path_of
from localsteer.perplexity import log_perplexities, perplexity
from localsteer.runtime.reply import Reply
from localsteer.runtime.sampling import GREEDY
from localsteer.tune import N_SEQ_MAX
from localsteer.verify import is_degenerate
from localsteer.verify.judge import judge

FOLDER = Path(__file__).parents[1] / "examples" / "styles"
MAX_TOKENS = 160
CARD = re.compile(r"Subject: .+\nFact: .+\nDoubt: .+\nLook up: .+", re.DOTALL)
FORMS: dict[str, Callable[[str], bool]] = {
    "field_card": lambda text: CARD.fullmatch(text.strip()) is not None,
    "support": lambda text: text.strip().endswith("- Ada, Lantern Help"),
}
TOLD = {
    "field_card": "Answer as a field card of four lines: Subject, Fact, Doubt, Look up.",
    "support": "Answer as our support desk does: a kind sentence, what to do, and then the signature.",
}
SUPPORT_QUESTIONS = (
    "My order is missing an item.", "How do I change my email address?", "The website does not load.",
    "Can I get my money back?", "How do I update the app?", "My card was declined.",
    "The headphones do not charge.", "How do I track my order?", "I received the wrong colour.",
    "Do you have a shop in Leeds?", "How do I use a gift card?", "My account was locked.",
    "The printer prints blank pages.", "Can I have my order wrapped as a gift?", "How do I pause my plan?",
    "The coupon was not applied.", "Can I pay in instalments?", "How do I clean the kettle?",
    "The alarm does not go off.", "Who can see my data?",
)  # fmt: skip


def main() -> None:
    arguments = _arguments()
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(arguments.model)
    rows = []
    with Engine(path, n_seq_max=N_SEQ_MAX, n_threads=arguments.threads) as engine:
        print(
            f"{path.name}, {platform.machine()}, {engine.context.n_threads} threads, localsteer {__version__}"
        )
        for style in arguments.style.split(","):
            questions = _questions(style, arguments.n)
            for arm, row in _arms(engine, style, questions, arguments, folder):
                rows.append({"style": style, "arm": arm, **row})
                print(_line(rows[-1]), flush=True)
    print(json.dumps({"model": path.name, "n": arguments.n, "rows": rows}))


def _questions(style: str, n: int) -> list[Query]:
    if style == "support":
        return [Query(text) for text in SUPPORT_QUESTIONS[:n]]
    return spread(load_catalog().queries["test"], n)


def _arms(
    engine: Engine, style: str, questions: Sequence[Query], arguments: argparse.Namespace, folder: Path
) -> Any:
    examples, queries = of_pairs(engine, FOLDER / f"{style}.jsonl")
    instruction = Instruction(style, (), literal=True)
    texts = [query.text for query in questions]
    shown = json.loads((FOLDER / f"{style}.jsonl").read_text("utf-8").splitlines()[0])["reply"]
    told = [f"{TOLD[style]} For example:\n\n{shown}\n\n{text}" for text in texts]
    for arm, prompts in (("plain", texts), ("told", told)):
        yield arm, _row(engine, style, questions, _replies(engine, prompts))
    for size in map(int, arguments.sizes.split(",")):
        if size > len(examples):
            continue
        path = folder / f"{style}-{size}.gguf"
        if not path.exists():
            lesson = learn(
                engine,
                instruction,
                queries[:size],
                questions[:4],
                Recipe(),
                examples=examples[:size],
                n_threads=arguments.threads,
            )
            lesson.vector.at(strength=1.0).save(path)
        vector = ControlVector.load(path)
        seconds = vector.provenance["validation"]["seconds"]
        row = _row(engine, style, questions, _replies(engine, texts, vector))
        yield f"{size} examples", row | {"seconds": seconds}


def _replies(engine: Engine, prompts: Sequence[str], vector: ControlVector | None = None) -> list[Reply]:
    steer = () if vector is None else [vector]
    return engine.generate_batch(prompts, steer=steer, max_tokens=MAX_TOKENS, sampling=GREEDY)


def _row(engine: Engine, style: str, questions: Sequence[Query], replies: Sequence[Reply]) -> dict[str, Any]:
    instruction = Instruction(style, (), literal=True)
    judged = [judge(instruction, query, reply) for query, reply in zip(questions, replies, strict=True)]
    n = sum(FORMS[style](reply.text) and not is_degenerate(reply.text) for reply in replies)
    low, high = wilson(n, len(replies))
    subjects = [outcome.subject_kept for outcome in judged if outcome.subject_kept is not None]
    value = perplexity(log_perplexities(engine, judged))
    return {
        "followed": n / len(replies),
        "low": round(low, 3),
        "high": round(high, 3),
        "subject_kept": sum(subjects) / len(subjects) if subjects else None,
        "ppl": None if value is None else round(value, 2),
    }


def _line(row: dict[str, Any]) -> str:
    kept = "" if row["subject_kept"] is None else f", subject {row['subject_kept']:.0%}"
    seconds = f", {row['seconds']:.0f} s" if "seconds" in row else ""
    return (
        f"{row['style']:<12} {row['arm']:<12} {row['followed']:.0%} ({row['low']:.0%} to {row['high']:.0%})"
        f"{kept}, ppl {row['ppl']}{seconds}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", default="smol")
    parser.add_argument("-o", "--output", required=True, help="folder of what is done")
    parser.add_argument("--style", default="field_card,support")
    parser.add_argument("--sizes", default="4,8,16,32")
    parser.add_argument("-n", type=int, default=20, help="questions")
    parser.add_argument("-t", "--threads", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
