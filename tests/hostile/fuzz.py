"""Damage input at random until the time is over: nothing but this project's one-line errors may come out.

    python tests/hostile/fuzz.py --seconds 40 --seed 1
    python tests/hostile/fuzz.py --only models --seconds 600

Model files go the way of a user's: the header, the trial, and what passes these is opened in this very
process and answers a question; so that an abort of llama.cpp ends the program, with the file left behind.
Each kind of input is an entry of KINDS. The last line is JSON; the exit status is 1 after a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

import fuzz_steering  # noqa: E402
import fuzz_texts  # noqa: E402
from raw_gguf import BOOL, F32, I32, STRING, U32, U64, RawGguf, array, value  # noqa: E402
from tiny_gguf import tiny_gguf  # noqa: E402

from localsteer.errors import LocalsteerError  # noqa: E402

BASES = ({}, {"tokenizer": "gpt2"}, {"tokenizer": "bert"}, {"n_expert": 2})
NUMBERS = (0, 1, 2, 3, 7, 8, 31, 33, 255, 256, 513, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
FLOATS = (0.0, -0.0, -1.0, 1e-45, 1e38, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "",
    "llama",
    "gpt2",
    "bert",
    "t5",
    "rwkv",
    "plamo2",
    "no_vocab",
    "yarn",
    "\x00",
    "\x1b[2J",
    "x" * 5000,
)
# read by llama.cpp, and missing in the tiny models
MORE_KEYS = (
    "llama.attention.sliding_window", "llama.attention.key_length", "llama.attention.value_length",
    "llama.rope.scaling.factor", "llama.rope.scaling.type", "llama.pooling_type", "llama.vocab_size",
    "llama.expert_count", "llama.expert_used_count", "llama.expert_shared_count", "llama.attention.causal",
    "llama.logit_scale", "llama.attention.clamp_kqv", "llama.attention.max_alibi_bias",
    "split.count", "split.no",
    "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.seperator_token_id", "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.eot_token_id", "tokenizer.ggml.pre", "tokenizer.ggml.merges", "general.alignment",
    "tokenizer.ggml.token_type_count", "tokenizer.ggml.remove_extra_whitespaces",
    "tokenizer.ggml.precompiled_charsmap",
)  # fmt: skip
PROMPTS = ("Tell me about foxes.", "", "é 川 🙂 \x00\x7f\n\n<s></s>[SEP]", "the the " * 20)


def damaged_bytes(raw: bytes, draw: random.Random) -> bytes:
    """A few bytes, a piece that is gone, twice there, or from elsewhere; most of it in the header."""
    content = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(draw.choice((64, 1024, 8192, len(content))) % len(content) + 1) % len(content)
        size = draw.choice((1, 1, 4, 8, 64))
        way = draw.randrange(5)
        if way == 0:
            content[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif way == 1:
            content[at : at + 8] = draw.choice(NUMBERS).to_bytes(8, "little")
        elif way == 2:
            del content[at : at + size]
        elif way == 3:
            content[at:at] = content[at : at + size]
        else:
            start = draw.randrange(len(content))
            content[at : at + size] = content[start : start + size]
        if not content:
            break
    return bytes(content)


def random_value(draw: random.Random) -> bytes:
    way = draw.randrange(8)
    if way <= 2:
        return value(U32, draw.choice(NUMBERS))
    if way == 3:
        return value(F32, draw.choice(FLOATS))
    if way == 4:
        return value(STRING, draw.choice(TEXTS))
    if way == 5:
        return draw.choice((value(BOOL, draw.random() < 0.5), value(U64, draw.choice(NUMBERS))))
    count = draw.choice((0, 1, 2, 300))
    if way == 6:
        return array(draw.choice((U32, I32)), [draw.randrange(2**31) for _ in range(count)])
    return array(STRING, [draw.choice(TEXTS)[:20] + str(k) for k in range(count)])


def damaged_model(draw: random.Random) -> bytes:
    raw: RawGguf = tiny_gguf(**draw.choice(BASES))
    if draw.random() < 0.4:
        return damaged_bytes(raw.to_bytes(), draw)
    for _ in range(draw.choice((1, 1, 2, 3))):
        keys = [*raw.key_values, *MORE_KEYS]
        way = draw.randrange(10)
        if way <= 5:
            raw.key_values[draw.choice(keys)] = random_value(draw)
        elif way == 6:
            raw.key_values.pop(draw.choice(keys), None)
        elif way == 7 and len(raw.tensors) > 1:
            raw.tensors.remove(draw.choice(raw.tensors))
        elif way == 8:
            tensor = draw.choice(raw.tensors)
            tensor.dims = tuple(draw.choice((*tensor.dims, 0, 1, 33, 2**40)) for _ in tensor.dims)
        else:
            draw.choice(raw.tensors).type = draw.choice((0, 1, 2, 8, 14, 30, 39, 4, 999))
    return raw.to_bytes()


def try_model(path: Path, draw: random.Random) -> str:
    import localsteer

    path.write_bytes(damaged_model(draw))
    with localsteer.Engine(path, n_threads=1, n_seq_max=2) as engine:
        for prompt in PROMPTS:
            try:
                engine.generate(prompt, max_tokens=2, raw=draw.random() < 0.5)
            except LocalsteerError as error:
                one_line(error)
    return "opened"


def try_vector(path: Path, draw: random.Random) -> str:
    from localsteer.convert import import_vector, read_vector

    sources = sorted(each for each in (TESTS / "data").iterdir() if each.is_file())
    source = draw.choice(sources)
    path = path.with_suffix(source.suffix)
    path.write_bytes(damaged_bytes(source.read_bytes(), draw))
    convention = draw.choice((None, "repeng", "cvector-generator", "layers", "hidden_states"))
    for read in (
        read_vector,
        lambda p: import_vector(p, convention=convention, n_layer=draw.choice((None, 4, 32))),
    ):
        try:
            read(path)
        except LocalsteerError as error:
            one_line(error)
    return "read"


def one_line(error: LocalsteerError) -> None:
    if "\n" in str(error):
        raise AssertionError(f"not one line: {error}")


KINDS: dict[str, Callable[[Path, random.Random], str]] = {
    "models": try_model,
    "vectors": try_vector,
    "steering": fuzz_steering.try_steering,
    "schemas": fuzz_texts.try_schema,
    "templates": fuzz_texts.try_template,
    "requests": fuzz_texts.try_request,
    "faces": fuzz_texts.try_face,
}


def fuzz(seconds: float, seed: int, only: list[str], folder: Path) -> tuple[Counter[str], list[str]]:
    """What came of how many inputs, and of each failure the file that is left of it."""
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    end, n = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        n += 1
        for kind in only:
            path = folder / f"{kind}-{seed}-{n}.gguf"
            try:
                outcome = KINDS[kind](path, random.Random(f"{kind} {seed} {n}"))
            except LocalsteerError as error:
                outcome = "refused"
                if "\n" in str(error):
                    failures.append(f"{path}: {error}")
            except BaseException:
                failures.append(f"{path}: {traceback.format_exc()}")
                continue
            outcomes[f"{kind} {outcome}"] += 1
            for left in folder.glob(f"{path.stem}.*"):
                left.unlink()
    return outcomes, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=[*KINDS])
    parser.add_argument("--folder", type=Path, help="where failing files are left")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="localsteer-fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["LOCALSTEER_CACHE"] = str(folder / "cache")
    os.environ["LOCALSTEER_MODEL_CHECK"] = "full" if "models" in given.only else "header"
    try:
        outcomes, failures = fuzz(given.seconds, given.seed, given.only, folder)
    finally:
        fuzz_steering.close()
        fuzz_texts.close()
    for failure in failures:
        print(failure, file=sys.stderr)
    print(json.dumps({"seed": given.seed, "outcomes": outcomes, "failures": len(failures)}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
