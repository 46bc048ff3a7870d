"""The bundled model's files are made once and never stale, and the demo shows what it says it shows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from cli_runs import environment, invoke

from localsteer import bundled
from localsteer.bundled import checkpoint_hash, gguf_path
from localsteer.catalog import load_catalog, spread
from localsteer.demo import GROUPS, _chosen, answers, demonstrate, mean, run_demo
from localsteer.engine import Engine
from localsteer.errors import CatalogError, LocalsteerError, ModelFileError
from localsteer.evaluate.cells import CONDITIONS
from localsteer.evaluate.extraction import extract_all
from localsteer.evaluate.runner import Advance, silent
from localsteer.extract import extract
from localsteer.runtime.bridge import Context
from localsteer.vector import ControlVector
from localsteer.workers import Workers

ROW_KEYS = {
    "id", "none", "steered", "random", "other", "instructed", "both", "quality_none", "quality_steered",
    "layer", "positions", "strength", "n",
}  # fmt: skip
CATALOG = load_catalog(bundled.CATALOG)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tiny_llama, tmp_path: Path) -> Path:
    """A checkpoint of this test's own, free to be changed."""
    return shutil.copytree(tiny_llama.hf_dir, tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def bundled_model() -> None:
    if not bundled.is_available():
        pytest.skip("this copy of the package holds no bundled model")


# --- the bundled model's GGUF files ---


def test_a_gguf_is_made_once(checkpoint: Path, cache: Path) -> None:
    said: list[str] = []
    first = gguf_path("instruct", "q8_0", folder=checkpoint, on_making=said.append)
    stamp = first.stat().st_mtime_ns
    assert gguf_path("instruct", "Q8_0", folder=checkpoint, on_making=said.append) == first
    assert first.stat().st_mtime_ns == stamp
    assert len(said) == 1
    assert sorted(path.name for path in first.parent.iterdir()) == [first.name, f"{first.name}.sha256"]
    assert cache in first.parents


@pytest.mark.parametrize("quant", ["F32", "F16", "Q8_0"])
def test_every_quantization_loads(checkpoint: Path, quant: str) -> None:
    with Engine(gguf_path("base", quant, folder=checkpoint), n_ctx=32, n_threads=1) as engine:
        assert np.isfinite(engine.logits([1, 2, 3])).all()
        assert engine.model.metadata["general.name"] == "localsteer-base"


def test_a_retrained_model_never_meets_an_old_file(checkpoint: Path) -> None:
    before = gguf_path("instruct", "F32", folder=checkpoint)
    weights = checkpoint / "model.safetensors"
    stat = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    after = gguf_path("instruct", "F32", folder=checkpoint)
    assert after != before
    assert after.read_bytes() != before.read_bytes()


def test_the_hash_covers_the_template_and_our_version(checkpoint: Path, monkeypatch) -> None:
    first = checkpoint_hash(checkpoint)
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    second = checkpoint_hash(checkpoint)
    monkeypatch.setattr(bundled, "__version__", "99.0")
    assert len({first, second, checkpoint_hash(checkpoint)}) == 3


def test_two_processes_at_once_make_one_file(checkpoint: Path, cache: Path) -> None:
    code = "import sys; from localsteer.bundled import gguf_path; print(gguf_path(folder=sys.argv[1]))"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(checkpoint)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(cache),
        )
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (path,) = paths
    made = sorted(file.name for file in Path(path).parent.iterdir())
    assert made == [Path(path).name, f"{Path(path).name}.sha256"]


def test_bad_requests_for_a_bundled_model_are_one_line(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="unknown bundled model 'large'"):
        gguf_path("large")
    with pytest.raises(ModelFileError, match="Q8_0"):
        gguf_path("instruct", "Q99", folder=checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match="holds no model"):
        gguf_path("instruct", folder=checkpoint)


# --- the demo's parts ---


def test_queries_are_spread_over_the_whole_list() -> None:
    assert spread(range(60), 20) == list(range(0, 60, 3))
    assert spread(range(60), 60) == list(range(60))
    assert len(set(spread(range(60), 37))) == 37


def test_means_skip_what_is_missing() -> None:
    rows = [
        dict.fromkeys([*CONDITIONS, "quality_none", "quality_steered", "subject_kept", "degenerate"], 1.0)
    ]
    rows.append(dict.fromkeys(rows[0]))
    assert mean(rows)["steered"] == 1.0
    assert mean(rows[1:])["steered"] is None


def test_vectors_made_together_are_those_made_alone(tiny_llama) -> None:
    instructions = [CATALOG.get(each) for each in ("json", "lowercase")]
    queries = CATALOG.queries_for(instructions[1], "extraction")
    with Workers(tiny_llama.gguf_path, 2, n_ctx=256, exact=True) as workers:
        together = extract_all(workers, instructions, CATALOG, lambda _done, _total: None)
    with Engine(tiny_llama.gguf_path, n_ctx=256, n_threads=1, exact=True) as engine:
        alone = extract(engine, instructions[1], queries, n_pairs=50, mode="project")
    assert list(together) == ["json", "lowercase"]
    np.testing.assert_allclose(together["lowercase"].directions, alone.directions, atol=1e-4)
    np.testing.assert_allclose(together["lowercase"].mean_with, alone.mean_with, atol=1e-4)


def test_workers_answer_in_order_and_each_has_its_engine(tiny_llama) -> None:
    steps: list[tuple[int, int]] = []
    with Workers(tiny_llama.gguf_path, 2, n_ctx=64) as workers:
        found = workers.map(
            lambda engine, k: (k, engine.logits([1, 2, k]).shape[0]),
            range(7),
            lambda *step: steps.append(step),
        )
    assert found == [(k, 3) for k in range(7)]
    assert steps == [(k, 7) for k in range(1, 8)]


def test_each_worker_opens_its_engine_in_its_own_thread(tiny_llama, monkeypatch) -> None:
    threads: dict[int, set[int]] = {}
    decode = Context._llama_decode

    def watched(context, *arrays) -> None:
        threads.setdefault(id(context), set()).add(threading.get_ident())
        decode(context, *arrays)

    monkeypatch.setattr(Context, "_llama_decode", watched)
    with Workers(tiny_llama.gguf_path, 2, n_ctx=64) as workers:
        workers.map(lambda engine, k: engine.logits([1, 2, k]), range(40))
    assert [len(found) for found in threads.values()] == [1, 1]
    assert len(set.union(*threads.values())) == 2


def test_a_model_that_workers_can_t_open_is_told_of_at_once(tmp_path) -> None:
    with pytest.raises(ModelFileError, match=r"none\.gguf"):
        Workers(tmp_path / "none.gguf", 3)


def test_an_error_in_one_piece_of_work_ends_the_others(tiny_llama) -> None:
    begun = []

    def work(_engine: Engine, k: int) -> None:
        begun.append(k)
        if k == 0:
            raise LocalsteerError("broken")
        time.sleep(0.05)

    with (
        pytest.raises(LocalsteerError, match="broken"),
        Workers(tiny_llama.gguf_path, 1, n_ctx=64) as workers,
    ):
        workers.map(work, range(50))
    assert len(begun) < 10
    with pytest.raises(LocalsteerError, match="stopped"):
        workers.check()


def test_what_is_asked_for_is_checked(checkpoint: Path) -> None:
    with pytest.raises(CatalogError, match="unknown instruction 'rhyme'"):
        run_demo(instructions=["rhyme"], checkpoint=checkpoint)
    with pytest.raises(LocalsteerError, match="--instructions is empty"):
        run_demo(instructions=[], checkpoint=checkpoint)
    with pytest.raises(LocalsteerError, match="number of test queries"):
        run_demo(n=1000, checkpoint=checkpoint)
    with pytest.raises(LocalsteerError, match="unknown backend"):
        run_demo(backend="onnx", checkpoint=checkpoint)


# --- end to end: a random model shows the shape, the bundled one the effect ---


@pytest.mark.parametrize("backend", ["gguf", "torch"])
def test_the_document_has_its_shape_on_any_model(checkpoint: Path, tmp_path: Path, backend: str) -> None:
    out = tmp_path / "vectors"
    document = run_demo(
        instructions=["json", "lowercase"], backend=backend, n=2, out=out, checkpoint=checkpoint, n_threads=1
    )
    check_shape(document, ["json", "lowercase"], n=2)
    assert sorted(path.name for path in out.iterdir()) == ["json.gguf", "lowercase.gguf"]
    assert document["quant"] == "Q8_0"


def check_shape(document: dict, ids: list[str], n: int) -> None:
    json.dumps(document, allow_nan=False)
    assert {"model", "quant", "instructions", "mean", "seconds"} <= set(document)
    assert [row["id"] for row in document["instructions"]] == ids
    for row in document["instructions"]:
        assert set(row) >= ROW_KEYS
        assert row["n"] == n
        assert all(0 <= row[name] <= 1 for name in CONDITIONS)
        vector = ControlVector.load(row["file"])
        assert vector.strength == row["strength"]
        assert row["layer"] is None or vector.layers == (row["layer"],)
    assert set(CONDITIONS) <= set(document["mean"])


def test_the_bundled_model_is_steered(bundled_model, tmp_path: Path) -> None:
    document = run_demo(instructions=["json", "one_sentence"], n=20, out=tmp_path)
    check_shape(document, ["json", "one_sentence"], n=20)
    for row in document["instructions"]:
        assert row["none"] <= 0.05
        assert row["steered"] >= 0.7
        assert row["instructed"] >= 0.9
        assert max(row["random"], row["other"]) <= 0.1
    assert document["mean"]["subject_kept"] >= 0.9
    assert document["mean"]["degenerate"] == 0


def test_the_commands_json_is_one_document(bundled_model, tmp_path: Path) -> None:
    done = invoke(
        "demo",
        "-m",
        "bundled",
        "--json",
        "--instructions",
        "json",
        "-n",
        4,
        "--out",
        tmp_path,
        "--threads",
        2,
    )
    assert done.status == 0, done.err
    check_shape(done.json, ["json"], n=4)


def test_the_command_prints_a_table_and_what_to_type_next(bundled_model, tmp_path: Path) -> None:
    done = invoke(
        "demo",
        "-m",
        "bundled",
        "--instructions",
        "json,lowercase",
        "-n",
        4,
        "--out",
        tmp_path,
        "--threads",
        2,
    )
    assert done.status == 0, done.err
    assert "steered" in done.out and "lowercase" in done.out
    assert "localsteer run" in done.out


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    from rich.console import Console

    from localsteer.cli.demo import SHARES, results

    names = [each.id for each in _chosen(CATALOG, None)]
    figures = {
        **dict.fromkeys(SHARES, 1.0),
        "subject_kept": 1.0,
        "quality_none": 1.3,
        "quality_steered": 35.3,
    }
    picked = {"layer": 4, "strength": 1.0, "positions": "prompt"}
    document = {
        "model": "m", "quant": "Q8_0", "seconds": 1.0, "mean": figures,
        "instructions": [{"id": name, **figures, **picked} for name in names],
    }  # fmt: skip
    console = Console(width=80)
    with console.capture() as printed:
        console.print(results(document))
    lines = printed.get().splitlines()
    assert len(lines) == len(names) + 3  # title, header and mean: nothing is folded
    assert max(map(len, lines)) <= 80
    assert [line.split()[-2:] for line in lines[2:-1]] == [["1@4", "prompt"]] * len(names)


def test_a_folder_that_cant_be_written_is_found_before_the_work(bundled_model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    stages: list[str] = []

    def stage(what: str) -> AbstractContextManager[Advance]:
        stages.append(what)
        return silent(what)

    with pytest.raises(LocalsteerError, match="file can't be written"):
        run_demo(out=tmp_path / "file", stage=stage)
    assert (tmp_path / "file").read_text() == "mine" and stages == ["quantizing the bundled model"]


def test_a_bad_request_on_the_command_line_is_one_line() -> None:
    assert "rhyme" in invoke("demo", "-m", "bundled", "--instructions", "rhyme").complaint()


def test_the_demo_shows_every_format_and_length() -> None:
    shown = _chosen(CATALOG, None)
    assert len(shown) >= 20
    assert {each.group for each in shown} == set(GROUPS)
    assert all(each.verifier for each in shown)


def test_a_question_of_yours_needs_a_real_model() -> None:
    assert "-m MODEL.gguf" in invoke("demo", "-m", "bundled", "How do bees find home?").complaint()


def test_options_of_the_bundled_model_are_refused_for_another(tiny_llama) -> None:
    complaint = invoke("demo", "-m", tiny_llama.gguf_path, "--quant", "Q4_0").complaint()
    assert "--quant is for the bundled model" in complaint


def test_any_model_is_demonstrated_with_its_tuned_vectors(bundled_model, tmp_path: Path) -> None:
    names = ("lowercase", "one_sentence")
    with Engine(gguf_path("instruct"), n_ctx=256) as engine:
        queries = CATALOG.queries["extraction"]
        vectors = {
            name: extract(engine, CATALOG.get(name), queries, n_pairs=20, mode="project").at(
                layer=3, positions="prompt"
            )
            for name in names
        }
        document = demonstrate(engine, CATALOG, vectors, n=4)
        shown = answers(engine, CATALOG, vectors, CATALOG.queries["test"][0].text)
    json.dumps(document, allow_nan=False)
    assert [row["id"] for row in document["instructions"]] == list(names)
    for row in document["instructions"]:
        assert row["none"] == 0 and row["steered"] >= 0.75 and row["random"] == 0
    assert [example["id"] for example in shown] == list(names)
    assert shown[0]["steered"] == shown[0]["steered"].lower() != shown[0]["none"]
