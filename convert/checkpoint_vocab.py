"""The tokenizer of a transformers checkpoint, in the form that llama.cpp's `gpt2` vocabulary wants.

Only byte-level BPE (`tokenizer.json`) is handled, and only where llama.cpp splits text exactly as that
tokenizer does: one token of difference and a vector is extracted at the wrong position. Everything else is
refused; llama.cpp's own convert_hf_to_gguf.py, which may import the real tokenizer, is the place for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from localsteer.errors import ModelFileError, UnsupportedModelError
from localsteer.jsonable import JsonObject

SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "mask", "eot", "eom")

# How text is cut before merging: the regular expression in tokenizer.json -> llama.cpp's tokenizer.ggml.pre.
# A ByteLevel pre-tokenizer with its own expression (use_regex) is GPT-2's.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_BY_REGEX = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}


@dataclass(frozen=True)
class Vocabulary:
    """Token ids are positions in `tokens`; `types` are gguf.TokenType values of the same length."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    special_ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None

    def write(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name in SPECIAL_TOKENS:
            if name in self.special_ids:
                getattr(writer, f"add_{name}_token_id")(self.special_ids[name])
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(directory: Path, n_vocab: int) -> Vocabulary:
    """The vocabulary of a checkpoint, padded to the model's `n_vocab` rows.

    Raises UnsupportedModelError when llama.cpp would cut text differently, ModelFileError when
    tokenizer.json is missing or is not one.
    """
    path = directory / "tokenizer.json"
    tokenizer = read_json(path)
    try:
        pre = _pre_tokenizer(tokenizer, directory)
        _refuse_other_bpe(tokenizer, pre, directory)
        tokens, types = _tokens(tokenizer, n_vocab, directory)
        special = gguf.SpecialVocab(directory, True, SPECIAL_TOKENS, n_vocab)
        if not all(isinstance(merge, str) for merge in special.merges):
            raise TypeError("a merge is not text")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path} is not a readable tokenizer file: {error!r}") from error
    return Vocabulary(
        tokens, types, special.merges, pre, _special_ids(special, directory),
        add_bos=special.add_special_token.get("bos", False),
        add_eos=special.add_special_token.get("eos", False),
        chat_template=_default_template(special.chat_template),
    )  # fmt: skip


def read_json(path: Path) -> JsonObject:
    """The object in a JSON file; ModelFileError when it is missing or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        message = f"{path.parent} holds no {path.name}: give a folder saved by transformers"
        raise ModelFileError(message) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} can't be read: expected a JSON object")
    return content


def _pre_tokenizer(tokenizer: Mapping[str, Any], directory: Path) -> str:
    step = tokenizer.get("pre_tokenizer") or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    plain = not steps[-1].get("add_prefix_space", True)
    if steps[-1].get("type") == "ByteLevel" and plain:
        if len(steps) == 1 and steps[0].get("use_regex", True):
            return "gpt-2"
        if len(steps) == 2 and steps[0].get("type") == "Split" and not steps[1].get("use_regex", True):
            pre = PRE_BY_REGEX.get(steps[0]["pattern"].get("Regex"))
            if pre and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
                return pre
    raise UnsupportedModelError(
        f"{directory}: llama.cpp is not known to split text as this tokenizer does (byte-level BPE of GPT-2, "
        "Llama 3 and Qwen 2 is): convert it with llama.cpp's convert_hf_to_gguf.py"
    )


def _refuse_other_bpe(tokenizer: Mapping[str, Any], pre: str, directory: Path) -> None:
    """Settings that llama.cpp has no equal for, each of which changes tokens silently."""
    model = tokenizer["model"]
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    reasons = {
        f"model type {model.get('type')}": model.get("type", "BPE") != "BPE",
        "byte_fallback": model.get("byte_fallback"),
        "dropout": model.get("dropout"),
        "continuing_subword_prefix": model.get("continuing_subword_prefix"),
        "end_of_word_suffix": model.get("end_of_word_suffix"),
        # llama.cpp looks whole words up before merging for Llama 3 only
        "ignore_merges": bool(model.get("ignore_merges")) != (pre == "llama-bpe"),
        # llama.cpp does not normalise; Qwen 2 ships NFC, and is converted without it everywhere
        "normalizer": normalizer is not None and (pre, normalizer) != ("qwen2", "NFC"),
        "added tokens that swallow spaces": any(
            token.get(side) for token in _added(tokenizer) for side in ("lstrip", "rstrip", "single_word")
        ),
    }
    reasons_present = [name for name, present in reasons.items() if present]
    if reasons_present:
        raise UnsupportedModelError(
            f"{directory}: llama.cpp can't follow this tokenizer's {reasons_present[0]}"
        )


def _added(tokenizer: Mapping[str, Any]) -> list[JsonObject]:
    return tokenizer.get("added_tokens") or []


def _tokens(tokenizer: Mapping[str, Any], n_vocab: int, directory: Path) -> tuple[list[str], list[int]]:
    by_id = {index: (text, TokenType.NORMAL) for text, index in tokenizer["model"]["vocab"].items()}
    for token in _added(tokenizer):
        kind = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
        by_id[token["id"]] = (token["content"], kind)
    if not all(isinstance(text, str) for text, _ in by_id.values()):
        raise TypeError("the text of an added token is not a string")
    if not by_id or max(by_id) >= n_vocab:
        last = max(by_id, default=None)
        raise ModelFileError(f"{directory}: tokenizer.json goes up to token {last}, the model has {n_vocab}")
    # Rows that pad the embedding to a round number; the names are convert_hf_to_gguf.py's.
    rows = [by_id.get(index, (f"[PAD{index}]", TokenType.UNUSED)) for index in range(n_vocab)]
    return [text for text, _ in rows], [int(kind) for _, kind in rows]


def _special_ids(special: gguf.SpecialVocab, directory: Path) -> dict[str, int]:
    ids = dict(special.special_token_ids)
    # For a gpt2 vocabulary llama.cpp takes token 11 as beginning and end of text when the file names none:
    # generation would then stop at an ordinary character.
    if "eos" not in ids:
        raise UnsupportedModelError(f"{directory}: the tokenizer names no end-of-text token (eos_token)")
    ids.setdefault("bos", ids["eos"])
    return ids


def _default_template(template: Any) -> str | None:
    if template is None or isinstance(template, str):
        return template
    named = {entry.get("name"): entry.get("template") for entry in template}
    return named.get("default")
