"""From an instruction and base queries to a control vector, from a transformers model or from a GGUF.

    from localsteer.extract import extract
    vector = extract("model.gguf", "Answer in rhyme.")

The state that counts is the residual stream after each layer at the LAST PROMPT TOKEN. The prompt is rendered
by the model's own chat template, with the generation prompt added (Stolfo et al., arXiv 2410.12877, section
3). Other tokens can be chosen (`tokens`), and pairs of texts can be read as they are (`extract_from_texts`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from localsteer.catalog import Instruction, Query, load_catalog
from localsteer.errors import PromptError, UnsupportedModelError
from localsteer.jsonable import JsonObject
from localsteer.prompt_texts import PromptText
from localsteer.token_choice import TokenChoice
from localsteer.vector import ControlVector, checked_layers

from .pairs import DEFAULT_PAIRS, Pair, build_pairs
from .statistics import KEPT_STATES, ProjectionSpread, RunningMeans
from .text_pairs import TextPair, read_text_pairs, some_pairs

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.templates import ChatTemplate

__all__ = [
    "DEFAULT_PAIRS",
    "Backend",
    "Pair",
    "TextPair",
    "build_pairs",
    "extract",
    "extract_from_texts",
    "open_backend",
    "read_text_pairs",
]

BATCH_TOKENS = 4096  # including padding: limits the size of one forward pass
BATCH_PROMPTS = 32
METHOD = "difference of means, last prompt token"
METHOD_OF_TEXTS = "difference of means of pairs of texts, last token"
ADDED_GROUPS = ("length", "word")  # the paper adds these directions, and projects the others

Progress = Callable[[int, int], None]


@runtime_checkable
class Backend(Protocol):
    """A model that returns its states; torch_backend.py and gguf_backend.py implement it."""

    n_layer: int
    n_embd: int
    model_name: str
    architecture: str | None  # by llama.cpp's name
    source_hash: str
    description: str
    template: ChatTemplate

    def tokenize(self, text: str) -> list[int]: ...

    def last_hidden_states(self, prompts: Sequence[Sequence[int]]) -> np.ndarray: ...

    def close(self) -> None: ...


@runtime_checkable
class TokenBackend(Backend, Protocol):
    """A backend that also returns states at tokens other than the last."""

    def find_part(self, text: str, tokens: Sequence[int], part: str) -> range | None: ...

    def mean_hidden_states(
        self, prompts: Sequence[Sequence[int]], positions: Sequence[range]
    ) -> np.ndarray: ...


def extract(
    source: str | os.PathLike[str] | Engine | Backend,
    instruction: Instruction | str,
    queries: Sequence[Query | str] | None = None,
    *,
    n_pairs: int | None = None,
    tokens: str | int | TokenChoice = "last",
    layer: int | Sequence[int] | None = None,
    mode: str | None = None,
    positions: str = "all",
    name: str | None = None,
    on_progress: Progress | None = None,
    **options: Any,
) -> ControlVector:
    """The control vector of one instruction in one model.

    source: a GGUF file, a transformers folder or hub name, an Engine, or an open backend (see `open_backend`,
    also for `options`). instruction: from a catalogue, or the user's own words. queries: base queries; None
    takes the instruction's own, or the general ones. tokens: a TokenChoice; the mean of several is taken.
    layer: the layers that the vector starts with, by default the middle one; tuning chooses better. mode: by
    default "add" for lengths and words, else "project". on_progress: called with (prompts done, prompts).

    Raises CatalogError, ModelFileError, UnsupportedModelError, PromptError, PlanError.
    """
    instruction = Instruction.from_text(instruction) if isinstance(instruction, str) else instruction.fill()
    if queries is None:
        queries = load_catalog().queries_for(instruction, "extraction")
    pairs, choice = build_pairs(instruction, queries, n_pairs), TokenChoice.parse(tokens)
    texts = [(_question(pair.instructed), _question(pair.plain)) for pair in pairs]
    with open_backend(source, **options) as backend:
        layers = _layers(backend, layer)
        try:
            means, spread = _statistics(backend, _Prompts(backend, texts, choice, on_progress))
        except PromptError as error:
            raise PromptError(f"{instruction.id}: {error}") from error
        return _vector(
            means,
            spread,
            layers=layers,
            mode=mode or ("add" if instruction.group in ADDED_GROUPS else "project"),
            positions=positions,
            name=name or instruction.id,
            provenance=_provenance(backend, instruction, pairs, choice),
        )


def extract_from_texts(
    source: str | os.PathLike[str] | Engine | Backend,
    pairs: Sequence[TextPair],
    *,
    name: str,
    n_pairs: int | None = None,
    tokens: str | int | TokenChoice = "last",
    layer: int | Sequence[int] | None = None,
    mode: str = "project",
    positions: str = "all",
    on_progress: Progress | None = None,
    **options: Any,
) -> ControlVector:
    """The control vector of pairs of texts: mean(with) - mean(without) at the chosen tokens.

    Replies in the pairs are teacher-forced. n_pairs: how many to take, evenly spaced. Everything else is as
    in `extract`. Raises PromptError, which names a text that can't be read, ModelFileError,
    UnsupportedModelError, PlanError.
    """
    pairs, choice = some_pairs(pairs, n_pairs), TokenChoice.parse(tokens)
    texts = [(pair.instructed, pair.plain) for pair in pairs]
    with open_backend(source, **options) as backend:
        layers = _layers(backend, layer)
        means, spread = _statistics(backend, _Prompts(backend, texts, choice, on_progress))
        provenance = _provenance_of_texts(backend, texts, choice, name)
        return _vector(
            means, spread, layers=layers, mode=mode, positions=positions, name=name, provenance=provenance
        )


def _vector(means: RunningMeans, spread: ProjectionSpread, **settings: Any) -> ControlVector:
    return ControlVector(
        directions=means.directions,
        mean_with=means.projections[1],
        mean_without=means.projections[0],
        std_with=spread.deviations[1],
        std_without=spread.deviations[0],
        **settings,
    )


def _layers(backend: Backend, layer: int | Sequence[int] | None) -> tuple[int, ...]:
    n_layer = backend.n_layer
    return checked_layers(n_layer // 2 if layer is None else layer, n_layer, backend.model_name)


def _question(text: str) -> PromptText:
    return PromptText(text, label=f"the prompt {text!r} can't be read")


@contextmanager
def open_backend(
    source: str | os.PathLike[str] | Engine | Backend,
    *,
    dtype: str = "auto",
    device: str | None = None,
    exact: bool = False,
    n_threads: int | None = None,
) -> Iterator[Backend]:
    """A model opened for several extractions. An engine or backend that was already open stays open.

    dtype, device: of a transformers model ("auto", "float32", "bfloat16", "float16"; "cpu", "cuda", ...).
    exact: a GGUF with F32 KV cache and no flash attention, for comparisons. n_threads: of either.
    """
    if isinstance(source, Backend):
        yield source
        return
    if not isinstance(source, (str, os.PathLike)) or _is_gguf(Path(source)):
        from .gguf_backend import GgufBackend

        backend: Backend = GgufBackend(source, exact=exact, n_threads=n_threads)
    else:
        from .torch_backend import TorchBackend

        backend = TorchBackend(source, dtype=dtype, device=device, n_threads=n_threads)
    try:
        yield backend
    finally:
        backend.close()


def _is_gguf(path: Path) -> bool:
    if path.suffix.lower() == ".gguf":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


class _Prompts:
    """The tokenised texts of all pairs, and their states in batches of similar lengths."""

    def __init__(
        self,
        backend: Backend,
        pairs: Sequence[tuple[PromptText, PromptText]],
        choice: TokenChoice,
        on_progress: Progress | None,
    ) -> None:
        self._backend, self._choice, self._on_progress = backend, choice, on_progress
        texts = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
        self._ids, self._positions = zip(*(_read(backend, text, choice) for text in texts), strict=True)
        self._instructed = np.arange(len(texts)) < len(pairs)
        self._passes = 1 if len(texts) <= KEPT_STATES else 2
        self._done = 0

    @property
    def few(self) -> bool:
        """Whether all states can be kept in memory."""
        return self._passes == 1

    def states(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (states, instructed) for each batch: (n, n_layer, n_embd) float32 and (n,) bool."""
        for batch in batches([len(ids) for ids in self._ids]):
            ids = [self._ids[i] for i in batch]
            if self._choice.is_last:
                states = self._backend.last_hidden_states(ids)
            else:
                states = self._backend.mean_hidden_states(ids, [self._positions[i] for i in batch])
            _check_finite(states)
            self._done += len(batch)
            if self._on_progress is not None:
                self._on_progress(self._done, self._passes * len(self._ids))
            yield states, self._instructed[batch]


def _read(backend: Backend, text: PromptText, choice: TokenChoice) -> tuple[list[int], range]:
    """Token ids of a text, and the chosen ones among them. Raises PromptError, which names the text."""
    try:
        rendered = text.render(backend.template)
        ids = backend.tokenize(rendered)
        n_ctx = getattr(backend, "n_ctx", None)
        if n_ctx is not None and len(ids) > n_ctx:
            raise PromptError(
                f"it has {len(ids)} tokens, more than the context of {n_ctx} tokens: shorten it"
            )
        if not choice.is_last and not isinstance(backend, TokenBackend):
            raise PromptError(f"{backend.description} knows only the last token")
        find = lambda part: backend.find_part(rendered, ids, part)  # noqa: E731
        return ids, choice.positions(len(ids), find, text.forced)
    except PromptError as error:
        raise PromptError(f"{text.label}: {str(error).rstrip('.')}.") from error


def _statistics(backend: Backend, prompts: _Prompts) -> tuple[RunningMeans, ProjectionSpread]:
    means = RunningMeans(backend.n_layer, backend.n_embd)
    kept = []
    for states, instructed in prompts.states():
        means.add(states, instructed)
        if prompts.few:
            kept.append((states, instructed))
    spread = ProjectionSpread(means)
    for states, instructed in kept if prompts.few else prompts.states():
        spread.add(states, instructed)
    return means, spread


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yields indices by length, shortest first, in batches of at most BATCH_TOKENS (padded) and
    BATCH_PROMPTS."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and ((len(batch) + 1) * lengths[index] > BATCH_TOKENS or len(batch) == BATCH_PROMPTS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def render(backend: Backend, question: str) -> str:
    """One question as the model reads it, ready for its reply."""
    return backend.template.render([{"role": "user", "content": question}])


def prompt_tokens(backend: Backend, question: str) -> list[int]:
    """Token ids of a question. Raises PromptError, which names the question, if the vocabulary can't spell
    it."""
    try:
        return backend.tokenize(render(backend, question))
    except PromptError as error:
        raise PromptError(f"the prompt {question!r} can't be read: {error}") from error


def _check_finite(states: np.ndarray) -> None:
    broken = ~np.isfinite(states).all(axis=(0, 2))
    if broken.any():
        raise UnsupportedModelError(
            f"the model's state after layer {int(broken.argmax())} is not finite: use dtype float32, "
            "or check whether the file is damaged"
        )


def _provenance(
    backend: Backend, instruction: Instruction, pairs: Sequence[Pair], choice: TokenChoice
) -> Mapping[str, Any]:
    prompts = [_question(text) for text in (pairs[0].plain, pairs[0].instructed, pairs[-1].instructed)]
    provenance = origin_of(backend, instruction, prompts, method=_method(METHOD, choice)) | {
        "n_pairs": len(pairs)
    }
    return provenance if choice.is_last else provenance | {"tokens": choice.spelled}


def _provenance_of_texts(
    backend: Backend, texts: Sequence[tuple[PromptText, PromptText]], choice: TokenChoice, name: str
) -> Mapping[str, Any]:
    """Provenance like that of an instruction without wordings. texts_sha256: of all texts as they were
    read."""
    probes = [texts[0][1], texts[0][0], texts[-1][0]]
    provenance = origin_of(backend, Instruction(name, ()), probes, method=_method(METHOD_OF_TEXTS, choice))
    rendered = [[text.render(backend.template) for text in pair] for pair in texts]
    provenance["texts_sha256"] = hashlib.sha256(json.dumps(rendered).encode()).hexdigest()
    provenance |= {"n_pairs": len(texts), "tokens": choice.spelled, "raw": all(pair[0].raw for pair in texts)}
    # no template was used, so a different one is no reason for a warning
    unknown = {"phrasings", "group"} | ({"template_hash"} if provenance["raw"] else set())
    return {key: value for key, value in provenance.items() if key not in unknown}


def _method(method: str, choice: TokenChoice) -> str:
    return method if choice.is_last else f"{method.rpartition(', ')[0]}, tokens {choice.spelled}"


def origin_of(
    backend: Backend, instruction: Instruction, prompts: Sequence[str | PromptText], *, method: str
) -> JsonObject:
    """The provenance of a vector: its instruction, model and method. prompts: some of those it was made
    with."""
    from localsteer import __version__

    # Tokenised again whenever the vector is attached to a model. They come from these prompts rather than
    # from a fixed # text, whose characters a small vocabulary may lack.
    texts = [PromptText(text) if isinstance(text, str) else text for text in prompts]
    probes = [text.render(backend.template) for text in texts]
    provenance = {
        "instruction_id": instruction.id,
        "instruction": instruction.phrasings[0] if instruction.phrasings else None,
        "phrasings": list(instruction.phrasings),
        "group": instruction.group,
        "verifier": instruction.verifier,
        "kwargs": dict(instruction.kwargs) if instruction.verifier else None,
        "method": method,
        "model_name": backend.model_name,
        "architecture": backend.architecture,
        "template_hash": backend.template.template_hash,
        "source_hash": backend.source_hash,
        "backend": backend.description,
        "tool_version": __version__,
        "probes": [[text, backend.tokenize(text)] for text in probes],
    }
    return {key: value for key, value in provenance.items() if value is not None}
