"""What the tests of the studies share: a small job on the bundled model, and what every study must leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localsteer import bundled
from localsteer.catalog import load_catalog
from localsteer.evaluate.bench import BUNDLED_LIMITS
from localsteer.evaluate.page import Results, loaded
from localsteer.evaluate.studies import study
from localsteer.evaluate.studies.common import StudyJob

CATALOG = load_catalog(bundled.CATALOG)


def job(out: Path, **more: Any) -> StudyJob:
    """A study of the bundled model, small."""
    if not bundled.is_available():
        pytest.skip("this copy of the package holds no bundled model")
    given = {"n": 3, "quick": True, "n_threads": 1, "wanted": ("json",)} | more
    return StudyJob(CATALOG, out, bundled.gguf_path("instruct", "Q8_0"), BUNDLED_LIMITS, **given)


def check(results: Results, out: Path, name: str) -> dict[str, Any]:
    """Its figures, once the files are seen to be what they should."""
    assert results.study == name and results.model["sha256"]
    written = json.loads((out / "results.json").read_text())
    assert written["figures"] == results.figures
    assert loaded(written) == results
    page = (out / f"{name}.md").read_text()
    assert page.startswith(f"# {study(name).TITLE}")
    if (out / "plots").is_dir():
        assert all(f"plots/{path.name}" in page for path in (out / "plots").iterdir())
    return results.figures
