"""Measures a control vector's mean projections again on the model that will run, keeping the directions.

    with Engine("model.Q4_0.gguf") as engine:
        calibration = calibrate(engine, vector, pairs)
    calibration.vector.save("json.gguf")

Quantization moves states, and with them the targets that `project` steers to. The same pairs go through the
quantized model once; the angle between its own directions and the stored ones is reported too. PyTorch is not
needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from localsteer.catalog import Catalog, Instruction, Query
from localsteer.errors import CatalogError, PlanError, VectorFileError
from localsteer.extract import METHOD, Backend, Pair, build_pairs, open_backend, render
from localsteer.extract.states import Progress, stream_states
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine

CALIBRATION = "calibration"  # key of the provenance


class CalibratedLayer(TypedDict):
    """before: as the file has it; here, and without a suffix: as this model gives it."""

    layer: int
    chosen: bool
    cosine: float | None
    drift: float | None
    mean_with_before: float | None
    mean_with: float | None
    mean_without: float | None
    std_with: float | None
    norm_before: float | None
    norm_here: float | None


class CalibrationNote(TypedDict):
    """Of a calibrated vector's provenance: where its mean projections come from."""

    model_name: str
    source_hash: str
    backend: str
    n_pairs: int


@dataclass(frozen=True)
class Calibration:
    """vector: the stored directions and settings with this model's statistics. fresh: this model's own
    directions and mean projections (without spreads), with the same settings. All columns are (n_layer,).

    cosines: between stored and fresh direction; NaN if one of them is zero. drift: how far the mean
    projection with the instruction has moved, in units of the stored distance between with and without: 0 is
    not at all, 1 is as far as the whole instruction moves it; NaN for a vector that had no mean projections.
    """

    before: ControlVector
    vector: ControlVector
    fresh: ControlVector
    cosines: np.ndarray
    drift: np.ndarray

    def rows(self) -> list[CalibratedLayer]:
        """A row for each layer, for tables and JSON; NaN becomes None."""
        old, new = self.before, self.vector
        columns = {
            "cosine": self.cosines,
            "drift": self.drift,
            "mean_with_before": old.mean_with,
            "mean_with": new.mean_with,
            "mean_without": new.mean_without,
            "std_with": new.std_with,
            "norm_before": np.linalg.norm(old.directions, axis=1),
            "norm_here": np.linalg.norm(self.fresh.directions, axis=1),
        }
        return [
            {"layer": il, "chosen": il in old.layers}
            | {key: _number(column, il) for key, column in columns.items()}
            for il in range(old.n_layer)
        ]


def calibrate(
    source: Engine | Backend,
    vector: ControlVector,
    pairs: Sequence[Pair],
    *,
    on_progress: Progress | None = None,
) -> Calibration:
    """Measure `vector`'s projections on `pairs` in this model, in one pass and in memory of one batch.

    The caller must check that the vector belongs to the model (`Engine.plan`). A vector without mean
    projections (an import) has them afterwards, and can project. Raises CatalogError without pairs, and
    PlanError for a gated vector, whose weight is learned.
    """
    if vector.mode == "gate":
        raise PlanError(f"{vector.label} has a learned gate, and so no target to measure: use it as it is.")
    if not pairs:
        raise CatalogError("there are no pairs to calibrate with")
    units = _units(vector.directions)
    with open_backend(source) as backend:
        sums = _Sums(units)
        questions = [pair.instructed for pair in pairs] + [pair.plain for pair in pairs]
        for batch, states in stream_states(backend, questions, on_progress):
            sums.add(states, np.array([i < len(pairs) for i in batch]))
        note = _note(backend, len(pairs))
    without, instructed = sums.projections
    spread_without, spread_with = sums.deviations
    calibrated = replace(
        vector,
        mean_with=instructed,
        mean_without=without,
        std_with=spread_with,
        std_without=spread_without,
        provenance={**vector.provenance, CALIBRATION: note},
    )
    fresh = _fresh(vector, sums.means)
    return Calibration(vector, calibrated, fresh, _cosines(vector, fresh), _drift(vector, calibrated))


def instruction_of(vector: ControlVector) -> Instruction:
    """The instruction that a vector was made from, according to its provenance. Raises VectorFileError."""
    known = vector.provenance
    phrasings = vector.phrasings
    if not phrasings or not all(text.strip() for text in phrasings):
        raise VectorFileError(
            f"{vector.label} does not say which instruction it was made from (an import, perhaps): "
            "name it with --instruction."
        )
    kwargs = known.get("kwargs")
    return Instruction(
        id=str(known.get("instruction_id") or vector.name or "instruction"),
        phrasings=phrasings,
        group=str(known.get("group") or "format"),
        verifier=known.get("verifier"),
        kwargs=kwargs if isinstance(kwargs, Mapping) else {},
        literal=True,
    )


def pairs_of(
    vector: ControlVector,
    catalog: Catalog,
    *,
    instruction: Instruction | None = None,
    queries: Sequence[Query] | None = None,
    n_pairs: int | None = None,
) -> list[Pair]:
    """The pairs that a vector was made from: its own phrasings and number of pairs, with queries of `catalog`
    unless others are passed.

    Raises VectorFileError for a vector that names no instruction, or was not made from pairs with and without
    one, CatalogError for unusable queries.
    """
    method = vector.provenance.get("method", METHOD)
    if instruction is None and method != METHOD:
        raise VectorFileError(
            f"{vector.label} was not made from pairs with and without its instruction ({method}): "
            "extract it from this model instead."
        )
    chosen = instruction or instruction_of(vector)
    if queries is None:
        queries = _catalog_queries(catalog, chosen)
    n = vector.provenance.get("n_pairs") if n_pairs is None else n_pairs
    most = len(queries) * len(chosen.phrasings)
    # there may be fewer queries than at extraction; pairs_match tells the user that they differ
    n = min(n, most) if isinstance(n, int) and n > 0 and n_pairs is None else n_pairs
    return build_pairs(chosen, queries, n)


def pairs_match(vector: ControlVector, backend: Backend, pairs: Sequence[Pair]) -> bool | None:
    """Whether these are the pairs that the vector was made from, judged by its probes (the first pair and the
    last instructed prompt, rendered); None if it has no probes."""
    texts = [str(probe[0]) for probe in vector.provenance.get("probes") or () if len(probe)]
    if not texts:
        return None
    ends = (pairs[0].plain, pairs[0].instructed, pairs[-1].instructed)
    return texts == [render(backend, text) for text in ends]


def _catalog_queries(catalog: Catalog, instruction: Instruction) -> tuple[Query, ...]:
    # the id of one with a filled slot is `bullets:5`; its queries are those of `bullets`
    known = catalog.instructions.get(instruction.id.split(":")[0], instruction)
    return catalog.queries_for(known, "extraction")


class _Sums:
    """Sums of states and of their projections on given units, without the instruction [0] and with it [1]."""

    def __init__(self, units: np.ndarray) -> None:
        self._units = units
        self._counts = np.zeros(2)
        self._states = np.zeros((2, *units.shape))
        self._first = np.zeros((2, len(units)))
        self._second = np.zeros((2, len(units)))
        self._shift: np.ndarray | None = None

    def add(self, states: np.ndarray, instructed: np.ndarray) -> None:
        projections = np.einsum("nle,le->nl", states.astype(np.float64), self._units)
        if self._shift is None:
            # squares around a point near the mean: around 0 they would cancel where means are large
            self._shift = projections.mean(axis=0)
        projections -= self._shift
        for side in (0, 1):
            chosen = instructed == bool(side)
            self._counts[side] += chosen.sum()
            self._states[side] += states[chosen].sum(axis=0, dtype=np.float64)
            self._first[side] += projections[chosen].sum(axis=0)
            self._second[side] += (projections[chosen] ** 2).sum(axis=0)

    @property
    def means(self) -> np.ndarray:
        """Mean states without and with the instruction, (2, n_layer, n_embd) float64."""
        return self._states / self._counts[:, None, None]

    @property
    def projections(self) -> np.ndarray:
        """Mean projections, (2, n_layer)."""
        return self._first / self._counts[:, None] + self._shift

    @property
    def deviations(self) -> np.ndarray:
        """Population standard deviations of the projections, (2, n_layer)."""
        counts = self._counts[:, None]
        return np.sqrt(np.maximum(self._second / counts - (self._first / counts) ** 2, 0.0))


def _units(directions: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 in float64; a row of zeros stays zero."""
    wide = directions.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.divide(wide, norms, out=np.zeros_like(wide), where=norms > 0)


def _fresh(vector: ControlVector, means: np.ndarray) -> ControlVector:
    directions = means[1] - means[0]
    without, instructed = np.einsum("sle,le->sl", means, _units(directions))
    arrays = {"directions": directions, "mean_with": instructed, "mean_without": without}
    return replace(vector, **arrays, std_with=None, std_without=None, readers=None, biases=None)


def _cosines(a: ControlVector, b: ControlVector) -> np.ndarray:
    cosines = np.einsum("le,le->l", _units(a.directions), _units(b.directions))
    known = a.directions.any(axis=1) & b.directions.any(axis=1)
    return np.where(known, cosines, np.nan)


def _drift(before: ControlVector, after: ControlVector) -> np.ndarray:
    if before.mean_with is None or before.mean_without is None:
        return np.full(before.n_layer, np.nan)
    distance = np.abs(before.mean_with.astype(np.float64) - before.mean_without)
    moved = after.mean_with.astype(np.float64) - before.mean_with
    return np.divide(moved, distance, out=np.full(before.n_layer, np.nan), where=distance > 0)


def _note(backend: Backend, n_pairs: int) -> CalibrationNote:
    """What the provenance records; no date, so that repeating a calibration gives the same bytes."""
    return {
        "model_name": backend.model_name,
        "source_hash": backend.source_hash,
        "backend": backend.description,
        "n_pairs": n_pairs,
    }


def _number(column: np.ndarray | None, il: int) -> float | None:
    return None if column is None or np.isnan(column[il]) else float(column[il])
