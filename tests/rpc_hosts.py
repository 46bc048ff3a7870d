"""ggml-rpc-server on loopback, and what can stand between it and a client, for tests."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from localsteer.errors import LocalsteerError
from localsteer.runtime.rpc.library import LIBRARY, SERVER, VARIABLE, rpc_folder

try:  # now: tests change where the cache is
    FOLDER = rpc_folder()
except LocalsteerError:
    FOLDER = None


def require_server() -> None:
    if FOLDER is None or not all((FOLDER / name).is_file() for name in (LIBRARY, SERVER)):
        pytest.skip(f"no ggml-rpc-server: `localsteer rpc build` builds it, or {VARIABLE} names its folder")


class Host:
    """One ggml-rpc-server with one thread. name: HOST:PORT."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.name = f"127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        words = [FOLDER / SERVER, "-H", "127.0.0.1", "-p", self.port, "-t", 1]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([*map(str, words)], **quiet)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.01)
        raise AssertionError("ggml-rpc-server did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def hosts(n: int) -> Iterator[list[Host]]:
    require_server()
    started = [Host() for _ in range(n)]
    try:
        yield started
    finally:
        for host in started:
            host.kill()


class Wire:
    """Passes bytes on between a client and a host, counts what the client sends, and can be cut: now, or once
    `limit` bytes went through. name: where the client finds it."""

    def __init__(self, host: Host, limit: int | None = None) -> None:
        self.host, self.limit, self.sent = host, limit, 0
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.name = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for end in (self._listener, *self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                upstream = socket.create_connection(("127.0.0.1", self.host.port))
                for end in (client, upstream):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._ends += [client, upstream]
                for ends in ((client, upstream, True), (upstream, client, False)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, is_client: bool) -> None:
        with suppress(OSError):
            while words := source.recv(1 << 16):
                target.sendall(words)
                self.sent += len(words) if is_client else 0
                if self.limit is not None and self.sent > self.limit:
                    self.cut()
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def impostor(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """HOST:PORT of something that is no ggml-rpc-server. answer: what it does with a connection, which stays
    open until the end otherwise."""
    listener = socket.create_server(("127.0.0.1", 0))
    open_ones: list[socket.socket] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                open_ones.append(connection)
                with suppress(OSError):
                    answer(connection)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        for end in (listener, *open_ones):
            end.close()
