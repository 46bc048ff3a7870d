"""What learned vectors do on questions that nothing was learned from, beside telling, with controls.

    python benchmarks/learned.py -m smol -o FOLDER [-i json,lowercase] [-n 40] [--static] [--found]
                                 [--together]

For each instruction of the general catalogue that has a rewriter, `localsteer learn` at its defaults, then
greedy replies to unseen test questions:

    none     the plain model                          told     the instruction in the prompt, in words
    learned  the learned gate, no word of it          both     told and learned
    random   its gate, a random direction as long     other    another instruction's learned vector
    static   (--static) a learned constant            found    (--found) difference in means, the setting
                                                               that `tune` chooses

--together edits four layers at once, where by default two race and one is edited.

A reply counts where its verifier passes and it is not degenerate; intervals are Wilson's, 95%. Quality of the
learned replies: the share that names the question's subject, their length beside the plain replies', and
`ppl`, their perplexity under the plain model over that of plain replies rewritten to follow, so that the form
itself costs nothing. FOLDER keeps vectors and rows, so that a run that was stopped goes on. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from localsteer import ControlVector, Engine, __version__
from localsteer.cache import atomic_path, file_hash
from localsteer.catalog import Catalog, Instruction, Query, alike, load_catalog, spread
from localsteer.errors import LocalsteerError
from localsteer.evaluate.controls import mean_state, random_control
from localsteer.evaluate.intervals import wilson
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.runner import MAX_TOKENS, run_conditions
from localsteer.extract import extract
from localsteer.learn import Kept, PlainReplies, Recipe, learn
from localsteer.learn.examples import rewritten
from localsteer.model_names import path_of
from localsteer.plan import Plan
from localsteer.runtime.reply import Reply
from localsteer.tune import N_SEQ_MAX, tune
from localsteer.tune.replies import Asked, replies_to, told_prompt
from localsteer.tune.setting import layers_in_words
from localsteer.verify import can_rewrite, rewrite, verify
from localsteer.verify.judge import judge

N_PAIRS = 32  # of a difference in means, as first use takes


def main() -> None:
    arguments = _arguments()
    catalog = load_catalog()
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(arguments.model)
    instructions = _instructions(catalog, arguments.instructions)
    with Engine(path, n_seq_max=N_SEQ_MAX, n_threads=arguments.threads) as engine:
        print(
            f"{path.name}, {platform.machine()}, {engine.context.n_threads} threads, localsteer {__version__}"
        )
        lessons = Lessons(engine, catalog, folder, arguments.threads, together=arguments.together)
        vectors = {each.id: lessons.vector(each, constant=False) for each in instructions}
        rows = []
        for instruction in instructions:
            row = lessons.measured(instruction, vectors, arguments)
            rows.append(row)
            print(_line(row), flush=True)
    document = {"model": path.name, "sha256": file_hash(path), "n": arguments.n, "rows": rows}
    print(json.dumps({**document, "mean": _mean(rows)}))


class Lessons:
    """Vectors and rows of one model, in a folder."""

    def __init__(
        self, engine: Engine, catalog: Catalog, folder: Path, n_threads: int | None, *, together: bool
    ) -> None:
        self._engine, self._catalog, self._folder, self._n_threads = engine, catalog, folder, n_threads
        self._together = together
        self._plain = PlainReplies(folder / "kept")

    def vector(self, instruction: Instruction, *, constant: bool) -> ControlVector | None:
        """None where it can't be learned; the reason is printed."""
        path = self._folder / f"{instruction.id}{'-static' if constant else ''}.gguf"
        if not path.exists():
            queries, validation = (
                self._catalog.queries_for(instruction, split) for split in ("extraction", "validation")
            )
            stages = Stages()
            try:
                lesson = learn(
                    self._engine,
                    instruction,
                    queries,
                    validation,
                    Recipe(constant=constant, together=self._together),
                    n_threads=self._n_threads,
                    kept=Kept(self._folder / "kept" / path.stem, path.stem),
                    report=stages,
                )
            except LocalsteerError as error:
                print(error, flush=True)
                return None
            lesson.vector.save(path)
            print(f"{path.stem:<20} learned in {lesson.record['seconds']:.0f} s: {stages}", flush=True)
        return ControlVector.load(path)

    def measured(
        self,
        instruction: Instruction,
        vectors: Mapping[str, ControlVector | None],
        arguments: argparse.Namespace,
    ) -> dict[str, Any]:
        path = self._folder / f"{instruction.id}-{arguments.n}.json"
        row: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"id": instruction.id}
        vector = vectors[instruction.id]
        if vector is None:
            return row
        test = spread(self._catalog.queries_for(instruction, "test"), arguments.n)
        if "none" not in row:
            row |= self._arms(instruction, vector, test)
        if "other" not in row and (other := self._other(instruction, vectors, test)) is not None:
            row["other"] = self._alone(instruction, other, test)
        if arguments.static and "static" not in row:
            constant = self.vector(instruction, constant=True)
            row["static"] = constant and self._alone(instruction, constant, test)
        if arguments.found and "found" not in row:
            row["found"] = self._alone(instruction, self._found(instruction), test)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(row))
        return row

    def _arms(
        self,
        instruction: Instruction,
        vector: ControlVector,
        test: Sequence[Query],
    ) -> dict[str, Any]:
        plain = self._plain_replies(test)
        outcomes = run_conditions(
            self._engine,
            instruction,
            vector,
            test,
            conditions=("none", "steered"),
            plain=plain,
            scored=("steered",),
        )
        random = random_control(vector, mean_state(self._engine, test), seed=0)
        record = vector.provenance["validation"]
        row = {
            "none": _share([row.strict for row in outcomes["none"]]),
            "learned": _share([row.strict for row in outcomes["steered"]]),
        }
        row |= {"seconds": record["seconds"], "layers": list(vector.layers), "strength": vector.strength}
        row |= {
            "told": self._alone(instruction, None, test, told=True),
            "both": self._alone(instruction, vector, test, told=True),
            "random": self._alone(instruction, random, test),
        }
        return row | {"quality": self._quality(instruction, outcomes, test, plain)}

    def _plain_replies(self, test: Sequence[Query]) -> list[Reply]:
        return self._plain.of(self._engine, [query.text for query in test], MAX_TOKENS)

    def _other(
        self,
        instruction: Instruction,
        vectors: Mapping[str, ControlVector | None],
        test: Sequence[Query],
    ) -> ControlVector | None:
        """The next instruction's that steers at all and is a fair control: what follows it does not follow
        this one by itself, as a text in quotation marks is JSON."""
        ids = list(vectors)
        start = ids.index(instruction.id) + 1
        for name in (*ids[start:], *ids[: start - 1]):
            vector, other = vectors[name], self._catalog.get(name)
            if vector is not None and vector.strength and not self._implies(other, instruction, test):
                return vector
        return None

    def _implies(self, other: Instruction, instruction: Instruction, test: Sequence[Query]) -> bool:
        if alike(other, instruction):
            return True
        texts = [
            (query, rewrite(other.verifier, reply.text, other.kwargs_for(query.text), prompt=query.text))
            for query, reply in zip(test, self._plain_replies(test), strict=True)
        ]
        passing = [
            verify(instruction.verifier, text, instruction.kwargs_for(query.text), prompt=query.text)
            for query, text in texts
            if text is not None
        ]
        return sum(passing) > len(passing) / 10

    def _found(self, instruction: Instruction) -> ControlVector:
        queries = self._catalog.queries_for(instruction, "extraction")
        vector = extract(self._engine, instruction, queries, n_pairs=N_PAIRS)
        validation = self._catalog.queries_for(instruction, "validation")
        return tune(self._engine, vector, instruction, validation).vector

    def _alone(
        self,
        instruction: Instruction,
        vector: ControlVector | None,
        test: Sequence[Query],
        *,
        told: bool = False,
    ) -> dict[str, Any]:
        """Whether replies follow, and nothing else of them: each ends as soon as that is known."""
        plan = None if vector is None else Plan.from_vectors([vector])
        asked = [
            Asked(told_prompt(query, instruction.phrasings, i) if told else query.text, query, plan)
            for i, query in enumerate(test)
        ]
        replies = replies_to(self._engine, instruction, asked, max_tokens=MAX_TOKENS)
        return _share(
            [judge(instruction, query, reply).followed for query, reply in zip(test, replies, strict=True)]
        )

    def _quality(
        self,
        instruction: Instruction,
        found: Mapping[str, Outcomes],
        test: Sequence[Query],
        plain: Sequence[Reply],
    ) -> dict[str, float | None]:
        none, learned = found["none"], found["steered"]
        n_plain, n_learned = (sum(len(row.reply.tokens) for row in rows) for rows in (none, learned))
        return {
            "subject_plain": none.subject_kept,
            "subject_learned": learned.subject_kept,
            "length": round(n_learned / n_plain, 3) if n_plain else None,
            "ppl": self._perplexity_ratio(instruction, learned, test, plain),
            "distinct": round(len({row.reply.text for row in learned}) / learned.n, 3),
        }

    def _perplexity_ratio(
        self, instruction: Instruction, learned: Outcomes, test: Sequence[Query], plain: Sequence[Reply]
    ) -> float | None:
        """Both sides carry the form, so that only what it holds is compared."""
        examples = [
            rewritten(self._engine, instruction, query, reply, 0)
            for query, reply in zip(test, plain, strict=True)
        ]
        pairs = [(example.prompt, example.reply) for example in examples if example is not None]
        if not pairs or learned.perplexity is None:
            return None
        reference = math.exp(-float(np.mean(self._engine.score(pairs))))
        return round(learned.perplexity / reference, 3)


class Stages:
    """Seconds of each stage of a lesson, by what it reports."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._what, self._since = "start", time.perf_counter()

    def __call__(self, what: str, done: int, total: int) -> None:
        del done, total
        now = time.perf_counter()
        self._seconds[self._what] = self._seconds.get(self._what, 0.0) + now - self._since
        self._what, self._since = what.partition(", ")[0], now

    def __str__(self) -> str:
        self(self._what, 0, 0)
        return ", ".join(f"{what} {seconds:.0f}" for what, seconds in self._seconds.items())


def _share(followed: Sequence[bool | None]) -> dict[str, Any]:
    """Of replies that follow; None is one that nothing could judge."""
    n_followed = sum(map(bool, followed))
    low, high = wilson(n_followed, len(followed))
    return {"followed": n_followed / len(followed), "low": round(low, 3), "high": round(high, 3)}


def _instructions(catalog: Catalog, names: str | None) -> list[Instruction]:
    if names:
        return [catalog.get(name) for name in names.split(",")]
    return [
        instruction.fill()
        for instruction in catalog.instructions.values()
        if instruction.verifier
        and can_rewrite(instruction.verifier)
        and all(slot in instruction.slots for slot in instruction.open_slots)
    ]


ARMS = ("none", "found", "static", "learned", "told", "both", "random", "other")


def _line(row: Mapping[str, Any]) -> str:
    if "none" not in row:
        return f"{row['id']:<20} can't be learned"
    shares = [f"{name} {row[name]['followed']:.0%}" for name in ARMS if row.get(name)]
    quality = row["quality"]
    low, high = row["learned"]["low"], row["learned"]["high"]
    return (
        f"{row['id']:<20} {', '.join(shares)} (learned {low:.0%} to {high:.0%}); "
        f"{layers_in_words(row['layers'])}, {row['seconds']:.0f} s; "
        f"length {quality['length']}, ppl {quality['ppl']}, "
        f"subject {quality['subject_learned']} of {quality['subject_plain']}"
    )


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Over the instructions that have the arm: one that can't be learned has none, and is printed as such."""
    means = {}
    for name in ARMS:
        shares = [row[name]["followed"] for row in rows if row.get(name)]
        if shares:
            means[name] = round(sum(shares) / len(shares), 3)
    return means


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", default="smol")
    parser.add_argument("-o", "--output", required=True, help="folder of what is done")
    parser.add_argument("-i", "--instructions")
    parser.add_argument("-n", type=int, default=40, help="test questions each")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--found", action="store_true")
    parser.add_argument("--together", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
