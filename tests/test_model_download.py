"""`hf:` fetched from a hub on this machine: resumed, checked, offline afterwards, refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from cli_runs import command_line, invoke
from other_programs import empty_home, hub_server, sha256
from tiny_gguf import tiny_gguf

from localsteer.errors import ModelFileError
from localsteer.model_names import path_of
from localsteer.stores import download, hub

pytest.importorskip("huggingface_hub", reason='pip install "localsteer[hub]"')
REPO = "ORG/Fox-GGUF"
NAME = f"hf:{REPO}"


@pytest.fixture(scope="module")
def gguf():
    return tiny_gguf().to_bytes()


@pytest.fixture
def server(gguf, tmp_path, monkeypatch):
    files = {
        "README.md": b"#",
        "Fox-Q8_0.gguf": gguf,
        "Fox-Q4_K_M.gguf": gguf + bytes(32),
        "mmproj-Fox-Q4_K_M.gguf": b"no",
    }
    files |= {f"big/Fox-BF16-0000{i}-of-00002.gguf": gguf + bytes(64 * i) for i in (1, 2)}
    for name, value in empty_home(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    # read once by huggingface_hub, when the first test of this process that needs it imports it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    with hub_server({REPO: files, "ORG/Words": {"model.safetensors": b"x"}}) as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made
        if made.hold:
            made.hold.set()


def refused(name):
    with pytest.raises(ModelFileError) as caught:
        path_of(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def blobs():
    folder = hub.cache_folder() / hub.folder_name(REPO) / "blobs"
    return {path.name: path.stat().st_size for path in folder.iterdir()} if folder.is_dir() else {}


def test_a_model_is_fetched_at_its_first_use_and_never_asked_for_again(server, monkeypatch):
    done = invoke("run", "-m", NAME, "-n", "3", "--json", "Hi")
    assert (done.status, done.json["n_tokens"]) == (0, 3), done.err
    assert done.err == "localsteer: fetching Fox-Q4_K_M.gguf (0.2 MB)\n"
    assert not any("mmproj" in line or "README" in line for line in server.asked)
    server.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = invoke("run", "-m", NAME, "-n", "3", "--json", "Hi")
    assert (again.status, again.err, server.asked) == (0, "", [])
    row = invoke("models", "--json").json["models"][-1]
    assert (row["name"], row["architecture"], row["steers"]) == (f"{NAME}:Q4_K_M", "llama", True)


def test_what_lies_in_the_cache_needs_no_package(server, monkeypatch):
    path = path_of(NAME)
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda _name: None)
    assert path_of(NAME) == path
    assert 'pip install "localsteer[hub]"' in refused(f"{NAME}:Q8_0")


def test_all_parts_of_a_split_model_come(server):
    path = path_of(f"{NAME}:BF16")
    assert sorted(file.name for file in path.parent.iterdir()) == [
        f"Fox-BF16-0000{i}-of-00002.gguf" for i in (1, 2)
    ]
    (path.parent / "Fox-BF16-00002-of-00002.gguf").unlink()
    assert path_of(f"{NAME}:BF16") == path and len(list(path.parent.iterdir())) == 2


def test_a_cut_connection_is_gone_on_from_where_it_was(server, gguf):
    server.cut_after, server.cuts = 1000, 1
    told = []
    path = path_of(f"{NAME}:Q8_0", on_progress=lambda *words: told.append(words))
    assert path.read_bytes() == gguf
    assert any("bytes=1000-" in line for line in server.asked)
    assert told[0] == ("Fox-Q8_0.gguf", 0, len(gguf)) and told[-1] == ("Fox-Q8_0.gguf", len(gguf), len(gguf))


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_fetched_stays_when_the_program_is_stopped(server, gguf, kill):
    server.cut_after, server.hold = 2000, threading.Event()
    running = subprocess.Popen(
        command_line("models", "pull", f"{NAME}:Q8_0"), stderr=subprocess.PIPE, env=os.environ
    )
    assert server.holding.wait(60)
    part = Path(hub.cache_folder(), hub.folder_name(REPO), "blobs", f"{sha256(gguf)}.incomplete")
    while not part.exists() or part.stat().st_size < 2000:  # on its way through the program
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(kill)
    _, said = running.communicate(timeout=30)
    assert running.returncode == (130 if kill == signal.SIGINT else -kill) and b"Traceback" not in said
    assert blobs() == {part.name: 2000}
    fault = next(row for row in invoke("models", "--json").json["models"] if row["name"] == NAME)["note"]
    assert "a download was never finished (0.0 MB are present)" in fault
    server.hold, server.cut_after = None, None
    server.asked.clear()
    done = invoke("models", "pull", f"{NAME}:Q8_0")
    assert done.status == 0 and "continuing at 0.0 MB" in done.err, done.err
    assert any("bytes=2000-" in line for line in server.asked)
    assert Path(done.out.strip().partition(": ")[2]).read_bytes() == gguf and blobs() == {
        sha256(gguf): len(gguf)
    }


def test_a_terminal_shows_a_bar(server):
    pytest.importorskip("pexpect")
    from terminals import Terminal

    server.cut_after, server.hold = 2000, threading.Event()
    terminal = Terminal(command_line("models", "pull", f"{NAME}:Q8_0"))
    terminal.wait_for(lambda screen: "Fox-Q8_0.gguf, MB" in screen, "the bar")
    held, server.hold, server.cut_after = server.hold, None, None
    held.set()
    assert terminal.end() == 0
    assert "fetching Fox-Q8_0.gguf (0.2 MB)" in terminal.screen and "Q8_0: /" in terminal.screen


def test_a_part_of_another_file_is_fetched_anew(server, gguf):
    part = hub.cache_folder() / hub.folder_name(REPO) / "blobs" / f"{sha256(gguf)}.incomplete"
    part.parent.mkdir(parents=True)
    for wrong in (b"x" * 3000, b"x" * (len(gguf) + 5), b"x" * len(gguf)):
        part.write_bytes(wrong)
        assert path_of(f"{NAME}:Q8_0").read_bytes() == gguf
        (part.parent / sha256(gguf)).unlink()
    server.ranges = False  # a server that sends the whole file again
    part.write_bytes(gguf[:3000])
    assert path_of(f"{NAME}:Q8_0").read_bytes() == gguf


def test_a_file_that_comes_damaged_is_not_kept(server):
    server.damaged = True
    told = refused(f"{NAME}:Q8_0")
    assert told == "Fox-Q8_0.gguf can't be fetched: it arrived damaged: its sha256 does not match: try again."
    assert blobs() == {}


def test_a_server_that_sends_too_much_or_nothing_is_refused(server, gguf, monkeypatch):
    monkeypatch.setattr(download, "RETRY_SECONDS", 0.0)
    for changed, said in ((gguf + bytes(99), "has more than its"), (b"", "the server sends nothing")):
        server.sent = changed
        assert said in refused(f"{NAME}:Q8_0")
        assert blobs() == {}


def test_a_file_that_would_lead_out_of_the_cache_is_not_there(server, gguf):
    server.repos["ORG/Evil"] = {"../../evil-Q4_K_M.gguf": gguf, "/evil-Q8_0.gguf": gguf}
    assert "holds no GGUF file of a model" in refused("hf:ORG/Evil")


def test_the_token_goes_to_the_hub_and_nowhere_else(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    path_of(f"{NAME}:Q8_0")
    assert all(line.endswith("Bearer hf_" + "a" * 34) for line in server.asked)
    server.asked.clear()
    server.elsewhere = True  # as the hub's own files, which lie in a store with signed addresses
    path_of(f"{NAME}:Q4_K_M")
    files = [line for line in server.asked if line.startswith("GET") and "resolve" in line]
    assert len(files) == 1 and files[0].endswith(" -")


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "RepoNotFound", "there is no such repository, or it is private"),
        (401, "GatedRepo", "its authors ask for consent"),
        (403, "GatedRepo", "its authors ask for consent"),
        (403, "", "its authors ask for consent"),
        (404, "RepoNotFound", "there is no such repository, or it is private"),
        (500, "", "the hub answered with status 500"),
    ],
)
def test_what_the_hub_refuses_is_one_line(server, status, code, said):
    server.statuses, server.codes = {"ORG/Gone": status}, {"ORG/Gone": code}
    assert said in refused("hf:ORG/Gone")
    done = invoke("models", "pull", "hf:ORG/Gone")
    assert said in done.complaint()


@pytest.mark.parametrize(
    "told", [b"<html>", b"", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"siblings": 5}', b" " * 70_000]
)
def test_an_answer_that_is_no_list_of_files_is_one_line(server, monkeypatch, told):
    monkeypatch.setattr(download, "MAX_ANSWER", 1 << 16)
    server.told = told if told != b" " * 70_000 else json.dumps({"siblings": [], "": " " * 70_000}).encode()
    assert "answers with no list of files: check HF_ENDPOINT" in refused(NAME)


def test_files_of_odd_names_are_not_there(server):
    odd = (None, 5, "", "a\0.gguf", "a\n.gguf", "\ud800.gguf", "..\\a.gguf", "a//b.gguf")
    server.told = json.dumps(
        {"siblings": [5, {}, *({"rfilename": name, "size": "x"} for name in odd)]}
    ).encode()
    assert "holds no GGUF file of a model" in refused(NAME)


def test_other_refusals_are_one_line_too(server, monkeypatch, tmp_path):
    assert "holds no GGUF file of a model" in refused("hf:ORG/Words")
    assert "has no Q2_K: choose one of hf:ORG/Fox-GGUF:" in refused(f"{NAME}:Q2_K")
    assert "can't be fetched: write hf:ORG/REPO" in invoke("models", "pull", "ollama:llama3.2").complaint()
    enough = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _path: enough._replace(free=10))
    assert "there is no room for the download" in refused(f"{NAME}:Q8_0")


def test_a_disk_that_fills_up_is_one_line(server, gguf):
    part = hub.cache_folder() / hub.folder_name(REPO) / "blobs" / f"{sha256(gguf)}.incomplete"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    assert "the disk is full, what was fetched is kept" in refused(f"{NAME}:Q8_0")


def test_a_cache_that_can_t_be_written_is_one_line(server):
    folder = hub.cache_folder() / hub.folder_name(REPO)
    folder.parent.mkdir(parents=True)
    folder.write_text("a file in its place")
    assert "can't be written" in refused(f"{NAME}:Q8_0")


def test_without_a_network_it_says_so(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the hub can't be reached" in refused(NAME)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in refused(NAME)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert "can't be fetched" in refused(NAME)


def test_two_programs_fetch_a_file_once(server, gguf):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(path_of(f"{NAME}:Q8_0"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1 and paths[0].read_bytes() == gguf
    assert sum(line.startswith("GET") and "resolve" in line for line in server.asked) == 1
