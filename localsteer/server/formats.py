"""response_format: a JSON schema becomes a grammar, and llama.cpp draws no token that breaks it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from .errors import ApiError
from .limits import MAX_GRAMMAR, MAX_SCHEMA
from .schemas import ResponseFormat

MAX_RANGE = 256
# The converter writes a rule for every repetition, one inside the other multiplied: a schema of a few bytes
# could keep the server busy for minutes.
MAX_REPEATS = 4096
_REPEATING = ("minLength", "maxLength", "minItems", "maxItems")
_COUNTS = re.compile(r"\{(\d+)(?:,(\d*))?\}")  # of a pattern

# llama.cpp's rule for a character of a string lets control characters through, which JSON does not have
_LOOSE, _STRICT = r'[^"\\]', r'[^"\\\x7F\x00-\x1F]'


def grammar_of(wanted: ResponseFormat | None) -> str | None:
    """GBNF text; None where any text will do. Raises ApiError for a schema that can't be turned into one."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return grammar_of_schema({"type": "object"}, "response_format")
    assert wanted.json_schema is not None
    return grammar_of_schema(wanted.json_schema.schema_, "response_format.json_schema.schema")


def grammar_of_schema(schema: Mapping[str, Any], param: str) -> str:
    """param: the field to blame."""
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    _check_repeats(schema, param)
    try:
        text = json.dumps(_enumerated(schema))
        if len(text) > MAX_SCHEMA:
            raise ApiError(f"{param}: must be at most {MAX_SCHEMA} bytes, not {len(text)}.", param=param)
        grammar = json_schema_to_gbnf(text)
    except ApiError:
        raise
    except Exception as error:  # the converter raises all sorts for what it does not know
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ApiError(f"{param}: can't be turned into a grammar ({why}).", param=param) from None
    if len(grammar) > MAX_GRAMMAR:
        raise ApiError(
            f"{param}: makes too large a grammar ({len(grammar)} bytes): simplify it.", param=param
        )
    return grammar.replace(_LOOSE, _STRICT)


def _check_repeats(schema: Any, param: str, times: int = 1) -> None:
    """times: how often this part of the schema is repeated by those around it."""
    if isinstance(schema, list):
        for each in schema:
            _check_repeats(each, param, times)
    if not isinstance(schema, dict):
        return
    counts = [schema[key] for key in _REPEATING if isinstance(schema.get(key), int)]
    if isinstance(schema.get("pattern"), str):
        found = _COUNTS.findall(schema["pattern"])
        counts.append(math.prod(max(1, *(int(each[:9] or 0) for each in pair)) for pair in found))
    times *= max(1, *counts) if counts else 1
    if times > MAX_REPEATS:
        raise ApiError(f"{param}: repeats {times} times, at most {MAX_REPEATS} are possible.", param=param)
    for each in schema.values():
        _check_repeats(each, param, times)


def _enumerated(schema: Any) -> Any:
    """llama.cpp's converter knows no bounds of numbers: a short range of integers becomes its values.

    Wider ones, and those of other numbers, are not enforced; docs/server.md says so.
    """
    if isinstance(schema, list):
        return [_enumerated(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    low, high = schema.get("minimum"), schema.get("maximum")
    is_range = schema.get("type") == "integer" and isinstance(low, int) and isinstance(high, int)
    if is_range and 0 <= high - low < MAX_RANGE and "enum" not in schema:
        return {"enum": list(range(low, high + 1))}
    return {key: _enumerated(each) for key, each in schema.items()}
