"""Pages that programs write are what those programs write today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


def written_by(script: str):
    """The module docs/<script>.py."""
    if not DOCS.is_dir():
        pytest.skip("not run from a checkout")
    spec = importlib.util.spec_from_file_location(script, DOCS / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_live_command_line_says():
    page = written_by("make_cli").reference()
    assert (DOCS / "cli.md").read_text("utf-8") == page, "run python docs/make_cli.py"


def test_the_tables_of_figures_are_made_of_the_results():
    for path, page in written_by("make_results").pages().items():
        assert path.read_text("utf-8") == page, f"{path.name}: run python docs/make_results.py"
