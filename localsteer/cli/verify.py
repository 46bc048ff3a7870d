"""`localsteer verify`: IFEval's verdict on a reply, or on a file of replies. No model, no network."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import click

from localsteer.errors import CatalogError, LocalsteerError

from . import options
from .console import answer, note, print_json, progress, table

RULES = ("strict", "loose")


@dataclass(frozen=True)
class VerdictRow:
    """One line of a JSONL file, with the arguments of its instructions checked. number: 1-based."""

    number: int
    response: str
    prompt: str | None
    instructions: tuple[tuple[str, Mapping[str, Any]], ...]


@dataclass(frozen=True)
class Verdicts:
    """Whether a reply follows each of its instructions, by both rules."""

    row: VerdictRow
    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


@click.command("verify", short_help="Check whether a reply follows an instruction, as IFEval does.")
@click.argument("file", required=False, type=click.Path())
@click.option(
    "-i",
    "--instruction",
    "ids",
    multiple=True,
    metavar="ID",
    help="IFEval's id of an instruction that the reply must follow (--list shows all); repeat for several.",
)
@click.option(
    "--kwargs",
    "arguments",
    multiple=True,
    metavar="JSON",
    help="The instruction's arguments, as in IFEval. With several instructions, one for each, in "
    "the same order; "
    "'{}' for one that has none.",
)
@click.option("--prompt", metavar="TEXT", help="The prompt, which combination:repeat_prompt compares with.")
@click.option("--prompt-file", type=click.Path(), metavar="FILE", help="The same, from a file.")
@click.option("--loose", is_flag=True, help="IFEval's loose rule. [default: strict]")
@click.option(
    "--jsonl",
    type=click.Path(),
    metavar="FILE",
    help="Many replies: lines with response, instruction_id_list, kwargs and prompt; - is standard input.",
)
@click.option("--list", "as_list", is_flag=True, help="The 25 ids and their arguments.")
@options.as_json
@click.pass_context
def command(
    ctx: click.Context, file: str | None, loose: bool, jsonl: str | None, as_json: bool, **params: Any
) -> None:
    """Check whether the reply in FILE, or on standard input, follows one or more instructions of IFEval.

    The exit status is 0 if every reply follows every instruction, and 1 otherwise. --jsonl shows both rules,
    with the accuracy over prompts and over instructions; --loose lets the loose one decide.

    \b
    Examples:
      localsteer verify --instruction change_case:english_lowercase < reply.txt
      localsteer verify -i startend:end_checker --kwargs '{"end_phrase": "Bye!"}' reply.txt
      localsteer verify -i punctuation:no_comma -i detectable_format:json_format --loose reply.txt
      localsteer verify --jsonl replies.jsonl --json
      localsteer verify --list
    """
    _check_usage(file, jsonl, params)
    if params["as_list"]:
        _list(as_json)
    elif jsonl is not None:
        ctx.exit(0 if _verify_many(jsonl, loose, as_json) else 1)
    else:
        prompt = params["prompt"] if params["prompt_file"] is None else _read(params["prompt_file"])
        asked = _asked(params["ids"], params["arguments"], prompt)
        ctx.exit(0 if _verify_one(_reply(file), asked, loose, as_json) else 1)


def _check_usage(file: str | None, jsonl: str | None, params: Mapping[str, Any]) -> None:
    as_list, ids = params["as_list"], params["ids"]
    prompt, prompt_file = params["prompt"], params["prompt_file"]
    of_one = (file, ids, params["arguments"], prompt, prompt_file)
    if (as_list and jsonl is not None) or ((as_list or jsonl is not None) and any(of_one)):
        name = "--list" if as_list else "--jsonl"
        raise click.UsageError(f"{name} stands by itself: leave out replies, instructions and prompts.")
    if not (as_list or jsonl is not None or ids):
        raise click.UsageError("name an --instruction, or use --jsonl or --list.")
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other.")


# --- one reply ---------------------------------------------------------------------------------------------


def _asked(
    ids: Sequence[str], arguments: Sequence[str], prompt: str | None
) -> list[tuple[str, Mapping[str, Any]]]:
    """The instructions with their checked arguments, in the order written. Raises LocalsteerError."""
    from localsteer.verify import check_arguments

    if len(arguments) > len(ids):
        raise click.UsageError(
            f"{len(arguments)} --kwargs for {len(ids)} --instruction: give one for each, in the same order."
        )
    params = [_table(text) for text in arguments] + [{}] * (len(ids) - len(arguments))
    checked = [
        check_arguments(verifier, kwargs, prompt=prompt) for verifier, kwargs in zip(ids, params, strict=True)
    ]
    return [
        (verifier, {name: kwargs.get(name, value) for name, value in known.items()})
        for verifier, kwargs, known in zip(ids, params, checked, strict=True)
    ]


def _table(text: str) -> Mapping[str, Any]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "unreadable"
        raise click.UsageError(
            f"--kwargs {_short(text)} is not JSON ({reason}): write it as in "
            """'{"num_words": 50, "relation": "at least"}'."""
        ) from None
    if not isinstance(arguments, dict):
        raise click.UsageError(f"--kwargs {_short(text)} must be a JSON object of names and values.")
    return arguments


def _verify_one(
    reply: str, asked: Sequence[tuple[str, Mapping[str, Any]]], loose: bool, as_json: bool
) -> bool:
    from localsteer.verify import verify

    passes = [verify(verifier, reply, kwargs, loose=loose) for verifier, kwargs in asked]
    if as_json:
        verdicts = [
            {"instruction_id": verifier, "kwargs": kwargs, "follows": passed}
            for (verifier, kwargs), passed in zip(asked, passes, strict=True)
        ]
        print_json({"rule": RULES[loose], "follows": all(passes), "verdicts": verdicts})
    else:
        for (verifier, kwargs), passed in zip(asked, passes, strict=True):
            click.echo("  ".join(filter(None, (_word(passed), verifier, _one_line(kwargs)))))
    return all(passes)


def _word(passed: bool) -> str:
    return "pass" if passed else "fail"


def _one_line(kwargs: Mapping[str, Any]) -> str:
    """The arguments for the terminal, short."""
    return ", ".join(f"{name}={_short(value)}" for name, value in kwargs.items())


def _short(value: Any) -> str:
    """A short form in ASCII, which can't control the terminal."""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (str, tuple, list)) else str(value)
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return text if len(text) <= 60 else text[:57] + "..."


# --- reading -----------------------------------------------------------------------------------------------


def _reply(file: str | None) -> str:
    """The reply without the line break that ends a text file, since a loose verdict drops the last line."""
    text = _standard_input() if file in (None, "-") else _read(file)
    return text.removesuffix("\n").removesuffix("\r")


def _standard_input() -> str:
    if sys.stdin is None:
        raise click.UsageError("there is no reply: name a file, or pipe one in.")
    if sys.stdin.isatty():
        note("reading from standard input; end it with Ctrl-D.")
    return _decoded(sys.stdin.buffer.read(), "standard input")


def _read(file: str) -> str:
    try:
        return _decoded(Path(file).read_bytes(), file)
    except OSError as error:
        raise LocalsteerError(f"{file} can't be read: {error.strerror or error}.") from error


def _decoded(raw: bytes, name: str) -> str:
    """The bytes as text. Raises LocalsteerError for anything else, and for a NUL, which no reply holds."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        where = f"line {line}, byte {error.start}"
        raise LocalsteerError(f"{name} is not UTF-8 text ({where}): convert it first.") from None
    if "\0" in text:
        raise LocalsteerError(f"{name} is not text: it holds a NUL byte (byte {raw.index(0)}).")
    return text


# --- many replies ------------------------------------------------------------------------------------------


def _verify_many(file: str, loose: bool, as_json: bool) -> bool:
    """Show the verdicts of all lines, and return whether all pass. Every line is checked before the first
    verdict, so that a mistake in line 900 shows at once."""
    name = "standard input" if file == "-" else file
    text = _standard_input() if file == "-" else _read(file)
    rows = list(_rows(text, name))
    if not rows:
        raise LocalsteerError(f"{name} is empty: it needs one JSON object for each reply.")
    verdicts = []
    with progress("verifying") as advance:
        for row in rows:
            verdicts.append(_judged(row))
            advance(len(verdicts), len(rows))
    document = _document(verdicts)
    print_json(document) if as_json else _print_many(document)
    return all(all(getattr(verdict, RULES[loose])) for verdict in verdicts)


def _rows(text: str, name: str) -> Iterator[VerdictRow]:
    # split only at line feeds: JSON text may contain other line breaks, such as U+2028
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield _row(number, line)
            except CatalogError as error:
                raise CatalogError(f"{name}, line {number}: {error}") from None


def _row(number: int, line: str) -> VerdictRow:
    """The line's record. Raises CatalogError with what is wrong in the line."""
    from localsteer.verify import check_arguments

    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f" ({error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise CatalogError(f"not JSON{reason}: repair or remove the line.") from None
    if not isinstance(record, dict):
        raise CatalogError(f"expected a JSON object, not {_short(record)}.")
    response, prompt = record.get("response"), record.get("prompt")
    if not isinstance(response, str):
        raise CatalogError("`response` must be the reply's text.")
    if not (prompt is None or isinstance(prompt, str)):
        raise CatalogError("`prompt` must be text.")
    ids = _listed(record, "instruction_id_list")
    kwargs = _listed(record, "kwargs") if record.get("kwargs") is not None else [{}] * len(ids)
    if not ids or len(kwargs) != len(ids):
        raise CatalogError(
            f"{len(ids)} in `instruction_id_list`, {len(kwargs)} in `kwargs`: expected at least "
            "one of the first, and "
            "as many of the second."
        )
    checked = (
        check_arguments(verifier, params, prompt=prompt) for verifier, params in zip(ids, kwargs, strict=True)
    )
    return VerdictRow(number, response, prompt, tuple(zip(ids, checked, strict=True)))


def _listed(record: Mapping[str, Any], key: str) -> list[Any]:
    values = record.get(key)
    if not isinstance(values, list):
        raise CatalogError(f"`{key}` must be a list.")
    return values


def _judged(row: VerdictRow) -> Verdicts:
    from localsteer.verify import verify

    strict, loose = (
        tuple(verify(verifier, row.response, kwargs, loose=rule) for verifier, kwargs in row.instructions)
        for rule in (False, True)
    )
    return Verdicts(row, strict, loose)


class VerifiedLine(TypedDict):
    """A line of the file: whether each of its instructions is followed, by both rules."""

    line: int
    instruction_id_list: list[str]
    strict: list[bool]
    loose: list[bool]


class VerifyDocument(TypedDict):
    """accuracy: by rule, `prompt`: the share of replies that follow all of their instructions; `instruction`:
    of all instructions, each counted alike. by_instruction: n, and a share for each rule."""

    n: dict[str, int]
    accuracy: dict[str, dict[str, float]]
    by_instruction: dict[str, dict[str, float]]
    lines: list[VerifiedLine]


def _document(verdicts: Sequence[Verdicts]) -> VerifyDocument:
    rows: list[VerifiedLine] = [
        {
            "line": verdict.row.number,
            "instruction_id_list": [name for name, _ in verdict.row.instructions],
            "strict": list(verdict.strict),
            "loose": list(verdict.loose),
        }
        for verdict in verdicts
    ]
    accuracy = {
        rule: {
            "prompt": _share([all(row[rule]) for row in rows]),
            "instruction": _share([passed for row in rows for passed in row[rule]]),
        }
        for rule in RULES
    }
    n = {"prompts": len(rows), "instructions": sum(len(row["strict"]) for row in rows)}
    return {"n": n, "accuracy": accuracy, "by_instruction": _by_instruction(rows), "lines": rows}


def _by_instruction(rows: Sequence[VerifiedLine]) -> dict[str, dict[str, float]]:
    verdicts: dict[str, list[tuple[bool, bool]]] = {}
    for row in rows:
        for name, *passed in zip(row["instruction_id_list"], row["strict"], row["loose"], strict=True):
            verdicts.setdefault(name, []).append(tuple(passed))
    return {
        name: {"n": len(pairs), **{rule: _share([pair[i] for pair in pairs]) for i, rule in enumerate(RULES)}}
        for name, pairs in sorted(verdicts.items())
    }


def _share(passed: Sequence[bool]) -> float:
    return sum(passed) / len(passed)


def _print_many(document: VerifyDocument) -> None:
    lines = table("line", *RULES, "instructions", numbers=("line",))
    for row in document["lines"]:
        lines.add_row(
            str(row["line"]),
            *(_word(all(row[rule])) for rule in RULES),
            ", ".join(row["instruction_id_list"]),
        )
    per_id = table("instruction", "n", *RULES, numbers=("n", *RULES))
    for name, figures in document["by_instruction"].items():
        per_id.add_row(name, str(figures["n"]), *(_percent(figures[rule]) for rule in RULES))
    accuracy = table("accuracy over", "n", *RULES, numbers=("n", *RULES))
    for level in ("prompt", "instruction"):
        shares = [_percent(document["accuracy"][rule][level]) for rule in RULES]
        accuracy.add_row(f"{level}s", str(document["n"][f"{level}s"]), *shares)
    for part in (lines, per_id, accuracy):
        answer().print(part)
        if part is not accuracy:
            answer().print()


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


# --- the list ----------------------------------------------------------------------------------------------


def _list(as_json: bool) -> None:
    from localsteer.verify.verifiers import VERIFIERS
    from localsteer.verify.verifiers.parameters import describe

    ids = {
        name: {argument: describe(checker) for argument, checker in verifier.parameters.items()}
        for name, verifier in VERIFIERS.items()
    }
    if as_json:
        print_json(ids)
        return
    rows = table("instruction", "arguments")
    for name, arguments in ids.items():
        rows.add_row(name, "\n".join(f"{argument}: {wanted}" for argument, wanted in arguments.items()))
    answer().print(rows)
