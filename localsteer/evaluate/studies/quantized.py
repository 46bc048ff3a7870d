"""One quantized file: what it does to vectors of the most exact one, and its replies under them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from localsteer.catalog import Instruction
from localsteer.evaluate.bench import Bench
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.page import Share
from localsteer.evaluate.studies.common import other_vector
from localsteer.evaluate.texts import said
from localsteer.extract import build_pairs
from localsteer.extract.calibrate import Calibration, calibrate
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine

CONDITIONS = ("none", "instructed", "reference", "recalibrated", "re-extracted", "random", "other")
SURE = 0.02  # a smaller difference is of no use, even where it is certain


class FileFigures(TypedDict):
    """By instruction id: cosines and drift of each layer, and the steered layer. instructions: shares that
    follow, by `instruction condition`."""

    quantization: str
    bytes: int
    cosines: dict[str, list[float]]
    drift: dict[str, list[float]]
    followed: dict[str, Share]
    instructions: dict[str, float | None]
    steered_layer: dict[str, int]


@dataclass(frozen=True)
class Measured:
    """One file. calibrations: by instruction id, whose steered layers are `layers`."""

    label: str
    size: int
    calibrations: dict[str, Calibration]
    layers: dict[str, int]
    rows: Outcomes

    def column(self, what: str) -> list[float]:
        """`cosines` or `drift` at each instruction's steered layer."""
        return [float(getattr(done, what)[self.layers[name]]) for name, done in self.calibrations.items()]

    def over_instructions(self, what: str, measure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """(n_layer,): mean of a measure of `cosines` or `drift`."""
        return np.nanmean([measure(getattr(done, what)) for done in self.calibrations.values()], axis=0)

    def share(self, condition: str) -> Share:
        return self.rows.of(condition).share

    def gain(self, condition: str) -> Share:
        """Over the reference vector on this file."""
        return self.rows.of(condition).minus(self.rows.of("reference"))

    def gains(self, condition: str) -> bool:
        gain = self.gain(condition)
        return gain.low > 0 and gain.share >= SURE

    def against(self, first: Measured, condition: str) -> Share:
        return self.rows.of(condition).minus(first.rows.of(condition))

    def figures(self) -> FileFigures:
        parts = self.rows.by("instruction", "condition")
        return {
            "quantization": self.label,
            "bytes": self.size,
            "cosines": {name: done.cosines.tolist() for name, done in self.calibrations.items()},
            "drift": {name: done.drift.tolist() for name, done in self.calibrations.items()},
            "followed": {name: self.share(name) for name in CONDITIONS},
            "instructions": {f"{a} {b}": rows.followed for (a, b), rows in parts.items()},
            "steered_layer": self.layers,
        }


def measure(
    bench: Bench,
    label: str,
    size: int,
    instructions: Sequence[Instruction],
    vectors: Mapping[str, ControlVector],
) -> Measured:
    """size: of the file, in bytes. vectors: of the most exact file, by instruction id."""

    def work(engine: Engine, instruction: Instruction) -> Calibration:
        queries = bench.catalog.queries_for(instruction, "extraction")
        return calibrate(engine, vectors[instruction.id], build_pairs(instruction, queries))

    with bench.stage(f"{label}: calibrating") as advance:
        done = bench.workers.map(work, instructions, advance)
    asked = []
    for instruction, calibration in zip(instructions, done, strict=True):
        reference, other = calibration.before, other_vector(instruction, instructions, vectors)
        steers = {
            "none": (), "instructed": (), "reference": (reference,), "recalibrated": (calibration.vector,),
            "re-extracted": (calibration.fresh,),
            **bench.controls.like([reference], [other] if other else []),
        }  # fmt: skip
        asked.append(bench.compare(instruction, steers, CONDITIONS))
    rows = bench.run(asked, what=f"{label}: asking", score=False)
    calibrations = {one.id: calibration for one, calibration in zip(instructions, done, strict=True)}
    layers = {one.id: vectors[one.id].layers[0] for one in instructions}
    return Measured(label, size, calibrations, layers, rows)


def what_to_do(measured: Sequence[Measured]) -> str:
    """For a user, from the figures alone: the coarsest file that the exact vector still works on, whether
    calibrating or extracting anew is worth the time, and where the model itself gives up."""
    first, anew = measured[0], ("recalibrated", "re-extracted")
    changes = {file.label: file.against(first, "reference") for file in measured[1:]}
    lost = {name: change for name, change in changes.items() if change.high < 0 or change.share < -0.1}
    gains = {file.label: [name for name in anew if file.gains(name)] for file in measured[1:]}
    held = [name for name in changes if name not in lost]
    texts = [said("quantization.held", first=first.label, held=", ".join(held))] if held else []
    for name, change in lost.items():
        mended = said("quantization.mended", kinds=" and ".join(gains[name])) if gains[name] else ""
        texts.append(
            said(
                "quantization.lost",
                name=name,
                share=-change.share,
                mended=mended or "no other vector does better",
            )
        )
    worth = [f"{kind} on {name}" for name in held for kind in gains[name]]
    texts.append(said("quantization.worth" if worth else "quantization.no_gain", kinds=", ".join(worth)))
    told = [file.label for file in measured if file.against(first, "instructed").high < -SURE]
    if told:
        texts.append(said("quantization.told", names=", ".join(told)))
    return " ".join(texts)
