"""Values as JSON has them, which lacks NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

JsonObject = dict[str, Any]  # a document, or a part of one: whatever JSON can hold, by name


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value
