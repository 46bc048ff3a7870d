"""What a request's `vllm_xargs` (offline: `SamplingParams.extra_args`) say about steering.

{"steer": "json"}                                           as the file says
{"steer": "json", "strength": 0.8, "positions": "prompt"}   with other settings
{"steer": ["json", "lowercase"], "strength": [1, 0.5]}      several, each with its own or all with one
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localsteer.errors import PlanError
from localsteer.plan import Plan
from localsteer.vector import check_model

from .shelf import VectorShelf

STEER = "steer"
SETTINGS = ("strength", "positions", "layer", "mode")
MOST_VECTORS = 16  # of one request
# Far beyond any use. States that overflow leave NaN in layers of the cache, which other requests get next.
MOST_STRENGTH = 1000.0


def plan_of(extra: Mapping[str, Any], shelf: VectorShelf, *, n_layer: int, n_embd: int) -> Plan | None:
    """The plan that a request asks for, or None.

    Raises PlanError for invalid settings, MismatchError for a vector of another model, VectorFileError.
    """
    settings = {name: extra[name] for name in SETTINGS if extra.get(name) is not None}
    names = extra.get(STEER)
    if names is None:
        if settings:
            raise PlanError(f"{next(iter(settings))} needs steer, the name of a vector.")
        return None
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise PlanError(f"steer: {names!r:.80} is not the name of a vector, nor a list of names.")
    if not 1 <= len(names) <= MOST_VECTORS or len(set(names)) < len(names):
        raise PlanError(f"steer: send 1 to {MOST_VECTORS} names, each once.")
    vectors = []
    for i, name in enumerate(names):
        vector = shelf.vector(name)
        check_model(vector, n_layer, n_embd, "")
        own = {key: _own(key, value, i, len(names)) for key, value in settings.items()}
        vectors.append(vector.at(**own))
    plan = Plan.from_vectors(vectors)
    return None if plan.is_empty else plan


def _own(key: str, value: Any, i: int, n: int) -> Any:
    """The i-th vector's setting: a list has one for each, but for `layer`, whose list is of layers."""
    if key != "layer" and isinstance(value, (list, tuple)):
        if len(value) != n:
            raise PlanError(f"{key}: {len(value)} values for {n} vectors: send one, or one for each.")
        value = value[i]
    if key == "strength" and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise PlanError(f"strength: {value!r:.80} is not a number.")
    if key == "strength" and not abs(value) <= MOST_STRENGTH:
        raise PlanError(f"strength: {value!r:.40} is not between -{MOST_STRENGTH:g} and {MOST_STRENGTH:g}.")
    if key in ("positions", "mode") and not isinstance(value, str):
        raise PlanError(f"{key}: {value!r:.80} is not a text.")
    if key == "layer":
        layers = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
            raise PlanError(f"layer: {value!r:.80} is not a layer's number, nor a list of them.")
    return value
