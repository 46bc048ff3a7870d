"""Residual states of many prompts, in memory or streamed into a safetensors file.

    from localsteer.states import collect_states, write_states
    with Engine("model.gguf") as engine:
        write_states(engine, prompts, "states.safetensors", layer=[10, 20], tokens="last")

A state is the residual stream after a layer, as `hidden_states[layer + 1]` of transformers (whose last entry,
after the final norm, is another thing). docs/states.md says what the file holds.
"""

from __future__ import annotations

from .chosen import Reading, collect_states, readings
from .writing import write_states

__all__ = ["Reading", "collect_states", "readings", "write_states"]
