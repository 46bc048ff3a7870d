"""IFEval's verdicts: does a reply follow an instruction? Deterministic, offline, strict and loose.

    verify("change_case:english_lowercase", "the fox sleeps.", {})        # True
    verify("keywords:frequency", reply, {"keyword": "fox", "frequency": 2, "relation": "at least"})

Ids and arguments are written as in IFEval. The official checkers' quirks are kept and named in
`localsteer.verify.verifiers`; docs/evaluation.md gathers them and measures the agreement.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from localsteer.errors import CatalogError, LocalsteerError
from localsteer.jsonable import JsonObject
from localsteer.verify.verifiers import VERIFIERS, Verifier

INSTRUCTION_IDS: tuple[str, ...] = tuple(VERIFIERS)

_VALUE_SHOWN = 60  # characters of a wrong value that an error message quotes


def verify(
    instruction_id: str,
    reply: str,
    kwargs: Mapping[str, Any] | None = None,
    *,
    prompt: str | None = None,
    loose: bool = False,
) -> bool:
    """Whether a reply follows an instruction, by IFEval's strict or loose rule. A blank reply never does.

    Loose: it is enough that one of eight variants follows it: the reply without its first line, its last
    line, both or neither, each with and without asterisks. So a greeting or bold type does not fail a reply;
    but a loose verdict can also pass what was not asked for, such as a short reply that is only the first
    line.

    Where IFEval draws random numbers (language detection), the likelier of its verdicts is returned.

    prompt: what was asked; `combination:repeat_prompt` takes it when `prompt_to_repeat` is missing.
    Raises CatalogError for an unknown id, or for an argument that is missing, unknown or makes no sense.
    """
    arguments = check_arguments(instruction_id, kwargs, prompt=prompt)
    if not isinstance(reply, str):
        raise LocalsteerError(f"the reply to verify must be text, not {type(reply).__name__}")
    check = VERIFIERS[instruction_id].check
    all_fail = 1.0  # the chance that every variant fails
    for variant in loose_variants(reply) if loose else (reply,):
        # IFEval draws anew for each variant, also where two are the same text: eight chances to pass.
        all_fail *= 1.0 - check(variant, **arguments) if variant.strip() else 1.0
    return all_fail < 0.5


def check_arguments(
    instruction_id: str, kwargs: Mapping[str, Any] | None, *, prompt: str | None = None
) -> JsonObject:
    """The arguments that a verifier will be called with, or a CatalogError that names what is wrong.

    None stands for "not given": some copies of IFEval write every name in every row, most of them null.
    """
    verifier = _find(instruction_id)
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise CatalogError(
            f"{instruction_id}: arguments must be a table of names and values, not {_show(kwargs)}"
        )
    given = {name: value for name, value in (kwargs or {}).items() if value is not None}
    if prompt is not None and "prompt_to_repeat" in verifier.parameters:
        given.setdefault("prompt_to_repeat", prompt)
    _check_names(instruction_id, verifier, given)
    arguments = {name: _checked(instruction_id, verifier, name, value) for name, value in given.items()}
    if arguments.get("nth_paragraph", 0) > arguments.get("num_paragraphs", 0):
        raise CatalogError(
            f"{instruction_id}: nth_paragraph {arguments['nth_paragraph']} is beyond num_paragraphs "
            f"{arguments['num_paragraphs']}"
        )
    return arguments


def loose_variants(reply: str) -> tuple[str, ...]:
    """The eight texts of which one must follow the instruction. Only a line feed separates lines."""
    lines = reply.split("\n")
    shortened = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    kept = (reply, *shortened)
    return (*kept, *(text.replace("*", "") for text in kept))


def _find(instruction_id: str) -> Verifier:
    verifier = VERIFIERS.get(instruction_id) if isinstance(instruction_id, str) else None
    if verifier is None:
        close = difflib.get_close_matches(str(instruction_id), INSTRUCTION_IDS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise CatalogError(
            f"unknown instruction id {_show(instruction_id)}: {hint}Choose from {', '.join(INSTRUCTION_IDS)}"
        )
    return verifier


def _check_names(instruction_id: str, verifier: Verifier, given: Mapping[str, Any]) -> None:
    known = ", ".join(verifier.parameters) or "none"
    if "prompt_to_repeat" in verifier.parameters:
        known += ", or the prompt (--prompt)"
    for name in given:
        if name not in verifier.parameters:
            raise CatalogError(f"{instruction_id}: unknown argument {_show(name)}; it takes {known}")
    for name in verifier.parameters:
        if name not in given:
            raise CatalogError(f"{instruction_id}: argument {name!r} is missing; it takes {known}")


def _checked(instruction_id: str, verifier: Verifier, name: str, value: Any) -> Any:
    try:
        return verifier.parameters[name](value)
    except CatalogError as error:
        raise CatalogError(f"{instruction_id}: {name}: {error}") from None
    except ValueError as wanted:
        raise CatalogError(f"{instruction_id}: {name} must be {wanted}, not {_show(value)}") from None


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _VALUE_SHOWN else shown[: _VALUE_SHOWN - 3] + "..."
