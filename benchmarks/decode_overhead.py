"""What steering costs: tokens per second of prefill and decode, as a ratio to the same model unsteered.

    python benchmarks/decode_overhead.py [--rounds 7] [--threads 2] [-m MODEL.gguf]

Without -m it writes a random llama of 0.4 billion parameters in Q4_0. The variants take turns at every token
and every piece of prompt, and each is divided by the unsteered run of the same step, so that a busy machine
slows both; medians of those ratios are printed. The last line is JSON. Exit status 1 if a steered ratio is
below 0.97.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as lc
import numpy as np

from localsteer import ControlVector
from localsteer.plan import Plan, PositionClass
from localsteer.runtime.bridge import Context, Model, default_threads, system_info

N_PREFILL, N_CHUNK, N_DECODE = 256, 128, 32
FLOOR = 0.97
N_LAYER, N_EMBD, N_FF, N_HEAD, N_VOCAB = 24, 1024, 4096, 16, 8192


def write_random_model(path: Path) -> None:
    """llama, 0.4 billion parameters; Q4_0 layers of one small scale and random nibbles."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(N_LAYER)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_context_length(2048)
    writer.add_vocab_size(N_VOCAB)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, n_out: int, n_in: int) -> None:
        layers = rng.integers(0, 256, (n_out, n_in // 32, 18), dtype=np.uint8)
        layers[:, :, :2] = np.array([0.2 / n_in**0.5], np.float16).view(np.uint8)
        writer.add_tensor(name, layers.reshape(n_out, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    add("token_embd.weight", N_VOCAB, N_EMBD)
    writer.add_tensor("output_norm.weight", np.ones(N_EMBD, np.float32))
    for il in range(N_LAYER):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{il}.{name}.weight", np.ones(N_EMBD, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{il}.{name}.weight", N_EMBD, N_EMBD)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{il}.{name}.weight", N_FF, N_EMBD)
        add(f"blk.{il}.ffn_down.weight", N_EMBD, N_FF)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_vector(model: Model) -> ControlVector:
    directions = np.random.default_rng(1).standard_normal((model.n_layer, model.n_embd)).astype(np.float32)
    ones = np.ones(model.n_layer, np.float32)
    return ControlVector(
        directions=directions, mean_with=ones, mean_without=0 * ones, std_with=ones, std_without=ones,
        layers=(model.n_layer // 2,), readers=1e-3 * directions[::-1], biases=1e-3 * ones,
    )  # fmt: skip


def set_static_vector(context: Context, directions: np.ndarray) -> None:
    """llama.cpp's own control vector: a constant added after every layer but the first."""
    data = np.ascontiguousarray(1e-3 * directions[1:])
    pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    n_layer, n_embd = directions.shape
    if lc.llama_set_adapter_cvec(context.pointer, pointer, data.size, n_embd, 1, n_layer - 1) != 0:
        raise RuntimeError("llama.cpp did not take the static vector")


@dataclass
class Variant:
    """One way of running the model, with a context of its own. seconds: of each timed call, by kind."""

    context: Context
    plan: Plan | None = None
    n_past: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"prefill": [], "decode": []})

    def restart(self) -> None:
        self.context.clear()
        self.n_past = 0

    def run(self, kind: str, n: int) -> None:
        """n more tokens of the one sequence, as prompt or as generated ones."""
        positions = np.arange(self.n_past, self.n_past + n)
        cls = PositionClass.PROMPT if kind == "prefill" else PositionClass.GENERATION
        plans = None if self.plan is None else [self.plan] * n
        tokens = 1 + positions % (self.context.model.n_vocab - 1)
        start = time.perf_counter()
        self.context.decode(tokens, positions, [0] * n, positions == positions[-1], plans, [cls] * n)
        self.seconds[kind].append(time.perf_counter() - start)
        self.n_past += n


def variants(model: Model, n_threads: int) -> dict[str, Variant]:
    def context(steering: bool) -> Context:
        return Context(
            model, n_ctx=N_PREFILL + N_DECODE, n_batch=N_CHUNK, n_threads=n_threads, steering=steering
        )

    vector = random_vector(model)
    everywhere = vector.at(layer=range(model.n_layer))
    static = context(steering=False)
    set_static_vector(static, vector.directions)
    return {
        "unsteered": Variant(context(steering=False)),
        "static vector of llama.cpp, all layers": Variant(static),
        "hook attached, no plan": Variant(context(steering=True)),
        "one layer": Variant(context(steering=True), Plan.from_vectors([vector])),
        "one layer, added": Variant(
            context(steering=True), Plan.from_vectors([vector.at(mode="add", strength=1e-3)])
        ),
        "one layer, gated": Variant(context(steering=True), Plan.from_vectors([vector.at(mode="gate")])),
        "all layers": Variant(context(steering=True), Plan.from_vectors([everywhere])),
        "all layers, gated": Variant(context(steering=True), Plan.from_vectors([everywhere.at(mode="gate")])),
    }


def measure(model: Model, n_threads: int, rounds: int) -> dict[str, dict[str, float]]:
    runs = variants(model, n_threads)
    turn = list(runs.values())
    steps = [("prefill", N_CHUNK)] * (N_PREFILL // N_CHUNK) + [("decode", 1)] * N_DECODE
    for run in turn:  # the first calls touch the pages of the model
        run.run("prefill", N_CHUNK)
        run.seconds["prefill"].clear()
    for done in range(rounds):
        print(f"round {done + 1} of {rounds}", file=sys.stderr)
        for run in turn:
            run.restart()
        for kind, n in steps:
            for run in turn:
                run.run(kind, n)
            turn.append(turn.pop(0))
    return {name: _row(run, runs["unsteered"]) for name, run in runs.items()}


def _row(run: Variant, unsteered: Variant) -> dict[str, float]:
    row = {}
    for kind, n in (("prefill", N_CHUNK), ("decode", 1)):
        taken = np.array(run.seconds[kind])
        row[f"{kind}_ratio"] = round(float(np.median(np.array(unsteered.seconds[kind]) / taken)), 4)
        row[f"{kind}_per_second"] = round(n / float(np.median(taken)), 1)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=default_threads())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or Path(folder) / "random-0.4b-q4_0.gguf"
        if arguments.model is None:
            write_random_model(path)
        with Model(path) as model:
            result = measure(model, arguments.threads, arguments.rounds)
    for name, row in result.items():
        print(f"{name:40} prefill {row['prefill_ratio']:.3f}  decode {row['decode_ratio']:.3f}")
    worst = min(min(result[name]["prefill_ratio"], result[name]["decode_ratio"]) for name in STEERED)
    machine = {"machine": platform.machine(), "processor": processor(), **system_info()}
    document = {"model": path.name, "threads": arguments.threads, "rounds": arguments.rounds, "worst": worst}
    print(json.dumps({**document, "machine": machine, "variants": result}))
    return 0 if worst >= FLOOR else 1


STEERED = ("one layer", "one layer, added", "one layer, gated", "all layers", "all layers, gated")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
