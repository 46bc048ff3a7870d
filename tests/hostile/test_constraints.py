"""Constraints in the engine: bounds, threads, ends; and replies of real models under them."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from localsteer import Engine, LocalsteerError, Sampling, bundled
from localsteer.constrain import END, Constraint, TokenBytes
from localsteer.errors import ConstraintError
from localsteer.model_names import path_of
from localsteer.runtime.bridge import Sampler
from localsteer.runtime.scheduler import Scheduler

BYTES = [bytes([i]) for i in range(256)]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mail": {"type": "string", "pattern": "^[a-z]{1,8}@[a-z]{1,8}\\.(com|org)$"},
        "tags": {"type": "array", "items": {"enum": ["a", 'b"c']}, "maxItems": 3},
        "boss": {"anyOf": [{"$ref": "#/$defs/P"}, {"type": "null"}]},
    },
    "required": ["name", "age", "mail", "tags", "boss"],
    "additionalProperties": False,
    "$defs": {"P": {"type": "object", "properties": {"name": {"const": 'The "boss"'}}, "required": ["name"],
                    "additionalProperties": False}},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokens() -> TokenBytes:
    return TokenBytes([*BYTES, b""], [256])


@pytest.fixture(scope="module")
def engine():
    if not bundled.is_available():
        pytest.skip("no bundled model in this copy")
    with Engine(path_of("bundled"), n_threads=1, n_ctx=512) as engine:
        yield engine


def test_a_schema_within_a_grammar_is_enforced_as_one_outside(tokens):
    schema = '{"type": "string", "pattern": "^[^\\"]$"}'
    rules = f'start: "%json {{" a // %json {{"\na: %json {schema} /[x\\/]/ %json {{"const": 1}}'
    matcher = tokens.matcher(Constraint.lark(rules))
    accepted = [
        text for text in ('"a"x1', '"\\""x1', '"a"x2') if matcher.accepts([*b"%json {", *text.encode()])
    ]
    assert accepted == ['"a"x1']


# --- bounds ------------------------------------------------------------------------------------------------


def nested(depth: int):
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "minItems": 50}
    return schema


def doubled(depth: int):
    parts = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i - 1}"}] * 2} for i in range(1, depth)}
    return {"$ref": f"#/$defs/a{depth - 1}", "$defs": {"a0": {"type": "string"}, **parts}}


def chain(n: int, link, last) -> str:
    return "\n".join([*(link(i) for i in range(n)), last(n)])


def chained(n: int, link):
    """References that lead from one to the next: by recursion each takes its part of the stack."""
    return {
        "$ref": "#/$defs/0",
        "$defs": {**{f"{i}": link(f"#/$defs/{i + 1}") for i in range(n)}, f"{n}": {}},
    }


BOMBS = {
    "chain of references": Constraint.json_schema(chained(6500, lambda to: {"$ref": to})),
    "chain of allOf": Constraint.json_schema(chained(5000, lambda to: {"allOf": [{"$ref": to}]})),
    "chain of items": Constraint.json_schema(chained(1500, lambda to: {"items": {"$ref": to}})),
    "chain of properties": Constraint.json_schema(
        chained(1500, lambda to: {"properties": {"a": {"$ref": to}}})
    ),
    "chain of GBNF": Constraint.gbnf(
        "root ::= r0\n" + chain(9000, lambda i: f'r{i} ::= "a" r{i + 1}', lambda i: f'r{i} ::= "b"')
    ),
    "chain of Lark": Constraint.lark(
        "start: r0\n" + chain(9000, lambda i: f'r{i}: "a" r{i + 1}', lambda i: f'r{i}: "b"')
    ),
    "pattern": Constraint.json_schema({"type": "string", "pattern": "^((.?){60}){60}$"}),
    "deeper pattern": Constraint.json_schema({"type": "string", "pattern": "^(((.?){60}){60}){60}$"}),
    "unicode pattern": Constraint.json_schema(
        {"type": "string", "pattern": r"^(\p{L}{0,100}\p{N}{0,90}){90}$"}
    ),
    "catastrophic for backtracking": Constraint.json_schema({"type": "string", "pattern": r"^(\w+\s?)+$"}),
    "patterns at once": Constraint.json_schema(
        {"allOf": [{"pattern": f"[a-z]{{3}}{c}"} for c in "abcdefgh"]}
    ),
    "multiples": Constraint.json_schema({"type": "integer", "multipleOf": 999999937}),
    "multiples together": Constraint.json_schema({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}),
    "length": Constraint.json_schema({"type": "string", "minLength": 10**9}),
    "items": Constraint.json_schema({"type": "array", "minItems": 10**9}),
    "nested items": Constraint.json_schema(nested(8)),
    "depth": Constraint.json_schema(nested(400)),
    "doubling references": Constraint.json_schema(doubled(40)),
    "a circle": Constraint.json_schema({"$ref": "#"}),
    "values": Constraint.json_schema({"enum": [f"value {i}" for i in range(3000)]}),
    "properties": Constraint.json_schema({"properties": {f"p{i}": {"type": "string"} for i in range(700)}}),
    "branches": Constraint.json_schema({"oneOf": [{"properties": {f"p{i}": {}}} for i in range(300)]}),
    "regex": Constraint.regex("((a{0,50}){0,50}){0,50}b"),
    "GBNF": Constraint.gbnf("root ::= ((([a-z]{0,50}){0,50}){0,50}){0,50}"),
    "ambiguous GBNF": Constraint.gbnf('root ::= "a" | root root | root root root'),
    "doubling GBNF": Constraint.gbnf(
        'r0 ::= "a"\nroot ::= r60\n' + "\n".join(f"r{i} ::= r{i - 1} r{i - 1}" for i in range(1, 61))
    ),
    "deep GBNF": Constraint.gbnf("root ::= " + "(" * 5000),
    "long GBNF": Constraint.gbnf("root ::= " + '"a" | ' * 10_000 + '"b"'),
    "Lark": Constraint.lark('start: x\nx: "a" x x | '),
}


@pytest.mark.parametrize("name", BOMBS)
def test_nothing_takes_seconds(tokens, name):
    """Refused, or cheap at every token; of processor time, since the machine may be busy."""
    started = time.process_time()
    try:
        matcher = tokens.matcher(BOMBS[name])
        assert time.process_time() - started < 3
        chance = np.random.default_rng(0)
        for _ in range(60):
            begun = time.process_time()
            allowed = np.flatnonzero(np.isfinite(matcher.mask(np.zeros(257, np.float32))))
            assert time.process_time() - begun < 0.5
            token = int(chance.choice(allowed))
            matcher.accept(token)
            if token == 256:
                break
    except LocalsteerError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Constraint.json_schema("{"), "not JSON"),
        (lambda: Constraint.json_schema("[1]"), "an object, true or false"),
        (lambda: Constraint.json_schema("[" * 100_000), "not JSON"),
        (lambda: Constraint.json_schema({"a": {1, 2}}), "not JSON"),
        (lambda: Constraint.choice([]), "nothing to choose"),
        (lambda: Constraint.choice("ab"), "list of texts"),
        (lambda: Constraint.regex(""), "it is empty"),
        (lambda: Constraint.regex("(a"), "unclosed group"),
        (lambda: Constraint.regex("a\\"), "escapes nothing"),
        (lambda: Constraint.regex("a" * 300_000), "at most"),
        (lambda: Constraint.gbnf(" "), "it is empty"),
        (lambda: Constraint.gbnf("root ::= ("), "line 1"),
        (lambda: Constraint.gbnf('root ::= "\\q"'), "escape"),
        (lambda: Constraint.gbnf("root ::= a-b"), "no rule `a-b`"),
        (lambda: Constraint.gbnf("root ::= [z-a]"), "range"),
        (lambda: Constraint.gbnf('x ::= "a"'), "no rule `root`"),
        (lambda: Constraint.gbnf("root ::= root"), "no reply can follow it"),
        (lambda: Constraint.lark('%llguidance {"no_forcing": false}\nstart: "a"'), "%llguidance"),
        (lambda: Constraint.lark("start: x"), "x"),
        (lambda: Constraint.choice(["\ud800"]), "not a Unicode"),
        (lambda: Constraint.regex("\ud800"), "not a Unicode"),
        (lambda: Constraint.gbnf('root ::= "\ud800"'), "not a Unicode"),
        (lambda: Constraint.json_schema({"pattern": "^\ud800$"}), "not a Unicode"),
        (lambda: Constraint.lark('start: %json {"items": {"uniqueItems": true}}'), "items.uniqueItems"),
    ],
)  # fmt: skip
def test_what_makes_no_constraint_is_one_line(tokens, make, says):
    with pytest.raises(ConstraintError, match=says) as caught:
        tokens.matcher(make())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        ('root ::= "yes" | "no"', ["yes", "no"], ["", "y", "yesno"]),
        ('root ::= [a-z]+ "foo"', ["abfoo", "foofoo"], ["foo", "fooa"]),
        ('root ::= "(" root ")" | [0-9]', ["5", "((5))"], ["()", "(5"]),
        ('root ::= "\\u0041\\x42" [&&b-d\\]] .', ["AB&\n", "AB]é"], ["ABa.", "AB&"]),
        ('root ::= start\nstart ::= Foo foo # a comment\nFoo ::= "a"\nfoo ::= "b"', ["ab"], ["aa", "bb"]),
        ('root ::= "a"{2,3} ("b" |\n "c")?', ["aa", "aaab", "aac"], ["a", "aab "]),
        ('root ::= "a/b" [/"]', ["a/b/", 'a/b"'], ["a/b"]),
        ('root ::= [^a-c\\n]', ["d", "é"], ["a", "\n", ""]),
        ('root ::= ""', [""], ["a"]),
        (
            'root ::= o\no ::= "{" (p ("," p)*)? "}"\np ::= [a-z]+ ":" (o | [0-9]+)',
            ["{}", "{a:{b:1},c:22}"],
            ["{a}", "{a:1,}"],
        ),
    ],
)  # fmt: skip
def test_gbnf_means_what_llama_cpp_means(tokens, grammar, yes, no):
    matcher = tokens.matcher(Constraint.gbnf(grammar))
    assert [text for text in yes + no if matcher.accepts(list(text.encode()))] == yes


def test_choices_and_patterns_are_whole(tokens):
    choice = tokens.matcher(Constraint.choice(["a", "ab", 'c"\\\n']))
    assert [text for text in ("a", "ab", 'c"\\\n', "", "abc") if choice.accepts(list(text.encode()))] == [
        "a", "ab", 'c"\\\n',
    ]  # fmt: skip
    pattern = tokens.matcher(Constraint.regex("^a|b/c$"))
    assert [text for text in ("a", "b/c", "ab/c", "") if pattern.accepts(list(text.encode()))] == ["a", "b/c"]


# --- ends and tokens ---------------------------------------------------------------------------------------


def test_tokens_without_text_and_ends_come_only_where_the_reply_may_end():
    tokens = TokenBytes([*BYTES, b"", b"yes", b"</s>", b""], [258, 259])
    matcher = tokens.matcher(Constraint.choice(["yes", "yes!"]))
    allowed = lambda: set(np.flatnonzero(np.isfinite(matcher.mask(np.zeros(260, np.float32)))))  # noqa: E731
    assert allowed() == {ord("y"), 257}
    matcher.accept(257)
    assert allowed() == {ord("!"), 258, 259}
    matcher.accept(ord("!"))
    assert allowed() == {258, 259}


def test_a_vocabulary_without_an_end_says_when_it_must():
    tokens = TokenBytes(BYTES, [])
    matcher = tokens.matcher(Constraint.choice(["a", "ab"]))
    assert not matcher.must_end
    matcher.accept(ord("a"))
    matcher.mask(np.zeros(256, np.float32))
    matcher.accept(ord("b"))
    matcher.mask(np.zeros(256, np.float32))
    assert matcher.must_end


def test_a_model_without_an_end_token_ends_by_its_constraint(engine, monkeypatch):
    monkeypatch.setattr(engine._tokenizer, "_token_bytes", TokenBytes(engine.model.pieces(), []))
    assert engine.ends(END)
    for temp in (0, 1):
        kept = Sampling(temp=temp, seed=1, grammar=Constraint.regex("[a-z]{3}"))
        replies = [engine.generate("Hi", sampling=kept), *engine.generate_batch(["Hi"] * 2, sampling=kept)]
        assert all(len(reply.text) == 3 and reply.finish_reason == "stop" for reply in replies)


@pytest.mark.parametrize(
    "sampling", [{"temp": 0}, {"temp": 1.5, "seed": 3}, {"temp": 0, "repeat_penalty": 1.3}]
)
def test_one_reply_and_many_are_kept_alike(engine, sampling):
    kept = Sampling(**sampling, grammar=Constraint.json_schema(PERSON))
    alone = engine.generate("Tell me about foxes.", sampling=kept)
    together = engine.generate_batch(["Tell me about foxes."] * 3, sampling=[kept] * 3)
    for reply in (alone, *together):
        if reply.finish_reason == "stop":
            check(reply.text)
    assert any(reply.finish_reason == "stop" for reply in (alone, *together))


@pytest.mark.parametrize(
    "settings",
    [
        {"temp": 0},
        {"temp": 0, "repeat_penalty": 1.3},
        {"seed": 1},
        {"seed": 2, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "temp": 2.0},
        {"seed": 3, "top_k": 5, "presence_penalty": 1.0, "logit_bias": [(101, 5.0), (34, -5.0)]},
    ],
    ids=str,
)
def test_a_draw_from_what_is_allowed_is_one_from_masked_logits(engine, settings):
    """Tokens that are no candidates change no draw: the others alone are handed to llama.cpp."""
    constraint, noise = Constraint.json_schema(PERSON), np.random.default_rng(5)
    mask = engine.token_bytes.matcher(constraint)
    with (
        Sampler(engine.model, **settings, matcher=engine.token_bytes.matcher(constraint)) as kept,
        Sampler(engine.model, **settings) as plain,
    ):
        for _ in range(40):
            logits = 3 * noise.standard_normal(engine.model.n_vocab, np.float32)
            token = plain.sample(Row(mask.mask(logits)))
            assert kept.sample(Row(logits)) == token
            if engine.ends(token):
                break
            mask.accept(token)


class Row:
    """Logits in the place of a context."""

    def __init__(self, logits):
        self._logits = logits

    def logits(self, _row):
        return self._logits


def check(text: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")
    jsonschema.validate(json.loads(text), PERSON)


def test_a_cut_reply_says_so(engine):
    kept = Sampling(temp=0, grammar=Constraint.json_schema({"type": "string", "minLength": 200}))
    reply = engine.generate("Tell me about foxes.", sampling=kept, max_tokens=5)
    assert reply.finish_reason == "length" and reply.text.startswith('"')


def test_many_threads_share_a_vocabulary(tokens):
    """Compiled once, one matcher each."""
    found: list[str] = []

    def work(i: int) -> None:
        for n in range(20):
            matcher = tokens.matcher(Constraint.json_schema({"const": f"{i % 3} {n}"}))
            text = ""
            while not text.endswith('"') or len(text) < 2:
                token = int(np.argmax(matcher.mask(np.zeros(257, np.float32))))
                matcher.accept(token)
                text += chr(token)
            if text != f'"{i % 3} {n}"':
                found.append(text)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not found and not any(thread.is_alive() for thread in threads)


def test_a_constraint_that_gets_too_complex_ends_its_own_reply_alone(engine):
    hard = Constraint.regex(r"(\p{L}{0,100}\p{N}{0,90}){90}")
    with Scheduler(engine) as scheduler:
        good = scheduler.submit("Tell me about foxes.", max_tokens=30, sampling=Sampling(temp=0))
        try:
            bad = scheduler.submit("Hi", max_tokens=60, sampling=Sampling(seed=1, grammar=hard))
            bad.result()
        except LocalsteerError as error:
            assert "\n" not in str(error)
        assert good.result().tokens


# --- replies of real models --------------------------------------------------------------------------------

REAL = {"smol": "smol.gguf", "qwen0.5b": "qwen0.5b.gguf"}
SHORT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "year": {"type": "integer", "minimum": 1500, "maximum": 2100},
        "kind": {"enum": ["book", 'so-called "play"']},
    },
    "required": ["name", "year", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(params=REAL)
def real_model(request):
    folder = os.environ.get("LOCALSTEER_REAL_MODELS", "")
    path = Path(folder) / REAL[request.param]
    if not (folder and path.exists()):
        try:
            path = path_of(request.param)
        except LocalsteerError:
            path = None
    if path is None or not Path(path).exists():
        pytest.skip(f"{REAL[request.param]} is not here: LOCALSTEER_REAL_MODELS names a folder that has it")
    with Engine(path, n_ctx=256) as engine:
        yield engine


def test_replies_of_real_models_are_valid(real_model):
    """Drawn together: each that ends, and one that is cut ends by `length`."""
    jsonschema = pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")
    kept = [Sampling(temp=temp, seed=1, grammar=Constraint.json_schema(SHORT)) for temp in (0, 1.5)]
    asked = ["Who wrote Faust? Answer as JSON.", "Tell me a story about a dragon."]
    replies = real_model.generate_batch(asked, sampling=kept, max_tokens=60)
    assert {reply.finish_reason for reply in replies} == {"stop"}
    for reply in replies:
        jsonschema.validate(json.loads(reply.text), SHORT)
