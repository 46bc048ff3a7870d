"""The instruct model's vectors carried over to its base model, beside the base model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from localsteer.catalog import Instruction
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.page import Heatmap, Section, Table, Value
from localsteer.evaluate.texts import said, section
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.evaluate.bench import Bench


def carry_all(base: Bench, vectors: Mapping[str, ControlVector]) -> dict[str, ControlVector]:
    """The instruct model's vectors as vectors of the base model. Raises MismatchError for another width."""
    from localsteer.extract import open_backend
    from localsteer.extract.transfer import carry

    def work(engine: Engine, _: None) -> dict[str, ControlVector]:
        with open_backend(engine) as backend:
            return {name: carry(vector, backend) for name, vector in vectors.items()}

    return base.workers.map(work, [None])[0]


def alike(
    instructions: Sequence[Instruction],
    own: Mapping[str, ControlVector],
    carried: Mapping[str, ControlVector],
    rows: Outcomes,
) -> Section:
    """Why: does the base know the instruction at all, and do the two directions have anything in common?"""
    names = [instruction.id for instruction in instructions]
    cosines = {name: _cosines(own[name], carried[name]) for name in names}
    told = rows.of("instructed")
    table: list[list[Value]] = [
        [name, told.of(None, name).share, max(cosines[name]), float(np.mean(cosines[name]))] for name in names
    ]
    plot = Heatmap(
        "Cosine of the base model's direction and the instruct model's",
        "layer",
        rows=names,
        columns=list(map(str, range(len(cosines[names[0]])))),
        values=list(cosines.values()),
    )
    columns = ["instruction", "instructed", "largest cosine", "mean cosine"]
    more = "" if told.followed is None else said("cross_model.told", share=told.followed)
    return section("cross_model.alike", Table(columns, table), plot, more=more)


def _cosines(a: ControlVector, b: ControlVector) -> list[float]:
    both = set(a.usable_layers) & set(b.usable_layers)
    return [float(a.unit(il) @ b.unit(il)) if il in both else 0.0 for il in range(a.n_layer)]
