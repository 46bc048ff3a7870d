"""Models that a server loads when they are asked for: several clients, room for few, and what goes wrong."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
from cli_runs import command_line, environment, write_vector
from other_programs import Ollama, empty_home, hub_server
from tiny_gguf import tiny_gguf

import localsteer

pytest.importorskip("fastapi", reason='pip install "localsteer[serve]"')
from serving import Server

from localsteer.errors import LocalsteerError
from localsteer.runtime.scheduler import Scheduler
from localsteer.server.app import create_app
from localsteer.server.pool import Loadable, Pool
from localsteer.server.run import Running

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three models and one that is damaged."""
    folder = tmp_path_factory.mktemp("models")
    paths = {}
    for name, architecture in (("a", "llama"), ("b", "qwen2"), ("c", "llama")):
        paths[name] = folder / f"{name}.gguf"
        paths[name].write_bytes(tiny_gguf(architecture=architecture).to_bytes())
    paths["bad"] = folder / "bad.gguf"
    paths["bad"].write_bytes(paths["a"].read_bytes()[:3000])
    return paths


class Opened:
    """Opens models, and keeps what happened. slow: seconds that each load takes longer."""

    def __init__(self, files):
        self.files, self.slow = files, 0.0
        self.events: list[str] = []
        self.most = self.now = 0

    def loadable(self, name, n_bytes=0):
        return Loadable(name, partial(self._open, name), n_bytes)

    def _open(self, name, stop):
        self.events.append(f"load {name}")
        until = time.monotonic() + self.slow
        while time.monotonic() < until:
            if stop.wait(0.01):
                raise LocalsteerError("loading was given up")
        scheduler = Scheduler(partial(localsteer.Engine, self.files[name], n_threads=1, n_seq_max=4))
        self.now += 1
        self.most = max(self.most, self.now)
        scheduler.engine.before_close(partial(self._closed, name, scheduler))
        return scheduler

    def _closed(self, name, scheduler):
        assert scheduler.counts["running"] == scheduler.counts["waiting"] == 0
        self.now -= 1
        self.events.append(f"unload {name}")


@contextmanager
def serving_pool(
    files, names=("a", "b", "c", "bad"), *, first=(), folder=None, sizes=None, resolve=None, **limits
):
    opened = Opened(files)
    models = [opened.loadable(name, (sizes or {}).get(name, 0)) for name in names]
    with Pool(models, resolve=resolve and partial(resolve, opened), **limits) as pool:
        for name in first:
            pool.load_now(name)
        running = Running(create_app(pool, folder=folder), "127.0.0.1", 0, 0.0)
        ready = threading.Event()
        thread = threading.Thread(
            target=running.serve, kwargs={"on_ready": ready.set, "signals": False}, daemon=True
        )
        thread.start()
        assert ready.wait(30)
        server = Server(running)
        server.opened, server.pool = opened, pool
        try:
            yield server
        finally:
            running.stop()
            thread.join(60)
            assert not thread.is_alive()


def ask(server, model, n=3, **fields):
    body = {"model": model, "messages": HI, "max_tokens": n, "seed": 1, **fields}
    with server.http() as http:
        return http.post("/v1/chat/completions", json=body)


def statuses(server):
    with server.http() as http:
        return {entry["id"]: entry["status"]["value"] for entry in http.get("/v1/models").json()["data"]}


def figures(server):
    with server.http() as http:
        lines = http.get("/metrics").text.splitlines()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("localsteer_model")
    }


def until(holds, seconds=10.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_model_is_loaded_when_it_is_first_asked_for_and_stays(files):
    with serving_pool(files, first=["a"]) as server:
        assert statuses(server) == {"a": "loaded", "b": "unloaded", "c": "unloaded", "bad": "unloaded"}
        assert [ask(server, "b").status_code for _ in range(2)] == [200, 200]
        assert ask(server, None).json()["model"] == "a"
        assert server.opened.events == ["load a", "load b"]
        assert statuses(server)["b"] == "loaded"
        with server.http() as http:
            assert set(http.get("/health").json()["models"]) == {"a", "b"}
            lengths = {entry["id"]: entry["max_model_len"] for entry in http.get("/v1/models").json()["data"]}
        assert lengths == {"a": 64, "b": 64, "c": None, "bad": None}
        found = figures(server)
        assert (found['localsteer_model_loaded{model="b"}'], found['localsteer_model_loaded{model="c"}']) == (
            1,
            0,
        )
        assert found['localsteer_model_loads_total{model="b",outcome="loaded"}'] == 1
    assert sorted(server.opened.events[2:]) == ["unload a", "unload b"]


def test_who_asks_for_a_model_that_is_being_loaded_waits_for_it(files):
    with serving_pool(files) as server, ThreadPoolExecutor(8) as clients:
        server.opened.slow = 0.3
        asked = [clients.submit(ask, server, "ab"[i % 2]) for i in range(8)]
        until(lambda: "loading" in statuses(server).values())
        assert {answer.result().status_code for answer in asked} == {200}
        assert sorted(server.opened.events) == ["load a", "load b"]


def test_two_models_asked_by_turns_with_room_for_one(files):
    with serving_pool(files, max_models=1) as server:
        replies = [ask(server, name).json()["choices"][0]["message"]["content"] for name in "abab"]
        assert replies[:2] == replies[2:]
        assert server.opened.events == [
            "load a",
            "unload a",
            "load b",
            "unload b",
            "load a",
            "unload a",
            "load b",
        ]
        assert server.opened.most == 1
        assert figures(server)['localsteer_model_loads_total{model="a",outcome="unloaded"}'] == 2


def test_the_one_not_used_for_longest_makes_room(files):
    with serving_pool(files, max_models=2) as server:
        for name in "abac":
            assert ask(server, name).status_code == 200
        assert server.opened.events == ["load a", "load b", "unload b", "load c"]


def test_under_load_no_request_loses_its_model_and_none_waits_for_ever(files):
    with serving_pool(files, max_models=1) as server, ThreadPoolExecutor(6) as clients:
        names = [("a", "b", "c")[i % 3] for i in range(18)]
        answers = list(clients.map(lambda name: ask(server, name, n=12), names))
        assert [answer.status_code for answer in answers] == [200] * 18
        assert server.opened.most == 1
        alone = {name: ask(server, name, n=12).json()["choices"][0]["message"]["content"] for name in "abc"}
        texts = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
        same = [text == alone[name] for name, text in zip(names, texts, strict=True)]
        assert sum(same) > 14  # near ties may tip


def test_a_busy_model_is_never_unloaded_and_can_t_keep_another_out(files):
    with serving_pool(files, max_models=1, first=["a"]) as server, ThreadPoolExecutor(4) as clients:
        with server.state.models["a"].scheduler.paused():
            first = clients.submit(ask, server, "a")
            until(lambda: server.counts("a")["waiting"])
            other = clients.submit(ask, server, "b")
            until(lambda: statuses(server)["b"] == "loading")
            again = clients.submit(ask, server, "a")  # behind b, although a is still here
            time.sleep(0.2)
            assert not (first.done() or other.done() or again.done())
            assert server.opened.events == ["load a"]
        assert [answer.result().status_code for answer in (first, other, again)] == [200] * 3
        assert server.opened.events == ["load a", "unload a", "load b", "unload b", "load a"]


def test_a_model_that_nobody_waits_for_any_more_is_not_loaded(files):
    with serving_pool(files, max_models=1, first=["a"]) as server, ThreadPoolExecutor(2) as clients:
        with server.state.models["a"].scheduler.paused():
            first = clients.submit(ask, server, "a")
            until(lambda: server.counts("a")["waiting"])
            with server.raw() as client:
                body = b'{"model": "b", "messages": [{"role": "user", "content": "Hi"}]}'
                head = (
                    "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
                )
                client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
                until(lambda: statuses(server)["b"] == "loading")
            until(lambda: statuses(server)["b"] == "unloaded")
            second = clients.submit(ask, server, "a")  # a takes requests again
            until(lambda: server.counts("a")["waiting"] == 2)
        assert first.result().status_code == second.result().status_code == 200
        assert server.opened.events == ["load a"]


def test_work_that_goes_on_in_a_thread_keeps_its_model(files, tmp_path):
    """A client that hangs up while its trace waits for the engine: the thread still waits."""
    import httpx

    write_vector(tmp_path / "mine.gguf", n_layer=2, n_embd=32, layers=(1,))
    body = {"model": "a", "messages": HI, "steering": ["mine"], "max_tokens": 8}
    limits = {"max_models": 1, "first": ["a"], "folder": tmp_path}
    with serving_pool(files, **limits) as server, ThreadPoolExecutor(1) as clients:
        with server.state.models["a"].scheduler.paused():
            with server.http() as http, pytest.raises(httpx.ReadTimeout):
                http.post("/v1/steering/trace", json=body, timeout=0.5)
            other = clients.submit(ask, server, "b")
            until(lambda: statuses(server)["b"] == "loading")
            time.sleep(0.2)
            assert (server.opened.events, statuses(server)["a"]) == (["load a"], "loaded")
        assert other.result().status_code == 200
        assert server.opened.events == ["load a", "unload a", "load b"]


def test_a_load_that_fails_is_the_error_of_those_who_asked(files):
    with serving_pool(files, first=["a"], max_models=2) as server, ThreadPoolExecutor(4) as clients:
        server.opened.slow = 0.1
        answers = list(clients.map(lambda _i: ask(server, "bad"), range(4)))
        for answer in answers:
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, "model_load_failed", "model")
            assert error["message"].startswith("model: bad can't be loaded: bad.gguf ")
            assert "\n" not in error["message"] and str(files["bad"].parent) not in error["message"]
        assert ask(server, "a").status_code == ask(server, "b").status_code == 200
        assert statuses(server)["bad"] == "unloaded"
        assert figures(server)['localsteer_model_loads_total{model="bad",outcome="failed"}'] >= 1
        files_bad = server.opened.files["bad"].read_bytes()
        server.opened.files["bad"].write_bytes(files["c"].read_bytes())  # mended: the next request gets it
        try:
            assert ask(server, "bad").status_code == 200
        finally:
            server.opened.files["bad"].write_bytes(files_bad)


def test_a_limit_of_memory_counts_what_the_models_need(files):
    sizes = {"a": 3_000_000, "b": 3_000_000, "c": 6_000_000, "bad": 9_000_000}
    with serving_pool(files, sizes=sizes, max_bytes=7_000_000) as server:
        for name in "abc":
            assert ask(server, name).status_code == 200
        assert server.opened.events == ["load a", "load b", "unload a", "unload b", "load c"]
        error = ask(server, "bad").json()["error"]
        assert "needs about 0.01 GB, and --max-memory allows 0.01 GB" in error["message"]
        assert statuses(server)["c"] == "loaded"


def test_vectors_are_tried_on_a_model_when_it_is_loaded(files, tmp_path):
    write_vector(tmp_path / "mine.gguf", n_layer=2, n_embd=32, layers=(1,))
    write_vector(tmp_path / "other.gguf", n_layer=2, n_embd=64, layers=(1,))
    with serving_pool(files, names="ab", folder=tmp_path, max_models=1) as server:
        assert set(statuses(server)) == {"a", "b"}
        assert ask(server, "b+mine").status_code == 200  # its vectors are known once it is loaded
        assert set(statuses(server)) == {"a", "b", "b+mine"}
        refused = ask(server, "a+other").json()["error"]
        assert refused["code"] == "model_not_found" and "a has no vector 'other'" in refused["message"]
        assert set(statuses(server)) == {"a", "a+mine", "b", "b+mine"}  # b is unloaded, and still known
        with server.http() as http:
            mine = (tmp_path / "mine.gguf").read_bytes()
            added = http.post("/v1/steering?name=new", content=mine)
            assert (added.status_code, added.json()["models"]) == (201, ["a"])
            assert (
                http.post("/v1/steering?name=odd", content=(tmp_path / "other.gguf").read_bytes()).status_code
                == 201
            )
        assert ask(server, "b+new").status_code == 200
        assert "b+odd" not in statuses(server)


def test_other_names_are_looked_for_only_where_the_server_may(files):
    def resolve(opened, name):
        if name.startswith("ollama:"):
            return opened.loadable("c" if name == "ollama:fox" else name.removeprefix("ollama:"))
        return None

    with serving_pool(files, names="a") as server:
        answer = ask(server, "ollama:fox")
        assert answer.status_code == 404 and "choose one of a" in answer.json()["error"]["message"]
    with serving_pool(files, names="a", resolve=resolve, max_models=1) as server:
        for name in ("ollama:fox", "ollama:fox", "c", "ollama:b"):
            assert (ask(server, name).status_code, ask(server, name).json()["model"]) == (200, name)
        assert server.opened.events == ["load c", "unload c", "load b"]
        for name in ("/etc/passwd", "../a", "hf:x/y"):
            assert ask(server, name).status_code == 404


def test_a_server_that_ends_gives_a_load_up(files):
    with serving_pool(files) as server, ThreadPoolExecutor(2) as clients:
        server.opened.slow = 60.0
        waiting = clients.submit(ask, server, "a")
        until(lambda: server.opened.events)
        server.running.stop()
        answer = waiting.result(20)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "closing")


def test_a_deadline_counts_the_wait_for_a_model(files, monkeypatch):
    from localsteer.server.limits import Limits

    opened = Opened(files)
    opened.slow = 1.5
    with Pool([opened.loadable("a")]) as pool:
        running = Running(create_app(pool, limits=Limits(request_seconds=0.3)), "127.0.0.1", 0, 0.0)
        ready = threading.Event()
        thread = threading.Thread(
            target=running.serve, kwargs={"on_ready": ready.set, "signals": False}, daemon=True
        )
        thread.start()
        assert ready.wait(30)
        server = Server(running)
        assert ask(server, "a").status_code == 504
        until(lambda: "a" in pool.served)  # what others may wait for goes on
        assert pool._places["a"].users == 0
        running.stop()
        thread.join(30)


# -- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path):
    """`localsteer serve` as a process, ended at the end."""
    import json
    import subprocess

    processes = []

    def start(*args, endpoint=""):
        env = environment(tmp_path / "cache", **empty_home(tmp_path) | {"HF_ENDPOINT": endpoint})
        process = subprocess.Popen(
            command_line("serve", "--port", "0", "--json", *args),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True, cwd=tmp_path,
        )  # fmt: skip
        processes.append(process)
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            assert line, process.stderr.read()
            text += line
        return json.loads(text)

    yield start
    for process in processes:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture
def hub(files):
    with hub_server({"ORG/R": {"m-Q8_0.gguf": files["b"].read_bytes()}}) as server:
        yield server


def test_serve_offers_what_is_on_this_machine_and_downloads_nothing(command, files, tmp_path, hub):
    import httpx

    empty_home(tmp_path)
    ollama = Ollama(tmp_path / "home" / ".ollama" / "models")
    ollama.model(
        "registry.ollama.ai/library/fox/1b", files["b"].read_bytes(), params={"num_ctx": 32, "top_k": 1}
    )
    told = command("-m", files["a"], "--all-models", "--max-models", "1", endpoint=hub.url)
    assert told["models"][0] == "a" and "ollama:fox:1b" in told["models"]
    ollama.model("registry.ollama.ai/library/late/1b", files["c"].read_bytes())
    with httpx.Client(base_url=told["url"], timeout=60, trust_env=False) as http:

        def post(model, **fields):
            body = {"model": model, "messages": HI, "max_tokens": 3, **fields}
            return http.post("/v1/chat/completions", json=body)

        def reply(answer):
            return answer.json()["choices"][0]["message"]["content"]

        assert [post(name).status_code for name in ("ollama:fox:1b", "ollama:FOX:1b", "ollama:late:1b")] == [
            200
        ] * 3
        replies = {reply(post("ollama:fox:1b", seed=seed)) for seed in range(4)}
        assert len(replies) == 1  # top_k 1
        assert len({reply(post("ollama:fox:1b", seed=seed, top_k=0, temperature=2)) for seed in range(4)}) > 1
        entries = {entry["id"]: entry for entry in http.get("/v1/models").json()["data"]}
        assert entries["ollama:fox:1b"]["max_model_len"] == 32
        missing = post("hf:ORG/R").json()["error"]
        assert missing["code"] == "model_not_found" and "is not in the hub's cache" in missing["message"]
        assert post(str(files["b"])).status_code == 404
    assert hub.asked == []


def test_a_client_brings_a_server_that_was_told_so_to_download(command, files, hub):
    import httpx

    body = {"model": "hf:ORG/R:Q8_0", "messages": HI, "max_tokens": 3}
    told = command("-m", files["a"], "--all-models", "--download", endpoint=hub.url)
    answer = httpx.post(f"{told['url']}/v1/chat/completions", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text


def test_download_needs_all_models():
    from cli_runs import invoke

    assert "--download needs --all-models" in invoke("serve", "--download").complaint()


def test_a_model_that_never_fits_is_refused_at_the_start(files, tmp_path):
    from cli_runs import invoke

    (tmp_path / "a.gguf").write_bytes(files["a"].read_bytes() + bytes(2_000_000))
    said = invoke("serve", "-m", tmp_path / "a.gguf", "--max-memory", "0.001", "--port", "0").complaint()
    assert "a needs about 0.00 GB, and --max-memory allows 0.00 GB" in said
