"""What a release is made of agrees with itself: versions, the changelog, the entry points."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

import localsteer

CHECKOUT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (CHECKOUT / "CHANGELOG.md").is_file(), reason="not run from a checkout")


def text(name):
    return (CHECKOUT / name).read_text("utf-8")


def test_the_changelog_keeps_its_form_and_has_this_version():
    heads = re.findall(r"^## (.+)$", text("CHANGELOG.md"), re.M)
    assert heads[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\]( - \d{4}-\d\d-\d\d)?", head) for head in heads[1:])
    assert heads[1].startswith(f"[{localsteer.__version__}]")
    kinds = set(re.findall(r"^### (.+)$", text("CHANGELOG.md"), re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_one_version_everywhere():
    assert f'\nversion = "{localsteer.__version__}"\n' in text("pyproject.toml")
    assert metadata.version("localsteer") == localsteer.__version__


def test_one_llama_cpp_python_everywhere():
    (pinned,) = re.findall(r'"llama-cpp-python==([\d.]+)"', text("pyproject.toml"))
    for name in (
        "Containerfile",
        "docs/install.md",
        "localsteer/runtime/bridge/openmp.py",
        "localsteer/runtime/broken.py",
    ):
        assert set(re.findall(r"llama-cpp-python==([\d.]+\d)", text(name))) == {pinned}, name


def test_every_extra_that_is_advised_is_there():
    extras = set(metadata.metadata("localsteer").get_all("Provides-Extra"))
    advised = set()
    for path in (CHECKOUT / "localsteer").rglob("*.py"):
        advised |= {each for group in re.findall(r"localsteer\[([\w,]+)\]", path.read_text("utf-8"))
                    for each in group.split(",")}  # fmt: skip
    assert advised <= extras, advised - extras


def test_what_a_wheel_must_hold_is_installed():
    names = {entry.name for entry in metadata.entry_points(group="llm") if entry.dist.name == "localsteer"}
    assert names == {"localsteer"}
    root = Path(localsteer.__file__).parent
    for name in ("models/instruct/model.safetensors", "packs/SmolLM2-135M-Instruct/pack.json",
                 "catalog/general.toml", "server/page/index.html"):  # fmt: skip
        assert (root / name).is_file(), name
