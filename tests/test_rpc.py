"""A model on two hosts: the same numbers as on one, and one line where a host is not what it should be."""

from __future__ import annotations

import re
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from cli_runs import command_line, invoke, program, write_vector
from engines import GREEDY, open_engine, random_vector
from rpc_hosts import Wire, hosts, impostor

import localsteer
from localsteer.errors import HostError, LocalsteerError
from localsteer.runtime.rpc import Endpoint, Hosts, library, parse_endpoints, protocol
from localsteer.runtime.rpc.protocol import Command

QUESTION = "Tell me about the fox and the rivers of a quiet village."


@pytest.fixture(scope="module")
def two():
    with hosts(2) as started:
        yield started


@pytest.fixture
def path(tiny_llama):
    return tiny_llama.gguf_path


@contextmanager
def remote(path, servers, **options):
    names = [server.name for server in servers]
    with open_engine(path, rpc=names, rpc_seconds=options.pop("rpc_seconds", 20), **options) as engine:
        yield engine


# --- names -------------------------------------------------------------------------------------------------


def test_hosts_are_written_with_commas_or_one_by_one():
    assert parse_endpoints("a:1, b.c:65535") == (Endpoint("a", 1), Endpoint("b.c", 65535))
    assert parse_endpoints(["a:1", "[::1]:2"]) == (Endpoint("a", 1), Endpoint("::1", 2))
    assert str(Endpoint("::1", 2)) == "[::1]:2"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no host and port"), ("a", "no host and port"), (":1", "no host and port"), ("a b:1", "no host"),
        ("a:1,", "no host and "
                 "port"), ("a:", "is not a port"), ("a:0", "is not a port"), ("a:65536", "is not a port"),
        ("a:-1", "is not a "
                 "port"), ("a:1x", "is not a "
                                   "port"), ("a:٣", "is not a port"), ("a:000000000001", "is not a port"),
        ("::1:50052", "brackets"), ("a:1,a:1", "twice"), ("http://a:1", "brackets"), ("a\n:1", "no host"),
        (",".join(f"a:{i}" for i in range(1, 17)), "16 hosts"), ("a" * 300 + ":1", "no host and port"),
    ],
)  # fmt: skip
def test_a_slip_in_a_host_names_the_value(path, text, says):
    assert says in invoke("run", "-m", path, "--rpc", text, "Hi").complaint()


def test_options_that_would_do_nothing_are_refused(path, tmp_path):
    assert "--rpc-timeout needs --rpc" in invoke("run", "-m", path, "--rpc-timeout", 5, "Hi").complaint()
    words = ("extract", "--model", tmp_path, "--rpc", "a:1", "-i", "json")
    assert "--rpc is for llama.cpp" in invoke(*words).complaint()
    with impostor(greet) as name:
        words = ("run", "-m", path, "-ngl", 0, "--rpc", name, "--rpc-timeout", 0.3, "Hi")
        assert "leave it out" in invoke(*words).complaint()


# --- hosts that are none -----------------------------------------------------------------------------------


def greet(connection: socket.socket, version: tuple[int, int] = protocol.VERSION) -> None:
    connection.recv(100)
    connection.sendall(protocol.SIZE.pack(28) + bytes(version) + bytes(26))


def refusal(name: str, path: Path) -> str:
    """What a run says, and that it says so in time."""
    begun = time.monotonic()
    said = invoke("run", "-m", path, "--rpc", name, "--rpc-timeout", 0.5, "Hi").complaint()
    assert time.monotonic() - begun < 5
    return said


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda connection: None, "accepts connections but does not answer: another client uses it"),
        (lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "does not answer like"),
        (lambda connection: connection.sendall(b"\x1c\0\0"), "does not answer: another client uses it"),
        (lambda connection: connection.close(), "closes the connection at the greeting"),
        (lambda connection: greet(connection, (6, 0)), "speaks version 6.0 of the protocol"),
        (lambda connection: greet(connection, (7, 1)), "speaks version 7.1"),
    ],
    ids=("silent", "http", "half", "closes", "older", "newer"),
)
def test_something_else_at_the_port(path, answer, says):
    with impostor(answer) as name:
        said = refusal(name, path)
    assert says in said and name in said


def test_a_host_that_is_not_there(path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        name = f"127.0.0.1:{taken.getsockname()[1]}"
    assert f"nothing listens at the rpc host {name}" in refusal(name, path)
    assert "no host of this name" in refusal("nosuch.invalid:50052", path)
    assert "nosuch..invalid:5" in refusal("nosuch..invalid:5", path)  # no name at all, by the rules of DNS


def test_a_host_that_greets_and_then_says_nothing_does_not_end_the_process(path):
    """llama.cpp's own client waits for ever, or ends the process when the connection is closed."""
    if not (library.rpc_folder() / library.LIBRARY).is_file():
        pytest.skip("the RPC backend is not built: localsteer rpc build")
    with impostor(greet) as name:
        assert f"the rpc host {name} is gone (it has been silent for 0.5 s)" in refusal(name, path)
    with impostor(lambda connection: (greet(connection), connection.close())) as name:
        assert f"the rpc host {name} is gone" in refusal(name, path)


def test_the_version_is_that_of_the_installed_llama_cpp():
    header = Path(find_spec("llama_cpp").origin).parents[1] / "include" / "ggml-rpc.h"
    if not header.is_file():
        pytest.skip("this llama-cpp-python has no headers")
    text = header.read_text()
    numbers = [int(re.search(rf"RPC_PROTO_{name}_VERSION +(\d+)", text)[1]) for name in ("MAJOR", "MINOR")]
    assert tuple(numbers) == protocol.VERSION


def test_answers_are_made_up_in_the_right_size():
    for command, size in protocol.ANSWERS.items():
        body = struct.pack("<IQ", 0, 4096)
        assert len(protocol.invented_answer(command, body, size)) == size
    asked = protocol.answer_size(Command.GET_TENSOR, bytes(296) + struct.pack("<QQ", 8, 1234))
    assert asked == 1234 and protocol.answer_size(Command.SET_TENSOR, b"") is None


def test_without_the_backend_the_command_that_builds_it_is_named(path, tmp_path, monkeypatch):
    monkeypatch.setenv(library.VARIABLE, str(tmp_path))
    with pytest.raises(LocalsteerError, match="localsteer rpc build"):
        library.built_library()


def test_a_source_of_another_version_is_not_built(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(library.VARIABLE, raising=False)
    assert "holds no source of llama.cpp" in invoke("rpc", "build", "--source", tmp_path).complaint()
    for name in ("ggml/src/ggml-rpc/ggml-rpc.cpp", "tools/rpc/rpc-server.cpp", "ggml/include/ggml.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("// of another year")
    assert "is not the llama.cpp of the installed" in invoke("rpc", "build", "--source", tmp_path).complaint()


# --- the same as on one machine ----------------------------------------------------------------------------


def numbers(engine):
    """Everything that comes out of an engine, plain and steered, for comparison to the bit."""
    plans = [(), [random_vector(engine)], [random_vector(engine, layers=tuple(range(engine.model.n_layer)))]]
    tokens = engine.prompt_tokens(QUESTION)
    layers = range(engine.model.n_layer)
    made = []
    for plan in plans:
        made.append(engine.logits(tokens, steer=plan))
        made.append(engine.hidden_states(tokens, layers, steer=plan))
        made.append(engine.generate(QUESTION, steer=plan, sampling=GREEDY, max_tokens=12).tokens)
    replies = engine.generate_batch([QUESTION, "Hello"] * 3, sampling=GREEDY, max_tokens=8, steer=plans[1])
    return [*made, engine.last_hidden_states([tokens, tokens[:5]]), *(reply.tokens for reply in replies)]


def test_two_hosts_give_the_bits_of_one_machine(path, two):
    with open_engine(path) as engine:
        local = numbers(engine)
    with remote(path, two) as engine:
        spread = numbers(engine)
        assert all(relay.sent > 10_000 for relay in engine.model.hosts.relays)  # both have a part
    for ours, theirs in zip(local, spread, strict=True):
        assert np.array_equal(ours, theirs)


def test_a_part_may_stay_on_this_machine(path, two):
    with open_engine(path) as engine:
        expected = engine.logits([1, 2, 3])
    with remote(path, two[:1], n_gpu_layers=2) as engine:
        assert np.array_equal(engine.logits([1, 2, 3]), expected)


def test_a_graph_is_not_sent_anew_where_nothing_is_steered(path, two):
    def sent_for(engine, n_tokens, **options):
        relays = engine.model.hosts.relays
        before = sum(relay.sent for relay in relays)
        engine.generate(QUESTION, sampling=GREEDY, max_tokens=n_tokens, **options)
        return sum(relay.sent for relay in relays) - before

    def per_token(engine, **options):
        return (sent_for(engine, 30, **options) - sent_for(engine, 10, **options)) / 20

    with remote(path, two, n_seq_max=1) as engine:
        plain, steered = per_token(engine), per_token(engine, steer=[random_vector(engine)])
    assert plain < 20_000 < steered


def test_a_relay_is_for_this_user_alone_and_its_port_for_one_model():
    from localsteer.runtime.rpc import relay

    with socket.create_server(("127.0.0.1", 0)) as listener:
        own = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", own)) as ours:
            assert relay._is_of_this_user(ours.getsockname()[1], own)
    if sys.platform == "linux":
        assert not relay._is_of_this_user(1, own)  # no connection of ours
    ports = [relay._new_port() for _ in range(3)]
    assert len({port.getsockname() for port in ports}) == 3
    for port in ports:
        port.close()


def test_models_of_one_process_share_a_host(path, two):
    """It serves one client at a time, and this process is one."""
    with remote(path, two) as first:
        with remote(path, two) as second:
            expected = first.logits([1, 2, 3])
            assert np.array_equal(second.logits([1, 2, 3]), expected)
        assert np.array_equal(first.logits([1, 2, 3]), expected)


# --- hosts that go -----------------------------------------------------------------------------------------


def test_a_host_that_dies_in_mid_reply_is_an_error_and_comes_back(path, two):
    with remote(path, two) as engine:
        expected = engine.generate(QUESTION, sampling=GREEDY, max_tokens=12).tokens
        stream = engine.stream(QUESTION, sampling=GREEDY, max_tokens=12)
        next(stream)
        two[1].kill()
        with pytest.raises(HostError, match=f"{two[1].name} is gone"):
            list(stream)
        for _ in range(2):  # a question meanwhile is refused at once, tokens and template are still there
            with pytest.raises(HostError, match=f"nothing listens at the rpc host {two[1].name}"):
                engine.generate(QUESTION, sampling=GREEDY, max_tokens=12)
        assert engine.prompt_tokens(QUESTION)
        two[1].start()
        assert engine.generate(QUESTION, sampling=GREEDY, max_tokens=12).tokens == expected
        assert np.isfinite(engine.logits([1, 2, 3], steer=[random_vector(engine)])).all()


def test_a_host_that_died_between_two_questions_is_had_back_unnoticed(path, two):
    with remote(path, two) as engine:
        expected = engine.generate(QUESTION, sampling=GREEDY, max_tokens=6).tokens
        two[0].kill()
        two[0].start()
        assert engine.generate(QUESTION, sampling=GREEDY, max_tokens=6).tokens == expected
        two[0].kill()
        two[0].start()
        assert np.isfinite(engine.last_hidden_states([[1, 2, 3]])).all()


def test_a_host_that_falls_silent_is_given_up_after_its_time(path, two):
    with remote(path, two, rpc_seconds=0.5) as engine:
        stream = engine.stream(QUESTION, sampling=GREEDY, max_tokens=12)
        next(stream)
        two[0].process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(HostError, match=r"has been silent for 0\.5 s"):
            list(stream)
        assert time.monotonic() - begun < 10
        two[0].process.send_signal(signal.SIGCONT)
    assert two[0].process.poll() is None  # it outlives the client that left it


def test_a_host_is_lost_while_the_model_is_loaded(path, two):
    with remote(path, two[:1]) as engine:
        whole = engine.model.hosts.relays[0].sent
    for share in (0.02, 0.3, 0.9):
        wire = Wire(two[0], limit=int(whole * share))
        with pytest.raises(HostError, match=f"{wire.name} is gone"), remote(path, [wire]) as engine:
            engine.logits([1, 2, 3])
        wire.cut()


def test_a_run_that_loses_its_host_ends_with_one_line(path, two, tmp_path):
    vector = write_vector(tmp_path / "v.gguf")
    words = ("run", "-m", path, "-s", vector, "-t", 1, "--temp", 0, "-n", 30, QUESTION)
    counting = Wire(two[0])
    whole = invoke(*words, "--rpc", counting.name)
    assert whole.status == 0
    wire = Wire(two[0], limit=counting.sent - 40_000)
    cut = program(*words, "--rpc", wire.name)
    assert cut.status == 2 and cut.err.count("\n") == 1 and f"the rpc host {wire.name} is gone" in cut.err
    assert whole.out.startswith(cut.out.rstrip("\n"))  # what was computed until then is right


def test_a_piped_chat_ends_with_one_line(path, two):
    wire = Wire(two[0], limit=200_000)
    words = ("chat", "-m", path, "-t", 1, "--temp", 0, "-n", 20, "--rpc", wire.name, "--no-history")
    done = invoke(*words, input="Hello\n" * 20)
    assert done.status == 2 and f"the rpc host {wire.name}" in done.err.splitlines()[-1]


def test_extract_on_hosts_gives_the_vector_of_one_machine(path, two, tmp_path):
    from localsteer import ControlVector

    words = ("extract", "--gguf", path, "-i", "json", "--pairs", 4, "-t", 1, "--exact")
    names = ",".join(host.name for host in two)
    assert invoke(*words, "-o", tmp_path / "here.gguf").status == 0
    assert invoke(*words, "-o", tmp_path / "there.gguf", "--rpc", names).status == 0
    here, there = (ControlVector.load(tmp_path / f"{name}.gguf") for name in ("here", "there"))
    assert np.array_equal(here.directions, there.directions)
    wire = Wire(two[0], limit=150_000)
    said = invoke(*words, "-o", tmp_path / "cut.gguf", "--rpc", wire.name)
    assert said.status == 2 and f"the rpc host {wire.name} is gone" in said.err
    assert not (tmp_path / "cut.gguf").exists()


def test_a_busy_host_is_named(path, two):
    """For another process: it would wait in the server's queue for ever."""
    with remote(path, two):
        words = ("run", "-m", path, "--rpc", two[0].name, "--rpc-timeout", 0.5, "Hi")
        assert f"{two[0].name} accepts connections but does not answer" in program(*words).complaint()
    checked = program("rpc", "check", two[0].name, two[1].name, "--json")
    assert checked.status == 0, checked.err
    assert [row["version"] for row in checked.json["hosts"]] == ["7.0.0"] * 2
    assert checked.json["hosts"][0]["devices"][0]["total"] > 1 << 20


def test_hosts_are_free_again_when_a_model_could_not_be_opened(two, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(100))
    for _ in range(2):
        with pytest.raises(LocalsteerError, match=r"cut\.gguf"):
            open_engine(tmp_path / "cut.gguf", rpc=[two[0].name])
    Hosts([two[0].name]).close()


def test_a_server_goes_on_when_a_host_is_lost(path, two):
    from serving import serving

    options = {"rpc": [host.name for host in two], "rpc_seconds": 20, "n_seq_max": 2}
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12, "temperature": 0}
    with serving(None, models={"tiny": path}, engine=options) as server, server.http() as client:

        def ask():
            return client.post("/v1/chat/completions", json=body)

        expected = ask().json()["choices"]
        two[0].kill()
        for _ in range(2):
            answer = ask()
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "host_lost"
            assert two[0].name in answer.json()["error"]["message"]
            assert client.get("/health").status_code == 200
        two[0].start()
        assert ask().json()["choices"] == expected
        with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            two[1].kill()
            said = [line for line in lines if line]
        assert any("host_lost" in line or "[DONE]" in line for line in said)
        two[1].start()
        assert ask().json()["choices"] == expected
        assert client.post("/v1/embeddings", json={"input": "x"}).status_code == 400


def test_closing_does_not_wait_for_a_host_that_says_nothing(path, two):
    from localsteer.runtime.scheduler import Scheduler

    options = {"rpc": [host.name for host in two], "rpc_seconds": 300, "n_threads": 1, "n_seq_max": 2}
    with Scheduler(lambda: localsteer.Engine(path, **options)) as scheduler:
        chunks = iter(scheduler.submit(QUESTION, sampling=GREEDY, max_tokens=100))
        next(chunks)
        two[1].process.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        begun = time.monotonic()
        scheduler.close()
        assert time.monotonic() - begun < 5
    two[1].process.send_signal(signal.SIGCONT)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no Ctrl-C to send")
def test_ctrl_c_ends_a_run_that_waits_for_a_host(path, two):
    """Python hears of it only when llama.cpp returns."""
    words = ("run", "-m", path, "-t", 1, "-n", 400, "--rpc", two[0].name, QUESTION)
    process = subprocess.Popen(command_line(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(4)
    two[0].process.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.communicate()
        two[0].process.send_signal(signal.SIGCONT)
