"""How long llama.cpp's threads spin: what libgomp itself reports when a fresh process loads it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from localsteer.runtime.bridge import openmp

pytestmark = pytest.mark.skipif(not openmp.is_loaded(), reason="this llama.cpp does not use libgomp")

IMPORTS = ("from localsteer import Engine", "from localsteer import SteeredLlama")
BRIDGE = "from localsteer.runtime.bridge import spinning; print(spinning)"


def settings_of(code: str, **environment: str) -> tuple[dict[str, str], str]:
    """libgomp's settings in a process that runs this code, and what that prints."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("GOMP_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"OMP_DISPLAY_ENV": "VERBOSE"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(re.findall(r"(\w+) = '(.*?)'", done.stderr)), done.stdout.strip()


@pytest.mark.parametrize("code", IMPORTS)
def test_threads_spin_for_a_bounded_time(code):
    settings, _ = settings_of(code)
    assert settings["GOMP_SPINCOUNT"] == str(openmp.SPIN_COUNT)
    assert settings["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize(
    ("name", "value", "spins"), [("GOMP_SPINCOUNT", "77", "77"), ("OMP_WAIT_POLICY", "passive", "0")]
)
def test_the_user_s_own_setting_stays(name, value, spins):
    settings, told = settings_of(BRIDGE, **{name: value})
    assert settings[name].lower() == value
    assert settings["GOMP_SPINCOUNT"] == spins
    assert told == f"as {name} says"


def test_a_libgomp_that_is_there_already_stays_as_it_is():
    settings, told = settings_of(f"import llama_cpp; {BRIDGE}")
    assert settings["GOMP_SPINCOUNT"] == "300000"
    assert told.startswith("unbounded")


def test_nothing_is_left_in_the_environment():
    _, told = settings_of(
        f"import os; before = dict(os.environ); {BRIDGE}; print(before == dict(os.environ))"
    )
    assert told == "bounded\nTrue"
