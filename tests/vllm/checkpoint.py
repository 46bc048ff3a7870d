"""smol's GGUF as a float32 checkpoint, dequantized by transformers: python tests/vllm/checkpoint.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

from localsteer.model_names import path_of


def write_checkpoint(folder: Path) -> Path:
    """Nothing is done where it is there already."""
    if (folder / "tokenizer.json").is_file():
        return folder
    path = path_of("smol")
    source, options = str(path.parent), {"gguf_file": path.name}
    plain = {"dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep the layers packed unless told otherwise
        plain["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, **plain, **options)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, **options).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(write_checkpoint(Path(sys.argv[1])))
