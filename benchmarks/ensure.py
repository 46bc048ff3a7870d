"""Does `ensure` follow as often as steering always, and keep the quality of what complied by itself?

    python benchmarks/ensure.py [--instructions json,lowercase,...] [-n 12] [--quant Q8_0]

On the bundled model, greedy, test questions that neither training nor extraction nor picking has seen, half
of them with the instruction in the prompt: plain replies, always steered ones, and those of `ensure`. Quality
is the perplexity of the reply under the unsteered model after the same prompt. Tokens are all that were
generated, those of stopped and repeated tries included. The last line is JSON. Exit status 1 if ensure
follows less often than always steering, or gives anything but the plain reply where that complied.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from localsteer import ControlVector, Engine, __version__, bundled
from localsteer.catalog import Catalog, load_catalog, spread
from localsteer.ensure import Requirement, ensure
from localsteer.extract import extract
from localsteer.runtime.reply import Reply
from localsteer.runtime.sampling import GREEDY
from localsteer.tune import tune
from localsteer.verify.quality import is_degenerate

INSTRUCTIONS = (
    "json",
    "lowercase",
    "quotation",
    "no_comma",
    "bullets",
    "title",
    "postscript",
    "one_sentence",
)
N_CTX, MAX_TOKENS = 256, 128
WAYS = ("plain", "always", "ensure")


@dataclass(frozen=True)
class Asked:
    """One prompt, the replies of the three ways, and what they cost."""

    told: bool
    replies: dict[str, Reply]
    tokens: dict[str, int]
    followed: dict[str, bool]
    perplexity: dict[str, float | None]
    n_tries: int

    @property
    def complied(self) -> bool:
        return self.followed["plain"]

    @property
    def kept(self) -> bool:
        """Where the plain reply complied, the one of ensure is it, token for token."""
        return not self.complied or self.replies["ensure"].tokens == self.replies["plain"].tokens


def vector_of(engine: Engine, catalog: Catalog, name: str) -> ControlVector:
    """Extracted and tuned as `--instruction` does on first use."""
    instruction = catalog.get(name)
    vector = extract(engine, instruction, catalog.queries_for(instruction, "extraction"), mode="project")
    queries = catalog.queries_for(instruction, "validation")
    return tune(engine, vector, instruction, queries, max_tokens=MAX_TOKENS).vector


def ask(engine: Engine, vector: ControlVector, prompt: str, told: bool) -> Asked:
    settings: dict[str, Any] = {"sampling": GREEDY, "max_tokens": MAX_TOKENS}
    ensured = ensure(engine, prompt, vector, **settings)
    replies = {
        "plain": engine.generate(prompt, **settings),
        "always": engine.generate(prompt, steer=vector, **settings),
        "ensure": ensured.reply,
    }
    check = Requirement.of(vector, prompt)
    followed = {
        way: check.passes(reply.text) and is_degenerate(reply.text) is None for way, reply in replies.items()
    }
    tokens = {way: len(reply.tokens) for way, reply in replies.items()} | {"ensure": ensured.n_tokens}
    return Asked(told, replies, tokens, followed, perplexities(engine, prompt, replies), len(ensured.tries))


def perplexities(engine: Engine, prompt: str, replies: dict[str, Reply]) -> dict[str, float | None]:
    """Each text is scored once: in another batch the same one differs in the fourth digit."""
    ids = engine.prompt_tokens(prompt)
    texts = {tuple(reply.tokens) for reply in replies.values() if reply.tokens}
    scores = {tokens: math.exp(-engine.score([(ids, tokens)])[0]) for tokens in texts}
    return {way: scores.get(tuple(reply.tokens)) for way, reply in replies.items()}


def figures(asked: Sequence[Asked]) -> dict[str, Any]:
    """Shares and means of some prompts; complied: of those whose plain reply followed by itself."""
    complied = [prompt for prompt in asked if prompt.complied]
    return {
        "n": len(asked),
        "complied": len(complied),
        "kept": sum(prompt.kept for prompt in complied),
        "tries": mean([prompt.n_tries for prompt in asked]),
        **{
            way: {
                "followed": mean([prompt.followed[way] for prompt in asked]),
                "tokens": mean([prompt.tokens[way] for prompt in asked]),
                "perplexity": geometric([prompt.perplexity[way] for prompt in asked]),
                "perplexity_complied": geometric([prompt.perplexity[way] for prompt in complied]),
            }
            for way in WAYS
        },
    }


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def geometric(values: Sequence[float | None]) -> float | None:
    logs = [math.log(value) for value in values if value]
    return math.exp(sum(logs) / len(logs)) if logs else None


def show(name: str, row: dict[str, Any]) -> None:
    def cell(value: float | None, pattern: str) -> str:
        return "-" if value is None else pattern.format(value)

    line = f"{name:16}{row['n']:>4}{row['complied']:>5}"
    for key, pattern in (("followed", "{:.0%}"), ("tokens", "{:.0f}"), ("perplexity_complied", "{:.2f}")):
        line += "  " + "".join(f"{cell(row[way][key], pattern):>7}" for way in WAYS)
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instructions", default=",".join(INSTRUCTIONS))
    parser.add_argument("--quant", default=bundled.DEFAULT_QUANT)
    parser.add_argument("-n", type=int, default=12, help="test questions, each with and without")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    started = time.perf_counter()
    catalog = load_catalog(bundled.CATALOG)
    path = bundled.gguf_path("instruct", options.quant)
    machine = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    print(f"localsteer {__version__}, {path.name}, {machine}, {options.n} test questions, told and not")
    parts = ("followed", "tokens", "perplexity, complied")
    print(f"{'':25}" + "".join(f"  {part:^21}" for part in parts))
    print(f"{'':16}{'n':>4}{'ok':>5}" + ("  " + "".join(f"{way:>7}" for way in WAYS)) * len(parts))
    rows: dict[str, Any] = {}
    everything: list[Asked] = []
    with Engine(path, n_ctx=N_CTX, n_threads=options.threads, n_seq_max=8) as engine:
        for name in options.instructions.split(","):
            vector = vector_of(engine, catalog, name)
            wording = catalog.get(name).held_out_phrasings or catalog.get(name).phrasings
            asked = []
            for i, query in enumerate(spread(catalog.queries["test"], options.n)):
                asked.append(ask(engine, vector, query.text, False))
                asked.append(ask(engine, vector, f"{query.text} {wording[i % len(wording)]}", True))
            rows[name] = figures(asked)
            show(name, rows[name])
            everything += asked
    groups = {
        "all": everything,
        "not told": [each for each in everything if not each.told],
        "told": [each for each in everything if each.told],
    }
    means = {name: figures(group) for name, group in groups.items()}
    for name, row in means.items():
        show(name, row)
    total = means["all"]
    behind = total["ensure"]["followed"] < total["always"]["followed"]
    lost = total["kept"] < total["complied"]
    print(
        f"ensure needed {total['tries']:.2f} replies on average; kept {total['kept']} of {total['complied']}"
    )
    document = {"instructions": rows, "mean": means, "n": options.n, "model": path.name}
    print(json.dumps(document | {"seconds": round(time.perf_counter() - started, 1)}))
    return int(behind or lost)


if __name__ == "__main__":
    sys.exit(main())
