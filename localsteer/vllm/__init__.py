"""Steering in vLLM: a plugin that vLLM finds by itself (entry point `vllm.general_plugins`).

    LOCALSTEER_VECTORS=vectors/ vllm serve MODEL
    curl .../v1/chat/completions -d '{..., "vllm_xargs": {"steer": "json", "strength": 0.8}}'

Each request names its vectors, control-vector files of that folder. Without LOCALSTEER_VECTORS the plugin
does nothing. Nothing in here imports llama.cpp, and only this folder imports vLLM.

    asked    what a request says, as a plan      shelf    the folder of vectors
    front    where requests come in              carried  a plan on its way to the workers
    layers   hooks on the decoder layers         workers  which rows of a batch get which plan
"""

from __future__ import annotations

import os

VARIABLE = "LOCALSTEER_VECTORS"


def register() -> None:
    """Called by vLLM in each of its processes, more than once. Raises LocalsteerError for a folder that can't
    be read, and if this version of vLLM differs from what the plugin expects."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    from . import front, workers
    from .shelf import VectorShelf

    front.install(VectorShelf(folder))
    workers.install()
