"""A program that loads a model file, reads all of its vocabulary, and decodes, in a process that may crash.

guard.py runs this file by its path with one argument, and reads from stdout how far it came: a word for each
stage begun, and at last `done`, or `error` with what was raised. It starts in a tenth of a second, because it
imports neither numpy nor all of llama_cpp: packages are stubs except for what is needed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import sys
import time
import types
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

N_CTX = 512
N_SEQ_MAX = 8  # as Engine opens a model, if its kind allows it
TEMPLATE_SECONDS = 5
MAX_TEXT = 1 << 18  # characters of a rendered template that are tokenized
CPU_SECONDS = 0.25  # for tokenizing: some 30,000 tokens, or as many of a larger vocabulary
BATCH, MIXED = 256, 16  # tokens whose texts are tokenized together; every MIXED-th batch comes first
GIB = 1 << 30


def main() -> None:
    job = json.loads(sys.argv[1])
    _limit(job["file_size"])
    _prepare(job)
    model_module = importlib.import_module(f"{job['package']}.model")
    errors = importlib.import_module(f"{job['root']}.errors")
    stage("load")
    try:
        with model_module.Model(
            job["model"], n_gpu_layers=job["n_gpu_layers"], use_extra_bufts=job["use_extra_bufts"]
        ) as model:
            _read_vocabulary(model, errors.PromptError)
            _decode(model, job["n_threads"])
            _render(model, job["root"])
    except errors.LocalsteerError as error:
        stage("error " + json.dumps([type(error).__name__, str(error)]))
        return
    stage("done")


def stage(line: str) -> None:
    print(line, flush=True)


def _limit(file_size: int) -> None:
    """Allow no core file, and no more memory than twice the file and a few GB: a file's claims must not fill
    the machine. On Linux, a mapped file does not count."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":
            limit = 2 * file_size + 8 * GIB
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


class _TrialJob(TypedDict):
    """What the parent asks for, by this part of it: its sys.path, and folders of packages that are not to be
    imported whole."""

    sys_path: list[str]
    stubs: dict[str, list[str]]


def _prepare(job: _TrialJob) -> None:
    sys.path[:] = job["sys_path"]
    for name, folders in job["stubs"].items():
        package = types.ModuleType(name)
        package.__path__ = folders
        sys.modules[name] = package


def _read_vocabulary(model: Any, refused: type[Exception]) -> None:
    """Read the text of every token, and tokenize these texts and all sorts of characters. The special parts
    of a vocabulary come first, since a large one is not read to its end."""
    if not model.has_vocabulary:
        return
    stage("vocabulary")
    batches = [*_batches(_special(model)), *_mixed(_batches(range(model.n_vocab)))]
    texts = [_text(model, batch) for batch in batches]
    stage("tokenizer")
    end = time.process_time() + CPU_SECONDS
    for text in (*_characters(), *texts):
        for parse_special in (True, False):
            with contextlib.suppress(refused):  # characters that the vocabulary can't spell
                model.tokenize(text, add_special=True, parse_special=parse_special)
        if time.process_time() > end:
            break


def _special(model: Any) -> list[int]:
    """The special tokens: control tokens, bytes, user-defined ones, ..."""
    import llama_cpp.llama_cpp as lc

    attribute, vocab, normal = lc.llama_vocab_get_attr, model.vocab, lc.LLAMA_TOKEN_ATTR_NORMAL
    return [token for token in range(model.n_vocab) if attribute(vocab, token) != normal]


def _batches(tokens: Sequence[int]) -> list[Sequence[int]]:
    return [tokens[start : start + BATCH] for start in range(0, len(tokens), BATCH)]


def _mixed(batches: list[Any]) -> list[Any]:
    """The batches, with samples from everywhere before the others."""
    return [batch for first in range(MIXED) for batch in batches[first::MIXED]]


def _text(model: Any, tokens: Sequence[int]) -> str:
    import ctypes

    import llama_cpp.llama_cpp as lc

    array = (lc.llama_token * len(tokens))(*tokens)
    size = 16 * len(tokens)
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = lc.llama_detokenize(model.vocab, array, len(tokens), buffer, size, False, True)
        if n >= 0:
            return buffer.raw[:n].decode("utf-8", "replace")
        size = -n


def _characters() -> Iterator[str]:
    """Characters: all at the beginning of the first planes and one in sixteen beyond, with every UTF-8
    byte."""
    codes = [*range(0x3000), *range(0x3000, 0x30000, 16), 0x10FFFF]
    text = " ".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
    yield from (text[start : start + 4096] for start in range(0, len(text), 4096))


def _decode(model: Any, n_threads: int) -> None:
    """Decode a short prompt and one more token, in a context like Engine's; then one like Embedder's."""
    import llama_cpp.llama_cpp as lc

    stage("decode")
    if lc.llama_model_has_encoder(model.pointer) or not lc.llama_model_has_decoder(model.pointer):
        return  # refused by Context
    tokens = [model.n_vocab * k // 8 for k in range(8)] if model.n_vocab else [0]
    n_seq_max = 1 if model.why_not_steerable(N_SEQ_MAX) else N_SEQ_MAX
    for embeddings in (False, True) if _pools(model) else (False,):
        params = lc.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(1, min(N_CTX, model.n_ctx_train))
        params.n_seq_max = 1 if embeddings else n_seq_max
        params.n_threads = params.n_threads_batch = n_threads
        params.kv_unified = params.swa_full = not embeddings
        params.embeddings = embeddings
        context = lc.llama_init_from_model(model.pointer, params)
        if not context:
            continue  # no memory, or another kind of model: Context reports it
        for batch in (tokens[: params.n_ctx], tokens[:1]):
            array = (lc.llama_token * len(batch))(*batch)
            lc.llama_decode(context, lc.llama_batch_get_one(array, len(batch)))
            lc.llama_get_logits_ith(context, -1)
        lc.llama_free(context)


def _pools(model: Any) -> bool:
    return model.metadata.get(f"{model.architecture}.pooling_type", "0") not in ("0", "4")


def _render(model: Any, root: str) -> None:
    """Render one message with the model's template, and tokenize it. What the template raises is reported
    when it is used."""
    if not model.chat_template or not model.has_vocabulary:
        return
    stage("template")
    with contextlib.suppress(Exception), _alarm(TEMPLATE_SECONDS):
        templates = importlib.import_module(f"{root}.templates")
        bos, eos = (
            model.token_to_piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""
            for token in (model.bos, model.eos)
        )
        template = templates.ChatTemplate(model.chat_template, bos=bos, eos=eos)
        text = template.render([{"role": "user", "content": "Tell me about foxes."}])
        model.tokenize(text[:MAX_TEXT], add_special=template.adds_special(text), parse_special=True)


@contextlib.contextmanager
def _alarm(seconds: int) -> Any:
    if not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
