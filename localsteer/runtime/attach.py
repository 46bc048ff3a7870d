"""What may steer a model: checks a vector's shape, tokenizer and layers against those of the model.

Engine and SteeredLlama both attach vectors through this, and so refuse the same ones in the same words.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import MismatchError, PlanError, VectorFileError
from ..plan import Plan
from ..vector import ControlVector, check_model

Steer = Plan | ControlVector | Sequence[ControlVector] | None

logger = logging.getLogger("localsteer")  # without a handler Python prints warnings to stderr as they are


class Notices:
    """Shows each notice to the user once per open model."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning(text)


class Attaching:
    """Turns vectors or a plan into a plan that is known to work on one model.

    tokenize: returns the ids of a text that the model's template rendered. probe: raises for layers that
    can't be steered. Neither may hold the owner of this object: a model is freed when its last user drops it.
    """

    def __init__(
        self,
        path: Path,
        *,
        shape: tuple[int, int, str],
        template_hash: str,
        tokenize: Callable[[str], list[int]],
        probe: Callable[[Sequence[int]], object],
        notice: Notices,
    ) -> None:
        self._path = path
        self._shape = shape  # n_layer, n_embd, architecture
        self._template_hash = template_hash
        self._tokenize, self._probe, self._notice = tokenize, probe, notice
        self._checked: weakref.WeakSet[ControlVector] = weakref.WeakSet()

    def plan(self, steer: Steer) -> Plan | None:
        """The plan of one sequence, or None if it changes nothing.

        Raises MismatchError for a vector of another model, PlanError, UnsupportedModelError.
        """
        plan = steer if isinstance(steer, Plan) else self._plan_of_vectors(steer)
        if plan.is_empty:
            return None
        for text in plan.notices:
            self._notice(text)
        n_embd = self._shape[1]
        if plan.n_embd != n_embd:
            raise MismatchError(
                f"the plan's directions are {plan.n_embd} wide but {self._path.name} is {n_embd} wide: "
                "use vectors of this model."
            )
        self._probe(plan.layers)
        return plan

    def _plan_of_vectors(self, steer: ControlVector | Sequence[ControlVector] | None) -> Plan:
        vectors = [steer] if isinstance(steer, ControlVector) else list(steer or ())
        for vector in vectors:
            if not isinstance(vector, ControlVector):
                raise PlanError(f"steer takes control vectors or a plan, not {type(vector).__name__}.")
            if vector not in self._checked:
                self._check_vector(vector)
                self._checked.add(vector)
        return Plan.from_vectors(vectors)

    def _check_vector(self, vector: ControlVector) -> None:
        check_model(vector, *self._shape)
        for text, ids in _probes(vector):
            ours = self._tokenize(text)
            if ours != ids:
                raise MismatchError(
                    f"{vector.label} was extracted with another tokenizer: {_brief(text)} is "
                    f"{_brief_ids(ours)} in {self._path.name} and {_brief_ids(ids)} in the vector: "
                    "extract the vector from this model."
                )
        theirs = vector.provenance.get("template_hash")
        if theirs and theirs != self._template_hash:
            self._notice(
                f"{vector.label} was extracted with a different chat template from that of "
                f"{self._path.name}: "
                "check that it still steers, or extract it from this model."
            )


def _probes(vector: ControlVector) -> list[tuple[str, list[int]]]:
    """The vector's probes: templated texts with their tokens at extraction. Raises VectorFileError."""
    probes = vector.provenance.get("probes") or ()
    try:
        return [(str(text), [int(token) for token in ids]) for text, ids in probes]
    except (TypeError, ValueError):
        raise VectorFileError(
            f"{vector.label} has probes that can't be read: extract the vector again."
        ) from None


def _brief(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def _brief_ids(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, list(ids)[:6]))
    return f"[{shown}{', ...' if len(ids) > 6 else ''}]"
