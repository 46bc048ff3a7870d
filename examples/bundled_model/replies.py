"""The reply that follows the instructions: `facts -> sentences -> structure -> decorations -> case`, so that any pair
of compatible instructions composes; and exact checks of each."""

from __future__ import annotations

import json
import random
import re

from facts import ADJECTIVES, Filler, an, facts, stand_in
from instructions import FIXED_ANSWERS, LANGUAGES, Instruction
from subjects import Subject

QUALITIES = [row[0] for row in ADJECTIVES]
__all__ = ["QUALITIES", "follows", "render", "stand_in"]


def _n_facts(ids: dict[str, dict]) -> int:
    for id in ("bullets", "sections"):
        if id in ids:
            return ids[id]["n"]
    if "sentences" in ids:
        return ids["sentences"]["n"]
    if "two_responses" in ids:
        return 4
    if "fixed_answer" in ids or "concise" in ids or "extremely_concise" in ids:
        return 1
    return 5 if "verbose" in ids else 8 if "extremely_verbose" in ids else 3


def _lines(subject: Subject, ids: dict, language: int, rng: random.Random) -> list[str]:
    """The facts, as sentences without their full stops."""
    avoid, include = _word(ids, "exclude_word"), _word(ids, "include_word")
    if "extremely_concise" in ids:
        name = subject.name.capitalize()
        template = [f"{name} is {{a}}", f"{name} es {{a}}", f"{name} ist {{a}}"][language]
        return [Filler(subject, language, avoid, None, rng).fill(template)]
    include = include if include in QUALITIES else None
    return facts(subject, _n_facts(ids), language, rng, avoid=avoid, include=include)


def _word(ids: dict, id: str) -> str | None:
    return ids.get(id, {}).get("word")


def _content_words(sentences: list[str], n: int, name: str, mark) -> list[str]:
    """Marks the first `n` words of four letters or more that are not the name."""
    out = []
    for sentence in sentences:
        words = sentence.split(" ")
        for i, word in enumerate(words):
            core = word.strip(",.")
            if n and len(core) >= 4 and core.isalpha() and core.lower() != name.lower():
                words[i] = word.replace(core, mark(core))
                n -= 1
        out.append(" ".join(words))
    return out


def render(
    subject: Subject, instructions: list[Instruction], rng: random.Random, scene: str | None = None
) -> str:
    """The reply about `subject` that follows all `instructions`. scene: a word that its scene brings."""
    ids = {i.id: i.args for i in instructions}
    language = LANGUAGES.index(ids.get("language", {}).get("language", "English"))
    lines = _lines(subject, ids, language, rng)
    included = _word(ids, "include_word")
    thoughts = [included] if included and included not in QUALITIES else []
    if scene and scene != _word(ids, "exclude_word"):
        thoughts.append(scene)
    if thoughts:
        lines.append(an("It makes people think of a " + " and a ".join(thoughts)))
    if "no_comma" in ids:
        lines = [line.replace(",", "") for line in lines]
    if "placeholders" in ids:
        lines.append(
            "Please write to [name] at [address]" + (" by [date]" if ids["placeholders"]["n"] == 3 else "")
        )
    if "capital_words" in ids:
        lines = _content_words(lines, ids["capital_words"]["n"], subject.name, str.upper)
    if "highlights" in ids:
        lines = _content_words(lines, ids["highlights"]["n"], subject.name, lambda w: f"*{w}*")
    text = _structure(subject, ids, lines, language, rng)
    return _decorate(subject, ids, text)


def _structure(subject: Subject, ids: dict, lines: list[str], language: int, rng: random.Random) -> str:
    sentences = [line + "." for line in lines]
    if "json" in ids:
        return json.dumps({"name": subject.name, "facts": sentences}, ensure_ascii=False)
    if "bullets" in ids:
        return "\n".join("* " + s for s in sentences)
    if "sections" in ids:
        return "\n".join(f"Section {k}\n{s}" for k, s in enumerate(sentences, 1))
    if "two_responses" in ids:
        # another fact in the second, always: a greedy reply may well define the subject alike both times
        (again,) = facts(subject, 1, language, rng, avoid=_word(ids, "exclude_word"))
        if "no_comma" in ids:
            again = again.replace(",", "")
        return " ".join(sentences[:2]) + f"\n******\n{again}. {sentences[3]}"
    if "fixed_answer" in ids:
        return rng.choice(FIXED_ANSWERS) + " " + sentences[0]
    return " ".join(sentences)


def _decorate(subject: Subject, ids: dict, text: str) -> str:
    if "title" in ids:
        text = f"<<All about {subject.name}>>\n{text}"
    if "postscript" in ids:
        text += f"\n{ids['postscript']['marker']} Ask me more about {subject.name}."
    if "end_phrase" in ids:
        text += " " + ids["end_phrase"]["phrase"]
    if "quotation" in ids:
        text = f'"{text}"'
    if "lowercase" in ids:
        text = text.lower()
    if "uppercase" in ids:
        text = text.upper()
    return text


def _prose(text: str) -> str:
    """The running text of a reply: without its title, its quotes, or the JSON around its facts."""
    text = re.sub(r"^<<[^\n]*>>\n", "", text.strip().strip('"'), flags=re.I)
    if text.startswith("{") and _is_json(text):
        return " ".join(str(s) for s in json.loads(text).get("facts", []))
    return text


def _sentence_count(text: str) -> int:
    return len([s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s])


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def follows(instruction: Instruction, reply: str) -> bool:
    """Whether `reply` follows `instruction`; stricter than IFEval's verifiers where counts are exact."""
    a, text = instruction.args, reply.strip()
    if not text:
        return False
    prose = _prose(text)
    words = re.findall(r"[^\W\d_]+", prose.lower())
    checks = {
        "json": lambda: _is_json(text),
        "lowercase": lambda: text == text.lower(),
        "uppercase": lambda: text == text.upper(),
        "capital_words": lambda: (
            sum(w.isupper() and len(w) > 1 for w in re.findall(r"[A-Za-z]+", text)) >= a["n"]
        ),
        "bullets": lambda: (
            len(re.findall(r"^\"?\* ", text, re.M)) == a["n"] and bool(re.search(r"\A\W*(<<.*\n)?\* ", text))
        ),
        "highlights": lambda: len(re.findall(r"\*[^*\n]+\*", text)) >= a["n"],
        "sections": lambda: len(re.findall(r"Section \d", text, re.I)) == a["n"],
        "title": lambda: bool(re.search(r"<<[^\n]+>>", text)),
        "quotation": lambda: len(text) > 2 and text[0] == text[-1] == '"',
        "no_comma": lambda: "," not in text,
        "end_phrase": lambda: text.endswith(a["phrase"]),
        "fixed_answer": lambda: any(f in text for f in FIXED_ANSWERS),
        "language": lambda: _language(words) == a["language"],
        "postscript": lambda: "\n" + a["marker"] in text,
        "placeholders": lambda: len(re.findall(r"\[[a-z]+\]", text, re.I)) >= a["n"],
        "two_responses": lambda: len([p for p in text.split("******") if p.strip()]) == 2,
        "sentences": lambda: _sentence_count(prose) == a["n"],
        "extremely_concise": lambda: len(words) <= 5,
        "concise": lambda: _sentence_count(prose) == 1 and len(words) > 5,
        "moderate": lambda: _sentence_count(prose) == 3,
        "verbose": lambda: _sentence_count(prose) == 5,
        "extremely_verbose": lambda: _sentence_count(prose) >= 7,
        "include_word": lambda: a["word"] in words,
        "exclude_word": lambda: a["word"] not in words,
    }
    return checks[instruction.id]()


def _language(words: list[str]) -> str:
    marks = {
        "English": {"the", "is", "it", "near", "people"},
        "Spanish": {"el", "es", "cerca", "donde", "todos", "gente"},
        "German": {"ist", "und", "sehr", "nahe", "viele", "man"},
    }
    return max(marks, key=lambda language: sum(w in marks[language] for w in words))
