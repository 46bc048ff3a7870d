"""The vectors of a run, kept in OUT/vectors: a run that was stopped finds them there when it goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from localsteer.cache import file_hash, file_name
from localsteer.catalog import Instruction
from localsteer.errors import VectorFileError
from localsteer.evaluate.results import unwritable
from localsteer.evaluate.scope import BenchScope
from localsteer.vector import ControlVector

DIGEST = "eval_digest"  # of a kept vector's provenance: what it was extracted from


class KeptVectors:
    """out: None keeps nothing. model: sha256 of its file. max_tokens: of a reply. files: of every vector that
    is used, the given and shipped ones too, by instruction id."""

    def __init__(self, scope: BenchScope, out: Path | None, model: str, max_tokens: int) -> None:
        self.scope, self.out, self.model, self.max_tokens = scope, out, model, max_tokens
        self.files = dict(scope.files)

    def hash_of(self, name: str) -> str:
        """Of the file of an instruction id's vector."""
        return file_hash(self.files[name])

    def save(
        self, instruction: Instruction, vector: ControlVector, *, resumable: bool = True
    ) -> ControlVector:
        """The vector as its file has it. resumable: a later run may take it for its own."""
        if self.out is None:
            return vector
        digest = self._digest(instruction) if resumable else ""
        vector = replace(vector, provenance={**vector.provenance, DIGEST: digest})
        path = self._path(instruction)
        # of one that is ready, what is extracted is only for controls
        if instruction.id not in self.scope.ready or not resumable:
            self.files[instruction.id] = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error) from error
        vector.save(path)
        return vector

    def raw(self, instruction: Instruction) -> ControlVector | None:
        """The vector of an earlier, stopped run, without its settings."""
        vector = self._of_earlier_run(instruction)
        if vector is None:
            return None
        return vector.at(layer=vector.n_layer // 2, positions="all", mode="project", strength=1.0)

    def tuned(self, instruction: Instruction) -> ControlVector | None:
        """The same with its settings, if that run had chosen them: the search is in no journal."""
        vector = self._of_earlier_run(instruction)
        return vector if vector is not None and vector.provenance.get("validation") else None

    def _of_earlier_run(self, instruction: Instruction) -> ControlVector | None:
        path = self.out and self._path(instruction)
        if path is None or not path.is_file():
            return None
        try:
            vector = ControlVector.load(path)
        except VectorFileError:
            return None
        if vector.provenance.get(DIGEST) != self._digest(instruction):
            return None
        if instruction.id not in self.scope.ready:
            self.files[instruction.id] = path
        return vector

    def _path(self, instruction: Instruction) -> Path:
        return self.out / "vectors" / f"{file_name(instruction.id)}.gguf"

    def _digest(self, instruction: Instruction) -> str:
        """Of what a vector and its settings come from."""
        extraction = [query.text for query in self.scope.catalog.queries_for(instruction, "extraction")]
        validation = [query.text for query in self.scope.queries(instruction, "validation")]
        rule = [instruction.verifier, dict(instruction.kwargs)]
        content = [self.model, list(instruction.phrasings), extraction, validation, rule]
        content += [self.max_tokens, self.scope.seed]
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
