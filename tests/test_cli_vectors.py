"""`localsteer vectors`: what is in the cache, and taking it out."""

from __future__ import annotations

import pytest
from cli_runs import invoke, write_vector

from localsteer.cache import vector_path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def keep(model_hash, name, model="tiny"):
    path = vector_path(model_hash, f"{name}-12345678")
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_vector(path, name=name, provenance={"model_name": model})


def names():
    return [vector["name"] for vector in invoke("vectors", "--json").json["vectors"]]


def test_an_empty_cache_has_an_empty_answer():
    done = invoke("vectors")
    assert (done.status, done.out) == (0, "")
    assert "no vectors yet" in done.err
    assert invoke("vectors", "--json").json["vectors"] == []


def test_the_list_has_names_models_and_settings():
    keep("a" * 64, "json", "first")
    keep("b" * 64, "lowercase", "second")
    out = invoke("vectors").out
    head, first, second = out.splitlines()
    assert head.split() == ["name", "model", "layers", "mode", "positions", "strength", "key"]
    assert first.split() == ["json", "first", "2", "project", "all", "1", f"{'a' * 16}/json-12345678"]
    assert second.split()[:2] == ["lowercase", "second"]
    assert invoke("vectors", "list").out == out


def test_json_says_where_the_files_are():
    path = keep("a" * 64, "json")
    (vector,) = invoke("vectors", "list", "--json").json["vectors"]
    assert vector["file"] == str(path)
    assert (vector["layers"], vector["mode"]) == ([2], "project")


def test_one_is_removed_by_its_name(folder):
    keep("a" * 64, "json")
    keep("a" * 64, "lowercase")
    done = invoke("vectors", "remove", "json")
    assert (done.status, done.out) == (0, "")
    assert names() == ["lowercase"]


def test_a_name_of_two_models_asks_for_the_key():
    keep("a" * 64, "json")
    keep("b" * 64, "json")
    says = invoke("vectors", "remove", "json").complaint()
    assert f"{'a' * 16}/json-12345678" in says and f"{'b' * 16}/json-12345678" in says
    assert invoke("vectors", "remove", f"{'b' * 16}/json-12345678").status == 0
    assert names() == ["json"]


def test_nothing_is_removed_when_one_name_is_wrong():
    keep("a" * 64, "json")
    assert "no cached vector 'jason'" in invoke("vectors", "remove", "json", "jason").complaint()
    assert names() == ["json"]


def test_all_are_removed_with_their_folders(folder):
    keep("a" * 64, "json")
    keep("b" * 64, "json")
    assert len(invoke("vectors", "remove", "--all", "--json").json["removed"]) == 2
    assert list((folder / "vectors").iterdir()) == []


def test_a_damaged_file_is_listed_and_can_be_removed():
    keep("a" * 64, "json").write_bytes(b"GGUF")
    assert "unreadable" in invoke("vectors").out
    assert invoke("vectors", "remove", "json-12345678").status == 0
    assert names() == []


def test_json_may_stand_before_the_subcommand():
    keep("a" * 64, "json")
    assert invoke("vectors", "--json", "list").json == invoke("vectors", "list", "--json").json
    assert invoke("vectors", "--json", "remove", "json").json["removed"] == [f"{'a' * 16}/json-12345678"]


def test_a_key_is_on_one_line_whatever_the_other_columns_take():
    keep(
        "a" * 64,
        "a_name_of_forty_characters_or_even_more_of_them",
        "a-model-with-a-name-as-long-as-models-have",
    )
    key = invoke("vectors", "--json").json["vectors"][0]["key"]
    assert key in invoke("vectors").out


def test_one_that_can_not_be_removed_is_named(folder):
    path = keep("a" * 64, "json")
    path.unlink()
    path.mkdir()  # a folder is not unlinked, not even by root
    assert f"{path} can't be used" in invoke("vectors", "remove", "--all").complaint()
