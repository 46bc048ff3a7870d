"""`localsteer doctor`: what it finds, and that its self-test can fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from cli_runs import invoke, program, write_vector

from localsteer.cli import doctor
from localsteer.errors import LocalsteerError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def statuses(done):
    return {check["name"]: check["status"] for check in done.json["checks"]}


def test_a_healthy_model_has_a_line_for_each_check(tiny_model):
    done = invoke("doctor", "-m", tiny_model.gguf_path)
    assert done.status == 0, done.out
    lines = [line for line in done.out.splitlines() if not line.startswith(("warn AMX", "warn  AMX"))]
    assert all(re.match(r"(ok|warn) +\S", line) for line in lines)
    names = [line.split()[1] for line in lines]
    assert names == [
        "localsteer",
        "llama.cpp",
        "native",
        "threads",
        "PyTorch",
        "extras",
        "cache",
        "file",
        "model",
        "template",
        "layers",
        "self-test",
    ]
    assert "all 4 can be steered" in done.out


def test_json_has_the_same_checks(tiny_llama):
    done = invoke("doctor", "-m", tiny_llama.gguf_path, "--json")
    assert done.json["ok"] is True
    assert statuses(done)["self-test"] == "ok"


def test_a_hook_that_does_not_do_what_it_says_fails(tiny_llama, monkeypatch):
    from localsteer.engine import Engine

    unsteered = Engine.hidden_states
    monkeypatch.setattr(
        Engine, "hidden_states", lambda self, tokens, layers, **_: unsteered(self, tokens, layers)
    )
    done = invoke("doctor", "-m", tiny_llama.gguf_path, "--json")
    assert (done.status, done.json["ok"], statuses(done)["self-test"]) == (1, False, "fail")


def test_numbers_that_are_none_fail(tiny_llama, monkeypatch):
    monkeypatch.setattr(doctor, "_miss", lambda engine, layer: np.nan)
    assert invoke("doctor", "-m", tiny_llama.gguf_path).status == 1


def test_layers_that_can_not_be_steered_are_named(tiny_llama, monkeypatch):
    from localsteer.runtime.bridge import Context

    monkeypatch.setattr(Context, "probe", lambda self, layers=None: {1, 2})
    done = invoke("doctor", "-m", tiny_llama.gguf_path, "--json")
    assert statuses(done)["layers"] == "warn"
    monkeypatch.setattr(Context, "probe", lambda self, layers=None: set())
    assert invoke("doctor", "-m", tiny_llama.gguf_path).status == 1


def test_a_model_that_can_not_be_loaded_fails(folder):
    done = invoke("doctor", "-m", folder / "none.gguf")
    assert done.status == 1
    assert re.search(r"^fail +model +.*none.gguf can't be read", done.out, re.M)
    assert invoke("doctor", "-m", write_vector(folder / "v.gguf")).status == 1


def test_an_installation_without_a_model_is_checked_all_the_same(monkeypatch):
    monkeypatch.setattr(doctor, "_has_bundled", lambda: False)
    done = invoke("doctor")
    assert done.status == 0
    assert "no bundled model" in done.out


def test_an_amx_build_is_told_how_to_be_fast(monkeypatch):
    import localsteer.runtime.bridge

    monkeypatch.setattr(doctor, "_has_bundled", lambda: False)
    monkeypatch.setattr(
        localsteer.runtime.bridge, "system_info", lambda: {"llama-cpp-python": "0.3.36", "CPU.AMX_INT8": "1"}
    )
    done = invoke("doctor")
    assert done.status == 0
    line = next(line for line in done.out.splitlines() if " AMX " in line)
    assert line.startswith("warn") and "-mno-amx-tile" in line and "llama-cpp-python==0.3.36" in line


def test_a_broken_library_is_a_line_and_no_traceback(monkeypatch):
    import localsteer.runtime.bridge

    def broken():
        raise OSError("libllama.so: undefined symbol")

    monkeypatch.setattr(doctor, "_has_bundled", lambda: False)
    monkeypatch.setattr(localsteer.runtime.bridge, "system_info", broken)
    done = invoke("doctor")
    assert done.status == 1
    assert "OSError: libllama.so: undefined symbol" in done.out
    assert done.err == ""


def test_a_cache_that_can_not_be_written_is_a_warning(monkeypatch, folder):
    monkeypatch.setattr(doctor, "_has_bundled", lambda: False)
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    done = invoke("doctor", "--json")
    assert statuses(done)["cache"] == "warn"


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_in_the_place_of_the_cache_is_a_warning(tiny_llama, folder, monkeypatch, below):
    (folder / "file").touch()
    monkeypatch.setenv("LOCALSTEER_CACHE", str(folder / "file" / below))
    assert statuses(invoke("doctor", "-m", tiny_llama.gguf_path, "--json"))["cache"] == "warn"


def without_llama_cpp(*args):
    """`localsteer ARGS` in a process that can't import llama_cpp."""
    code = "import sys; sys.modules['llama_cpp'] = None; from localsteer.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=300)
    return done


def test_without_llama_cpp_it_says_so_in_one_line():
    done = without_llama_cpp("doctor")
    assert (done.returncode, done.stderr) == (1, "")
    failed = [line for line in done.stdout.splitlines() if line.startswith("fail")]
    assert len(failed) == 1 and "pip install llama-cpp-python==0.3.36" in failed[0]
    assert "cache" in done.stdout
    done = without_llama_cpp("run", "Hi")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert "llama-cpp-python is not installed" in done.stderr


def with_broken_llama_cpp(folder, init, *args):
    """`localsteer ARGS` where llama_cpp is a package that does this."""
    (folder / "llama_cpp").mkdir()
    (folder / "llama_cpp" / "__init__.py").write_text(init)
    return program(*args, env={**os.environ, "PYTHONPATH": str(folder)})


def test_a_llama_cpp_of_another_processor_is_one_line(folder):
    done = with_broken_llama_cpp(folder, "import os; os.kill(os.getpid(), 4)", "doctor")
    failed = [line for line in done.out.splitlines() if line.startswith("fail")]
    assert (done.status, done.err, len(failed)) == (1, "", 1)
    assert "compiled for another processor" in failed[0] and "--force-reinstall" in failed[0]


def test_a_llama_cpp_that_ends_the_process_is_one_line(folder):
    done = with_broken_llama_cpp(folder, "import os; os.kill(os.getpid(), 11)", "doctor")
    failed = [line for line in done.out.splitlines() if line.startswith("fail")]
    assert (done.status, len(failed)) == (1, 1) and "signal 11" in failed[0]


@pytest.mark.skipif(sys.platform != "linux", reason="the library is named so on Linux")
@pytest.mark.parametrize("command", [("doctor",), ("run", "Hi")])
def test_a_broken_openmp_library_is_one_line_that_says_what_to_install(folder, command):
    (folder / "libgomp.so.1").touch()
    done = program(*command, env={**os.environ, "LD_LIBRARY_PATH": str(folder)})
    lines = [line for line in (done.out + done.err).splitlines() if "llama.cpp can't be loaded" in line]
    assert done.status and len(lines) == 1 and "Traceback" not in done.err
    assert "file too short" in lines[0] and "apt install libgomp1" in lines[0]


def test_a_model_is_not_blamed_for_a_llama_cpp_of_another_processor(tiny_llama, monkeypatch):
    from localsteer.runtime.bridge import check_gguf, guard

    class Done:
        returncode, stdout, stderr = -4, b"load", b""

    monkeypatch.setattr(guard.subprocess, "run", lambda *_args, **_more: Done)
    with pytest.raises(LocalsteerError, match="compiled for another processor") as caught:
        check_gguf(tiny_llama.gguf_path, again=True)
    assert "damaged" not in str(caught.value)


def test_another_llama_cpp_is_named_in_one_line(monkeypatch):
    from localsteer.runtime.bridge import library

    monkeypatch.setattr(library.importlib.metadata, "version", lambda _name: "0.3.20")
    done = invoke("doctor", "--json")
    failed = [check["detail"] for check in done.json["checks"] if check["status"] == "fail"]
    assert len(failed) == 1 and "0.3.20 is installed, localsteer is tested with 0.3.36" in failed[0]


def test_a_missing_native_library_is_named_in_one_line(monkeypatch):
    from localsteer.runtime.bridge import hook

    def missing():
        raise LocalsteerError("localsteer's native library is not built here.")

    monkeypatch.setattr(hook, "load_native", missing)
    done = invoke("doctor", "--json")
    assert [check["name"] for check in done.json["checks"] if check["status"] == "fail"] == ["native"]


def test_extras_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"serve": "fastapi", "mcp": "localsteer_no_such_module"})
    monkeypatch.setattr(doctor, "_has_bundled", lambda: False)
    line = next(line for line in invoke("doctor").out.splitlines() if " extras " in line)
    assert line.startswith("ok") and 'not installed: mcp (pip install "localsteer[mcp]")' in line
