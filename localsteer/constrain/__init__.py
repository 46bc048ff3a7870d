"""What a reply must be: a JSON schema, a regular expression, a grammar; kept by a mask on the logits.

    constraint = Constraint.json_schema({"type": "object", "properties": {"name": {"type": "string"}}})
    engine.generate("Who are you?", sampling=Sampling(grammar=constraint))

`llguidance` (Rust) is the one engine behind all of them. It works on bytes, knows no model, and takes a few
dozen microseconds for the mask of one token. Nothing here imports llama.cpp.
"""

from .constraint import Constraint
from .matcher import END, Matcher, TokenBytes

__all__ = ["END", "Constraint", "Matcher", "TokenBytes"]
