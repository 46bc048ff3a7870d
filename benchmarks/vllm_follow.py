"""Do vectors steer alike in vLLM and in the GGUF engine? Share of replies that follow, on the same questions.

    VENV/bin/python benchmarks/vllm_follow.py replies CHECKPOINT replies.json     # in vLLM's environment
    python benchmarks/vllm_follow.py compare replies.json                         # in localsteer's

smol, its pack's `json` (learned in PyTorch) and `title` (extracted by llama.cpp), 40 test questions of the
catalogue, greedy. CHECKPOINT is smol's GGUF dequantized (tests/vllm/checkpoint.py), in float32: the engine's
weights, but not its kernels, so that replies part at near ties. The last line is JSON. Exit
status 1 where the intervals of a vector do not overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from localsteer import packs
from localsteer.catalog import load_catalog

NAMES = ("json", "title")
N, MAX_TOKENS = 40, 120
PACK = Path(packs.__file__).parent / "SmolLM2-135M-Instruct"


def questions() -> list[str]:
    catalog = load_catalog("general")
    return [query.text for query in catalog.queries_for(catalog.get("json"), "test")][:N]


def write_replies(checkpoint: str, output: Path) -> None:
    os.environ |= {"LOCALSTEER_VECTORS": str(PACK), "VLLM_CPU_KVCACHE_SPACE": "1"}
    import vllm

    llm = vllm.LLM(model=checkpoint, dtype="float32", max_model_len=1024, max_num_seqs=16)
    messages = [[{"role": "user", "content": text}] for text in questions()]
    replies = {}
    for name in (None, *NAMES):
        extra = {"steer": name} if name else {}
        settings = vllm.SamplingParams(temperature=0, max_tokens=MAX_TOKENS, extra_args=extra)
        outputs = llm.chat(messages, settings, use_tqdm=False)
        replies[name or "plain"] = [output.outputs[0].text for output in outputs]
    output.write_text(json.dumps(replies, ensure_ascii=False, indent=1), "utf-8")


def own_replies() -> dict[str, list[str]]:
    from localsteer import ControlVector, Engine, Sampling
    from localsteer.model_names import path_of

    replies = {}
    with Engine(path_of("smol"), n_ctx=1024) as engine:
        for name in (None, *NAMES):
            steer = [ControlVector.load(PACK / f"{name}.gguf")] if name else []
            greedy = Sampling(temp=0)
            batch = engine.generate_batch(questions(), steer=steer, sampling=greedy, max_tokens=MAX_TOKENS)
            replies[name or "plain"] = [reply.text for reply in batch]
    return replies


def compare(path: Path) -> int:
    from localsteer.evaluate.intervals import wilson
    from localsteer.verify.verdicts import verify

    sides = {"vLLM": json.loads(path.read_text("utf-8")), "GGUF engine": own_replies()}
    catalog = load_catalog("general")
    document, overlap = {}, True
    for name in NAMES:
        instruction = catalog.get(name)
        kwargs = instruction.kwargs_for("?")
        rows = {}
        for side, replies in sides.items():
            for kind, texts in (("plain", replies["plain"]), ("steered", replies[name])):
                n = sum(verify(instruction.verifier, text, kwargs) for text in texts)
                rows[f"{side}, {kind}"] = {"follow": n, "of": len(texts), "interval": wilson(n, len(texts))}
                low, high = wilson(n, len(texts))
                print(f"{name:6} {side:12} {kind:8} {n:3} of {len(texts)} ({low:.0%} to {high:.0%})")
        (a, b), (c, d) = (rows[f"{side}, steered"]["interval"] for side in sides)
        overlap &= a <= d and c <= b
        document[name] = rows
    print(json.dumps(document))
    return 0 if overlap else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("replies", "compare"))
    parser.add_argument("paths", nargs="+")
    arguments = parser.parse_args()
    if arguments.what == "replies":
        write_replies(arguments.paths[0], Path(arguments.paths[1]))
        return 0
    return compare(Path(arguments.paths[0]))


if __name__ == "__main__":
    sys.exit(main())
