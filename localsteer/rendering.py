"""Runs chat templates in a separate process, which can be killed.

A chat template is a program from the model's file. jinja2's sandbox limits everything except time and memory:
`{{ 'a' * 10**10 }}` is a template, and so are loops that never end. One process renders for all models and
threads of a program. It starts with the first prompt and stays. A template that had to be stopped runs in a
second process for a while, so that the others do not wait for it.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

from .interpreter import python_command

SECONDS = 5.0  # for one rendering; usually it takes a millisecond
START_SECONDS = 60.0  # to import jinja2, on a busy machine
MOST_CHARACTERS = 4_000_000  # of a prompt, and
GROWTH = 8  # more for each byte that went in
APART_SECONDS = 60.0  # for which a template that was stopped is kept apart; four times that the second time
MOST_STOPPED = 64  # templates that are known to have been stopped
MOST_SLOW = 2  # prompts of theirs that run or wait at once
NICE_SLOW = 10  # of the process that runs them: replies to others need the cores
_CODE = "from localsteer.rendering_child import serve; serve(niceness={})"


class RenderingFailed(Exception):
    """A rendering failed. is_template: the fault is the template's, whatever the messages. was_killed: at the
    limits, so trying it again is as expensive. was_run: False if the template never had its turn."""

    def __init__(
        self, why: str, *, is_template: bool = False, was_killed: bool = False, was_run: bool = True
    ) -> None:
        super().__init__(why)
        self.is_template, self.was_killed, self.was_run = is_template, was_killed, was_run


class Renderer:
    """What renders all templates. Any thread may use it."""

    def __init__(self) -> None:
        self.usual, self.slow = Lane(), Lane(most=MOST_SLOW, niceness=NICE_SLOW)
        self._stopped: dict[str, _Stopped] = {}  # by template

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """The rendered text. Raises RenderingFailed after at most SECONDS, and twice as much again if others
        go first."""
        try:
            said = pickle.dumps((template, dict(values), 0))
        except Exception as error:
            raise RenderingFailed(f"they can't be handed over: {error}") from error
        said = pickle.dumps((template, dict(values), MOST_CHARACTERS + GROWTH * len(said)))
        answer = None
        while answer is None:
            lane = self._lane(template)
            with lane.turn():
                if lane is self._lane(template):  # it may have been stopped meanwhile
                    answer = self._answer(lane, template, said)
        if "text" not in answer:
            raise RenderingFailed(answer["why"], is_template=answer["fault"] == "template")
        return answer["text"]

    def close(self) -> None:
        """End the children. The next prompt starts a new one."""
        self.usual.close()
        self.slow.close()

    def forget(self) -> None:
        """That templates had to be stopped."""
        self._stopped.clear()

    def _answer(self, lane: Lane, template: str, said: bytes) -> Mapping[str, str]:
        try:
            return lane.ask(said)
        except RenderingFailed as error:
            if error.was_killed:
                count = self._stopped[template].count + 1 if template in self._stopped else 1
                self._stopped[template] = _Stopped(count, time.monotonic() + APART_SECONDS * count**2)
                while len(self._stopped) > MOST_STOPPED:
                    del self._stopped[next(iter(self._stopped))]
            raise

    def _lane(self, template: str) -> Lane:
        stopped = self._stopped.get(template)
        return self.slow if stopped is not None and time.monotonic() < stopped.until else self.usual


class _Stopped(NamedTuple):
    """How often a template had to be stopped, and until when it is kept apart."""

    count: int
    until: float


class Lane:
    """One child process, and the threads that wait for it. most: how many, the one at work among them; others
    are turned away, since the caller may have few threads. niceness: of the child, as in os.nice."""

    def __init__(self, most: int | None = None, niceness: int = 0) -> None:
        self._niceness = niceness
        self._turn = threading.Lock()
        self._places = threading.BoundedSemaphore(most) if most else None
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0  # a forked copy of this process has no child

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the child. Raises RenderingFailed when that takes too long."""
        seconds = START_SECONDS if self._child is None else 2 * SECONDS
        with ExitStack() as stack:
            if self._places is not None:
                _take(self._places, 0.0, stack)
            _take(self._turn, seconds, stack)
            yield

    def close(self) -> None:
        """End the child. The next prompt starts a new one."""
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        for stream in (child.stdin, child.stdout):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        child.wait()

    def ask(self, said: bytes) -> Mapping[str, str]:
        """What the child answers; for the thread whose turn it is."""
        try:
            child = self._running()
            return self._timed(child, len(said).to_bytes(8, "big") + said)
        except BaseException:  # Ctrl-C too: half an answer must not be the next one's
            self.close()
            raise

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            return self._child
        self.close()
        child = subprocess.Popen(
            python_command(_CODE.format(self._niceness)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal goes to the whole group
        )
        self._child, self._owner = child, os.getpid()
        with _killed_after(START_SECONDS, child):
            if child.stdout.readline() != b"ready\n":  # type: ignore[union-attr]
                raise RenderingFailed("the process that runs it could not be started", was_run=False)
        return child

    def _timed(self, child: subprocess.Popen[bytes], said: bytes) -> Mapping[str, str]:
        line = b""
        with _killed_after(SECONDS, child), suppress(BrokenPipeError):
            child.stdin.write(said)  # type: ignore[union-attr]
            child.stdin.flush()  # type: ignore[union-attr]
            line = child.stdout.readline()  # type: ignore[union-attr]
        if not line.endswith(b"\n"):
            raise RenderingFailed(
                f"it takes more than {SECONDS:g} seconds, or too much memory", was_killed=True
            )
        return json.loads(line.decode("utf-8", "surrogatepass"))


def _take(lock: threading.Lock | threading.Semaphore, seconds: float, stack: ExitStack) -> None:
    if not lock.acquire(timeout=seconds):
        raise RenderingFailed("other prompts keep it busy", was_run=False)
    stack.callback(lock.release)


class _killed_after:
    """Kill the child if the `with` block takes longer: reading from it then ends, on every system."""

    def __init__(self, seconds: float, child: subprocess.Popen[bytes]) -> None:
        self._timer = threading.Timer(seconds, child.kill)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


RENDERER = Renderer()
atexit.register(RENDERER.close)
