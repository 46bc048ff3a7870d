"""Uses a vector of one model in another: as it is, or through a map between their states.

    same tokens, layers and width (another quantization, the base model)   as it is
    same width, another model                                              as it is, by depth, recalibrated
    another width                                                          a ridge map, fitted on prompts

`Engine` rightly refuses a vector of another model. The provenance of the vectors made here says that they
belong to the target, and where they are from. `evaluate/transfer.py` measures whether they do anything there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from localsteer.catalog import Catalog, Instruction, alike
from localsteer.errors import CatalogError, MismatchError, PlanError, PromptError
from localsteer.extract import Backend, Pair, prompt_tokens, render
from localsteer.extract.calibrate import calibrate
from localsteer.extract.states import Progress, stream_states
from localsteer.extract.statistics import RunningMeans, unit_rows
from localsteer.jsonable import JsonObject
from localsteer.vector import STATISTICS, ControlVector

if TYPE_CHECKING:
    from localsteer.extract.gguf_backend import GgufBackend

AS_IS, OTHER_MODEL, MAPPED = "as is", "another model of the same width", "mapped"
UNMAPPED = "unmapped"  # the control of a map: the source's unmapped numbers
KEPT = ("instruction_id", "instruction", "phrasings", "group", "verifier", "kwargs", "method", "n_pairs")
ORIGIN = ("model_name", "architecture", "template_hash", "source_hash", "backend")
N_PROMPTS = 400  # shared prompts to fit a map on
MIN_PROMPTS = 20
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean eigenvalue of the states' Gram matrix
HELD_OUT = 0.2  # share of the queries held out, to choose the ridge and to measure the map


# --- as it is ----------------------------------------------------------------------------------------------


def relation(vector: ControlVector, target: Backend) -> str:
    """How a vector can be used in `target`: AS_IS, OTHER_MODEL, or MAPPED (the width differs)."""
    if vector.n_embd != target.n_embd:
        return MAPPED
    known = vector.provenance
    same_tokens = all(target.tokenize(text) == list(ids) for text, ids in known.get("probes") or ())
    architecture = known.get("architecture") in (None, target.architecture)
    return AS_IS if vector.n_layer == target.n_layer and same_tokens and architecture else OTHER_MODEL


def carry(vector: ControlVector, target: Backend) -> ControlVector:
    """The same directions as a vector of `target`; if the depths differ, each layer takes the direction at
    the same share of the depth. Gates are kept. Raises MismatchError for another width."""
    if vector.n_embd != target.n_embd:
        raise MismatchError(
            f"{vector.label} is {vector.n_embd} wide but {target.model_name} is {target.n_embd}: "
            "use --map with --from, the model that it was made from."
        )
    rows = layers_by_depth(vector.n_layer, target.n_layer)
    columns = (*STATISTICS, "readers", "biases")
    taken = {key: _rows(getattr(vector, key), rows) for key in columns}
    return adopt(vector, target, AS_IS, directions=vector.directions[rows], **taken)


def carry_to_other_model(vector: ControlVector, target: Backend, pairs: Sequence[Pair]) -> ControlVector:
    """The same, with mean projections measured in the target, since those of another model mean nothing
    there."""
    carried = calibrate(target, carry(vector, target), pairs).vector
    return adopt(vector, target, OTHER_MODEL, **_arrays(carried))


def adopt(vector: ControlVector, target: Backend, way: str, **arrays: Any) -> ControlVector:
    """`vector` with other arrays, as a vector of `target`: with its architecture, template and tokens; those
    of the model that it was made from are kept under `transferred_from`.

    The figures of its tuning are dropped, since they belong to another model. arrays: directions and
    statistics, and readers and biases if the gates are kept. Raises PlanError for a gated vector that is not
    used as it is.
    """
    if vector.mode == "gate" and way != AS_IS:
        raise PlanError(
            f"{vector.label} has a learned gate, which reads its own model's states: learn one on this model."
        )
    known = vector.provenance
    layers = {round(il * _scale(vector.n_layer, target.n_layer)) for il in vector.layers}
    usable = [il for il in sorted(layers) if arrays["directions"][il].any()]
    provenance = {
        **{key: known[key] for key in KEPT if key in known},
        "model_name": target.model_name,
        "architecture": target.architecture,
        "template_hash": target.template.template_hash,
        "source_hash": target.source_hash,
        "backend": target.description,
        "probes": _probes(vector, target),
        "transferred_from": {key: known[key] for key in ORIGIN if key in known},
        "transfer": way,
    }
    provenance = {key: value for key, value in provenance.items() if value is not None}
    if not usable:
        usable = [int(np.flatnonzero(arrays["directions"].any(axis=1))[0])]
    arrays = {"readers": None, "biases": None, **arrays}
    return replace(vector, **arrays, layers=tuple(usable), provenance=provenance)


def layers_by_depth(n_from: int, n_to: int) -> list[int]:
    """For each layer of the target, the source's layer at the same share of the depth."""
    return [round(il * _scale(n_to, n_from)) for il in range(n_to)]


def _scale(n_from: int, n_to: int) -> float:
    return (n_to - 1) / max(1, n_from - 1)


def _rows(column: np.ndarray | None, rows: Sequence[int]) -> np.ndarray | None:
    return None if column is None else column[list(rows)]


def _arrays(vector: ControlVector) -> JsonObject:
    keys = ("directions", "mean_with", "mean_without", "std_with", "std_without")
    return {key: getattr(vector, key) for key in keys}


def _probes(vector: ControlVector, target: Backend) -> list[list[Any]]:
    """Probes with the target's template and tokens, so that a third model is refused."""
    phrasing = next(iter(vector.phrasings), "Answer briefly.")
    texts = [render(target, text) for text in ("What is a river?", f"What is a river? {phrasing}")]
    return [[text, target.tokenize(text)] for text in texts]


# --- through a map -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerMap:
    """h_to = (h_from - centre_from) X^T A + centre_to, X the n centred states that it was fitted on: weights
    of n x (width + width) numbers, where the whole matrix would have width x width.

    source: the layer of the source model. ridge: times the mean eigenvalue. r2: on prompts not used in the
    fit; 0 is no better than the target's mean state.
    """

    source: int
    states: np.ndarray
    weights: np.ndarray
    centre_from: np.ndarray
    centre_to: np.ndarray
    ridge: float
    r2: float

    def __call__(self, states: np.ndarray) -> np.ndarray:
        """Map states (..., width of the source) to (..., width of the target)."""
        return (states - self.centre_from) @ self.states.T @ self.weights + self.centre_to


def fit_maps(
    source: np.ndarray, target: np.ndarray, groups: Sequence[str], *, shuffle: bool = False, seed: int = 0
) -> list[LayerMap]:
    """A map for each of the target's layers. source, target: (n, n_layer, n_embd) for each model, states of
    the same prompts. groups: the prompts' queries; some are held out as a whole. shuffle: pair each prompt
    with the target's state of another one, a control that knows only the models' means; its ridges are those
    of the true map.

    Raises CatalogError for fewer than MIN_PROMPTS prompts, or fewer than two queries.
    """
    if len(source) < MIN_PROMPTS or len(set(groups)) < 2:
        raise CatalogError(
            f"{len(source)} shared prompts are too few to fit a map: use {MIN_PROMPTS} or more"
        )
    held_out = _held_out(groups, seed)
    rows = layers_by_depth(source.shape[1], target.shape[1])
    maps = [_fit(source[:, s], target[:, t], held_out, s) for t, s in enumerate(rows)]
    if not shuffle:
        return maps
    others = target[np.random.default_rng(seed).permutation(len(target))]
    return [_refit(layer_map, source[:, layer_map.source], others[:, t]) for t, layer_map in enumerate(maps)]


def _held_out(groups: Sequence[str], seed: int) -> np.ndarray:
    """Which prompts are held out, (n,) bool."""
    names = list(dict.fromkeys(groups))
    n = max(1, round(HELD_OUT * len(names)))
    chosen = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:n]}
    return np.array([group in chosen for group in groups])


def _fit(source: np.ndarray, target: np.ndarray, held_out: np.ndarray, layer: int) -> LayerMap:
    x, y = source.astype(np.float64), target.astype(np.float64)
    kept = ~held_out
    solve = _Ridge(x[kept], y[kept])
    spread = ((y[held_out] - y[kept].mean(axis=0)) ** 2).sum()
    errors = {ridge: ((y[held_out] - solve(ridge, x[held_out])) ** 2).sum() for ridge in RIDGES}
    best = min(errors, key=errors.__getitem__)
    r2 = 1.0 - errors[best] / spread if spread > 0 else 0.0
    whole = _Ridge(x, y)
    return LayerMap(layer, whole.x, whole.weights(best), whole.x_mean, whole.y_mean, best, float(r2))


def _refit(fitted: LayerMap, source: np.ndarray, target: np.ndarray) -> LayerMap:
    """A map with the same ridge on other states; r2 is NaN, since nothing was held out."""
    ridge = _Ridge(source.astype(np.float64), target.astype(np.float64))
    weights = ridge.weights(fitted.ridge)
    return replace(fitted, weights=weights, centre_to=ridge.y_mean, r2=float("nan"))


class _Ridge:
    """Ridge regression in its dual form, one eigendecomposition for all ridges."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x_mean, self.y_mean = x.mean(axis=0), y.mean(axis=0)
        self.x = x - self.x_mean
        values, self._vectors = np.linalg.eigh(self.x @ self.x.T)
        self._values = np.maximum(values, 0.0)
        self._rotated = self._vectors.T @ (y - self.y_mean)

    def weights(self, ridge: float) -> np.ndarray:
        """The fitted weights, (n, width of the target)."""
        shift = ridge * max(self._values.mean(), 1e-30)
        return self._vectors @ (self._rotated / (self._values + shift)[:, None])

    def __call__(self, ridge: float, x: np.ndarray) -> np.ndarray:
        return (x - self.x_mean) @ self.x.T @ self.weights(ridge) + self.y_mean


def shared_prompts(catalog: Catalog, instruction: Instruction, n: int = N_PROMPTS) -> list[Pair]:
    """Base queries, plain and with other instructions of the catalogue in turn, as pairs of prompt and query.
    Never with the instruction itself or one of its kind, which would tell the map the answer.
    """
    queries = catalog.queries_for(instruction, "extraction")
    usable = [
        candidate
        for candidate in catalog.instructions.values()
        if set(candidate.open_slots) <= set(candidate.slots)
    ]
    others = [candidate.fill() for candidate in usable if not alike(instruction, candidate)]
    prompts: dict[str, Pair] = {}
    for i in range(max(n, 1)):
        query = queries[i // 2 % len(queries)].text
        other = others[(i // 2) % len(others)] if others and i % 2 else None
        wording = f" {other.phrasings[i % len(other.phrasings)]}" if other else ""
        prompts.setdefault(query + wording, Pair(query + wording, query))
    return list(prompts.values())


def readable(prompts: Sequence[Pair], *backends: GgufBackend) -> list[Pair]:
    """The prompts that all of these models can read, since a small vocabulary lacks some characters, and a
    small context has no room for the longest."""

    def can_read(backend: GgufBackend, text: str) -> bool:
        try:
            return len(prompt_tokens(backend, text)) <= backend.n_ctx
        except PromptError:
            return False

    return [pair for pair in prompts if all(can_read(each, pair.instructed) for each in backends)]


def mean_states(backend: Backend, pairs: Sequence[Pair], on_progress: Progress | None = None) -> np.ndarray:
    """Mean states without and with the instruction, (2, n_layer, n_embd) float64."""
    means = RunningMeans(backend.n_layer, backend.n_embd)
    texts = [pair.instructed for pair in pairs] + [pair.plain for pair in pairs]
    for batch, states in stream_states(backend, texts, on_progress):
        means.add(states, np.array([i < len(pairs) for i in batch]))
    return means.means


def all_states(backend: Backend, prompts: Sequence[str], on_progress: Progress | None = None) -> np.ndarray:
    """The states, (n, n_layer, n_embd) float32, in order."""
    every = np.empty((len(prompts), backend.n_layer, backend.n_embd), np.float32)
    for batch, states in stream_states(backend, prompts, on_progress):
        every[batch] = states
    return every


def send_through(
    vector: ControlVector, target: Backend, maps: Sequence[LayerMap], means: np.ndarray
) -> ControlVector:
    """The vector of `target` made from the source's mean states (`means`, from `mean_states`), mapped."""
    mapped = np.stack([layer_map(means[:, layer_map.source]) for layer_map in maps], axis=1)
    directions = (mapped[1] - mapped[0]).astype(np.float32)
    units = unit_rows(directions.astype(np.float64))
    without, instructed = np.einsum("sle,le->sl", mapped, units)
    return adopt(
        vector,
        target,
        MAPPED,
        directions=directions,
        mean_with=instructed,
        mean_without=without,
        std_with=None,
        std_without=None,
    )


def unmapped(vector: ControlVector, mapped: ControlVector, plain_mean: np.ndarray) -> ControlVector:
    """The source's unmapped numbers in the target, cut off or padded with zeros, at the lengths of
    `mapped`."""
    rows = layers_by_depth(vector.n_layer, mapped.n_layer)
    width = min(vector.n_embd, mapped.n_embd)
    directions = np.zeros(mapped.directions.shape, np.float64)
    directions[:, :width] = vector.directions[rows, :width]
    units = unit_rows(directions)
    lengths = np.linalg.norm(mapped.directions.astype(np.float64), axis=1)
    bases = np.einsum("le,le->l", plain_mean, units)
    return replace(
        mapped,
        directions=units * lengths[:, None],
        mean_with=bases + lengths,
        mean_without=bases,
        name=UNMAPPED,
    )
