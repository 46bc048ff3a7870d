"""What results.json says of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from localsteer.cache import file_hash
from localsteer.evaluate.page import ModelFacts

if TYPE_CHECKING:
    from localsteer.engine import Engine


def model_info(engine: Engine) -> ModelFacts:
    model = engine.model
    return {
        "name": model.metadata.get("general.name") or engine.path.stem,
        "sha256": file_hash(engine.path),
        "architecture": model.architecture,
        "quantization": quantization(model.metadata),
        "n_layer": model.n_layer,
        "n_embd": model.n_embd,
    }


def quantization(metadata: Mapping[str, str]) -> str | None:
    """llama.cpp's name of a file's quantization, as `Q4_K_M`; None where the file does not say."""
    import gguf

    try:
        name = gguf.LlamaFileType(int(metadata["general.file_type"])).name
    except (KeyError, ValueError):
        return None
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")
