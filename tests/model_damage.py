"""Hostile model files: name -> (what the tiny model is made with, what is changed in it)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

from raw_gguf import ARRAY, BOOL, F32, F64, I32, STRING, U8, U32, U64, RawGguf, array, text, value
from tiny_gguf import BYTE, TOKENIZERS, tiny_gguf

NAN, INF = float("nan"), float("inf")
Edit = Callable[[RawGguf], Any]
TOK = "tokenizer.ggml."


def put(**keys: bytes) -> Edit:
    """`put(block_count=...)` writes `llama.block_count`; two underscores are a dot."""
    return lambda raw: raw.key_values.update({f"llama.{k.replace('__', '.')}": v for k, v in keys.items()})


def tok(**keys: bytes) -> Edit:
    return lambda raw: raw.key_values.update({TOK + k: v for k, v in keys.items()})


def drop(*keys: str) -> Edit:
    return lambda raw: [raw.key_values.pop(key, None) for key in keys]


def tokens(change: Callable[[list[str], list[int]], Any], tokenizer: str = "llama") -> Edit:
    """Another vocabulary; `change` edits lists of texts and of types."""

    def edit(raw: RawGguf) -> None:
        texts, types = TOKENIZERS[tokenizer]()
        change(texts, types)
        raw.key_values[TOK + "tokens"] = array(STRING, texts)
        raw.key_values[TOK + "token_type"] = array(I32, types)

    return edit


def setting(i: int, text: str | bytes) -> Callable[[list, list], Any]:
    return lambda texts, types: texts.__setitem__(i, text)


def typed(i: int, type_: int) -> Callable[[list, list], Any]:
    return lambda texts, types: types.__setitem__(i, type_)


def tensor(name: str, **lies: Any) -> Edit:
    def edit(raw: RawGguf) -> None:
        (found,) = (each for each in raw.tensors if each.name == name)
        for key, lie in lies.items():
            setattr(found, key, lie)

    return edit


def first(raw: RawGguf, **keys: bytes) -> None:
    """Before all others: decoys that a search for the first one would find."""
    raw.key_values = {**keys, **raw.key_values}


def decoy(raw: RawGguf) -> None:
    raw.key_values = {
        "decoy": value(STRING, b"llama.block_count\x04\0\0\0\x02\0\0\0"),
        **raw.key_values,
        "llama.block_count": value(U32, 0),
    }


def large_key_first(raw: RawGguf) -> None:
    raw.key_values = {"large": value(STRING, "x" * 100_000), **raw.key_values}
    raw.key_values["llama.block_count"] = value(U32, 600)


def twice(key: str) -> Edit:
    return lambda raw: setattr(
        raw, "extra_key_values", text(key) + raw.key_values[key]
    ) or setattr(raw, "n_key_values", len(raw.key_values) + 1)  # fmt: skip


HEADER: dict[str, tuple[dict[str, Any], Edit]] = {}  # refused by the header
TRIAL: dict[str, tuple[dict[str, Any], Edit]] = {}  # by llama.cpp, in the trial at the latest


def _header(name: str, edit: Edit, **made: Any) -> None:
    HEADER[name] = (made, edit)


def _trial(name: str, edit: Edit, **made: Any) -> None:
    TRIAL[name] = (made, edit)


for n in (0, 513, 600, 2**31, 2**32 - 1):
    _header(f"{n} layers", put(block_count=value(U32, n)))
_header("0 layers behind a decoy", decoy)
_header("600 layers behind a large key", large_key_first)
for n in (0, 2**31, 2**32 - 1):
    _header(f"context of {n}", put(context_length=value(U32, n)))
for n in (0, 2**21, 2**32 - 1):
    _header(f"width of {n}", put(embedding_length=value(U32, n)))
_header("one layer too many for nextn", put(nextn_predict_layers=value(U32, 3)))
_header("pooling of a kind that is not", put(pooling_type=value(U32, 77)))
_header("rope scaling of a kind that is not", put(rope__scaling__type=value(STRING, "hostile")))
for n in (3, 5, 65537, 2**32 - 1):
    _header(f"{n} heads", put(attention__head_count=value(U32, n)))
for n in (0, 3, 8, 2**32 - 1):
    _header(f"{n} heads of keys", put(attention__head_count_kv=value(U32, n)))
_header("heads per layer, one absurd", put(attention__head_count=array(U32, [4, 2**31])))
for n in (0, 2**20):
    _header(f"keys of {n}", put(attention__key_length=value(U32, n)))
    _header(f"values of {n}", put(attention__value_length=value(U32, n)))
for n in (7, 9, 10, 2**31):
    _header(f"rotation of {n}", put(rope__dimension_count=value(U32, n)))
for x in (0.0, -1.0, -1e-30, NAN, INF, -INF):
    _header(f"epsilon {x}", put(attention__layer_norm_rms_epsilon=value(F32, x)))
for x in (NAN, INF, -INF):
    _header(f"frequency {x}", put(rope__freq_base=value(F32, x)))
    _header(f"rope scale {x}", put(rope__scaling__factor=value(F32, x)))
    _header(f"softcap {x}", put(final_logit_softcapping=value(F32, x)))
_header("an epsilon below 0", put(attention__layer_norm_epsilon=value(F32, -1.0)))
_header("experts without any used", put(expert_count=value(U32, 8)))
_header("a used expert without experts", put(expert_used_count=value(U32, 2)))
_header("used experts by layer without experts", put(expert_used_count=array(U32, [0, 3])))
_header("more used experts than experts", put(expert_used_count=value(U32, 3)), n_expert=2)
_header("1025 experts", put(expert_count=value(U32, 1025), expert_used_count=value(U32, 2)))
_header("groups without experts", put(expert_group_count=value(U32, 2)))
_header("as many groups as experts", put(expert_group_count=value(U32, 2)), n_expert=2)
_header(
    "groups that do not divide the experts",
    put(expert_group_count=value(U32, 3), expert_group_used_count=value(U32, 1)),
    n_expert=4,
)
_header(
    "no group used", put(expert_group_count=value(U32, 2), expert_group_used_count=value(U32, 0)), n_expert=4
)
for name, tokenizer in (("spm", "llama"), ("bpe", "gpt2"), ("wpm", "bert")):
    made = {"tokenizer": tokenizer}
    _header(f"{name} token twice", tokens(lambda t, _: t.__setitem__(-1, t[-2]), tokenizer), **made)
    _header(
        f"{name} two special tokens alike",
        tokens(setting(1, TOKENIZERS[tokenizer]()[0][0]), tokenizer),
        **made,
    )
    _header(
        f"{name} empty vocabulary",
        tok(tokens=array(STRING, []), token_type=array(I32, []), scores=array(F32, [])),
        **made,
    )
    _header(f"{name} a byte token that is none", tokens(typed(-1, BYTE), tokenizer), **made)
    _header(f"{name} tokens of the wrong type", tok(tokens=array(I32, [1, 2, 3])), **made)
    _header(f"{name} tokens in no array", tok(tokens=value(STRING, "the")), **made)
    _header(f"{name} types of the wrong type", tok(token_type=array(F32, [1.0])), **made)
    _header(f"{name} too few types", tok(token_type=array(I32, [1, 1])), **made)
    _header(f"{name} too many types", tok(token_type=array(I32, [1] * 9999)), **made)
    _header(f"{name} too few scores", tok(scores=array(F32, [0.0])), **made)
    _header(f"{name} scores of the wrong type", tok(scores=array(F64, [0.0])), **made)
    _header(
        f"{name} scores that are no numbers",
        tok(scores=array(F32, [NAN] * len(TOKENIZERS[tokenizer]()[0]))),
        **made,
    )
_header(
    "empty token and its name",
    tokens(lambda t, _: t.__setitem__(slice(-2, None), ["", f"[EMPTY_{len(t) - 2}]"])),
)
for i, odd in ((13, "<0x0a>x"), (13, "<0xGG>"), (13, "<0x"), (13, ""), (13, "\n\n"), (68, "<0x4>")):
    _header(f"byte token {i} is {odd!r}", tokens(setting(i, odd)))
for i in (3, 68, 200, 258):
    _header(f"byte {i - 3} is missing", tokens(lambda t, types, i=i: (t.pop(i), types.pop(i))))
    _header(
        f"byte {i - 3} has another name",
        tokens(lambda t, types, i=i: (t.__setitem__(i, f"other{i}"), types.__setitem__(i, 1))),
    )
for which in ("bos", "eos"):
    for n in (290, 10**6, 2**31):
        _header(f"{which} is {n}", tok(**{f"{which}_token_id": value(U32, n)}))
_header("merges that are numbers", tok(merges=array(I32, [1, 2])), tokenizer="gpt2")
_header("merges in no array", tok(merges=value(STRING, "t h")), tokenizer="gpt2")
_header("a key twice", twice("llama.block_count"))
_header("a tensor twice", lambda raw: raw.tensors.append(raw.tensors[-1]))
for dims in ((0,), (32, 0), (2**63,), (2**40, 2**40), (32, 2**40)):
    _header(f"tensor of {dims}", tensor("blk.1.ffn_gate.weight", dims=dims))
_header("tensor far beyond the file", tensor("output.weight", offset=1 << 40))
_header("rows that are no layers", tensor("blk.0.ffn_up.weight", type=2, dims=(33, 64)))
_header("alignment of 3", lambda raw: raw.key_values.update({"general.alignment": value(U32, 3)}))
_header("alignment of 0", lambda raw: raw.key_values.update({"general.alignment": value(U32, 0)}))
_header(
    "alignment that is text", lambda raw: raw.key_values.update({"general.alignment": value(STRING, "32")})
)
_header("array of 2**60", lambda raw: raw.key_values.update({"x": array(U64, [], 1 << 60)}))
_header("array of 2**60 strings", lambda raw: raw.key_values.update({"x": array(STRING, [], 1 << 60)}))
_header("string of 2**62", lambda raw: raw.key_values.update({"x": struct.pack("<IQ", STRING, 1 << 62)}))
_header("array of arrays", lambda raw: raw.key_values.update({"x": array(ARRAY, [])}))
_header("2**40 keys", lambda raw: setattr(raw, "n_key_values", 1 << 40))
_header("2**40 tensors", lambda raw: setattr(raw, "n_tensors", 1 << 40))
_header("a value of an unknown type", lambda raw: raw.key_values.update({"x": struct.pack("<I", 99)}))
_header(
    "a control vector",
    lambda raw: raw.key_values.update({"general.architecture": value(STRING, "controlvector")}),
)

_trial("a vocabulary larger than the embedding", tokens(lambda t, types: (t.append("more"), types.append(1))))
_trial("layers that are missing", put(block_count=value(U32, 12)))
_trial("layers as text", put(block_count=value(STRING, "2")))
_trial("a width that is not that of the tensors", put(embedding_length=value(U32, 64)))
for empty in (array(U32, []), array(STRING, ["llama"] * 3), value(F32, 0.0)):
    _trial(
        f"architecture {empty[:9].hex()}",
        lambda raw, empty=empty: raw.key_values.update({"general.architecture": empty}),
    )
    _trial(f"tokenizer {empty[:9].hex()}", tok(model=empty))
_trial("no architecture", drop("general.architecture"))
_trial(
    "another architecture",
    lambda raw: raw.key_values.update({"general.architecture": value(STRING, "qwen2")}),
)
_trial("architecture of a number", lambda raw: raw.key_values.update({"general.architecture": value(U32, 1)}))
_trial(
    "an unknown architecture",
    lambda raw: raw.key_values.update({"general.architecture": value(STRING, "\x1b[31mx")}),
)
_trial("an unknown tokenizer", tok(model=value(STRING, "hostile")))
_trial("an endless name of a tokenizer", tok(model=value(STRING, "x" * 100_000)))
_trial("a tokenizer without merges", drop(TOK + "merges"), tokenizer="gpt2")
_trial("no epsilon", drop("llama.attention.layer_norm_rms_epsilon"))
_trial("SentencePiece without any separator in a BERT vocabulary", lambda raw: None, tokenizer="bert")
_trial(
    "BOS that is no token",
    tok(bos_token_id=value(U32, 2**32 - 1), add_bos_token=value(BOOL, True)),
    tokenizer="gpt2",
)
_trial("a norm in F16", tensor("blk.0.attn_norm.weight", type=1))
_trial("a norm as a matrix", tensor("blk.0.attn_norm.weight", dims=(32, 1, 1, 1)))
_trial("an embedding of another shape", tensor("token_embd.weight", dims=(290, 32)))
_trial("the type of a tensor is unknown", tensor("token_embd.weight", type=4))
_trial("experts without their tensors", put(expert_count=value(U32, 2), expert_used_count=value(U32, 1)))
_trial("a window of 0", put(attention__sliding_window=value(U32, 0)))
_trial("rotation in sections", put(rope__dimension_sections=array(I32, [2**31 - 1] * 4)))
_trial("BERT vocabulary with SentencePiece's name", tok(model=value(STRING, "llama")), tokenizer="bert")
_trial("BPE vocabulary with SentencePiece's name", tok(model=value(STRING, "llama")), tokenizer="gpt2")
_trial("SentencePiece vocabulary with T5's name", tok(model=value(STRING, "t5")))
_trial("SentencePiece vocabulary with RWKV's name", tok(model=value(STRING, "rwkv")))
_trial("SentencePiece vocabulary with PLaMo's name", tok(model=value(STRING, "plamo2")))
_trial(
    "a character map out of bounds",
    lambda raw: tok(
        model=value(STRING, "t5"), precompiled_charsmap=array(U8, [4, 0, 0, 0, 255, 255, 255, 255, 0])
    )(raw),
)


def hostile_files() -> Iterator[tuple[str, bytes]]:
    for name, (made, edit) in {**HEADER, **TRIAL}.items():
        yield name, made_file(made, edit)


def made_file(made: dict[str, Any], edit: Edit) -> bytes:
    raw = tiny_gguf(**made)
    edit(raw)
    return raw.to_bytes()
