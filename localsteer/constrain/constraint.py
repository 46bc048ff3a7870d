"""A constraint as specified by the user, and the grammar that llguidance reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConstraintError
from .gbnf import lark_of_gbnf
from .guidance import HEAD, refused
from .patterns import ends_open, exact_pattern

Kind = Literal["json_schema", "regex", "gbnf", "lark", "choice", "tool_call"]

MAX_TEXT = 256 << 10  # characters of a constraint: reading one takes time by its length
WHAT = {"json_schema": "JSON schema", "regex": "regular expression", "choice": "choice",
        "tool_call": "call"}  # fmt: skip
# texts, expressions and comments of Lark, in which `%json` means nothing
_LARK_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|\#[^\n]*|/(?:\\.|[^/\\\n])+/|%json\b')


@dataclass(frozen=True)
class Constraint:
    """Made by one of the functions below; equal ones share what they are compiled to.

    text: the grammar or expression; of a JSON schema and of choices their JSON.
    """

    kind: Kind
    text: str

    def __post_init__(self) -> None:
        if len(self.text) > MAX_TEXT:
            raise self.error(
                f"it has {len(self.text)} characters, but at most {MAX_TEXT} are allowed: simplify it"
            )
        if any("\ud800" <= character < "\ue000" for character in self.text):
            raise self.error("it holds half a surrogate pair, which is not a Unicode character")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Constraint:
        """The reply is one JSON document that the schema accepts, its properties in the schema's order.

        schema: a document, or its text. Raises ConstraintError for text that is not JSON; what can't be
        enforced is found when it is compiled (`TokenBytes.matcher`).
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise ConstraintError(f"the JSON schema is not JSON: {_short(error)}.") from None
        if not isinstance(schema, (Mapping, bool)):
            raise ConstraintError(f"a JSON schema must be an object, true or false, not {schema!r:.60}.")
        try:
            return cls("json_schema", json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise ConstraintError(f"the JSON schema is not JSON: {_short(error)}.") from None

    @classmethod
    def json_object(cls) -> Constraint:
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """The whole reply matches the pattern, in the syntax of Rust's `regex`: no look-around, no
        backreferences."""
        return cls("regex", pattern)

    @classmethod
    def gbnf(cls, text: str) -> Constraint:
        """llama.cpp's grammars. In one that is recursive, a rule without recursion is read as a lexer reads:
        the longest match counts."""
        return cls("gbnf", text)

    @classmethod
    def lark(cls, text: str) -> Constraint:
        """llguidance's dialect of Lark; the first rule is `start`."""
        return cls("lark", text)

    @classmethod
    def grammar(cls, text: str) -> Constraint:
        """Lark if it has a rule `start:`, else GBNF."""
        from llguidance.gbnf_to_lark import is_lark_syntax

        return cls.lark(text) if is_lark_syntax(text) else cls.gbnf(text)

    @classmethod
    def tool_call(cls, tools: Sequence[tuple[str, Mapping[str, Any]]]) -> Constraint:
        """The reply is `{"name": ..., "arguments": {...}}` for one of the tools: (name, JSON schema of the
        arguments). The path of a ConstraintError begins with the number of the tool."""
        return cls("tool_call", json.dumps(list(tools)))

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Constraint:
        """The reply is one of the texts."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ConstraintError("choices must be a list of texts.")
        if not texts or not any(texts):
            raise ConstraintError("there is nothing to choose from: at least one text must not be empty.")
        return cls("choice", json.dumps(list(texts)))

    @classmethod
    def of(cls, grammar: Constraint | str) -> Constraint:
        """A bare text is GBNF, as `Sampling(grammar=...)` and `run --grammar` take it."""
        return grammar if isinstance(grammar, cls) else cls.gbnf(grammar)

    def lark_text(self) -> str:
        """The grammar in llguidance's language. Raises ConstraintError, which names what can't be read."""
        return HEAD + _WRITERS[self.kind](self)

    def error(self, why: str) -> ConstraintError:
        """why: without a full stop."""
        if self.kind in ("gbnf", "lark"):
            return ConstraintError(f"the grammar can't be parsed: {why}.", why=f"can't be parsed: {why}")
        return ConstraintError(
            f"the {WHAT[self.kind]} can't be enforced: {why}.", why=f"can't be enforced: {why}"
        )


def _schema_rule(constraint: Constraint) -> str:
    from .json_schema import compiled_schema

    return f"start: %json {compiled_schema(json.loads(constraint.text))}"


def _regex_rule(constraint: Constraint) -> str:
    from llguidance._lib import regex_to_lark

    if not constraint.text:
        raise constraint.error("it is empty")
    if ends_open(constraint.text):
        raise constraint.error("its last backslash escapes nothing")
    return f"start: /{regex_to_lark(exact_pattern(constraint.text), 'd')}/"


def _gbnf_rules(constraint: Constraint) -> str:
    if not constraint.text.strip():
        raise constraint.error("it is empty")
    try:
        return lark_of_gbnf(constraint.text)
    except (ValueError, RecursionError) as error:
        raise constraint.error(_short(error)) from None


def _lark_rules(constraint: Constraint) -> str:
    if not constraint.text.strip():
        raise constraint.error("it is empty")
    if re.search(r"(?m)^\s*%llguidance\b", constraint.text):
        raise constraint.error("`%llguidance` is not supported: leave that line out")
    return _with_compiled_schemas(constraint.text)


def _with_compiled_schemas(rules: str) -> str:
    """Schemas within a grammar, too, are enforced exactly or refused."""
    from .json_schema import compiled_schema

    written, at = "", 0
    for found in _LARK_TOKEN.finditer(rules):
        if found[0] != "%json" or found.start() < at:
            continue
        start = found.end() + len(rules[found.end() :]) - len(rules[found.end() :].lstrip())
        try:
            schema, end = json.JSONDecoder().raw_decode(rules, start)
        except (ValueError, RecursionError):  # llguidance says what is wrong, and where
            continue
        written += f"{rules[at : found.end()]} {compiled_schema(schema)}"
        at = end
    return written + rules[at:]


def _choice_rule(constraint: Constraint) -> str:
    texts = json.loads(constraint.text)
    # one terminal, so that a text may begin another
    return "start: CHOICE\nCHOICE: " + " | ".join(quoted(text) for text in texts)


def _call_rules(constraint: Constraint) -> str:
    """A document of its own for each tool, so that `$ref` leads where it leads alone."""
    from .json_schema import compiled_schema

    tools = json.loads(constraint.text)
    rules = ["start: " + " | ".join(f"call{i}" for i in range(len(tools)))]
    for i, (name, schema) in enumerate(tools):
        try:
            if schema.setdefault("type", "object") != "object":
                raise refused(("type",), "the arguments of a tool must be an object")
            written = compiled_schema(schema)
        except ConstraintError as error:
            raise ConstraintError(str(error), (str(i), *error.path), error.why) from None
        head = quoted('{"name": ' + json.dumps(name) + ', "arguments": ')
        rules += [f'call{i}: {head} arguments{i} "}}"', f"arguments{i}: %json {written}"]
    return "\n".join(rules)


_WRITERS = {
    "json_schema": _schema_rule,
    "regex": _regex_rule,
    "gbnf": _gbnf_rules,
    "lark": _lark_rules,
    "choice": _choice_rule,
    "tool_call": _call_rules,
}


def quoted(text: str) -> str:
    """A text as a Lark string, which has JSON's escapes. Raises ConstraintError for half a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConstraintError(
            f"the text holds {text[error.start]!r}, which is not a Unicode character."
        ) from None
    return json.dumps(text, ensure_ascii=False)


def _short(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split()).rstrip(".")[:160]
