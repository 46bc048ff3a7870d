"""Completion in the shell: what a Tab brings, and that it brings in nothing heavy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from cli_runs import invoke


def tab(*words, cwd=None, code="from localsteer.cli import main; main()"):
    """What bash is told at a Tab behind these words."""
    asked = {"_LOCALSTEER_COMPLETE": "bash_complete", "COMP_CWORD": str(len(words))}
    asked["COMP_WORDS"] = " ".join(("localsteer", *words))
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, **asked}, capture_output=True, text=True, timeout=300, cwd=cwd
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_commands_models_files_and_instructions_are_offered():
    assert "plain,run" in tab("ru")
    offered = tab("run", "-m", "bun")
    assert {"plain,bundled", "plain,bundled-base"} <= set(offered)
    assert any(line.startswith("file,") for line in offered)
    assert [line.partition(",")[0] for line in tab("run", "-s", "v")] == ["file"]
    assert "plain,json" in tab("run", "-i", "js")
    assert "plain,--positions" in tab("run", "--pos")


def test_a_tab_brings_in_nothing_heavy():
    code = (
        "import sys, atexit; from localsteer.cli import main;"
        "heavy = {'torch', 'llama_cpp', 'transformers', 'gguf', 'rich'};"
        "atexit.register(lambda: print(*sorted(heavy & set(sys.modules))));"
        "main()"
    )
    for words in (["run", "-m", "sm"], ["run", "-i", "js"], ["ru"]):
        assert tab(*words, code=code)[-1] == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_one_that_it_takes(shell, tmp_path):
    done = invoke("completion", shell)
    assert done.status == 0 and "_LOCALSTEER_COMPLETE" in done.out
    assert invoke("completion", shell, "--json").json["script"].strip() == done.out.strip()
    if shutil.which(shell) is None:
        return
    script = tmp_path / "script"
    script.write_text(done.out, "utf-8")
    checked = subprocess.run([shell, "-n", script], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr


def test_another_shell_is_refused():
    assert "bash" in invoke("completion", "tcsh").complaint()
