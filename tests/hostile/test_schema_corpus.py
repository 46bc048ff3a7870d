"""What a schema accepts, token by token, beside `jsonschema`; and what it refuses, by keyword and path."""

from __future__ import annotations

import copy
import json
import os
import random
import warnings
from itertools import islice, permutations, product
from pathlib import Path

import numpy as np
import pytest

jsonschema = pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")
pytest.importorskip("pydantic", reason="the package pydantic is not installed")

from schema_corpus import CASES, FORMATS, REFUSED  # noqa: E402

from localsteer.constrain import Constraint, Matcher, TokenBytes  # noqa: E402
from localsteer.errors import ConstraintError  # noqa: E402

SUITE = "LOCALSTEER_SCHEMA_SUITE"  # a folder: tests/draft2020-12 of json-schema-org/JSON-Schema-Test-Suite
# every byte, some longer tokens, and an end
PIECES = [
    *(bytes([i]) for i in range(256)),
    b'{"',
    b'": "',
    b'", "',
    b"]}",
    b"\n  ",
    b"true",
    b"  ",
    b"ab",
    b"",
]
END = len(PIECES) - 1


@pytest.fixture(scope="module")
def tokens() -> TokenBytes:
    return TokenBytes(PIECES, [END])


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of Python's `re`, at patterns that jsonschema tries
        yield


def validator(schema):
    old = isinstance(schema, dict) and "draft-07" in schema.get("$schema", "")
    return (jsonschema.Draft7Validator if old else jsonschema.Draft202012Validator)(schema)


def spellings(document):
    yield json.dumps(document, ensure_ascii=False)
    yield json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    yield json.dumps(document, ensure_ascii=False, indent=2)


def accepts(matcher: Matcher, text: str) -> bool:
    return matcher.accepts(list(text.encode()))


def test_there_are_enough():
    assert len(CASES) >= 150 and len(REFUSED) >= 45


@pytest.mark.parametrize(("name", "schema", "documents"), CASES, ids=[name for name, *_ in CASES])
def test_what_is_accepted_is_what_is_valid(tokens, name, schema, documents):
    matcher, truth = tokens.matcher(Constraint.json_schema(schema)), validator(schema)
    valid = [truth.is_valid(document) for document in documents]
    assert any(valid) and (schema in (True, {}) or not all(valid)), "each case has both kinds"
    for document, is_valid in zip(documents, valid, strict=True):
        for text in spellings(document):
            assert accepts(matcher, text) is is_valid, text
            if is_valid:  # and nothing else is
                assert not accepts(matcher, text + "x") and not accepts(matcher, f"{text},{text}")


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tokens, name):
    matcher = tokens.matcher(Constraint.json_schema({"type": "string", "format": name}))
    valid, wrong = FORMATS[name]
    assert [text for text in valid + wrong if accepts(matcher, json.dumps(text))] == valid


@pytest.mark.parametrize(
    ("schema", "path"), REFUSED, ids=[f"{i} {case[1]}" for i, case in enumerate(REFUSED)]
)
def test_what_can_t_be_enforced_is_named(tokens, schema, path):
    with pytest.raises(ConstraintError) as caught:
        tokens.matcher(Constraint.json_schema(schema))
    assert ".".join(caught.value.path) == path
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_random_replies_are_valid(tokens):
    """Tokens drawn at random from the mask: the whole reply is a valid document, whatever the schema."""
    chance, ended = random.Random(1), 0
    for name, schema, _ in CASES[::2]:
        reply = drawn(tokens.matcher(Constraint.json_schema(schema)), chance)
        if reply is not None:
            ended += 1
            document = json.loads(reply)
            assert validator(schema).is_valid(document), (name, reply)
    assert ended > len(CASES) / 4


def drawn(matcher: Matcher, chance: random.Random, most: int = 120) -> bytes | None:
    """A reply of random tokens that ends where it may; None for one that does not end in time."""
    reply = bytearray()
    for _ in range(most):
        allowed = np.flatnonzero(matcher.mask(np.zeros(END + 1, np.float32)) == 0)
        # letters go on for ever; a quote, a bracket or the end is taken where it stands
        closing = [token for token in allowed if token == END or PIECES[token] in (b'"', b"]", b"}")]
        token = int(chance.choice(closing if closing and chance.random() < 0.5 else allowed))
        matcher.accept(token)
        if token == END:
            return bytes(reply)
        reply += PIECES[token]
    return None


ODD = [None, True, -1, 1.5, 10**30, "", "(", "\0", "#", "\ud800", [], {}, [[]], [{}], {"a": [{}]}, ["a", "a"],
       "integer", {"$ref": "#"}, float("nan")]  # fmt: skip
KEYS = (
    "type", "const", "enum", "properties", "patternProperties", "required", "items", "prefixItems", "allOf",
    "anyOf", "oneOf", "not", "propertyNames", "additionalProperties", "minimum", "multipleOf", "minLength",
    "pattern", "format", "$ref", "$defs", "x-guidance", "$id",
)  # fmt: skip


def test_no_schema_breaks_anything(tokens):
    """Parts of schemas in the place of others, and things that are no schema: taken, or refused in a line."""
    chance = random.Random(5)
    pool = [*(schema for _, schema, _ in CASES), *(schema for schema, _ in REFUSED)]
    for _ in range(100):
        schema = copy.deepcopy(chance.choice(pool))
        for _ in range(chance.randint(1, 3)):
            place = chance.choice([*objects(schema), {}])
            place[chance.choice([*KEYS, *place])] = copy.deepcopy(chance.choice([*ODD, chance.choice(pool)]))
        try:
            tokens.matcher(Constraint.json_schema(schema))
        except ConstraintError as error:
            assert "\n" not in str(error) and len(str(error)) < 800


def objects(value):
    if isinstance(value, dict):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        yield from objects(each)


@pytest.mark.skipif(SUITE not in os.environ, reason=f"{SUITE} does not lead to the official test suite")
def test_the_official_suite(tokens):
    """Refused by keyword, or nothing that is invalid is accepted; and nearly all that is valid."""
    counts = {"valid": 0, "accepted": 0, "invalid": 0, "refused": 0}
    for file in sorted(Path(os.environ[SUITE]).glob("*.json")):
        for case in json.loads(file.read_text("utf-8")):
            try:
                matcher = tokens.matcher(Constraint.json_schema(case["schema"]))
            except ConstraintError as error:
                assert error.path or case["schema"] is False, (case["description"], str(error))
                counts["refused"] += 1
                continue
            for test in case["tests"]:
                found = any(
                    accepts(matcher, next(spellings(each))) for each in islice(orders(test["data"]), 100)
                )
                assert test["valid"] or not found, (file.name, case["description"], test["description"])
                counts["valid" if test["valid"] else "invalid"] += 1
                counts["accepted"] += found
    assert counts["accepted"] > 0.93 * counts["valid"] and counts["invalid"] > 200, counts


def orders(value):
    """The same document with its properties in every order: a schema's own order is kept in replies."""
    if isinstance(value, dict):
        for names in permutations(value) if len(value) < 5 else [tuple(value)]:
            for values in product(*(list(orders(value[name])) for name in names)):
                yield dict(zip(names, values, strict=True))
    elif isinstance(value, list):
        yield from map(list, product(*(list(orders(each)) for each in value)))
    else:
        yield value
