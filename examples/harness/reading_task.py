"""Data and metrics of the tasks `reading...`: functions that their YAML files name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset

DATA = Path(__file__).parent / "reading.jsonl"


def questions(**_arguments: Any) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(_rows())}


def passages(**_arguments: Any) -> dict[str, Dataset]:
    """Each text once."""
    texts = dict.fromkeys(row["passage"] for row in _rows())
    return {"test": Dataset.from_list([{"passage": text} for text in texts])}


def judge(doc: dict[str, Any], replies: list[str]) -> dict[str, float]:
    """Whether the reply names the answer, as a word, and whether it is JSON from end to end."""
    return {"names_it": float(names(doc["answer"], replies[0])), "is_json": float(is_json(replies[0]))}


def names(answer: str, reply: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer)}s?(?!\w)", reply, re.IGNORECASE) is not None


def is_json(reply: str) -> bool:
    try:
        json.loads(reply)
    except ValueError:
        return False
    return True


def _rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in DATA.read_text("utf-8").splitlines()]
