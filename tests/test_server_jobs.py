"""/v1/jobs: vectors that are made on request, over real HTTP on the bundled model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from serving import EXACT, FOXES, Server, model_path, serving

import localsteer
from localsteer import bundled

pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="no bundled model in this copy")

SECONDS = 240.0  # other tests may keep the cores busy, and the process of a job comes last


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vectors")


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder) as server:
        yield server


@pytest.fixture
def http(server):
    with server.http() as http:
        yield http
        for job in http.get("/v1/jobs").json()["data"]:
            for _ in range(2):
                http.delete(f"/v1/jobs/{job['id']}")
        for job in http.get("/v1/jobs").json()["data"]:
            wait(lambda job=job: job_of(http, job)["status"] in ENDED)


ENDED = ("succeeded", "cancelled", "failed")


def begin(http, instruction, **fields):
    answer = http.post("/v1/jobs", json={"instruction": instruction, **fields})
    assert answer.status_code == 202, answer.text
    return answer.json()


def job_of(http, job):
    return http.get(f"/v1/jobs/{job['id']}").json()


def wait(condition, seconds=SECONDS):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come")


def ended(http, job):
    def look():
        now = job_of(http, job)
        return now if now["status"] in ENDED else None

    return wait(look)


def refusal(http, **body):
    answer = http.post("/v1/jobs", json=body)
    assert 400 <= answer.status_code < 500
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


def test_a_name_of_the_catalogue_becomes_a_vector_while_others_are_answered(http, folder):
    entry = next(each for each in http.get("/v1/instructions").json()["data"] if each["id"] == "lowercase")
    assert entry["vector"] is None and entry["has_verifier"]
    job = begin(http, "lowercase")
    assert job["status"] == "queued" and job["name"] == "lowercase" and job["result"] is None
    wait(lambda: job_of(http, job)["doing"])
    chat = http.post(
        "/v1/chat/completions", json={"messages": FOXES, "temperature": 0, "max_tokens": 20}
    ).json()
    assert chat["choices"][0]["message"]["content"]
    assert job_of(http, job)["status"] == "running"  # it did not wait for the search
    assert refusal(http, instruction="lowercase")[0] == 409  # it is on its way
    made = ended(http, job)
    assert (made["status"], made["vector"], made["error"]) == ("succeeded", "lowercase", None)
    assert "good" in made["best"] and made["seconds"] > 0
    result = made["result"]
    assert result["helps"] and result["n"] == 8 and result["judged_by"] == "verifier"
    assert set(result["scores"]) == set(result["degenerate"]) == {"none", "steered", "instructed", "both"}
    assert result["scores"]["steered"] > result["scores"]["none"] and result["learning"] is None
    vector = localsteer.ControlVector.load(folder / "lowercase.gguf")
    assert vector.layers == tuple(result["setting"]["layer"])
    offered = http.get("/v1/steering/lowercase").json()
    assert offered["models"] == ["bundled"] and offered["settings"]["strength"] == vector.strength
    steered = {"model": "bundled+lowercase", "messages": FOXES, "temperature": 0, "max_tokens": 30}
    text = http.post("/v1/chat/completions", json=steered).json()["choices"][0]["message"]["content"]
    assert text and text == text.lower()
    status, param, message = refusal(http, instruction="lowercase")
    assert (status, param) == (409, "name") and "replace=true" in message
    entry = next(each for each in http.get("/v1/instructions").json()["data"] if each["id"] == "lowercase")
    assert entry["vector"] == "lowercase"


def test_one_runs_and_others_wait_and_a_job_is_cancelled_twice(http):
    running, *waiting = [begin(http, f"Say it in {n} words.") for n in range(5)]
    assert [job_of(http, job)["before"] for job in waiting] == [1, 2, 3, 4]
    assert [each["status"] for each in http.get("/v1/jobs").json()["data"]][-4:] == ["queued"] * 4
    status, _, message = refusal(http, instruction="One more of these.")
    assert status == 429 and "4 more wait" in message
    for _ in range(2):
        assert http.delete(f"/v1/jobs/{waiting[0]['id']}").json()["status"] == "cancelled"
    assert job_of(http, waiting[1])["before"] == 1
    for job in waiting[1:]:
        http.delete(f"/v1/jobs/{job['id']}")
    wait(lambda: job_of(http, running)["doing"])
    for _ in range(2):
        assert http.delete(f"/v1/jobs/{running['id']}").json()["status"] in ("stopping", "cancelled")
    assert ended(http, running)["status"] == "cancelled"
    assert job_of(http, running)["vector"] is None
    http.delete(f"/v1/jobs/{running['id']}")
    assert job_of(http, running)["status"] == "cancelled"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"instruction": ""}, "empty"),
        ({"instruction": " \n "}, "empty"),
        ({"instruction": "word " * 2000}, "at most 1000 characters"),
        ({"instruction": "jsn"}, "unknown instruction 'jsn'"),
        ({"instruction": "../../etc/passwd"}, "unknown instruction"),
        ({"instruction": "Answer\x00 in rhyme."}, "plain text"),
        ({"instruction": "Answer \ud800 in rhyme."}, "unicode"),
        ({"instruction": "include_word"}, "needs a value"),
        ({"instruction": 7}, "instruction: must be a valid string"),
        ({"instruction": None}, "instruction"),
        ({}, "instruction is missing"),
        ({"instruction": "Answer in rhyme.", "method": "magic"}, "method"),
        ({"instruction": "Answer in rhyme.", "name": "../x"}, "letters, digits"),
        ({"instruction": "Answer in rhyme.", "name": ""}, "name"),
        ({"instruction": "Answer in rhyme.", "model": "nobody"}, "there is no 'nobody'"),
        ({"instruction": "Answer in rhyme.", "layers": [1]}, "layers"),
    ],
)
def test_what_can_be_no_job_is_refused_in_one_line(http, body, words):
    before = len(http.get("/v1/jobs").json()["data"])
    answer = http.post("/v1/jobs", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404)
    message = answer.json()["error"]["message"]
    assert words in message and "\n" not in message and len(message) < 900
    assert len(http.get("/v1/jobs").json()["data"]) == before


def test_a_job_that_never_was(http):
    for answer in (
        http.get("/v1/jobs/job-7"),
        http.delete("/v1/jobs/..%2f7"),
        http.get("/v1/jobs/" + "x" * 999),
    ):
        assert answer.status_code == 404 and "error" in answer.json()
    assert http.get("/v1/instructions", params={"model": "nobody"}).status_code == 404


def test_names_that_are_taken_by_other_words_are_left_alone(http, server):
    first = begin(http, "Answer in rhyme.")
    http.delete(f"/v1/jobs/{first['id']}")
    http.delete(f"/v1/jobs/{first['id']}")
    assert first["name"] == "answer_in_rhyme"
    chinese = begin(http, "请用中文回答")
    assert chinese["name"].startswith("own-") and chinese["text"] == "请用中文回答"
    assert begin(http, "Answer in rhyme.", name="mine")["name"] == "mine"


def test_a_client_that_leaves_is_nothing_to_its_job(server, http):
    body = json.dumps({"instruction": "Answer like a pirate would."}).encode()
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with server.raw() as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert connection.recv(12) == b"HTTP/1.1 202"  # it stays for no more of the answer

    def begun():
        jobs = http.get("/v1/jobs").json()["data"]
        return next((job for job in jobs if job["instruction"] == "answer_like_a_pirate_would"), None)

    job = wait(begun)
    wait(lambda: job_of(http, job)["status"] == "running")


@pytest.mark.parametrize(
    ("folder_of_vectors", "limits", "words"),
    [(False, {}, "--vectors DIR"), (True, {"job_seconds": 0.0}, "--job-minutes 0")],
)
def test_it_is_off_where_the_operator_says_so(tmp_path, folder_of_vectors, limits, words):
    from localsteer.server.limits import Limits

    with (
        serving(tmp_path if folder_of_vectors else None, limits=Limits(**limits)) as server,
        server.http() as http,
    ):
        status, _, message = refusal(http, instruction="json")
        assert status == 409 and words in message
        methods = http.get("/v1/instructions").json()["methods"]
        assert all(words in method["why_not"] for method in methods)


def test_a_job_has_its_time_and_runs_nothing_of_the_current_folder(tmp_path, monkeypatch):
    from localsteer.server.limits import Limits

    current = tmp_path / "current"
    current.mkdir()
    for name in ("json", "localsteer", "click"):
        (current / f"{name}.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(current)
    tmp_path = tmp_path / "vectors"
    tmp_path.mkdir()
    with serving(tmp_path, limits=Limits(job_seconds=1.0)) as server, server.http() as http:
        made = ended(http, begin(http, "json"))
        assert (made["status"], made["stopped_by"]) == ("failed", "deadline"), made
        assert "--job-minutes" in made["error"] and not list(tmp_path.iterdir())


def test_a_model_that_is_unloaded_and_a_stop_that_keeps_the_best(tmp_path):
    """The job has a model of its own; what it has found when it is stopped is offered."""
    from localsteer.server.pool import Loadable, Pool

    def opened(path, _stop):
        from localsteer.runtime.scheduler import Scheduler

        return Scheduler(partial(localsteer.Engine, path, **EXACT, n_seq_max=4))

    files = {"bundled": model_path(), "bundled-base": bundled.gguf_path("base", "F32")}
    models = [Loadable(name, partial(opened, path)) for name, path in files.items()]
    with Pool(models, max_models=1) as pool, pooled(pool, tmp_path) as server, server.http() as http:
        job = begin(http, "json", model="bundled")
        wait(lambda: job_of(http, job)["doing"])
        assert http.post("/v1/completions", json={"model": "bundled-base", "prompt": "A", "max_tokens": 1})
        assert pool.status("bundled") == "unloaded"
        wait(lambda: job_of(http, job)["best"] or job_of(http, job)["status"] in ENDED)
        http.delete(f"/v1/jobs/{job['id']}")
        made = ended(http, job)
        assert (made["status"], made["vector"]) == ("succeeded", "json"), made
        assert made["result"]["stopped"] and "stopped" in made["result"]["advice"][0]
        answer = http.post(
            "/v1/chat/completions", json={"model": "bundled+json", "messages": FOXES, "max_tokens": 2}
        )
        assert answer.status_code == 200


def pooled(pool, folder):
    """A Server on a pool, as serving.serving has it on schedulers."""
    import threading
    from contextlib import contextmanager

    from localsteer.server.app import create_app
    from localsteer.server.run import Running

    @contextmanager
    def run():
        running = Running(create_app(pool, folder=folder), "127.0.0.1", 0, 0.0)
        ready = threading.Event()
        thread = threading.Thread(
            target=running.serve, kwargs={"on_ready": ready.set, "signals": False}, daemon=True
        )
        thread.start()
        assert ready.wait(30)
        try:
            yield Server(running)
        finally:
            running.stop()
            thread.join(60)
            assert not thread.is_alive()

    return run()


def test_a_job_without_room_is_refused_in_its_words(tmp_path):
    from localsteer.runtime.scheduler import Scheduler
    from localsteer.server.pool import Loadable, Pool

    opener = partial(localsteer.Engine, model_path(), **EXACT, n_seq_max=4)
    model = Loadable("bundled", lambda _stop: Scheduler(opener), n_bytes=10)
    with Pool([model], max_bytes=15) as pool:
        pool.load_now("bundled")
        with pooled(pool, tmp_path) as server, server.http() as http:
            made = ended(http, begin(http, "json"))
            assert made["status"] == "failed" and "--max-memory" in made["error"]


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_the_process_of_a_job_ends_with_whoever_started_it():
    code = "from localsteer.cli.piped import run; run()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdin.write(json.dumps(["tune", "-m", "bundled", "--instruction", "json", "--dry-run"]).encode())
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert process.stderr.readline().startswith(b"\x1e")
    process.stdin.close()
    process.wait(30)
    process.stderr.close(), process.stdout.close()
    assert process.returncode == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_sigterm_ends_a_job_within_the_grace_and_keeps_the_best_so_far(tmp_path):
    from hostile_requests import serving_process

    with serving_process("--vectors", tmp_path, "--grace", 20) as process, process.http() as http:
        job = begin(http, "json")
        wait(lambda: job_of(http, job)["best"] or job_of(http, job)["status"] in ENDED)
        process.process.send_signal(signal.SIGTERM)
        process.process.wait(25)
    assert process.process.returncode == 0
    assert localsteer.ControlVector.load(tmp_path / "json.gguf").strength
