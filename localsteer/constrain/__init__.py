"""The form a reply must have: a JSON schema, a regular expression or a grammar, enforced by a mask on the
logits.

    constraint = Constraint.json_schema({"type": "object", "properties": {"name": {"type": "string"}}})
    engine.generate("Who are you?", sampling=Sampling(grammar=constraint))

`llguidance` (Rust) is the engine behind all of them. It works on bytes, independently of the model, and takes
a few dozen microseconds for the mask of one token. Nothing here imports llama.cpp.
"""

from .constraint import Constraint
from .matcher import END, Matcher, TokenBytes

__all__ = ["END", "Constraint", "Matcher", "TokenBytes"]
