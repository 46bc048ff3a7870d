"""What tests/hostile/test_server_*.py share: a vector that costs nothing to make, and requests by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import localsteer


def add_vector(server, folder: Path, name: str = "odd") -> None:
    """Upload one that fits the model: it steers to nothing, and has a verifier."""
    engine = next(iter(server.state.models.values())).engine
    directions = np.ones((engine.model.n_layer, engine.model.n_embd), np.float32)
    provenance = {"verifier": "change_case:english_lowercase", "kwargs": {}}
    vector = localsteer.ControlVector(
        directions, None, None, None, None, layers=(1,), mode="add", name=name, provenance=provenance
    )
    vector.save(folder / f"{name}.gguf")
    with server.http() as http:
        data = (folder / f"{name}.gguf").read_bytes()
        answer = http.post("/v1/steering", params={"name": name}, content=data)
        assert answer.status_code == 201, answer.text


def raw_request(path: str, document: object, **headers: str) -> bytes:
    body = json.dumps(document).encode()
    given = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **headers,
    }
    lines = "".join(f"{key}: {value}\r\n" for key, value in given.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body
