"""Some seconds of the program that damages files at random (`python tests/hostile/fuzz.py`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_some_seconds_of_random_damage_bring_one_line_errors_alone(tmp_path):
    program = Path(__file__).with_name("fuzz.py")
    command = [sys.executable, program, "--seconds", "12", "--seed", "11", "--folder", tmp_path / "left"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["failures"] == 0
