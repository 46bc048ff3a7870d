"""The examples, the README and the CI program say what is true of this version."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import serving
from cli_runs import invoke, write_vector

CHECKOUT = Path(__file__).parents[1]
README = CHECKOUT / "README.md"

pytestmark = pytest.mark.skipif(not README.is_file(), reason="not run from a checkout")


def test_an_instruction_of_one_s_own_takes_ten_lines():
    from localsteer.catalog import load_catalog

    path = CHECKOUT / "examples" / "my_instruction.toml"
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    assert len(lines) <= 10
    catalog = load_catalog(path)
    assert list(catalog.instructions) == ["pirate"]
    assert catalog.queries_for(catalog.get("pirate"), "extraction")


def test_the_python_example_runs(tiny_llama, tmp_path):
    vector = write_vector(tmp_path / "v.gguf")
    args = [CHECKOUT / "examples" / "steer.py", tiny_llama.gguf_path, vector, "Hi"]
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(plain|steered|strength [\d.]+):", done.stdout, re.M) == [
        "plain", "steered", "strength 0.5", "strength 1.0", "strength 1.5",
    ]  # fmt: skip


def run_example(name, *args):
    """What an example printed, {label: text}."""
    command = [sys.executable, CHECKOUT / "examples" / name, *args]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {label: text.strip() for label, text in re.findall(r"^([a-z ]+):(.*)$", done.stdout, re.M)}


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """The bundled model and a folder with vectors that really steer it."""
    from localsteer import bundled

    if not bundled.is_available("instruct"):
        pytest.skip("the bundled model is not in this copy")
    return serving.model_path(), serving.write_vectors(tmp_path_factory.mktemp("steered") / "vectors")


def starts_as_told(said, plain, steered):
    """Plain text without the vector of JSON, an object with it."""
    assert all(not said[label].startswith("{") for label in plain), said
    assert all(said[label].startswith('{"name"') for label in steered), said


def test_the_drop_in_example_steers(steered):
    model, folder = steered
    said = run_example("drop_in.py", model, folder / "json.gguf", serving.QUESTION)
    starts_as_told(said, ["plain"], ["steered", "prompt"])


def test_the_langchain_example_steers(steered):
    if importlib.util.find_spec("langchain_community") is None:
        pytest.skip("langchain-community is not installed")
    model, folder = steered
    said = run_example("langchain_steered.py", model, folder / "json.gguf", serving.QUESTION)
    starts_as_told(said, ["plain"], ["steered", "stream"])
    assert said["text"]


def test_the_llamaindex_example_steers(steered):
    if importlib.util.find_spec("llama_index") is None:
        pytest.skip("llama-index-llms-llama-cpp is not installed")
    model, folder = steered
    said = run_example("llamaindex_steered.py", model, folder / "json.gguf", serving.QUESTION)
    starts_as_told(said, ["plain"], ["steered", "chat", "stream"])


def test_the_openai_example_and_the_models_of_llm_are_served(steered):
    pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
    pytest.importorskip("openai", reason="the openai package is not installed")
    config = (CHECKOUT / "examples" / "llm" / "extra-openai-models.yaml").read_text("utf-8")
    with serving.serving(steered[1]) as server:
        said = run_example("openai_client.py", f"{server.url}/v1", "json", serving.QUESTION)
        starts_as_told(said, ["plain"], ["by name", "by field", "stream"])
        served = {model.id for model in server.client().models.list()}
    named = re.findall(r"^  model_name: (.+)$", config, re.M)
    assert named == ["bundled", "bundled+json"]
    assert set(named) <= served


def commands_of(path):
    """`localsteer ...` lines of a document, as lists of words without quotes' content."""
    layers = re.findall(r"```sh\n(.*?)```", path.read_text("utf-8"), re.S)
    lines = [line.split("#")[0] for layer in layers for line in layer.splitlines()]
    return [line for line in lines if line.startswith("localsteer ") and "demo" not in line]


@pytest.mark.parametrize("line", commands_of(README) if README.is_file() else [])
def test_commands_in_the_readme_have_no_option_that_is_not_there(line):
    words = line.split()
    path = words[1:3] if words[1] in ("convert", "vectors") else words[1:2]
    known = invoke(*path, "--help").out
    for option in re.findall(r"(?<= )--?[a-z-]+", line):
        assert re.search(rf"{re.escape(option)}\b", known), option


def test_the_readme_has_its_two_commands_and_ci_runs_just_them():
    readme, script = README.read_text("utf-8"), (CHECKOUT / ".ci" / "run").read_text("utf-8")
    assert 'pip install ".[smol]" && localsteer demo' in readme
    assert 'pip install ".[test]" && pytest' in readme
    for command in ('pip install ".[smol]"', "localsteer demo", 'pip install ".[test]"', "pytest"):
        assert re.search(rf"^{re.escape(command)}( |$)", script, re.M), command
    assert os.access(CHECKOUT / ".ci" / "run", os.X_OK)


def test_links_in_the_documents_lead_somewhere():
    for path in (README, *(CHECKOUT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text("utf-8")):
            if target != "docs/results/":  # written with the reports
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_a_recording_takes_its_place_in_the_readme():
    script = CHECKOUT / "docs" / "record_demo.py"
    spec = importlib.util.spec_from_file_location("record_demo", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    once = module.recorded(README.read_text("utf-8"), "old   \ntable\n")
    assert "$ localsteer demo\nold\ntable\n```" in once
    assert module.recorded(once, "new") == module.recorded(README.read_text("utf-8"), "new")
