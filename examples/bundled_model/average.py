"""The mean of several checkpoints' weights: average.py OUT CHECKPOINT CHECKPOINT ...

Between two runs of one training it follows more reliably than either; the tokenizer is the first one's.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def average(out: Path, checkpoints: list[Path]) -> None:
    loaded = [load_file(folder / WEIGHTS) for folder in checkpoints]
    means = {
        name: torch.stack([weights[name].float() for weights in loaded]).mean(0).to(loaded[0][name].dtype)
        for name in loaded[0]
    }
    shutil.copytree(checkpoints[0], out, ignore=shutil.ignore_patterns(WEIGHTS))
    save_file(means, out / WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    average(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
