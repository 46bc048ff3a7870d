"""Schemas as pydantic, zod and OpenAI's documentation make them, with documents; jsonschema says which are valid.

`CASES`: (name, schema, documents), some valid and some not. `REFUSED`: (schema, path of the keyword).
"""

from __future__ import annotations

import datetime
import enum
import uuid
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict


class Color(enum.Enum):
    red = "red"
    green = 'gr"een'


class Size(enum.IntEnum):
    s = 1
    m = 2


class Point(NamedTuple):
    x: int
    y: int = 0


class Movie(TypedDict, total=False):
    title: str
    year: int


class Address(BaseModel):
    model_config = ConfigDict(extra="forbid")
    street: str
    number: Annotated[int, Field(ge=1, le=9999)]
    zip: Annotated[str, Field(pattern=r"^\d{5}$")] | None = None


class Person(BaseModel):
    name: Annotated[str, Field(min_length=1, max_length=10)]
    born: datetime.date
    color: Color = Color.red
    addresses: Annotated[list[Address], Field(max_length=2)] = []


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog", "puppy"]
    barks: bool


class Owner(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


class Tree(BaseModel):
    value: int
    children: list[Tree] = []


class Linked(BaseModel):
    model_config = ConfigDict(extra="forbid")
    value: str
    next: Linked | None = None


class Odd(BaseModel):
    """Names that need quoting, somewhere."""

    quote: int = Field(alias='a "quoted" name')
    slash: int = Field(alias="a/b c~d")
    back: int = Field(alias="back\\slash")


class Step(BaseModel):
    model_config = ConfigDict(extra="forbid")
    explanation: str
    output: str


class MathReply(BaseModel):
    model_config = ConfigDict(extra="forbid")
    steps: list[Step]
    final_answer: str


ADDRESS = {"street": "Mill", "number": 12}
# (a type, documents)
PYDANTIC: list[tuple[Any, list[Any]]] = [
    (int, [0, -7, 12345, 1.5, "1", None, True]),
    (float, [0, 1.5, -2e3, "1", None]),
    (bool, [True, False, 0, "true"]),
    (str, ["", "a", 'q"\\\n', "é中", 5, None]),
    (None, [None, 0, "null"]),
    (list[int], [[], [1], [1, 2], ["1"], [1.5], {}]),
    (list[list[bool]], [[], [[]], [[True], [False, True]], [True], [[0]]]),
    (dict[str, int], [{}, {"a": 1}, {"a b": 1, 'q"': 2}, {"a": "x"}, [], {"a": None}]),
    (dict[str, list[str]], [{}, {"a": []}, {"a": ["b"]}, {"a": "b"}, {"a": [1]}]),
    (dict[Literal["a", "b"], int], [{"a": 1, "b": 2}, {"c": 1}, {"a": "x"}]),
    (dict[Annotated[str, Field(pattern="^k[0-9]$")], bool], [{"k1": True}, {"x": True}, {"k1": 1}]),
    (int | None, [None, 3, "3", 1.5]),
    (int | str, [3, "3", None, [3]]),
    (list[int] | dict[str, str], [[1], {"a": "b"}, ["a"], {"a": 1}]),
    (Literal["a", 'b"c', "d\\e"], ["a", 'b"c', "d\\e", "x", None]),
    (Literal[1, "1", None], [1, "1", None, 2, "2"]),
    (Color, ["red", 'gr"een', "green", 1]),
    (Size, [1, 2, 3, "1"]),
    (tuple[int, str], [[1, "a"], [1], [1, "a", 2], ["a", 1]]),
    (tuple[int, ...], [[], [1, 2], ["a"]]),
    (Point, [[1], [1, 2], [], ["a"], [1, 2, 3]]),
    (Movie, [{}, {"title": "x"}, {"title": "x", "year": 1}, {"title": 1}, {"year": "1"}]),
    (Annotated[int, Field(ge=0, le=8)], [0, 8, 9, -1, 10]),
    (Annotated[int, Field(gt=-5, lt=5)], [-4, 4, -5, 5]),
    (Annotated[int, Field(ge=1)], [1, 999999, 0, -1]),
    (Annotated[int, Field(le=1000000)], [-5, 1000000, 1000001]),
    (Annotated[int, Field(multiple_of=5)], [0, 5, -10, 3]),
    (Annotated[float, Field(ge=0, le=1)], [0, 0.5, 1, 1.01, -0.1]),
    (Annotated[float, Field(gt=0)], [0.01, 5, 0, -0.5]),
    (Annotated[float, Field(gt=-273.15, lt=1.5)], [-273, 0, 1.4999, -273.15, 1.5]),
    (Annotated[str, Field(min_length=2, max_length=4)], ["ab", "abcd", "a", "abcde", "éé"]),
    (Annotated[str, Field(max_length=5000)], ["", "x" * 5000, "x" * 5001]),
    (Annotated[str, Field(pattern=r"^\d{4}$")], ["1234", "123", "12345", "abcd"]),
    (Annotated[str, Field(pattern=r"^a\.b$")], ["a.b", "axb"]),
    (Annotated[str, Field(pattern=r"^\S+$")], ["ab", "a b", "", "a\tb", "a\u00a0b"]),
    (Annotated[str, Field(pattern=r"^(?:a|b)+$")], ["a", "abab", "", "c"]),
    (Annotated[str, Field(pattern=r"foo")], ["foo", "a foo b", "fo o"]),
    (Annotated[str, Field(pattern=r"^[\w.]+@[\w.]+$")], ["a.b@c.d", "a@", "@b", "a b@c"]),
    (Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")], ["#00ff00", "#00ff0", "00ff00"]),
    (Annotated[str, Field(pattern=r"^[a-z]+(-[a-z]+)*$", max_length=9)], ["a-b", "a", "a-", "abcdefghi-j"]),
    (Annotated[list[int], Field(min_length=1, max_length=3)], [[1], [1, 2, 3], [], [1, 2, 3, 4]]),
    (Annotated[dict[str, int], Field(min_length=1, max_length=2)], [{"a": 1}, {}, {"a": 1, "b": 2, "c": 3}]),
    (bytes, ["", "abc", 5]),
    (Any, [1, "a", None, {"b": [1]}, [[]]]),
    (Address, [ADDRESS, {**ADDRESS, "zip": "01234"}, {**ADDRESS, "zip": None}, {**ADDRESS, "zip": "1"},
               {"street": "x"}, {**ADDRESS, "number": 0}, {**ADDRESS, "other": 1}]),
    (Person, [{"name": "A", "born": "2000-02-29"}, {"name": "A", "born": "2000-01-01", "color": "red"},
              {"name": "A", "born": "2000-01-01", "color": "red", "addresses": [ADDRESS, ADDRESS]},
              {"name": "", "born": "2000-01-01"}, {"name": "A"}, {"name": "A", "born": 5},
              {"name": "A", "born": "2000-01-01", "color": "blue"},
              {"name": "A", "born": "2000-01-01", "addresses": [ADDRESS, ADDRESS, ADDRESS]}]),
    (Owner, [{"pet": {"kind": "cat", "lives": 9}}, {"pet": {"kind": "puppy", "barks": True}},
             {"pet": {"kind": "cat", "barks": True}}, {"pet": {"kind": "cow"}}, {}]),
    (Tree, [{"value": 1}, {"value": 1, "children": [{"value": 2, "children": [{"value": 3}]}]},
            {"value": 1, "children": [{"children": []}]}, {"value": 1, "children": 5}]),
    (Linked, [{"value": "a"}, {"value": "a", "next": {"value": "b", "next": None}}, {"value": "a", "next": {}},
              {"value": "a", "next": {"value": "b", "next": 5}}]),
    (Odd, [{'a "quoted" name': 1, "a/b c~d": 2, "back\\slash": 3}, {'a "quoted" name': 1}, {}]),
    (MathReply, [{"steps": [{"explanation": "e", "output": "o"}], "final_answer": "x"},
                 {"steps": [], "final_answer": "x"}, {"steps": [{"explanation": "e"}], "final_answer": "x"},
                 {"final_answer": "x"}, {"steps": [], "final_answer": "x", "more": 1}]),
    (list[Cat | Dog], [[{"kind": "dog", "barks": False}], [{"kind": "cat"}], []]),
]  # fmt: skip

_TEXT = {"type": "string"}
_POINT = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
          "required": ["x", "y"], "additionalProperties": False}  # fmt: skip
# by hand, in the forms of zod's toJSONSchema, zod-to-json-schema, OpenAI's documentation and others
PLAIN: list[tuple[Any, list[Any]]] = [
    (True, [1, None, {"a": [1]}]),
    ({}, [1, "a", [None]]),
    ({"type": "object"}, [{}, {"a": {"b": 1}}, [], 1]),
    ({"type": "array"}, [[], [1, "a", {}], {}, 1]),
    ({"type": ["string", "null"]}, ["a", None, 1]),
    ({"type": ["integer", "boolean"]}, [1, True, "a", 1.5]),
    ({"properties": {"a": True, "b": _TEXT}}, [{"a": [1]}, {}, 5, {"b": 1}]),
    ({"type": "object", "properties": {"a": True}, "required": ["a"]}, [{"a": None}, {"a": {"x": []}}, {}]),
    ({"type": "object", "properties": {"a": False}}, [{}, {"b": 1}, {"a": 1}]),
    ({"type": "object", "properties": {"a": {}}, "additionalProperties": False}, [{"a": 1}, {}, {"b": 1}]),
    ({"type": "object", "required": ["z"]}, [{"z": 1}, {}, {"a": 1}]),
    ({"type": "object", "additionalProperties": {"type": "integer"}, "properties": {"a": _TEXT}},
     [{"a": "x", "b": 1}, {"a": 1}, {"b": "x"}]),
    ({"type": "object", "additionalProperties": {"not": {}}, "properties": {"a": _TEXT}}, [{"a": "x"}, {"b": 1}]),
    ({"type": "object", "propertyNames": _TEXT, "additionalProperties": {"type": "number"}},
     [{"a": 1.5}, {}, {"a": "x"}]),
    ({"type": "object", "propertyNames": {"type": "string", "enum": ["a", "b"]}, "additionalProperties": _TEXT},
     [{"a": "x"}, {"a": "x", "b": "y"}, {"c": "x"}, {"a": 1}]),
    ({"type": "object", "propertyNames": {"pattern": "^x"}, "additionalProperties": True}, [{"x1": 1}, {"y": 1}]),
    ({"type": "object", "patternProperties": {"^n_": {"type": "integer"}}}, [{"n_a": 1, "b": "x"}, {"n_a": "x"}]),
    ({"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": False},
     [{"n_a": 1}, {"b": 1}]),
    ({"type": "object", "minProperties": 1, "additionalProperties": {"type": "null"}}, [{"a": None}, {}]),
    ({"const": 'a "b" \\ c'}, ['a "b" \\ c', "a b c"]),
    ({"const": {"a": [1, None]}}, [{"a": [1, None]}, {"a": [1]}, {}]),
    ({"const": None}, [None, 0, False]),
    ({"const": 0.1}, [0.1, 0.2, 0]),
    ({"const": False}, [False, 0, None]),
    ({"const": []}, [[], [1], {}]),
    ({"enum": ["a", 1, None, True, [1], {"b": 2}]}, ["a", 1, None, True, [1], {"b": 2}, "b", 2, False, [2], {}]),
    ({"enum": ["", " ", "\n", "\t\u2028", "é", "\U0001f600"]}, ["", " ", "\n", "\t\u2028", "é", "\U0001f600", "e"]),
    ({"type": "string", "enum": ["a", "b"]}, ["a", "c", 1]),
    ({"type": "integer", "enum": [1, "a"]}, [1, "a", 2]),
    ({"allOf": [{"enum": ["a", "b"]}]}, ["a", "c"]),
    ({"allOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}]}, ["b", "a", "c"]),
    ({"allOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": {"enum": ["x"]}}}, ["x", "y"]),
    ({"allOf": [{"$ref": "#/$defs/A"}], "description": "d", "$defs": {"A": _POINT}}, [{"x": 1, "y": 2}, {"x": 1}]),
    ({"allOf": [{"properties": {"a": _TEXT}, "required": ["a"]}, {"properties": {"b": _TEXT}, "required": ["b"]}],
      "type": "object"}, [{"a": "x", "b": "y"}, {"a": "x"}, {"a": "x", "b": 1}]),
    ({"allOf": [{"minimum": 3}, {"maximum": 5}], "type": "integer"}, [3, 5, 2, 6]),
    ({"allOf": [{"type": "string", "minLength": 2}, {"pattern": "^[a-z]*$"}]}, ["ab", "a", "AB"]),
    ({"anyOf": [_TEXT, {"type": "null"}]}, ["a", None, 1]),
    ({"anyOf": [{"type": "integer", "minimum": 5}, {"type": "string", "maxLength": 1}]}, [5, "a", 4, "ab"]),
    ({"anyOf": [{"const": "a"}, {"const": "b"}]}, ["a", "b", "c"]),
    ({"oneOf": [_TEXT, {"type": "integer"}]}, ["a", 1, 1.5, None]),
    ({"oneOf": [{"const": 1}, {"const": 2}]}, [1, 2, 3]),
    ({"oneOf": [{"enum": ["a"]}, {"enum": ["b"]}]}, ["a", "b", "c"]),
    ({"oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], "$defs": {
        "A": {"type": "object", "properties": {"t": {"const": "a"}, "n": {"type": "integer"}}, "required": ["t"]},
        "B": {"type": "object", "properties": {"t": {"$ref": "#/$defs/T"}}, "required": ["t"]},
        "T": {"enum": ["b", "c"]}}},
     [{"t": "a", "n": 1}, {"t": "c"}, {"t": "a", "n": "x"}, {"t": "d"}, {}]),
    ({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"type": "integer"}}}, [1, "a"]),
    ({"$ref": "#/$defs/a~0b", "$defs": {"a~b": {"type": "integer"}}}, [1, "a"]),
    ({"$ref": "#/$defs/N", "$defs": {"N": {"type": "object", "properties": {"n": {"$ref": "#/$defs/N"}},
                                           "additionalProperties": False}}},
     [{}, {"n": {"n": {}}}, {"n": 1}, {"m": {}}]),
    ({"type": "object", "properties": {"n": {"$ref": "#"}}, "additionalProperties": False},
     [{}, {"n": {"n": {}}}, {"n": {"n": 1}}]),
    ({"type": "array", "items": {"$ref": "#"}}, [[], [[]], [[], [[]]], [1]]),
    ({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"$ref": "#"}}]}, [1, [1, [2]], ["a"]]),
    ({"$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"type": "boolean"}}, "$ref": "#/$defs/A"}, [True, 1]),
    ({"definitions": {"A": {"type": "boolean"}}, "$ref": "#/definitions/A"}, [True, 1]),
    ({"$id": "https://example.com/s", "$schema": "https://json-schema.org/draft/2020-12/schema",
      "$ref": "#/$defs/A", "$defs": {"A": _TEXT}}, ["a", 1]),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [_TEXT, {"type": "integer"}],
      "additionalItems": False}, [["a", 1], [], ["a", 1, 2], [1]]),
    ({"type": "array", "prefixItems": [_TEXT, {"type": "integer"}], "items": False, "minItems": 2},
     [["a", 1], ["a"], ["a", 1, 2], [1, 1]]),
    ({"type": "array", "prefixItems": [_TEXT], "items": {"type": "boolean"}}, [[], ["a"], ["a", True], ["a", 1]]),
    ({"type": "array", "items": _TEXT, "minItems": 2, "maxItems": 2}, [["a", "b"], ["a"], ["a", "b", "c"]]),
    ({"type": "array", "items": {"anyOf": [_TEXT, _POINT]}}, [["a", {"x": 1, "y": 2}], [{"x": 1}], [1]]),
    ({"type": "array", "items": False}, [[], [1]]),
    ({"type": "array", "uniqueItems": False}, [[1, 1], 1]),
    ({"type": "string", "minLength": 3}, ["abc", "é" * 3, "ab"]),
    ({"type": "string", "maxLength": 2}, ["", "\U0001f600\U0001f600", "abc"]),
    ({"type": "string", "pattern": "^$"}, ["", "a"]),
    ({"type": "string", "pattern": "^[^\\x00-\\x1f]*$"}, ["abc", "", "a\nb"]),
    ({"type": "string", "pattern": "^[a&&b]$"}, ["a", "&", "b", "c"]),
    ({"type": "string", "pattern": "^[[]$"}, ["[", "]", "a"]),
    ({"type": "string", "pattern": "^\\W$"}, ["-", " ", "é", "a"]),
    ({"type": "string", "pattern": "^\\D$"}, ["a", "1", "\u0661"]),
    ({"type": "string", "pattern": "^[^\\s@]+@[^\\s@]+\\.[a-z]{2,}$"}, ["a@b.de", "a b@c.de", "a\u00a0@b.de", "a@b"]),
    ({"type": "string", "pattern": "^.$"}, ["a", "é", "\n", "ab"]),
    ({"type": "string", "pattern": "^(\\([0-9]{3}\\))?[0-9]{3}-[0-9]{4}$"}, ["555-1212", "(888)555-1212", "5551212"]),
    ({"type": "string", "pattern": "^a\\/b\\_c$"}, ["a/b_c", "ab"]),
    ({"type": "string", "pattern": "\\$\\d+"}, ["$5", "cost: $12!", "5"]),
    ({"type": "string", "pattern": "^(?i:yes|no)$"}, ["YES", "no", "maybe"]),
    # what a class leaves out stays out, though JSON escapes it
    ({"type": "string", "pattern": '^[^"]*$'}, ["", "a\nb\\", 'a"b', '"']),
    ({"type": "string", "pattern": "^[^\\\\]+$"}, ['a"\n', "a\\b", "\\"]),
    ({"type": "string", "pattern": "^[^,;]{1,3}$"}, ['"\\a', "a,", ";"]),
    ({"type": "string", "pattern": "^[\\x00-\\x1f]$"}, ["\n", "\t", '"', "\\", "a"]),
    ({"type": "string", "pattern": "^[^ -~]$"}, ["é", "\n", '"', "\\", "a"]),
    ({"type": "string", "pattern": "^(?i:[^\"a])$"}, ["b", "A", '"']),
    ({"type": "object", "patternProperties": {'^[^"]+$': {"type": "integer"}}, "additionalProperties": False},
     [{"a": 1, "\\": 2}, {'"': 1}, {"a": "x"}]),
    # references to places that are no schemas by themselves, or that are written anew
    ({"$ref": "#/components/schemas/A", "components": {"schemas": {"A": {"type": "object", "required": ["d"],
      "properties": {"d": {"pattern": '^[^"]$'}, "a": {"$ref": "#/components/schemas/A"}}}}}},
     [{"d": "x"}, {"d": '"'}, {"d": "x", "a": {"d": '"'}}]),
    ({"$ref": "#/components/A", "components": {"A": {"oneOf": [{"const": 1}, {"const": 2}]}}}, [1, 2, 3]),
    ({"$id": "https://example.com/s", "$ref": "https://example.com/s#/c/A", "c": {"A": {"pattern": "^\\W$"}}},
     ["-", "a"]),
    ({"type": "object", "properties": {"a": {"oneOf": [{"const": 1}, {"const": 2}]}, "b": {"$ref": "#/properties/a/oneOf/0"}}},
     [{"a": 2, "b": 1}, {"a": 2, "b": 2}]),
    ({"$ref": "#/", "": {"type": "integer"}}, [1, "a"]),
    ({"$ref": "#/a/b", "a": {"b": {"type": "integer"}}, "$defs": {"moved-0": _TEXT}}, [1, "a"]),
    ({"$ref": "#/definitions/Box<a, é>", "definitions": {"Box<a, é>": {"type": "integer"}}}, [1, "a"]),
    # a keyword of an older draft without the one that it belongs to
    ({"type": "array", "prefixItems": [{"type": "integer"}], "additionalItems": False}, [[1], ["a"]]),
    ({"type": "array", "items": {"type": "integer"}, "additionalItems": False}, [[1, 2], ["a"]]),
    ({"type": "array", "items": {"type": "null"}, "minItems": 2.0}, [[None, None], [None]]),
    ({"type": "object", "default": {"multipleOf": 99999}}, [{}, 1]),
    ({"type": "number", "minimum": -1.5, "maximum": 2.25}, [-1.5, 2.25, 0, -1.51, 2.26]),
    ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, [0.5, 0, 1, 0.999]),
    ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, [0.25, 0, 0.5, 0.001]),
    ({"minimum": -1.5, "exclusiveMaximum": -1}, [-1.5, -1.25, -1, -1.001]),
    ({"allOf": [{"exclusiveMinimum": 2}, {"type": "number", "maximum": 2.1}]}, [2, 2.05, 2.1, 2.2]),
    ({"type": "number", "multipleOf": 0.01}, [0.01, 1.23, 7, 0.005]),
    ({"type": "number", "multipleOf": 2.5}, [2.5, 5, -7.5, 3]),
    ({"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
     [0, 9007199254740991, 9007199254740992]),
    ({"type": "integer", "minimum": 10, "multipleOf": 4}, [12, 16, 8, 13]),
    ({"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 1000}, [100, 999, 99, 1000]),
    ({"minimum": 3}, [3, "a", None, 2]),
    ({"maxLength": 1}, ["a", 5, "ab"]),
    ({"items": {"type": "integer"}}, [[1], "a", ["a"]]),
    ({"type": "object", "title": "t", "description": "d", "default": {}, "examples": [1], "deprecated": True,
      "readOnly": True, "$comment": "c", "x-order": 1, "properties": {"a": {"type": "integer", "default": 5}}},
     [{"a": 1}, {"a": "x"}]),
    # OpenAI: structured outputs and function calling
    ({"type": "object", "properties": {"name": _TEXT, "date": _TEXT, "participants": {"type": "array", "items": _TEXT}},
      "required": ["name", "date", "participants"], "additionalProperties": False},
     [{"name": "n", "date": "d", "participants": ["p"]}, {"name": "n", "date": "d"},
      {"name": "n", "date": "d", "participants": ["p"], "more": 1}]),
    ({"type": "object", "properties": {"location": {"type": "string", "description": "City, e.g. Bogotá"},
      "units": {"type": ["string", "null"], "enum": ["celsius", "fahrenheit", None]}},
      "required": ["location", "units"], "additionalProperties": False},
     [{"location": "Rome", "units": None}, {"location": "Rome", "units": "kelvin"}, {"location": "Rome"}]),
    ({"type": "object", "properties": {"type": {"type": "string", "enum": ["div", "button"]}, "label": _TEXT,
      "children": {"type": "array", "items": {"$ref": "#"}}}, "required": ["type", "label", "children"],
      "additionalProperties": False},
     [{"type": "div", "label": "l", "children": [{"type": "button", "label": "m", "children": []}]},
      {"type": "div", "label": "l", "children": [{}]}, {"type": "x", "label": "l", "children": []}]),
    ({"type": "object", "properties": {"linked_list": {"$ref": "#/$defs/node"}}, "$defs": {"node": {"type": "object",
      "properties": {"value": {"type": "number"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
      "required": ["value", "next"], "additionalProperties": False}}, "required": ["linked_list"],
      "additionalProperties": False},
     [{"linked_list": {"value": 1, "next": {"value": 2, "next": None}}}, {"linked_list": {"value": 1}}, {}]),
    ({"type": "object", "properties": {"item": {"anyOf": [
        {"type": "object", "properties": {"name": _TEXT, "age": {"type": "number"}}, "required": ["name", "age"],
         "additionalProperties": False},
        {"type": "object", "properties": {"number": _TEXT, "city": _TEXT}, "required": ["number", "city"],
         "additionalProperties": False}]}}, "required": ["item"], "additionalProperties": False},
     [{"item": {"name": "n", "age": 1}}, {"item": {"number": "1", "city": "c"}}, {"item": {"name": "n"}}]),
    ({"type": "object", "properties": {"username": {"type": "string", "pattern": "^[a-zA-Z0-9_]+$"},
      "email": {"type": "string", "pattern": "^[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\\.[a-zA-Z]{2,}$"}},
      "required": ["username", "email"], "additionalProperties": False},
     [{"username": "a_b", "email": "a@b.com"}, {"username": "a b", "email": "a@b.com"},
      {"username": "a", "email": "nobody"}]),
]  # fmt: skip

# formats: what is valid, and what is not
FORMATS: dict[str, tuple[list[str], list[str]]] = {
    "date": (
        ["2024-02-29", "1999-12-31"],
        ["2023-02-29", "1900-02-29", "2024-13-01", "2024-04-31", "24-01-01", "x"],
    ),
    "time": (["12:30:00Z", "00:00:00.5+02:00"], ["24:00:00Z", "12:60:00Z", "12:30", "23:59:60Z", "x"]),
    "date-time": (["2024-02-29T12:00:00Z"], ["2023-02-29T12:00:00Z", "2024-02-29", "2024-02-29 12:00:00"]),
    "uuid": ([str(uuid.UUID(int=5))], ["5", "zz000000-0000-0000-0000-000000000005"]),
    "email": (
        ["a@b.com", "a" * 64 + "@b.com"],
        ["a", "@b", "a b@c.de", "a" * 65 + "@b.com", "a@" + "b" * 64 + ".com"],
    ),
    "ipv4": (["127.0.0.1"], ["127.0.0.256", "1.2.3", "01.2.3.4"]),
    "ipv6": (["::1", "fe80::1:2"], ["12345::", "1::2::3", "x"]),
    "hostname": (["example.com", "a-b.c"], ["-a.com", "a..b", "a_b", "x" * 64 + ".com"]),
    "uri": (["https://example.com/a?b=c#d"], ["/relative", "no spaces://x y"]),
    "duration": (["P3DT4H", "PT1M"], ["3 days", "P", "PT1D"]),
}


def _numbers() -> list[tuple[Any, list[Any]]]:
    """Ranges of integers and of decimals, each with its edges and what lies beyond."""
    edges = [(-1000, -7), (-12, 345), (0, 0), (0, 255), (1, 65535), (9, 11), (99, 1001), (-1, 1), (5, 4000)]
    whole = [
        ({"type": "integer", "minimum": low, "maximum": high}, [low, high, low - 1, high + 1])
        for low, high in edges
    ]
    parts = [
        (
            {"type": "number", "minimum": low / 8, "maximum": high / 8},
            [low / 8, high / 8, low / 8 - 1, high / 8 + 0.125],
        )
        for low, high in edges
        if low != high
    ]
    return whole + parts


def _lengths() -> list[tuple[Any, list[Any]]]:
    sizes = [(0, 0), (0, 1), (1, 1), (2, 5), (7, 7)]
    texts = [
        ({"type": "string", "minLength": low, "maxLength": high}, ["é" * low, "a" * high, "a" * (high + 1)])
        for low, high in sizes
    ]
    lists = [
        ({"type": "array", "items": {"type": "null"}, "minItems": low, "maxItems": high},
         [[None] * low, [None] * high, [None] * (high + 1), [1] * max(low, 1)])
        for low, high in sizes
    ]  # fmt: skip
    return texts + lists


def _nullable() -> list[tuple[Any, list[Any]]]:
    kinds = {"string": "a", "integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}
    return [
        ({"type": "object", "properties": {"v": {"type": [kind, "null"]}}, "required": ["v"]},
         [{"v": value}, {"v": None}, *({"v": other} for other in kinds.values())])
        for kind, value in kinds.items()
    ]  # fmt: skip


CASES = [
    *((f"pydantic {i}", TypeAdapter(kind).json_schema(), found) for i, (kind, found) in enumerate(PYDANTIC)),
    *((f"plain {i}", *case) for i, case in enumerate([*PLAIN, *_numbers(), *_lengths(), *_nullable()])),
]

REFUSED: list[tuple[Any, str]] = [
    ({"type": "integer", "minimum": 1e20, "maximum": 1e21}, "minimum"),
    ({"type": ["integer", "null"], "enum": [1e20, 2]}, "enum"),
    ({"const": -1e30}, "const"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"properties": {"a": {"pattern": "^a$\\"}}}, "properties.a.pattern"),
    ({"exclusiveMinimum": True, "minimum": 1}, "exclusiveMinimum"),
    ({"multipleOf": -2}, "multipleOf"),
    ({"patternProperties": {"a\\": {}}}, "patternProperties.a\\"),
    ({"type": "object", "properties": {"a": {"type": "array", "items": {"uniqueItems": True}}}},
     "properties.a.items.uniqueItems"),
    ({"not": {"type": "string"}}, "not"),
    ({"if": {"type": "string"}, "then": {"minLength": 3}, "else": False}, "if"),
    ({"properties": {"a": {"dependentSchemas": {"b": {}}}}}, "properties.a.dependentSchemas"),
    ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"contains": {"const": 1}}, "contains"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties"),
    ({"unevaluatedItems": {"type": "null"}}, "unevaluatedItems"),
    ({"propertyNames": {"maxLength": 3}}, "propertyNames"),
    ({"propertyNames": {"pattern": "^a"}, "properties": {"b": {}}}, "propertyNames"),
    ({"$dynamicRef": "#a"}, "$dynamicRef"),
    ({"properties": {"a": {"$ref": "https://example.com/a.json"}}}, "properties.a.$ref"),
    ({"items": {"$ref": "#/$defs/none"}}, "items.$ref"),
    ({"type": "object", "properties": {"a": {"$ref": "#/$defs/B"}}, "$defs": {"B": {"items": {"not": {"type": "null"}, "if": {}}}}},
     "$defs.B.items.not"),
    ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "oneOf"),
    ({"anyOf": [{"type": "null"}, {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}]}, "anyOf.1.oneOf"),
    ({"type": "string", "pattern": "^(a$"}, "pattern"),
    ({"type": "string", "pattern": "(?<=x)y"}, "pattern"),
    ({"type": "string", "pattern": "^(?!x)"}, "pattern"),
    ({"type": "string", "pattern": "(a)\\1"}, "pattern"),
    ({"type": "string", "pattern": "\\bword\\b"}, "pattern"),
    ({"type": "string", "pattern": "^a\\x01b$"}, "pattern"),
    ({"type": "string", "pattern": "^a\\u0000$"}, "pattern"),
    ({"type": "string", "pattern": "^a[\\x01]b$"}, "pattern"),
    ({"patternProperties": {"(": {}}}, "patternProperties"),
    ({"patternProperties": {"a": {}, "b": {}}}, "patternProperties"),
    ({"type": "string", "format": "weird"}, "format"),
    ({"type": "spaceship"}, "type"),
    ({"type": "string", "minLength": "3"}, "minLength"),
    ({"type": "string", "minLength": -1}, "minLength"),
    ({"type": "integer", "minimum": "3"}, "minimum"),
    ({"type": "integer", "minimum": 10**19}, "minimum"),
    ({"const": 10**25}, "const"),
    ({"type": "integer", "multipleOf": 99999}, "multipleOf"),
    ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "allOf.0.multipleOf"),
    ({"const": "a\u0001"}, "const"),
    ({"properties": {"a": {"enum": ["\x7f"]}}}, "properties.a.enum"),
    ({"properties": {"a\u0000": {}}}, "properties"),
    ({"const": "\ud800"}, "const"),
    ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "x-guidance"),
    ({"properties": {"a": 5}}, "properties.a"),
    ({"items": 5}, "items"),
    ({"anyOf": {"a": 1}}, "anyOf"),
    ({"properties": []}, "properties"),
    ({"type": "string", "pattern": "^\\a$"}, "pattern"),
    ({"type": "array", "prefixItems": [{}], "items": [{}]}, "items"),
    ({"properties": {"a": {"minimum": float("nan")}}}, "properties.a.minimum"),
    ({"enum": [[float("inf")]]}, "enum"),
    ({"$id": "https://example.com/s", "properties": {"a": {"$ref": "#/$defs/S/properties/q"}}, "$defs": {"S": {
        "$id": "sub", "properties": {"q": {"$ref": "#/$defs/Z"}}, "$defs": {"Z": {"type": "boolean"}}}}},
     "properties.a.$ref"),
    ({"$id": "https://example.com/s", "properties": {"a": {"$id": "sub", "$defs": {"Y": {"type": "null"},
      "Z": {"type": "null"}}, "oneOf": [{"$ref": "#/$defs/Y"}, {"$ref": "#/$defs/Z"}]}}, "$defs": {
        "Y": {"type": "integer"}, "Z": {"type": "string"}}}, "properties.a.oneOf"),
    ({"required": "a"}, "required"),
    ({"enum": []}, "enum"),
    ({"enum": "ab"}, "enum"),
]  # fmt: skip
