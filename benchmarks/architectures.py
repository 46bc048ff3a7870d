"""PyTorch against llama.cpp: a tiny random model of every architecture that transformers shares with it.

    python benchmarks/architectures.py --llama-cpp FOLDER [-o ROWS.json] [NAME ...]

FOLDER is llama.cpp's source, of the version that llama-cpp-python ships: its convert_hf_to_gguf.py writes
each model's F32 GGUF (tiny_architectures.py). Then transformers, steered by the hooks of
extract/torch_steering.py, is compared with the exact engine: plain logits; the state after each layer; logits
under vectors that add, project and are gated, at a middle layer and at the last; a greedy reply with the
cache; vectors extracted by both; and what `learn` makes of the model. Where the plain logits differ, the two
are not the same model, and nothing else is judged. Every model is made and run in processes of its own. With
--keep, what is there already is not made again. Exit status 1 where a comparison fails. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tiny_architectures

TEXT = "Tell me about the fox. What do you know about rivers? Describe a quiet village."
QUERIES = ("Who?", "Why?", "What is a fox?", "Tell me about rivers.", "Where is the village?")
MAX_TOKENS = 24
TOLERANCE = 4e-3  # of the spread of what is compared: float32 sums in another order, and tables of GELU
FORK = multiprocessing.get_context("fork")  # what is imported before is imported once
# llama.cpp does not load the file, or ends the process; or we refuse the model
NOT_OURS = ("ModelFileError", "UnsupportedModelError", "GGML_ASSERT", "fatal error")
LEFT = ("model.gguf", "stopped.json")  # what making a model leaves
SECONDS = 120  # of one step on one model


def main() -> None:
    arguments = _arguments()
    if not (arguments.llama_cpp / "convert_hf_to_gguf.py").is_file():
        print(
            f"skipped: {arguments.llama_cpp} holds no convert_hf_to_gguf.py: --llama-cpp names the folder "
            "with llama.cpp's source."
        )
        return
    unknown = set(arguments.names) - set(tiny_architectures.CASES)
    if unknown:
        raise SystemExit(f"unknown architecture {sorted(unknown)[0]!r}: see CASES in tiny_architectures.py.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        names = arguments.names or list(tiny_architectures.CASES)
        # a process of its own: the converter has its own gguf, and localsteer the one that is installed
        maker = FORK.Process(target=make_all, args=(names, folder, arguments.llama_cpp, arguments.verbose))
        maker.start()
        maker.join()
        rows: dict[str, Any] = {}
        document = {"versions": _versions(), "rows": rows}
        for name, row in compare_all(names, folder, arguments.verbose):
            rows[name] = row
            print(_line(name, row), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
    sys.exit(any(row["failed"] for row in rows.values()))


def make_all(names: Sequence[str], folder: Path, llama_cpp: Path, verbose: bool) -> None:
    """Checkpoint and GGUF of each model that the folder does not hold yet, or the reason why not."""
    missing = [name for name in names if not any((folder / name / left).exists() for left in LEFT)]
    if missing:
        tiny_architectures.warm(llama_cpp)
    for name in missing:
        home = folder / name
        home.mkdir(parents=True, exist_ok=True)
        # llama.cpp changes tokens of a model whose name it knows
        checkpoint, path = home / "model", home / "model.gguf"
        why = run_apart(tiny_architectures.write_checkpoint, (name, checkpoint), home, verbose)
        step = "made"
        if why is None:
            why = run_apart(tiny_architectures.convert, (name, checkpoint, path), home, verbose)
            step = "converted"
        if why is not None:
            path.unlink(missing_ok=True)
            (home / "stopped.json").write_text(json.dumps({"stopped": step, "why": why, "failed": []}))


def compare_all(names: Sequence[str], folder: Path, verbose: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    from localsteer.extract import torch_replies, torch_steering  # noqa: F401

    ready = next((folder / name for name in names if (folder / name / "model.gguf").exists()), None)
    if ready:
        with contextlib.suppress(Exception):  # for what it imports
            compare(ready / "model", ready / "model.gguf")
    for name in names:
        home = folder / name
        if (home / "model.gguf").exists():
            outcome = run_apart(compare, (home / "model", home / "model.gguf"), home, verbose)
            if isinstance(outcome, str):
                ours = not any(word in outcome for word in NOT_OURS)
                outcome = {"stopped": "compared", "why": outcome, "failed": ["compared"] * ours}
            yield name, outcome
        else:
            yield name, json.loads((home / "stopped.json").read_text())


def run_apart(
    work: Callable[..., Any], details: tuple[Any, ...], folder: Path, verbose: bool
) -> dict[str, Any] | str | None:
    """What `work` returns in a process of its own, or why it returned nothing."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    process = FORK.Process(target=_answer, args=(work, details, answer, verbose))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return f"not done within {SECONDS} s"
    if not answer.exists():
        lines = (folder / "log").read_text(errors="replace").splitlines() if not verbose else []
        failed = [line.strip() for line in lines if "GGML_ASSERT" in line or "error" in line.lower()]
        why = " ".join([f"the process ended with status {process.exitcode}", *failed[-1:]])
        return _without_folders(why)
    outcome = json.loads(answer.read_text())
    return _without_folders(outcome["why"]) if "why" in outcome else outcome["result"]


def _without_folders(text: str) -> str:
    return re.sub(r"/\S*/", "", text)


def _answer(work: Callable[..., Any], details: tuple[Any, ...], answer: Path, verbose: bool) -> None:
    os.environ["GGML_NO_BACKTRACE"] = "1"  # which takes a debugger half a minute
    if not verbose:
        log = os.open(answer.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
    try:
        outcome = {"result": work(*details)}
    except BaseException as error:
        if verbose:
            traceback.print_exc()
        at = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())
        outcome = {"why": f"{type(error).__name__}: {text[:300]} ({Path(at.filename).name}, {at.name})"}
    answer.write_text(json.dumps(outcome))


# --- one model ---------------------------------------------------------------------------------------------


def compare(checkpoint: Path, path: Path) -> dict[str, Any]:
    from localsteer import Engine
    from localsteer.extract.torch_backend import TorchBackend

    backend = TorchBackend(checkpoint, n_threads=1)
    with Engine(path, exact=True, n_threads=1, n_seq_max=1) as engine:
        return Comparison(backend, engine).row()


class Comparison:
    def __init__(self, backend: Any, engine: Any) -> None:
        import torch

        self.backend, self.engine, self.torch = backend, engine, torch
        self.model = backend.model
        self.ids = engine.prompt_tokens(TEXT, raw=True)
        self.last = engine.model.n_layer - 1
        self.failed: list[str] = []

    def row(self) -> dict[str, Any]:
        from localsteer.errors import LocalsteerError

        row = {
            "type": self.model.config.get_text_config(decoder=True).model_type,
            "architecture": self.engine.model.architecture,
            "named": self.backend.architecture,
            "plain": self.plain(),
        }
        if row["plain"] > TOLERANCE:
            with contextlib.suppress(LocalsteerError):  # which the engine may not show
                row["states"] = self.states()
            return row | {"failed": [], "differs": True}
        self.bound = TOLERANCE + 2 * row["plain"]
        for name in ("states", "batched", "steered", "reply", "extraction", "learning", "from_gguf"):
            try:
                row[name] = getattr(self, name)()
            except Exception as error:
                traceback.print_exc()
                self.failed.append(name)
                row[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return row | {"failed": self.failed}

    def _judge(self, name: str, difference: float, bound: float | None = None) -> None:
        if not difference <= (self.bound if bound is None else bound):
            self.failed.append(name)

    def _logits(self, plan: Any = None) -> Any:
        from localsteer import Plan
        from localsteer.extract.torch_steering import steer_hooks

        with self.torch.inference_mode(), steer_hooks(self.model, plan or Plan.none()):
            return self.model(self.torch.tensor([self.ids])).logits[0].float().numpy()

    def plain(self) -> float:
        return relative(self.engine.logits(self.ids), self._logits())

    def states(self) -> list[float]:
        """Of each layer, at the last token."""
        ours = self.backend.last_hidden_states([self.ids])[0]
        theirs = self.engine.last_hidden_states([self.ids])[0]
        differences = [relative(a, b) for a, b in zip(theirs, ours, strict=True)]
        if hasattr(self, "bound"):
            self._judge("states", max(differences))
        return differences

    def batched(self) -> float:
        """Whether prompts of other lengths in the same batch change a state."""
        short = self.ids[: len(self.ids) // 2]
        both = self.backend.last_hidden_states([short, self.ids])
        single = [self.backend.last_hidden_states([ids])[0] for ids in (short, self.ids)]
        difference = max(relative(a, b) for a, b in zip(both, single, strict=True))
        self._judge("batched", difference)
        return difference

    def vectors(self) -> dict[str, Any]:
        """Of the size of the state where they act."""
        import numpy as np

        from localsteer import ControlVector

        states = self.engine.last_hidden_states([self.ids])[0]
        draw = np.random.default_rng(5)
        n_layer, n_embd = states.shape
        size = states.std(axis=1)
        directions = draw.normal(size=(n_layer, n_embd)) * size[:, None]
        settings = {
            "directions": directions,
            "mean_with": 2.0 * size * n_embd**0.5,
            "mean_without": None, "std_with": None, "std_without": None,
            "readers": draw.normal(size=(n_layer, n_embd)) / n_embd**0.5,
            "biases": np.ones(n_layer),
        }  # fmt: skip
        named_vectors = {}
        for layer in (self.last // 2, self.last):
            for mode, strength in (("add", 1.0), ("project", 0.7), ("gate", 1.0)):
                name = f"{mode} at {layer}"
                named_vectors[name] = ControlVector(
                    **settings, layers=(layer,), name=name, mode=mode, strength=strength
                )
        return named_vectors

    def steered(self) -> dict[str, float]:
        from localsteer import Plan

        plain, differences = self._logits(), {}
        for name, vector in self.vectors().items():
            theirs = self._logits(Plan.from_vectors([vector]))
            differences[name] = relative(self.engine.logits(self.ids, steer=[vector]), theirs)
            if not relative(theirs, plain) > 10 * self.bound:
                self.failed.append(f"{name} does nothing")
        self._judge("steered", max(differences.values()))
        return differences

    def reply(self) -> dict[str, Any]:
        """Tokens of the engine's steered reply that transformers gives too, by both ways of asking it."""
        from localsteer import Plan
        from localsteer.extract.torch_replies import torch_replies
        from localsteer.extract.torch_steering import greedy_tokens
        from localsteer.runtime.sampling import Sampling

        vectors = self.vectors()
        vector = vectors[f"project at {self.last // 2}"]
        reply = self.engine.generate(
            TEXT, raw=True, steer=[vector], max_tokens=MAX_TOKENS, sampling=Sampling(temp=0.0)
        )
        tokens, plan = list(reply.tokens), Plan.from_vectors([vector])
        found = {
            "generate": torch_replies(self.backend, [self.ids], plan, max_tokens=MAX_TOKENS)[0].tokens,
            "greedy": greedy_tokens(
                self.model, self.ids, [plan], max_tokens=MAX_TOKENS, ends=self.engine.ends
            ),
        }
        row: dict[str, Any] = {"tokens": len(tokens), "distinct": len(set(tokens))}
        for name, theirs in found.items():
            row[name] = _common(tokens, list(theirs))
            if row[name] != len(tokens) or len(theirs) != len(tokens):
                self.failed.append(f"reply by {name}")
        return row

    def extraction(self) -> dict[str, Any]:
        """The least cosine of a layer's directions, and whether the engine takes the vector for its own."""
        import numpy as np

        from localsteer.extract import extract

        from_torch = extract(self.backend, "Answer in rhyme.", QUERIES)
        from_engine = extract(self.engine, "Answer in rhyme.", QUERIES)
        a, b = from_torch.directions.astype(float), from_engine.directions.astype(float)
        # a layer that sees three tokens at a time has no direction: prompts of both kinds end alike
        some = np.linalg.norm(b, axis=1) > 1e-5 * np.linalg.norm(b, axis=1).max()
        a, b = a[some], b[some]
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        self.engine.plan(from_torch)
        if not cosines.min() > 0.999:
            self.failed.append("extraction")
        if self.backend.architecture != self.engine.model.architecture:
            self.failed.append("name")
        return {"cosine": float(cosines.min()), "architecture": from_torch.provenance.get("architecture")}

    def learning(self) -> dict[str, float]:
        """What learn/ computes: logits of the last states, and the layers above one by themselves."""
        from localsteer.learn.weights import Weights

        weights, ids = (
            Weights.load(self.engine, self.backend.source, n_tokens=64),
            self.torch.tensor([self.ids]),
        )
        weights.model.float()
        attention = self.torch.ones_like(ids)
        states, last = weights.states(ids, attention, (0, self.last - 1))
        with self.torch.inference_mode():
            row = {"logits": relative(weights.logits(last[0]).numpy(), self._logits())}
            for layer in states:
                above = weights.after(layer, states[layer], ids, attention)
                row[f"above {layer}"] = relative(above[0].float().numpy(), last[0].float().numpy())
        for name, difference in row.items():
            self._judge(f"learning: {name}", difference)
        return row

    def from_gguf(self) -> float | str:
        """Logits of the file as transformers reads it; or that it does not."""
        from localsteer.errors import LocalsteerError
        from localsteer.learn.weights import Weights

        try:
            weights = Weights.load(self.engine, n_tokens=64)
        except LocalsteerError as error:
            return str(error)[:160]
        weights.model.float()
        with self.torch.inference_mode():
            logits = weights.model(self.torch.tensor([self.ids])).logits[0].float().numpy()
        difference = relative(logits, self._logits())
        self._judge("from_gguf", difference)
        return difference


def relative(a: Any, b: Any) -> float:
    """The largest difference, in standard deviations of b."""
    return float(abs(a - b).max() / b.std())


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _line(name: str, row: dict[str, Any]) -> str:
    if "stopped" in row:
        return f"{name:<18} not {row['stopped']}: {row['why']}"
    if row.get("differs"):
        first = next((i for i, d in enumerate(row.get("states", ())) if not d < TOLERANCE), "-")
        return f"{name:<18} another model: logits differ by {row['plain']:.2g}, states from layer {first} on"
    state = "fails: " + ", ".join(row["failed"]) if row["failed"] else "agrees"
    return f"{name:<18} {row['architecture']:<14} {state} (logits {row['plain']:.1e})"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "llama-cpp-python")}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-cpp", type=Path, default=Path("llama.cpp"), metavar="FOLDER")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the models there")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what the steps print")
    parser.add_argument("names", nargs="*", metavar="NAME")
    return parser.parse_args()


if __name__ == "__main__":
    main()
