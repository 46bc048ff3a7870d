"""A GGUF model: loading, shape, vocabulary; and making a smaller one by quantizing."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp.llama_cpp as lc

from ...cache import atomic_path
from ...errors import ContextError, LocalsteerError, ModelFileError, PromptError
from . import long_runs
from .guard import Load, check_file
from .library import (
    Handle,
    check_version,
    choose_extra_bufts,
    default_threads,
    log,
    text_of,
    total_memory,
)
from .rwkv import Spellings

if TYPE_CHECKING:
    from ..rpc import Hosts
    from .context import Context

ALL_LAYERS = 9999  # more than any model has: all layers, and the last matrix too
# A text may have as many tokens as the model's training context, within these bounds
MANY_TOKENS, MOST_TOKENS = 1 << 18, 1 << 20
COUNTED = 1 << 16  # characters whose tokens are counted at once
# Architectures whose graph node `l_out` is not the output of a layer
NO_RESIDUAL = ("nemotron_h", "nemotron_h_moe")


class Model(Handle):
    """A GGUF model. hosts: where its layers are stored and computed, after the weights have been sent there;
    they are closed with the model. n_gpu_layers: None means none, but all of them with hosts.

    Raises ModelFileError for a file that is missing, truncated, or not a model, and HostError.
    """

    _what = "model"
    hosts: Hosts | None = None
    _texts: object = None  # for a model on hosts: another one on this machine, only for its vocabulary

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_gpu_layers: int | None = None,
        use_extra_bufts: bool | None = None,
        hosts: Hosts | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        check_version()
        self.path = Path(path)
        self.n_gpu_layers = (ALL_LAYERS if hosts else 0) if n_gpu_layers is None else n_gpu_layers
        if hosts and self.n_gpu_layers == 0:
            raise LocalsteerError("-ngl 0 leaves no layers to the hosts of --rpc: leave it out.")
        load = check_gguf(
            self.path,
            n_gpu_layers=0 if hosts else self.n_gpu_layers,
            use_extra_bufts=use_extra_bufts,
            fits=not hosts or _fits(self.path),
        )
        self._extra_bufts = load.use_extra_bufts
        if hosts:  # tokens are available at any time, even while the hosts are lost
            self._texts = self._load(None, vocab_only=True)
            self._free_texts = weakref.finalize(self, lc.llama_model_free, self._texts)
        self._take(*self._loaded(hosts, on_progress))
        self.hosts = hosts

    def _loaded(
        self, hosts: Hosts | None, on_progress: Callable[[float], None] | None = None
    ) -> tuple[object, Callable[[object], object]]:
        """A pointer to the loaded model, and the function that frees it and leaves its hosts."""
        pointer = self._load(hosts, on_progress=on_progress)
        return pointer, lc.llama_model_free if hosts is None else partial(_free_remote, hosts)

    def _load(
        self,
        hosts: Hosts | None,
        *,
        vocab_only: bool = False,
        on_progress: Callable[[float], None] | None = None,
    ) -> object:
        """A pointer to the loaded model, which the caller must free."""
        params = lc.llama_model_default_params()
        params.n_gpu_layers = self.n_gpu_layers
        params.use_extra_bufts = self._extra_bufts
        params.vocab_only = vocab_only
        if hosts:
            from .remote import devices_of  # the trial of a file (trial.py) has no hosts

            devices = devices_of(hosts.addresses)
            params.devices = ctypes.cast(devices, ctypes.c_void_p)
        progress = lc.llama_progress_callback(lambda part, _: on_progress(part) is not False)
        if on_progress is not None:
            params.progress_callback = progress
        log.clear()
        pointer = lc.llama_model_load_from_file(os.fsencode(self.path), params)
        if hosts and hosts.lost:
            if pointer:
                lc.llama_model_free(pointer)
            hosts.check()
        if not pointer:
            why = hosts.named(log.why()) if hosts else log.why()
            if "'controlvector'" in why:
                raise ModelFileError(
                    f"{self.path} is a control vector: name a model here, and steer it by this file."
                )
            raise ModelFileError(f"{self.path} can't be loaded: {why}.")
        return pointer

    def reload(self, contexts: Sequence[Context]) -> None:
        """Load the model again on hosts that are back, with a new, empty llama_context for each of
        `contexts`; anything else that depends on the model is closed. All or nothing. Raises HostError."""
        hosts = self.hosts.renewed()
        free, inner = hosts.close, []
        try:
            pointer, free_model = self._loaded(hosts)
            free = partial(free_model, pointer)
            inner = [context.opened(pointer) for context in contexts]
            hosts.check()
        except BaseException:
            for context, opened in zip(contexts, inner, strict=False):
                context.discard(opened)
            free()
            raise
        self._free_now()
        self._hold(pointer, free_model)
        self.hosts = hosts
        for context, opened in zip(contexts, inner, strict=True):
            context.take_up(opened)

    def _take(self, pointer: object, free: Callable[[object], object]) -> None:
        self._hold(pointer, free)
        self._characters: frozenset[str] | None = None  # computed at the first text
        self._spellings: Spellings | None = None  # likewise
        self._read_shape()
        self.metadata = self._read_metadata()
        self.architecture = self.metadata.get("general.architecture", "")

    def _hold(self, pointer: object, free: Callable[[object], object]) -> None:
        self._pointer = pointer
        self._free = weakref.finalize(self, free, pointer)
        self._dependents: weakref.WeakSet[Handle] = weakref.WeakSet()

    def _read_shape(self) -> None:
        vocab = self._vocab = lc.llama_model_get_vocab(self._texts or self._pointer)
        self.n_layer = lc.llama_model_n_layer(self._pointer)
        self.n_embd = lc.llama_model_n_embd(self._pointer)
        self.n_ctx_train = lc.llama_model_n_ctx_train(self._pointer)
        self.n_vocab = lc.llama_vocab_n_tokens(vocab)
        self.n_params: int = lc.llama_model_n_params(self._pointer)
        self.bos: int = lc.llama_vocab_bos(vocab)  # -1: none
        self.eos: int = lc.llama_vocab_eos(vocab)
        self.add_bos = bool(lc.llama_vocab_get_add_bos(vocab))
        fills_in = (lc.llama_vocab_fim_pre, lc.llama_vocab_fim_suf, lc.llama_vocab_fim_mid)
        signs = tuple(sign(vocab) for sign in fills_in)
        # marks before the text before a gap, before the text after it, and before the gap; None: can't fill
        # gaps
        self.fill_in_tokens: tuple[int, ...] | None = None if -1 in signs else signs
        # -1 = no rotary embedding: a table of n_ctx_train positions, and reading past its end aborts
        self.has_position_table = lc.llama_model_rope_type(self._pointer) == lc.LLAMA_ROPE_TYPE_NONE

    def _read_metadata(self) -> dict[str, str]:
        """GGUF key-values as llama.cpp prints them; it cuts long arrays short."""
        count = lc.llama_model_meta_count(self._pointer)
        return {
            self._sized_text(lc.llama_model_meta_key_by_index, i): self._sized_text(
                lc.llama_model_meta_val_str_by_index, i
            )
            for i in range(count)
        }

    def _sized_text(self, function: Callable, index: int, size: int = 256) -> str:
        buffer = ctypes.create_string_buffer(size)
        needed = function(self._pointer, index, buffer, size)
        if needed >= size:
            return self._sized_text(function, index, needed + 1)
        return text_of(buffer.value)

    @property
    def chat_template(self) -> str | None:
        template = lc.llama_model_chat_template(self.pointer, None)
        return text_of(template) if template else None

    @property
    def vocab(self) -> object:
        if self._texts and self._free_texts.alive:  # whatever happens to the hosts meanwhile
            return self._vocab
        return self.pointer and self._vocab

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text. add_special: add BOS and the like as the model wants; off for text from a chat
        template.

        Raises PromptError for what the vocabulary can't spell, and for a model without a vocabulary;
        ContextError for more tokens than any context holds.
        """
        if not self.has_vocabulary:
            raise PromptError(f"{self.path.name} has no tokenizer: it takes only token ids.")
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text holds {text[error.start]!r}, which is not a Unicode character."
            ) from None
        self._check_characters(text)
        self._check_bytes(raw)
        self._check_count(text, len(raw))  # after these: it calls the tokenizer
        tokens = self._tokens_of(text, raw, add_special, parse_special)
        if -1 in tokens:
            unknown = next((c for c in text if -1 in self._tokens(c.encode(), False, False)), text)
            raise self._no_token(unknown)
        return tokens

    def _tokens_of(self, text: str, raw: bytes, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text. One with a very long word is cut (long_runs.py), with special tokens around
        the pieces."""
        pieces = self.safe_pieces(text)
        if len(pieces) == 1:
            return self._tokens(raw, add_special, parse_special)
        tokens = [token for piece in pieces for token in self._tokens(piece.encode(), False, parse_special)]
        first = [self.bos] if add_special and self.add_bos else []
        last = [self.eos] if add_special and lc.llama_vocab_get_add_eos(self.vocab) else []
        return [*first, *tokens, *last]

    def safe_pieces(self, text: str) -> list[str]:
        """The pieces in which llama.cpp's tokenizer may get a text: one, unless it has a very long word."""
        is_bpe = lc.llama_vocab_type(self.vocab) == lc.LLAMA_VOCAB_TYPE_BPE
        is_safe = not is_bpe or self.metadata.get("tokenizer.ggml.pre") in long_runs.SAFE
        return [text] if is_safe else long_runs.pieces(text)

    def _tokens(self, raw: bytes, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text's bytes; -1 for a character for which the vocabulary has neither token nor
        bytes."""
        size = len(raw) + 8
        while True:
            buffer = (lc.llama_token * size)()
            n = lc.llama_tokenize(self.vocab, raw, len(raw), buffer, size, add_special, parse_special)
            if n >= 0:
                return buffer[:n]
            size = -n

    def _check_count(self, text: str, n_bytes: int) -> None:
        """Raise ContextError for a text with more tokens than any context holds. It is read only up to there:
        a list of 2.5 million tokens would stop all threads for half a second, and take 200 MB."""
        most = min(max(self.n_ctx_train, MANY_TOKENS), MOST_TOKENS)
        if n_bytes <= most:
            return
        count = 0
        for start in range(0, len(text), COUNTED):
            part = text[start : start + COUNTED]
            for piece in map(str.encode, self.safe_pieces(part)):
                self._check_bytes(piece)
                count -= lc.llama_tokenize(self.vocab, piece, len(piece), None, 0, False, True)
            if count > most:
                raise ContextError(
                    f"the first {start + len(part):,} characters of the text have {count:,} tokens already, "
                    f"more than any context of {self.path.name} holds: shorten it."
                )

    @property
    def has_vocabulary(self) -> bool:
        """Whether there is a vocabulary; llama.cpp ends the process if asked for a token's text without
        one."""
        return lc.llama_vocab_type(self.vocab) != lc.LLAMA_VOCAB_TYPE_NONE

    def _check_characters(self, text: str) -> None:
        """Raise PromptError for a character at which llama.cpp would end the process, as with a SentencePiece
        vocabulary without byte tokens."""
        if self._characters is None:
            self._characters = self._only_characters()
        unknown = sorted(set(text.replace(" ", "\u2581")) - self._characters) if self._characters else ()
        if unknown:
            raise self._no_token(unknown[0])

    def _check_bytes(self, raw: bytes) -> None:
        if lc.llama_vocab_type(self.vocab) != lc.LLAMA_VOCAB_TYPE_RWKV:
            return
        if self._spellings is None:
            tokens = [self.token_to_piece(i, special=True) for i in range(self.n_vocab)]
            special = lc.LLAMA_TOKEN_ATTR_CONTROL | lc.LLAMA_TOKEN_ATTR_USER_DEFINED
            attributes = (lc.llama_vocab_get_attr(self.vocab, i) for i in range(self.n_vocab))
            chosen = [
                token for token, attribute in zip(tokens, attributes, strict=True) if attribute & special
            ]
            self._spellings = Spellings(tokens, chosen)
        unknown = self._spellings.unknown(raw)
        if unknown:
            raise self._no_token(unknown)

    def _no_token(self, character: str) -> PromptError:
        return PromptError(
            f"{self.path.name} has no token for {character!r}: leave it out, or use another model."
        )

    def _only_characters(self) -> frozenset[str]:
        """The characters that the vocabulary can spell; empty means all, through its bytes."""
        if lc.llama_vocab_type(self._vocab) != lc.LLAMA_VOCAB_TYPE_SPM:
            return frozenset()
        tokens = range(self.n_vocab)
        if any(lc.llama_vocab_get_attr(self._vocab, i) & lc.LLAMA_TOKEN_ATTR_BYTE for i in tokens):
            return frozenset()
        texts = (text_of(lc.llama_vocab_get_text(self._vocab, i)) for i in tokens)
        return frozenset(text for text in texts if len(text) == 1)

    def token_to_piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of a token, which may be part of a character. special: render control tokens too.

        Empty for a model without a vocabulary.
        """
        self._check_token(token)
        if not self.has_vocabulary:
            return b""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = lc.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def pieces(self) -> list[bytes]:
        """`token_to_piece` of every token, with no bytes for special ones, in one go, since a vocabulary may
        have 200,000."""
        if not self.has_vocabulary:
            return [b""] * self.n_vocab
        function, vocab, size = lc.llama_token_to_piece, self.vocab, 4096
        buffer, texts = ctypes.create_string_buffer(size), []
        for token in range(self.n_vocab):
            n = function(vocab, token, buffer, size, 0, False)
            texts.append(buffer[:n] if n >= 0 else self.token_to_piece(token))
        return texts

    def ends(self) -> list[int]:
        """The tokens that end a reply."""
        if not self.has_vocabulary:
            return []
        function, vocab = lc.llama_vocab_is_eog, self.vocab
        return [token for token in range(self.n_vocab) if function(vocab, token)]

    def is_eog(self, token: int) -> bool:
        """Whether a token ends the reply (EOS, end of turn, ...)."""
        self._check_token(token)
        return bool(lc.llama_vocab_is_eog(self.vocab, token))

    def _check_token(self, token: int) -> None:
        if not 0 <= token < self.n_vocab:
            raise PromptError(f"token {token} is outside the vocabulary of {self.n_vocab} tokens.")

    def cache_bytes(self, element_bytes: int) -> int:
        """Bytes that the keys and values of one token take, by the heads of the first layer; 0 if it has
        none."""
        n_head, n_head_kv = lc.llama_model_n_head(self.pointer), lc.llama_model_n_head_kv(self.pointer)
        return 2 * element_bytes * self.n_layer * n_head_kv * self.n_embd // max(n_head, 1)

    def why_not_steerable(self, n_seq_max: int) -> str | None:
        """Why the whole architecture can't be steered, known before any layer is tried."""
        if self.architecture in NO_RESIDUAL:
            return "llama.cpp's graph shows what its MLPs add to the residual stream, not the stream"
        if n_seq_max > 1 and lc.llama_model_is_hybrid(self.pointer):
            return "hybrid models mix the rows of several sequences: use one sequence at a time"
        if n_seq_max > 1 and lc.llama_model_is_recurrent(self.pointer):
            return "recurrent models mix the rows of several sequences: use one sequence at a time"
        if lc.llama_model_is_diffusion(self.pointer):
            return "a diffusion model has no last prompt token"
        return None

    def close(self) -> None:
        self._free_now()
        if self._texts:
            self._free_texts()

    def _free_now(self) -> None:
        for dependent in list(self._dependents):
            dependent.close()
        super().close()


def _free_remote(hosts: Hosts, pointer: object) -> None:
    lc.llama_model_free(pointer)
    hosts.close()  # after the buffers on the hosts were freed


def _fits(path: Path) -> bool:
    """Whether this machine can load the model for a trial; a file that can't be read is refused elsewhere."""
    try:
        return path.stat().st_size < total_memory() / 2
    except (OSError, ValueError):
        return True


def check_gguf(
    path: str | os.PathLike[str],
    *,
    n_gpu_layers: int = 0,
    use_extra_bufts: bool | None = None,
    again: bool = False,
    fits: bool = True,
) -> Load:
    """Check that llama.cpp survives loading a file (guard.py); returns how to load it.

    again: also try a file that is known. fits: whether this machine can load it; otherwise only its header is
    checked. Raises ModelFileError, one line.
    """
    lc.llama_backend_init()
    system = text_of(lc.llama_print_system_info())
    load = Load(n_gpu_layers, choose_extra_bufts(system, use_extra_bufts), system)
    check_file(Path(path), load, again=again, can_try=fits)
    return load


def quantization_types() -> dict[str, int]:
    """The names that quantize() takes: {"Q4_K_M": 15, ...}."""
    names = {}
    for attribute in dir(lc):
        match = re.fullmatch(r"LLAMA_FTYPE_(?:MOSTLY|ALL)_(\w+)", attribute)
        if match:
            names[match[1]] = getattr(lc, attribute)
    return names


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    ftype: str,
    n_threads: int = 0,
    *,
    trusted: bool = False,
) -> None:
    """Quantize src to dst, which is written in one step: an interrupted run leaves no half model.

    ftype: "Q8_0", "Q4_K_M", ... trusted: localsteer made src, which then needs no trial (guard.py).
    Tensors whose width a type can't hold get a neighbouring type, as llama.cpp decides.
    """
    src, dst = Path(src), Path(dst)
    types = quantization_types()
    if ftype.upper() not in types:
        raise ModelFileError(f"unknown quantization {ftype!r}: choose one of {', '.join(sorted(types))}.")
    check_version()
    if not trusted:
        check_gguf(src)
    params = lc.llama_model_quantize_default_params()
    params.ftype = types[ftype.upper()]
    params.nthread = n_threads or default_threads()
    with atomic_path(dst) as temporary:
        log.clear()
        if lc.llama_model_quantize(os.fsencode(src), os.fsencode(temporary), ctypes.byref(params)) != 0:
            why = log.why()
            if "iostream error" in why:  # all that C++ says about a disk without room
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise ModelFileError(f"{src} can't be quantized to {ftype}: {why}.")
