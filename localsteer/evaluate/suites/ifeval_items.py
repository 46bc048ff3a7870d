"""A file of IFEval-form prompts, read and checked line by line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localsteer.errors import LocalsteerError
from localsteer.evaluate.cells import Rule
from localsteer.verify.verdicts import check_arguments

SEVERAL = "several at once"


@dataclass(frozen=True)
class Item:
    """One line. base: the prompt without the instruction, None where the file has none."""

    number: int
    prompt: str
    base: str | None
    checks: tuple[Rule, ...]

    @property
    def label(self) -> str:
        return self.checks[0].verifier if len(self.checks) == 1 else SEVERAL


def read_items(path: Path) -> list[Item]:
    """Raises LocalsteerError for a file that can't be read or is empty, and names the line that is wrong."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise LocalsteerError(f"{path} can't be read ({error.strerror or error}).") from error
    items = [_item(line, number, path) for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise LocalsteerError(f"{path} holds no prompt: write one JSON object on each line.")
    return items


def _item(line: bytes, number: int, path: Path) -> Item:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # also JSONDecodeError and UnicodeDecodeError
        raise LocalsteerError(f"{path}, line {number}: not readable as JSON ({error}).") from None
    try:
        return _checked(record, number)
    except (LocalsteerError, ValueError) as error:
        raise LocalsteerError(f"{path}, line {number}: {error}") from None


def _checked(record: Any, number: int) -> Item:
    if not isinstance(record, dict):
        raise ValueError("not a JSON object with prompt, instruction_id_list and kwargs.")
    prompt, base = record.get("prompt"), record.get("prompt_without_instruction")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("prompt must be a text that is not empty.")
    if not (base is None or (isinstance(base, str) and base.strip())):
        raise ValueError("prompt_without_instruction must be a text that is not empty, or null.")
    ids, kwargs = record.get("instruction_id_list"), record.get("kwargs")
    if not isinstance(ids, list) or not ids:
        raise ValueError("instruction_id_list must be a list of at least one IFEval id.")
    if not isinstance(kwargs, list) or len(kwargs) != len(ids):
        raise ValueError("kwargs must be a list with a table for each id.")
    checks = []
    for name, arguments in zip(ids, kwargs, strict=True):
        checks.append(Rule(name, check_arguments(name, arguments, prompt=base or prompt)))
    return Item(number, prompt, base, tuple(checks))
