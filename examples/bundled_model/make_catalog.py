"""Writes the bundled model's catalogue (`localsteer/catalog/bundled.toml`): its instructions with the
phrasings of phrasings.toml and IFEval verifiers, and questions about subjects that training never saw."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import world

SEED = 11
N_QUERIES = {"extraction": 100, "validation": 40, "test": 60}
N_CONTEXT_QUERIES = {"extraction": 40, "validation": 20, "test": 24}


def at_least(key, n):
    return {"relation": "at least", key: n}


def less_than(key, n):
    return {"relation": "less than", key: n}


# id in the catalogue, group, id in the world, its arguments, verifier, kwargs. Moderate length and three
# sentences are what the model does when nothing is asked, so there is nothing to steer.
LENGTH = "length_constraints:number_"
ENTRIES = [
    ("json", "format", "json", {}, "detectable_format:json_format", {}),
    ("lowercase", "format", "lowercase", {}, "change_case:english_lowercase", {}),
    ("uppercase", "format", "uppercase", {}, "change_case:english_capital", {}),
    (
        "capital_words",
        "format",
        "capital_words",
        {"n": 2},
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
    ),
    ("bullets", "format", "bullets", {"n": 3}, "detectable_format:number_bullet_lists", {"num_bullets": 3}),
    (
        "highlights",
        "format",
        "highlights",
        {"n": 2},
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
    ),
    (
        "sections",
        "format",
        "sections",
        {"n": 2},
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
    ),
    ("title", "format", "title", {}, "detectable_format:title", {}),
    ("quotation", "format", "quotation", {}, "startend:quotation", {}),
    ("no_comma", "format", "no_comma", {}, "punctuation:no_comma", {}),
    (
        "end_phrase",
        "format",
        "end_phrase",
        {"phrase": world.END_PHRASES[0]},
        "startend:end_checker",
        {"end_phrase": world.END_PHRASES[0]},
    ),
    ("fixed_answer", "format", "fixed_answer", {}, "detectable_format:constrained_response", {}),
    (
        "spanish",
        "format",
        "language",
        {"language": "Spanish"},
        "language:response_language",
        {"language": "es"},
    ),
    (
        "german",
        "format",
        "language",
        {"language": "German"},
        "language:response_language",
        {"language": "de"},
    ),
    (
        "postscript",
        "format",
        "postscript",
        {"marker": "P.S."},
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
    ),
    (
        "placeholders",
        "format",
        "placeholders",
        {"n": 2},
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
    ),
    ("two_responses", "format", "two_responses", {}, "combination:two_responses", {}),
    ("one_sentence", "length", "sentences", {"n": 1}, LENGTH + "sentences", less_than("num_sentences", 2)),
    ("two_sentences", "length", "sentences", {"n": 2}, LENGTH + "sentences", less_than("num_sentences", 3)),
    ("four_sentences", "length", "sentences", {"n": 4}, LENGTH + "sentences", at_least("num_sentences", 4)),
    ("five_sentences", "length", "sentences", {"n": 5}, LENGTH + "sentences", at_least("num_sentences", 5)),
    ("extremely_concise", "length", "extremely_concise", {}, LENGTH + "words", less_than("num_words", 8)),
    ("concise", "length", "concise", {}, LENGTH + "sentences", less_than("num_sentences", 2)),
    ("verbose", "length", "verbose", {}, LENGTH + "words", at_least("num_words", 28)),
    ("extremely_verbose", "length", "extremely_verbose", {}, LENGTH + "words", at_least("num_words", 42)),
]


def word_entries():
    for word in ("moon", "horse", "music", "lantern"):  # lantern: never asked for in training
        yield (
            f"include_{word}",
            "word",
            "include_word",
            {"word": word},
            "keywords:existence",
            {"keywords": [word]},
        )
    for word in ("noble", "elegant", "strong", "simple"):  # simple: never asked to be avoided in training
        yield (
            f"exclude_{word}",
            "word",
            "exclude_word",
            {"word": word},
            "keywords:forbidden_words",
            {"forbidden_words": [word]},
        )


def context_entries():
    """Words that a scene brings into replies: their queries stand in one, and never name the word."""
    for word in ("moon", "horse", "music", "apple"):
        kwargs = {"forbidden_words": [word]}
        yield f"exclude_{word}", "word", "exclude_word", {"word": word}, "keywords:forbidden_words", kwargs


# For `--include-word`, `--exclude-word` and `--length`: any word, and the level that the model keeps by itself.
TEMPLATES = [
    (
        "include_word",
        "word",
        "include_word",
        {"word": "{word}"},
        "keywords:existence",
        {"keywords": ["{word}"]},
    ),
    (
        "exclude_word",
        "word",
        "exclude_word",
        {"word": "{word}"},
        "keywords:forbidden_words",
        {"forbidden_words": ["{word}"]},
    ),
    ("moderate", "length", "moderate", {}, None, {}),
]


def toml(value) -> str:
    """JSON strings, numbers and arrays are TOML too; tables are written inline."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, list):
        return (
            "[\n" + "".join(f"    {toml(v)},\n" for v in value) + "]"
            if len(value) > 1
            else "[" + "".join(map(toml, value)) + "]"
        )
    return json.dumps(value, ensure_ascii=False)


def phrasings(id: str, args: dict, split: str, rng: random.Random) -> list[str]:
    table = world.load_phrasings(split)[id]
    return list(dict.fromkeys(world.phrase(world.Instruction(id, args), template, rng) for template in table))


def queries(split: str, rng: random.Random, word: str | None = None) -> list[dict]:
    """word: of the scene that each question stands in."""
    counts = N_QUERIES if word is None else N_CONTEXT_QUERIES
    pool = world.subjects()[split][: counts[split]]
    texts, beside = world.questions(split), world.sentences(split)
    found = [{"text": world.ask(s, texts[k % len(texts)]), "subject": s.name} for k, s in enumerate(pool)]
    if word is not None:
        for k, each in enumerate(found):
            each["text"] += " " + world.scene(word, beside[k % len(beside)], rng)
    return found


def main() -> None:
    rng = random.Random(SEED)
    out = [
        "# The bundled model's catalogue, written by examples/bundled_model/make_catalog.py: change it there.\n"
    ]
    in_context = list(context_entries())
    for entry in [*ENTRIES, *word_entries(), *TEMPLATES, *in_context]:
        id, group, world_id, args, verifier, kwargs = entry
        out.append("[[instruction]]")
        table = {
            "id": id,
            "group": group,
            "phrasings": phrasings(world_id, args, "train", rng),
            "held_out_phrasings": phrasings(world_id, args, "held_out", rng),
            "verifier": verifier,
            "kwargs": kwargs,
        }
        out += [f"{key} = {toml(value)}" for key, value in table.items() if value is not None]
        out.append("")
        if entry in in_context:
            out.append("[instruction.queries]")
            out += [f"{split} = {toml(queries(split, rng, args['word']))}" for split in N_CONTEXT_QUERIES]
            out.append("")
    out.append("[queries]")
    out += [f"{split} = {toml(queries(split, rng))}" for split in N_QUERIES]
    Path(sys.argv[1]).write_text("\n".join(out) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
