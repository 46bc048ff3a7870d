"""Stands between llama.cpp and one host: passes everything on until the host is lost, and then answers
itself.

llama.cpp connects to a port of this machine on which only this relay listens. The relay does not send a graph
that equals the previous one again: with a callback in its scheduler, which steering needs, llama.cpp sends
one for every token, steered or not. The server keeps the last one (GRAPH_RECOMPUTE).
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from contextlib import suppress

from ...errors import HostError
from . import protocol
from .endpoint import Endpoint
from .greeting import SECONDS as GREETING_SECONDS
from .greeting import connect, read, reason
from .protocol import HEAD, SIZE, Command

SECONDS = 300.0  # for an answer, since a long prompt in a large model takes time
PIECE = 1 << 20  # bytes passed on at once
_LOOPBACK = "127.0.0.1"


class Relay:
    """One host, from its greeting to its end. A lost host never comes back here: a new relay is made for it.

    seconds: how long the host may be silent when it owes an answer, or accept nothing. sent, received: bytes
    to and from the host since the greeting. n_users: models that share it. Raises HostError.
    """

    def __init__(self, endpoint: Endpoint, seconds: float = SECONDS) -> None:
        self.endpoint, self.seconds = endpoint, seconds
        self.lost: HostError | None = None
        self.sent = self.received = self.n_users = 0
        self._host, greeting = connect(endpoint, min(GREETING_SECONDS, seconds))
        self._host.settimeout(seconds)
        # without the other transports that a host may offer: to llama.cpp this relay is the host
        self._greeting = greeting[:4] + bytes(protocol.CAPABILITIES)
        self._turn = threading.Lock()  # llama.cpp may use several connections, the host has one
        # for each device: the last graph, and whether the host has it
        self._graphs: dict[bytes, tuple[bytes, bool]] = {}
        self._piece = memoryview(bytearray(PIECE))
        try:
            self._listener = _new_port()
        except OSError as error:
            self._host.close()
            raise HostError(f"no port of this machine is free for {endpoint}: {error.strerror}.") from None
        self.address = f"{_LOOPBACK}:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def close(self) -> None:
        """Close the connections, which frees the host for others."""
        for end in (self._listener, self._host):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
            end.close()

    def abandon(self) -> None:
        """Stop waiting for the host, from any thread: whoever waits gets an answer at once, a worthless
        one."""
        self._lose(EOFError("nobody waits for it any more"))

    def look(self) -> HostError | None:
        """Why the host is lost, or None. If a host that owes nothing sends data or closes, that is a loss
        too."""
        if self.lost is None and self._turn.acquire(blocking=False):  # otherwise its answer is being read
            try:
                self._host.setblocking(False)
                self._host.recv(1, socket.MSG_PEEK)
                self._lose(EOFError("it closed the connection"))
            except BlockingIOError:
                self._host.settimeout(self.seconds)
            except OSError as error:
                self._lose(error)
            finally:
                self._turn.release()
        return self.lost

    # -- llama.cpp's side ---------------------------------------------------------------------------

    def _start(self, work, *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, name="localsteer-relay", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, peer = self._listener.accept()
            except OSError:  # closed
                return
            if not _is_of_this_user(peer[1], self._listener.getsockname()[1]):
                client.close()
                continue
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError, EOFError):  # llama.cpp is done with it
            while True:
                command, size = HEAD.unpack(read(client, HEAD.size))
                if command == Command.HELLO:
                    read(client, size)
                    client.sendall(SIZE.pack(len(self._greeting)) + self._greeting)
                    continue
                with self._turn:
                    self._pass_on(client, command, size)

    def _pass_on(self, client: socket.socket, command: int, size: int) -> None:
        if command == Command.SET_TENSOR:  # of any size, and without an answer
            self._send(HEAD.pack(command, size))
            self._stream(client, size)
            return
        body = read(client, size)
        self._send(self._request(command, body))
        n = protocol.answer_size(command, body)
        if n is not None:
            self._answer(client, command, body, n)

    def _request(self, command: int, body: bytes) -> bytes:
        """What to send to the host: for a graph that it already has, only the command to compute it again."""
        if command in (Command.GRAPH_COMPUTE, Command.GRAPH_RECOMPUTE):
            device = body[:4]
            graph, is_there = self._graphs.get(device, (b"", False))
            again = command == Command.GRAPH_RECOMPUTE or graph == body
            graph = graph if again else body
            self._graphs[device] = (graph, True)
            if again and is_there:
                return protocol.request(Command.GRAPH_RECOMPUTE, device)
            return protocol.request(Command.GRAPH_COMPUTE, graph)
        if command == Command.FREE_BUFFER:  # the server forgets all graphs
            self._graphs = {device: (graph, False) for device, (graph, _) in self._graphs.items()}
        return HEAD.pack(command, len(body)) + body

    def _answer(self, client: socket.socket, command: int, body: bytes, n: int) -> None:
        """The host's answer, or a made-up one; an answer that the host did not finish is filled up with
        zeros."""
        said = self._read(SIZE.size)
        if said is not None and SIZE.unpack(said)[0] != n:
            self._lose(ValueError("its answers have the wrong size"))
        if self.lost and command != Command.GET_TENSOR:
            client.sendall(SIZE.pack(n) + protocol.invented_answer(command, body, n))
            return
        head, zeros = SIZE.pack(n), bytes(min(n, PIECE))
        while n:
            part = self._read(min(n, PIECE)) or zeros[:n]
            client.sendall(head + part)
            head, n = b"", n - len(part)
        if head:
            client.sendall(head)

    # -- the host's side ----------------------------------------------------------------------------

    def _send(self, words: bytes | memoryview) -> None:
        if self.lost:
            return
        try:
            self._host.sendall(words)
            self.sent += len(words)
        except OSError as error:
            self._lose(error)

    def _stream(self, client: socket.socket, size: int) -> None:
        while size:
            n = client.recv_into(self._piece, min(size, PIECE))
            if n == 0:
                raise EOFError
            self._send(self._piece[:n])
            size -= n

    def _read(self, n: int) -> bytes | None:
        """None once the host is lost."""
        if self.lost:
            return None
        try:
            words = read(self._host, n)
            self.received += n
            return words
        except (OSError, EOFError) as error:
            self._lose(error)
            return None

    def _lose(self, error: BaseException) -> None:
        if self.lost is None:
            self.lost = HostError(
                f"the rpc host {self.endpoint} is gone ({reason(error, self.seconds)}): check its "
                "ggml-rpc-server, and ask again."
            )
        with suppress(OSError):  # a server that still waits for the rest of a message is free again
            self._host.shutdown(socket.SHUT_RDWR)


_used: set[int] = set()  # ports that relays of this process have used


def _new_port() -> socket.socket:
    """A port for a relay, never the same twice, since ggml remembers what a server at an address once
    said."""
    taken = []
    try:
        while True:
            listener = socket.create_server((_LOOPBACK, 0))
            port = listener.getsockname()[1]
            if port not in _used:
                _used.add(port)
                return listener
            taken.append(listener)  # kept open until another one is found
    finally:
        for listener in taken:
            listener.close()


def _is_of_this_user(port: int, own: int) -> bool:
    """Whether a connection comes from a process of this user. Systems other than Linux don't tell."""
    if sys.platform != "linux":
        return True
    address = f"{int.from_bytes(socket.inet_aton(_LOOPBACK), sys.byteorder):08X}"
    wanted = [f"{address}:{port:04X}", f"{address}:{own:04X}"]
    with open("/proc/net/tcp", encoding="ascii") as table:
        lines = (line.split() for line in table)
        return any(fields[1:3] == wanted and int(fields[7]) == os.getuid() for fields in lines if fields[1:])
