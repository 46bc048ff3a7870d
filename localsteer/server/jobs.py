"""/v1/jobs: vectors made on request; /v1/instructions: the instructions to make them from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from localsteer.catalog import DEFAULT, Catalog, Instruction, load_catalog
from localsteer.errors import CatalogError
from localsteer.model_names import is_bundled
from localsteer.terms import LEARNING_NEEDS

from .errors import ApiError, Json, shown
from .making import JobDocument, VectorJob
from .models import State
from .reading import BodyRoute
from .schemas import JobRequest
from .steering import NAME

if TYPE_CHECKING:
    from .served import Served

router = APIRouter(tags=["Steering"], route_class=BodyRoute)
MAX_CTX = 4096  # the prompts and replies of a search are short
BEFORE_DIGEST = 54  # characters of a name before its digest


def _state(request: Request) -> State:
    return request.app.state.localsteer


@router.get("/v1/instructions", summary="Instructions for which vectors can be made for a model, and how")
async def instructions(request: Request, model: str | None = None) -> Response:
    """The catalogue's instructions, except those that need a value, each with the vector that exists for it;
    and the methods, with the reason if one is not available."""
    state = _state(request)
    name, _ = state.pool.split(model)
    catalog = catalog_for(name)
    offered = set(state.vectors.of_model(name))
    complete = [
        known.fill()
        for known in catalog.instructions.values()
        if all(slot in known.slots for slot in known.open_slots)
    ]
    entries = [
        {
            "id": known.id,
            "text": known.phrasings[0],
            "group": known.group,
            "has_verifier": known.verifier is not None,
            "vector": vector_name(known) if vector_name(known) in offered else None,
        }
        for known in complete
    ]
    methods = [{"id": method, "why_not": why_not(state, method)} for method in ("search", "learn")]
    return Json({"object": "list", "model": name, "data": entries, "methods": methods})


@router.get("/v1/jobs", summary="List jobs: running, waiting, and recent ones")
async def list_jobs(request: Request) -> Response:
    return Json({"object": "list", "data": [_document(_state(request), job) for job in _known(request)]})


@router.post("/v1/jobs", summary="Make a vector for an instruction of the catalogue, or for a sentence")
async def make(body: JobRequest, request: Request) -> Response:
    """The job runs whether or not anyone asks about it. GET /v1/jobs/ID returns its progress."""
    state = _state(request)
    served, _ = state.served(body.model)
    reason = why_not(state, body.method)
    if reason:
        raise ApiError(f"{reason}.", status=409, param="method", code="making_is_off")
    if served.engine.model.hosts:
        raise ApiError(
            f"model: {served.name} runs on several hosts (--rpc), but a vector is made by a separate engine "
            "on one machine: use `localsteer tune` on a machine that the model fits.",
            param="model",
        )
    catalog = catalog_for(served.name)
    instruction = _instruction(catalog, body.instruction)
    name = _name(state, served.name, instruction, body)
    words = _words(served, catalog, body.instruction.strip(), body.method)
    job = VectorJob(served.name, instruction, body.method, name, body.replace, words)
    state.jobs.add(job)
    return Json(_document(state, job), 202)


@router.get("/v1/jobs/{job_id}", summary="Show a job: what it is doing, the best so far, and its result")
async def one_job(job_id: str, request: Request) -> Response:
    return Json(_document(_state(request), _job(request, job_id)))


@router.delete(
    "/v1/jobs/{job_id}", summary="Stop a job and keep the best so far; the second time, stop it at once"
)
async def cancel(job_id: str, request: Request) -> Response:
    job = _job(request, job_id)
    _state(request).jobs.cancel(job)
    return Json(_document(_state(request), job))


def _known(request: Request) -> Sequence[VectorJob]:
    return list(_state(request).jobs.known.values())


def _job(request: Request, job_id: str) -> VectorJob:
    job = _state(request).jobs.known.get(job_id)
    if job is None:
        raise ApiError(
            f"there is no job {shown(job_id)}: it never existed, or ended long ago.", status=404, param="id"
        )
    return job


def _document(state: State, job: VectorJob) -> JobDocument:
    return {**job.document(), "before": state.jobs.place(job)}


# -- what is asked for --------------------------------------------------------------------------------------


def catalog_for(model: str) -> Catalog:
    """The catalogue that belongs to a model of this name."""
    if is_bundled(model):
        from localsteer import bundled

        return _catalog(bundled.CATALOG)
    return _catalog(DEFAULT)


_catalog = lru_cache(load_catalog)


def why_not(state: State, method: str) -> str | None:
    """Why this server can't make vectors by this method, or None."""
    if state.vectors.folder is None:
        return "this server has no folder of vectors: start it with --vectors DIR"
    if not state.limits.job_seconds:
        return "this server makes no vectors (--job-minutes 0)"
    missing = [name for name in LEARNING_NEEDS if find_spec(name) is None] if method == "learn" else []
    if missing:
        listed = " and ".join(missing)
        return f"learning needs PyTorch, and {listed} is missing here: pip install 'localsteer[torch]'"
    return None


def _instruction(catalog: Catalog, text: str) -> Instruction:
    try:
        return catalog.find(text)
    except CatalogError as error:
        is_word = str(error).startswith("unknown instruction")
        hint = "; a sentence of your own has more than one word" if is_word else ""
        raise ApiError(f"instruction: {error}{hint}.", param="instruction") from None


def vector_name(instruction: Instruction) -> str:
    """The name of an instruction's vector, in the form of a file name."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", instruction.id).strip("-._")[:64]
    return name or f"own-{_digest(*instruction.phrasings)}"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest()[:8]


def _name(state: State, model: str, instruction: Instruction, body: JobRequest) -> str:
    """A free name. Raises ApiError if the requested name is invalid or taken."""
    if body.name is not None and not NAME.fullmatch(body.name):
        raise ApiError(
            f"name: must be letters, digits, dots, dashes and underscores, not {shown(body.name)}.",
            param="name",
        )
    name = body.name or vector_name(instruction)
    if body.name is None and not body.replace and _is_others(state, model, instruction, name):
        name = f"{name[:BEFORE_DIGEST]}-{_digest(model, *instruction.phrasings)}"
    under_way = state.jobs.active(name)
    if under_way is not None:
        raise ApiError(
            f"name: a vector {name!r} is already being made ({under_way.id}).",
            status=409, param="name", code="exists",
        )  # fmt: skip
    if not body.replace and (name in state.vectors.entries or name in state.vectors.of_model(model)):
        raise ApiError(
            f"name: {model} already has a vector {name!r}: steer by it, or send replace=true to make another "
            "in its place.",
            status=409, param="name", code="exists",
        )  # fmt: skip
    return name


def _is_others(state: State, model: str, instruction: Instruction, name: str) -> bool:
    """Whether the vector of this name is for another model, or other words."""
    entry = state.vectors.entries.get(name)
    if entry is None or entry.vector is None:
        return entry is not None
    return not entry.fits(model) or entry.vector.phrasings[:1] != instruction.phrasings[:1]


def _words(served: Served, catalog: Catalog, text: str, method: str) -> list[str]:
    """The arguments of the command that makes the vector, without its output."""
    engine = served.engine
    command = "tune" if method == "search" else "learn"
    return [
        command,
        f"--model={engine.path.absolute()}",
        f"--instruction={text}",
        f"--catalog={catalog.source}",
        f"--threads={engine.context.n_threads}",
        f"--gpu-layers={engine.model.n_gpu_layers}",
        f"--ctx-size={min(engine.n_ctx, MAX_CTX)}",
        "--json",
    ]
