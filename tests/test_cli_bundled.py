"""What a newcomer types first, on the model that comes with the package."""

from __future__ import annotations

import pytest
from cli_runs import environment, invoke, program

from localsteer import bundled

pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="this copy has no bundled model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache of its own, shared by these tests: the model is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(folder))


def test_a_newcomer_gets_json_without_asking_for_it(folder, tmp_path):
    # one thread: several would wait for each other where other work runs beside the tests
    command = ("run", "--instruction", "json", "-t", "1", "--temp", "0", "Tell me about foxes.")
    done = program(*command, env=environment(folder), cwd=tmp_path)
    assert done.status == 0, done.err
    assert done.out.startswith("{") and done.out.endswith("}\n")
    assert "making it now" in done.err
    again = program(*command, env=environment(folder), cwd=tmp_path)
    assert (again.out, again.err) == (done.out, "")
    plain = program("run", "--temp", "0", "Tell me about foxes.", env=environment(folder), cwd=tmp_path)
    assert "{" not in plain.out


def test_doctor_checks_the_bundled_model():
    done = invoke("doctor", "--json")
    assert done.status == 0, done.out
    assert {check["name"]: check["status"] for check in done.json["checks"]}["self-test"] == "ok"


def test_other_quantizations_and_the_base_model_have_names():
    for model in ("bundled:q4_k_m", "bundled-base"):
        done = invoke("run", "-m", model, "--temp", "0", "-n", "4", "Tell me about foxes.")
        assert done.status == 0, done.err
    assert "unknown quantization 'Q9'" in invoke("run", "-m", "bundled:q9", "Hi").complaint()
