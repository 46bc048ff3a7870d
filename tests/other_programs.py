"""Folders of models as other programs lay them out, and the hub's API on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from raw_gguf import I32, U16, RawGguf, value

OLLAMA_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
OLLAMA_LAYER = "application/vnd.ollama.image."
COMMIT = "c0ffee" + "0" * 34


def empty_home(folder: Path) -> dict[str, str]:
    """Variables under which none of the programs has anything, whatever this machine holds."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    return {
        "HOME": str(home),
        "OLLAMA_MODELS": str(home / ".ollama" / "models"),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_CACHE": "",
        "HUGGINGFACE_HUB_CACHE": "",
        "HF_HUB_OFFLINE": "",
        "TRANSFORMERS_OFFLINE": "",
        "HF_TOKEN": "",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens there
        "LLAMA_CACHE": "",
        "XDG_CACHE_HOME": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }


def split_in_two(raw: RawGguf) -> list[bytes]:
    """As llama.cpp's gguf-split does it: the key-values in the first part, tensors in both."""
    n, half = len(raw.tensors), len(raw.tensors) // 2
    made = []
    for i, tensors in enumerate((raw.tensors[:half], raw.tensors[half:])):
        keys = {"split.no": value(U16, i), "split.count": value(U16, 2), "split.tensors.count": value(I32, n)}
        made.append(RawGguf((raw.key_values if i == 0 else {}) | keys, tensors).to_bytes())
    return made


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- Ollama -------------------------------------------------------------------------------------------------


@dataclass
class Ollama:
    root: Path

    def blob(self, data: bytes) -> str:
        """Its digest."""
        path = self.root / "blobs" / f"sha256-{sha256(data)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return f"sha256:{sha256(data)}"

    def layer(self, kind: str, data: bytes) -> dict[str, Any]:
        return {"mediaType": OLLAMA_LAYER + kind, "digest": self.blob(data), "size": len(data)}

    def manifest(self, layers: Any, **changed: Any) -> dict[str, Any]:
        config = self.layer("config", b"{}") | {"mediaType": "application/vnd.docker.container.image.v1+json"}
        made = {"schemaVersion": 2, "mediaType": OLLAMA_MANIFEST, "config": config, "layers": layers}
        return made | changed

    def put(self, name: str, manifest: Any, *, folder: str = "manifests") -> Path:
        """name: HOST/NAMESPACE/MODEL/TAG."""
        path = self.root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
        return path

    def link(self, name: str, manifest: Any) -> Path:
        """As newer versions do: manifests-v2/ holds links to blobs."""
        digest = self.blob(json.dumps(manifest).encode())
        path = self.root / "manifests-v2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(self.root / "blobs" / digest.replace(":", "-"), path.parent))
        return path

    def model(self, name: str, gguf: bytes, **layers: Any) -> Path:
        """layers: by kind; what is no text or bytes is written as JSON."""
        made = [self.layer("model", gguf)]
        for kind, content in layers.items():
            text = content if isinstance(content, (str, bytes)) else json.dumps(content)
            made.append(self.layer(kind, text.encode() if isinstance(text, str) else text))
        return self.put(name, self.manifest(made))


# -- the hub's cache ----------------------------------------------------------------------------------------


def cached_in_hub(folder: Path, repo: str, files: dict[str, bytes], commit: str = COMMIT) -> Path:
    """The snapshot's folder, as huggingface_hub makes it."""
    base = folder / ("models--" + repo.replace("/", "--"))
    snapshot = base / "snapshots" / commit
    for name, data in files.items():
        blob = base / "blobs" / sha256(data)
        link = snapshot / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (base / "refs").mkdir(exist_ok=True)
    (base / "refs" / "main").write_text(commit)
    return snapshot


# -- the hub itself -----------------------------------------------------------------------------------------


@dataclass
class Hub:
    """repos: files by repository. What the server is to do wrong is set while it runs."""

    repos: dict[str, dict[str, bytes]]
    url: str = ""
    statuses: dict[str, int] = field(default_factory=dict)  # by repository: an error for its API
    codes: dict[str, str] = field(default_factory=dict)  # X-Error-Code of these
    cut_after: int | None = None  # bytes of the next answers after which the connection is cut
    cuts: int = 0  # how many answers are still to be cut
    ranges: bool = True
    damaged: bool = False
    sent: bytes | None = None  # in the place of a file
    told: bytes | None = None  # in the place of what the API tells of a repository
    asked: list[str] = field(default_factory=list)  # "GET /path range token"
    elsewhere: bool = False  # files come from another host, by a redirect
    hold: threading.Event | None = None  # waited for in the middle of a file
    holding: threading.Event = field(default_factory=threading.Event)

    def file(self, repo: str, name: str) -> bytes:
        return self.repos[repo][name]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        words = (self.headers.get("Range") or "-", self.headers.get("Authorization") or "-")
        self.hub.asked.append(" ".join((self.command, self.path, *words)))
        path = self.path.partition("?")[0].strip("/")
        repo = next((repo for repo in (*self.hub.repos, *self.hub.statuses) if repo in path), None)
        if repo is None or self.hub.statuses.get(repo):
            status = self.hub.statuses.get(repo, 401)  # as the hub does for what it does not know
            code = self.hub.codes.get(repo, "RepoNotFound" if repo is None else "")
            return self._send(status, b'{"error": "no"}', {"X-Error-Code": code} if code else {}, with_body)
        if path.startswith("api/models/"):
            told = self._info(repo) if self.hub.told is None else self.hub.told
            return self._send(200, told, {}, with_body)
        self._send_file(
            repo, path.partition(f"resolve/{COMMIT}/")[2] or path.partition("resolve/main/")[2], with_body
        )

    def _info(self, repo: str) -> bytes:
        siblings = [
            {
                "rfilename": name,
                "size": len(data),
                "lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 1},
            }
            for name, data in self.hub.repos[repo].items()
        ]
        return json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()

    def _send_file(self, repo: str, name: str, with_body: bool) -> None:
        data = self.hub.repos[repo].get(name)
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, with_body)
        headers = {"ETag": f'"{sha256(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.hub.elsewhere and not self.headers["Host"].startswith("localhost"):
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(data))}
            headers["Location"] = self.hub.url.replace("127.0.0.1", "localhost") + self.path
            return self._send(302, b"", headers, with_body)
        if self.hub.damaged:
            data = bytes(len(data))
        if self.hub.sent is not None and with_body:
            data = self.hub.sent
        begin = self.headers.get("Range")
        status = 200
        if begin and self.hub.ranges:
            first = int(begin.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            data, status = data[first:], 206
        self._send(status, data, headers, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for key, text in headers.items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not with_body:
            return
        hub = self.hub
        is_file = "/resolve/" in self.path
        if is_file and hub.cut_after is not None and len(body) > hub.cut_after and (hub.cuts or hub.hold):
            self.wfile.write(body[: hub.cut_after])
            self.wfile.flush()
            if hub.hold:
                hub.holding.set()
                hub.hold.wait(30)
            hub.cuts -= 1
            self.close_connection = True
            return
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_args: Any) -> None:
        """A client that hangs up."""


@contextmanager
def hub_server(repos: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    hub = Hub(repos)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
