"""Schemas that require themselves: a reply under one could never end."""

from __future__ import annotations

import json
import time

import jsonschema
import numpy as np
import pytest

from localsteer.constrain import Constraint, TokenBytes
from localsteer.constrain.json_schema import compiled_schema
from localsteer.errors import ConstraintError

NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}, "required": ["next"]}
ENDLESS = {
    "root": ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "properties.a.$ref"),
    "one of $defs": ({"$ref": "#/$defs/Node", "$defs": {"Node": NODE}}, "$ref"),
    "two of $defs": (
        {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "a": {"$ref": "#/$defs/A"}},
            "required": ["x", "a"],
            "$defs": {
                "A": {"type": "array", "items": {"$ref": "#/$defs/B"}, "minItems": 1},
                "B": {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"]},
            },
        },
        "properties.a.$ref",
    ),
    "every branch": (
        {"anyOf": [NODE, {"allOf": [NODE]}], "$defs": {"Node": NODE}},
        "anyOf.0.properties.next.$ref",
    ),
    "a value of a record": (
        {"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["a"]},
        "additionalProperties.$ref",
    ),
    "the second item": (
        {"type": "array", "prefixItems": [{"type": "null"}], "items": {"$ref": "#"}, "minItems": 2},
        "items.$ref",
    ),
}
# in each, `a` can't be given, and all else can
PARTLY = {
    "optional": {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/Node"}, "b": {"type": "integer"}},
        "additionalProperties": False,
        "$defs": {"Node": NODE},
    },
    "a branch": {
        "anyOf": [{"$ref": "#/$defs/Node"}, {"type": "integer"}, {"enum": ["a"]}],
        "$defs": {"Node": NODE},
    },
    "items": {"type": "array", "items": {"$ref": "#/$defs/Node"}, "$defs": {"Node": NODE}},
}
FINITE = {
    "null ends it": {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
    },
    "types": {
        "type": ["object", "string"],
        "properties": {"next": {"$ref": "#"}},
        "required": ["next"],
    },
    "an empty list": {
        "type": "object",
        "properties": {"children": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["children"],
        "additionalProperties": False,
    },
    "a value": {
        "$ref": "#/$defs/A",
        "$defs": {
            "A": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/A"}, "minItems": 1}, {"const": 1}]}
        },
    },
}


@pytest.fixture(scope="module")
def tokens():
    return TokenBytes([*(bytes([i]) for i in range(256)), b""], [256])


@pytest.mark.parametrize("name", ENDLESS)
def test_one_that_can_match_nothing_is_refused_by_its_path(name):
    schema, path = ENDLESS[name]
    with pytest.raises(ConstraintError, match="never ends") as refusal:
        compiled_schema(schema)
    assert ".".join(refusal.value.path) == path


def replies(tokens, schema, n=30, longest=2000):
    """Drawn among the allowed bytes; few spaces and digits, so that they end."""
    chance = np.random.default_rng(1)
    for _ in range(n):
        matcher, reply = tokens.matcher(Constraint.json_schema(schema)), b""
        while len(reply) < longest:
            allowed = np.flatnonzero(np.isfinite(matcher.mask(np.zeros(257, np.float32))))
            ends = [token for token in allowed if token == 256 or token in b'}]"']
            token = int(chance.choice(ends if ends and chance.random() < 0.5 else allowed))
            if token == 256:
                break
            matcher.accept(token)
            reply += bytes([token])
        yield reply


@pytest.mark.parametrize("name", [*PARTLY, *FINITE])
def test_every_reply_under_another_ends_and_matches(tokens, name):
    schema = {**PARTLY, **FINITE}[name]
    drawn = set(replies(tokens, schema))
    for reply in drawn:
        jsonschema.validate(json.loads(reply), schema)
    assert len(drawn) > 1 or name == "items"  # there only [] matches


@pytest.mark.parametrize(
    "odd",
    [
        {"type": [{}, ["object"]]},
        {"type": [{}]},
        {"required": {"a": 1}},
        {"required": [["a"], 1]},
        {"type": "array", "minItems": 1e400},
        {"type": "array", "minItems": float("nan")},
        {"allOf": {"a": 1}},
        {"type": "object", "properties": ["a"], "required": ["a"]},
        {"anyOf": [1, None]},
        {"$ref": 5},
        {"$ref": "#/$defs"},
        {"$ref": "#/$defs/Odd/minItems/0"},
        {"items": [[]], "type": "array", "minItems": True},
    ],
)
def test_what_is_no_schema_is_refused_in_one_line_or_taken(odd):
    try:
        compiled_schema({"$ref": "#/$defs/Odd", "$defs": {"Odd": odd}})
    except ConstraintError as error:
        assert "\n" not in str(error)


def test_large_entangled_schemas_take_no_seconds():  # four times the largest that `serve` takes
    chain = {
        f"D{i}": {"type": "array", "items": {"$ref": f"#/$defs/D{i + 1}"}, "minItems": 1} for i in range(2000)
    }
    every = {f"p{i}": {"$ref": f"#/$defs/D{i}"} for i in range(2000)}
    root = {"type": "object", "properties": every, "required": list(every), "$defs": chain}
    start = time.process_time()
    try:
        compiled_schema(root)
    except ConstraintError as error:
        assert "\n" not in str(error)
    assert time.process_time() - start < 5
