"""Ollama's store: `ollama:llama3.2:1b`, `ollama:user/name:tag`, `ollama:hf.co/ORG/REPO:tag`.

    models/manifests/HOST/NAMESPACE/MODEL/TAG       JSON; manifests-v2/ the same as links into blobs/
    models/blobs/sha256-HEX                         the layers; sha256-HEX-partial... while they are pulled

Sources: ollama's manifest/manifest.go and manifest/paths.go, types/model/name.go (names and what they are
filled up with), server/images.go (kinds of layers), docs/faq (where the folder lies). A manifest may be a
list with one for each of Ollama's engines: the one for GGUF is taken.

The chat template in the GGUF is used, since Ollama's are Go templates. The parameters that change what is
said are respected (`AskedFor`); an adapter would make it another model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localsteer.errors import ModelFileError

from . import folders
from .stored import AskedFor, StoredModel, checked, is_whole, nearest

PREFIX = "ollama:"
TITLE = "Ollama"
EXAMPLE = "ollama:llama3.2:1b or ollama:user/name:tag"
HOST, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"
MANIFESTS = ("manifests-v2", "manifests")  # the newer one goes first, as in Ollama
SYSTEM_FOLDER = Path("/usr/share/ollama/.ollama/models")  # of the service that its installer sets up on Linux
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
LIST = "application/vnd.ollama.manifest.list.v2+json"
LAYER = "application/vnd.ollama.image."
ENGINES = ("", "ollama", "llamacpp")  # of a list's manifests; `mlx` has no GGUF
MAX_NUMBER = 2**31 - 1  # of a parameter, as llama.cpp holds them
MAX_JSON = 4 << 20  # bytes of a manifest, or of a layer that is read whole
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")
# of a Modelfile's PARAMETER -> of Sampling
SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repeat_penalty",
    "repeat_last_n": "repeat_last_n",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}


class _Fault(Exception):
    """Why one model can't be used."""


@dataclass(frozen=True)
class _Tag:
    """One manifest: the parts of its name, and where it lies."""

    host: str
    namespace: str
    model: str
    tag: str
    root: Path
    path: Path

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(part.casefold() for part in (self.host, self.namespace, self.model, self.tag))

    @property
    def name(self) -> str:
        """The name as Ollama shows it, without the parts that it fills in."""
        host = "" if self.host.casefold() == HOST else f"{self.host}/"
        namespace = "" if not host and self.namespace.casefold() == NAMESPACE else f"{self.namespace}/"
        return f"{PREFIX}{host}{namespace}{self.model}:{self.tag}"


def find(rest: str) -> StoredModel:
    """The model of a name. Case is ignored, as in Ollama. Raises ModelFileError."""
    key = _parse(checked(rest, PREFIX, EXAMPLE))
    tags = list(_tags())
    tag = next((tag for tag in tags if tag.key == key), None)
    if tag is None:
        raise _unknown(rest, key, tags)
    return _model(tag)


def one_by_one() -> Iterator[StoredModel]:
    yield from map(_model, _tags())
    yield from _unfinished()


def model_folders() -> list[Path]:
    named = folders.from_environment("OLLAMA_MODELS")
    if named is not None:
        return [named]
    home = folders.home()
    return [*([home / ".ollama" / "models"] if home else []), SYSTEM_FOLDER]


# -- names --------------------------------------------------------------------------------------------------


def _parse(text: str) -> tuple[str, ...]:
    """[host/][namespace/]model[:tag] as the key of a _Tag. Raises ModelFileError."""
    head, _, last = text.rpartition("/")
    model, colon, tag = last.partition(":")
    above = head.split("/") if head else []
    parts = [*above, model, tag if colon else TAG]
    host_may_have_port = [part.partition(":")[0] if i == 0 else part for i, part in enumerate(parts)]
    if len(above) > 2 or not all(_PART.fullmatch(part) for part in host_may_have_port):
        raise ModelFileError(f"{PREFIX + text!r:.120} is not the name of a model: write it like {EXAMPLE}.")
    filled = [*[HOST, NAMESPACE][: 2 - len(above)], *above]
    return tuple(part.casefold() for part in (*filled, model, parts[-1]))


def _unknown(rest: str, key: tuple[str, ...], tags: list[_Tag]) -> ModelFileError:
    same = [tag.name for tag in tags if tag.key[:3] == key[:3]]
    if same:
        return ModelFileError(f"{PREFIX}{rest} is not here: Ollama has it as {', '.join(sorted(same))}.")
    near = nearest(PREFIX + rest, [tag.name for tag in tags])
    blocked = next((folder for folder in model_folders() if not _readable(folder)), None)
    hint = f"the nearest: {', '.join(near)}" if near else f"`ollama pull {rest}` brings it"
    hint += f" ({blocked} can't be read by this user)" if blocked else ""
    return ModelFileError(f"{PREFIX}{rest} is not in Ollama's folder: {hint}.")


def _readable(folder: Path) -> bool:
    try:
        next(folder.iterdir(), None)
    except PermissionError:
        return False
    except OSError:
        return True  # it is not there at all
    return True


def _tags() -> Iterator[_Tag]:
    """The tags, each name once."""
    seen = set()
    for root in model_folders():
        for kind in MANIFESTS:
            for path in folders.walk(root / kind, 3):
                parts = path.relative_to(root / kind).parts
                if len(parts) != 4 or not all(map(_PART.fullmatch, parts[1:])):
                    continue  # a .DS_Store, say
                tag = _Tag(*parts, root=root, path=path)
                if tag.key not in seen:
                    seen.add(tag.key)
                    yield tag


def _unfinished() -> Iterator[StoredModel]:
    """Unfinished blobs of `ollama pull`: the manifest comes last, so nothing names them yet."""
    begun: dict[str, str] = {}
    for root in model_folders():
        for path in folders.walk(root / "blobs", 0):
            blob, partial, _ = path.name.partition("-partial")
            if partial and _DIGEST.fullmatch(blob):
                begun.setdefault(blob, f"{PREFIX}{blob[:19]}...")
    for name in begun.values():
        yield StoredModel(name, fault="a download that was never finished: `ollama pull` continues it")


# -- manifests ----------------------------------------------------------------------------------------------


def _model(tag: _Tag) -> StoredModel:
    try:
        layers = _layers(tag)
        file, size = _weights(tag, layers)
        if LAYER + "adapter" in layers:
            raise _Fault("it has an adapter (LoRA), which is not applied here: merge it, or take its base")
        remarks = []
        if LAYER + "projector" in layers:
            remarks.append("its projector is left out: text only")
        if LAYER + "messages" in layers:
            remarks.append("its example messages are left out")
        return StoredModel(tag.name, (file,), size, remark="; ".join(remarks), asked=_asked(tag, layers))
    except _Fault as fault:
        return StoredModel(tag.name, fault=str(fault))


def _layers(tag: _Tag) -> dict[str, Mapping[str, Any]]:
    """By media type, the first of each. Raises _Fault."""
    manifest = _json(tag.path, "its manifest")
    if isinstance(manifest, dict) and manifest.get("mediaType") == LIST:
        manifest = _of_list(tag, manifest)
    if not isinstance(manifest, dict):
        raise _Fault("its manifest is damaged: pull it again")
    version = manifest.get("schemaVersion")
    if version != 2 or manifest.get("mediaType", MANIFEST) != MANIFEST:
        what = f"version {version!r:.20} of {manifest.get('mediaType')!r:.80}"
        raise _Fault(f"its manifest is of a kind that is unknown here ({what})")
    layers = manifest.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise _Fault("its manifest is damaged: pull it again")
    found: dict[str, Mapping[str, Any]] = {}
    for layer in layers:
        found.setdefault(str(layer.get("mediaType")), layer)
    return found


def _of_list(tag: _Tag, manifest: Mapping[str, Any]) -> Any:
    """The manifest for GGUF, which may stand in the list or lie beside the other blobs."""
    children = manifest.get("manifests")
    children = [child for child in children if isinstance(child, dict)] if isinstance(children, list) else []
    for engine in ENGINES:
        for child in children:
            if str(child.get("runner") or "").lower() != engine:
                continue
            if "layers" in child:
                return child
            return _json(_blob(tag, child), "its manifest")
    engines = ", ".join(str(child.get("runner")) for child in children) or "none"
    raise _Fault(f"it has no GGUF (made for {engines:.60})")


def _weights(tag: _Tag, layers: Mapping[str, Mapping[str, Any]]) -> tuple[Path, int]:
    layer = layers.get(LAYER + "model")
    if layer is None:
        kind = "safetensors" if LAYER + "tensor" in layers else "a model that runs elsewhere"
        raise _Fault(f"it has no GGUF ({kind})")
    file, expected = _blob(tag, layer), layer.get("size")
    size, fault = folders.measured([file])
    if fault:
        raise _Fault(f"{fault.replace('its file', 'its blob')}: pull it again")
    if isinstance(expected, int) and size != expected:
        raise _Fault(f"its blob has {size} of {expected} bytes: pull it again")
    return file, size or 0


def _blob(tag: _Tag, layer: Mapping[str, Any]) -> Path:
    """Only a digest becomes a path. Raises _Fault."""
    match = _DIGEST.fullmatch(str(layer.get("digest")))
    if not match:
        raise _Fault(f"its manifest names a blob by {layer.get('digest')!r:.80}, which is no sha256")
    return tag.root / "blobs" / f"sha256-{match[1].lower()}"


def _json(path: Path, what: str) -> Any:
    try:
        return json.loads(folders.read(path, MAX_JSON), parse_constant=_no_number)
    except OSError as error:
        why = (
            "can't be read by this user"
            if isinstance(error, PermissionError)
            else "is missing or a dead link"
        )
        raise _Fault(f"{what} {why}") from None
    except (ValueError, RecursionError):
        raise _Fault(f"{what} is damaged: pull it again") from None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


# -- how it is to be asked ----------------------------------------------------------------------------------


def _asked(tag: _Tag, layers: Mapping[str, Mapping[str, Any]]) -> AskedFor:
    params = (
        _json(_blob(tag, layers[LAYER + "params"]), "its layer of parameters")
        if LAYER + "params" in layers
        else {}
    )
    if not isinstance(params, dict):
        raise _Fault("its layer of parameters is damaged: pull it again")
    stop = params.get("stop")
    stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    sampling = {}
    for theirs, ours in SAMPLING.items():
        value = params.get(theirs)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not abs(value) <= MAX_NUMBER:  # 1e999 is infinite to Python's reader
                raise _Fault(f"its parameter {theirs} is not a number that can be used: pull it again")
            sampling[ours] = int(value) if ours in ("top_k", "repeat_last_n") else float(value)
    n_ctx = params.get("num_ctx")
    return AskedFor(
        stop=tuple(text for text in stops if isinstance(text, str) and text and is_whole(text)),
        system=_text(tag, layers.get(LAYER + "system")),
        sampling=sampling,
        n_ctx=min(n_ctx, MAX_NUMBER) if type(n_ctx) is int and n_ctx > 0 else None,
    )


def _text(tag: _Tag, layer: Mapping[str, Any] | None) -> str | None:
    if layer is None:
        return None
    try:
        return folders.read(_blob(tag, layer), MAX_JSON).decode("utf-8").strip() or None
    except (OSError, ValueError):
        raise _Fault("its system message is missing or damaged: pull it again") from None
