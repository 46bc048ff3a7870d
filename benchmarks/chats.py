"""Ten turns of a chat with a pack's vector on: does it still follow, and does it know what was said?

    python benchmarks/chats.py -m smol [-i json,lowercase] [-n 12] [--turns 10] [-o ROWS.json]

Each chat begins with a fact ("My name is Ada."), asks an unseen test question at every turn, and in the end
for the fact. The replies of earlier turns, as they came, are in the history. Three ways:

    plain     nothing                       steered   the pack's vector, at every turn
    told      the instruction in words, in the first message

A reply follows where its verifier passes and it is not degenerate; intervals are Wilson's, 95%. Every turn
computes the whole history again, so ten turns of a dozen chats take half an hour on two cores. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localsteer import ControlVector, Engine
from localsteer.cache import atomic_path, file_hash
from localsteer.catalog import Instruction, Query, load_catalog
from localsteer.evaluate.intervals import wilson
from localsteer.model_names import path_of
from localsteer.packs import pack_for
from localsteer.runtime.reply import Reply
from localsteer.runtime.sampling import GREEDY
from localsteer.tune.replies import told_prompt
from localsteer.verify.judge import judge

N_SEQ_MAX = 12
MAX_TOKENS = 192
NAMES = ("Ada", "Boris", "Clara", "Dmitri", "Elsa", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Karin", "Leo")
ASKED = "What is my name?"


def main() -> None:
    arguments = _arguments()
    path = path_of(arguments.model)
    match = pack_for(path)
    if match is None:
        raise SystemExit(f"no pack fits {path.name}.")
    rows = []
    n_ctx = (arguments.turns + 1) * (MAX_TOKENS + 64)
    with Engine(path, n_seq_max=N_SEQ_MAX, n_ctx=n_ctx, n_threads=arguments.threads) as engine:
        print(f"{match.pack.title}, {platform.machine()}, {arguments.n} chats of {arguments.turns} turns")
        for name in arguments.instructions.split(","):
            instruction = load_catalog(match.pack.catalog).get(name).fill()
            for way in ("plain", "told", "steered"):
                vector = match.pack.vector(name) if way == "steered" else None
                chats = Chats(engine, instruction, vector, arguments.n, told=way == "told")
                row = {"instruction": name, "way": way, **chats.run(arguments.turns)}
                rows.append(row)
                print(_line(row), flush=True)
    document = {"model": path.name, "sha256": file_hash(path), "chats": arguments.n, "rows": rows}
    if arguments.output:
        with atomic_path(arguments.output) as temporary:
            temporary.write_text(json.dumps(document))
    print(json.dumps(document))


class Chats:
    """Chats side by side, a turn of all of them at a time."""

    def __init__(
        self, engine: Engine, instruction: Instruction, vector: ControlVector | None, n: int, *, told: bool
    ) -> None:
        self._engine, self._instruction, self._told = engine, instruction, told
        self._steer = () if vector is None else (vector,)
        self._histories: list[list[dict[str, str]]] = [[] for _ in range(n)]
        self._queries = load_catalog().queries_for(instruction, "test")

    def run(self, n_turns: int) -> dict[str, Any]:
        n = len(self._histories)
        followed = [self._turn(turn) for turn in range(n_turns)]
        replies = self._ask([ASKED] * n)
        known = sum(_name(i).lower() in reply.text.lower() for i, reply in enumerate(replies))
        return {"followed": followed, "n": n, "known": known}

    def _turn(self, turn: int) -> int:
        """How many replies follow."""
        queries = [self._query(chat, turn) for chat in range(len(self._histories))]
        prompts = [query.text for query in queries]
        if turn == 0:
            if self._told:
                phrasings = self._instruction.phrasings
                prompts = [told_prompt(query, phrasings, i) for i, query in enumerate(queries)]
            prompts = [f"My name is {_name(i)}. {prompt}" for i, prompt in enumerate(prompts)]
        pairs = zip(queries, self._ask(prompts), strict=True)
        return sum(bool(judge(self._instruction, query, reply).followed) for query, reply in pairs)

    def _query(self, chat: int, turn: int) -> Query:
        """No question twice in a chat, and at each turn another one in each."""
        return self._queries[(7 * chat + turn) % len(self._queries)]

    def _ask(self, prompts: Sequence[str]) -> list[Reply]:
        """What each chat answers."""
        for history, prompt in zip(self._histories, prompts, strict=True):
            history.append({"role": "user", "content": prompt})
        replies = self._engine.generate_batch(
            self._histories, steer=self._steer, max_tokens=MAX_TOKENS, sampling=GREEDY
        )
        for history, reply in zip(self._histories, replies, strict=True):
            history.append({"role": "assistant", "content": reply.text})
        return replies


def _name(chat: int) -> str:
    return NAMES[chat % len(NAMES)]


def _line(row: dict[str, Any]) -> str:
    n, counts = row["n"], row["followed"]
    low, high = wilson(sum(counts), n * len(counts))
    turns = " ".join(f"{count / n:.0%}" for count in counts)
    return (
        f"{row['instruction']:<12} {row['way']:<8} by turn {turns}; all {sum(counts) / n / len(counts):.0%} "
        f"({low:.0%} to {high:.0%}); the name is known in {row['known']} of {n}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", default="smol")
    parser.add_argument("-i", "--instructions", default="json,lowercase")
    parser.add_argument("-n", type=int, default=12, help="chats")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
