"""A real terminal for tests: a program in a pty, and what a person would see on the screen (pyte)."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import pexpect
import pyte

WIDTH, HEIGHT = 100, 200  # so high that nothing scrolls away
PATIENCE_SECONDS = 60


class Terminal:
    """Type with `send`, read with `screen`; the program's questions about the terminal are answered."""

    def __init__(self, command: Sequence[str], **options) -> None:
        environment = {**os.environ, "TERM": "xterm-256color", **options.pop("env", {})}
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            environment.pop(name, None)
        self.child = pexpect.spawn(
            command[0], list(command[1:]), env=environment, dimensions=(HEIGHT, WIDTH), timeout=5, **options
        )
        self._screen = pyte.Screen(WIDTH, HEIGHT)
        self._screen.write_process_input = self.child.send
        self._stream = pyte.ByteStream(self._screen)

    def send(self, text: str) -> None:
        self.child.send(text)

    @property
    def screen(self) -> str:
        """The lines that are not blank."""
        lines = (line.rstrip() for line in self._screen.display)
        return "\n".join(line for line in lines if line)

    def wait_for(self, wanted, what: str = "") -> str:
        """Read until `wanted(screen)` holds; returns the screen."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if wanted(self.screen):
                return self.screen
            try:
                self._stream.feed(self.child.read_nonblocking(4096, timeout=0.1))
            except pexpect.TIMEOUT:
                pass
            except pexpect.EOF:
                if wanted(self.screen):
                    return self.screen
                break
        raise AssertionError(f"waited in vain for {what}:\n{self.screen}")

    def wait_for_prompt(self, n: int) -> str:
        """Until the n-th `> ` waits for input, and nothing is in it."""

        def waits(screen: str) -> bool:
            lines = screen.split("\n")
            return sum(line.startswith(">") for line in lines) >= n and lines[-1].rstrip() == ">"

        return self.wait_for(waits, f"prompt {n}")

    def end(self) -> int:
        """Read to the end; the exit status."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                self._stream.feed(self.child.read_nonblocking(4096, timeout=0.1))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                break
        self.child.close()
        return self.child.exitstatus if self.child.signalstatus is None else -self.child.signalstatus
