"""Ctrl-C in a real terminal, and readers that go away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from cli_runs import command_line, environment, write_vector

pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
termios = pytest.importorskip("termios")

PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that goes on for thousands of tokens."""
    pytest.importorskip("torch")
    from tiny_models import write_checkpoint

    from localsteer.convert.checkpoint import checkpoint_to_gguf

    folder = tmp_path_factory.mktemp("endless")
    write_checkpoint("llama", folder / "hf", max_position_embeddings=32768)
    return checkpoint_to_gguf(folder / "hf", folder / "endless.gguf", "F32")


class Terminal:
    """A program in a pseudo-terminal of its own, as a person has it in front of them."""

    def __init__(self, *args, cache):
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.seen = b""
        self.process = subprocess.Popen(
            command_line(*args),
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=environment(cache, TERM="xterm-256color", COLUMNS="80", LINES="24"),
            preexec_fn=self._own_terminal,
        )

    def _own_terminal(self):
        import fcntl

        os.setsid()
        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

    def read_until(self, wanted):
        """Read what appears until `wanted(all of it)`."""
        import select

        end = time.monotonic() + PATIENCE_SECONDS
        while not wanted(self.seen):
            assert time.monotonic() < end, self.seen[-2000:]
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 65536)
            else:
                assert self.process.poll() is None, self.seen[-2000:]

    def press_ctrl_c(self):
        os.write(self.master, b"\x03")

    def end(self):
        """(exit status, what appeared); checks that the terminal is as it was."""
        import select

        end = time.monotonic() + PATIENCE_SECONDS
        while self.process.poll() is None or select.select([self.master], [], [], 0)[0]:
            assert time.monotonic() < end, self.seen[-2000:]
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 65536)
        assert termios.tcgetattr(self.slave) == self.before
        return self.process.returncode, self.seen

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(tmp_path):
    opened = []

    def start(*args):
        opened.append(Terminal(*args, cache=tmp_path / "cache"))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_ctrl_c_ends_a_reply_with_status_130(terminal, endless):
    screen = terminal("run", "-m", endless, "-t", "1", "-n", "-1", "-c", "32768", "--temp", "0", "Hi")
    screen.read_until(lambda seen: len(seen) > 40)
    screen.press_ctrl_c()
    status, seen = screen.end()
    assert status == 130
    assert b"Traceback" not in seen and b"Exception" not in seen


def test_ctrl_c_in_two_columns_gives_the_cursor_back(terminal, endless, tmp_path):
    vector = write_vector(tmp_path / "v.gguf")
    args = ("-t", "1", "-n", "-1", "-c", "32768", "--temp", "0", "-s", vector, "--compare", "Hi")
    screen = terminal("run", "-m", endless, *args)
    screen.read_until(lambda seen: b"plain" in seen)
    screen.press_ctrl_c()
    status, seen = screen.end()
    assert status == 130
    assert seen.rfind(b"\x1b[?25h") > seen.rfind(b"\x1b[?25l")
    assert b"Traceback" not in seen


def test_ctrl_c_while_the_prompt_is_typed(terminal, endless):
    screen = terminal("run", "-m", endless, "-")
    screen.read_until(lambda seen: b"reading the prompt" in seen)
    screen.press_ctrl_c()
    status, seen = screen.end()
    assert status == 130
    assert b"Traceback" not in seen


def test_a_press_that_a_callback_from_c_swallows_comes_again():
    code = """
import ctypes, os, signal, sys, time
from localsteer.cli import interrupt
called = []
@ctypes.CFUNCTYPE(None)
def callback():
    called.append(1)
    signal.raise_signal(signal.SIGINT)
with interrupt.handled():
    callback()
    try:
        time.sleep(30)
    except KeyboardInterrupt:
        sys.exit(interrupt.EXIT_STATUS if interrupt.pressed() else 1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_third_press_ends_a_process_that_does_not_let_go():
    code = """
import signal
from localsteer.cli import interrupt
with interrupt.handled():
    for _ in range(3):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "")


def test_an_ignored_ctrl_c_stays_ignored():
    code = """
import signal
from localsteer.cli import interrupt
signal.signal(signal.SIGINT, signal.SIG_IGN)
with interrupt.handled():
    signal.raise_signal(signal.SIGINT)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_reader_that_goes_away_leaves_no_traceback(endless, tmp_path):
    process = subprocess.Popen(
        command_line("run", "-m", endless, "-t", "1", "-n", "-1", "-c", "32768", "--temp", "0", "Hi"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(tmp_path / "cache"),
    )
    process.stdout.read(10)
    process.stdout.close()
    complaint = process.stderr.read()
    assert process.wait(timeout=PATIENCE_SECONDS) in (1, 128 + signal.SIGPIPE)
    assert complaint == b""


def test_a_reader_that_never_reads_leaves_no_traceback(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command_line("--help"), stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE, timeout=60
    )
    os.close(write)
    assert done.returncode in (1, 128 + signal.SIGPIPE)
    assert done.stderr == b""


def test_ctrl_c_while_modules_load_leaves_no_traceback(tmp_path):
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command_line("--help"), env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
