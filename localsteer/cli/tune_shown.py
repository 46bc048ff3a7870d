"""What `localsteer tune` shows of a search: heat maps, the best settings, and what they are worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any

from . import options
from .console import answer, table

if TYPE_CHECKING:
    from localsteer.evaluate.pick import Setting, Trial
    from localsteer.evaluate.tune import Tuned

SHARES = {"low": 0.0, "high": 1.0, "form": "{:.0%}"}  # the colours and figures of a heat map
TITLE_CHARACTERS = 8  # in an inch of a picture
SHOWN = 8  # settings in the table; all that were asked are in the heat map, in --json and in the file


def show(label: str, tuned: Tuned) -> None:
    """Heat maps, the best settings, and what they are worth, on stdout."""
    console = answer()
    for heatmap in heatmaps(label, tuned):
        console.print(heatmap.rendered())
        console.print()
    console.print(_best(tuned))
    console.print()
    for line in _summary(label, tuned):
        console.print(line, soft_wrap=True)


def _best(tuned: Tuned) -> Any:
    """The best settings, and the model alone."""
    titles = ("block", "positions", "mode", "strength", "score", "followed", "degenerate", "kept", "ppl", "n")
    made = table(
        *titles, numbers=("block", "strength", "score", "followed", "degenerate", "kept", "ppl", "n")
    )
    shown = [trial for trial in tuned.trials if trial.setting is not None and trial.replies][:SHOWN]
    if tuned.setting is None:
        shown.insert(0, tuned.alone)
    else:
        shown.append(tuned.alone)
    for trial in shown:
        row, setting = trial.row(), trial.setting
        where = (setting.layer, setting.positions, setting.mode) if setting else ("-", "model alone", "")
        shares = (_percent(row[name]) for name in ("score", "followed", "degenerate", "subject_kept"))
        ppl = "-" if row["perplexity"] is None else f"{row['perplexity']:.1f}"
        strength = f"{setting.strength:g}" if setting else "0"
        style = "bold" if trial is tuned.trials[0] else None
        made.add_row(*map(str, where), strength, *shares, ppl, str(row["n"]), style=style)
    return made


def _summary(label: str, tuned: Tuned) -> Iterator[str]:
    scores, n = tuned.scores, tuned.record["n"]
    if tuned.setting is not None:
        setting = tuned.setting
        yield (
            f"{label}: {setting.mode} at block {setting.layer}, positions {setting.positions}, strength "
            f"{setting.strength:g}: {_percent(scores['steered'])} of {n} validation queries, the model alone "
            f"{_percent(scores['none'])}."
        )
        if scores["both"] is not None:
            yield (
                f"With the instruction in the prompt: {_percent(scores['instructed'])}, steered as well "
                f"{_percent(scores['both'])}."
            )
    for line in tuned.advice:
        yield line[0].upper() + line[1:]
    if tuned.setting is None:
        yield "The file gets strength 0, so that it changes nothing; --strength steers by it all the same."


def _percent(share: object) -> str:
    return "-" if share is None else f"{share:.0%}"


@dataclass(frozen=True)
class HeatMap:
    """Scores by block and by whatever else was tried."""

    title: str
    rows: tuple[int, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    mark: tuple[int, int] | None

    def rendered(self) -> Any:
        from localsteer.evaluate.heatmap import terminal_heatmap

        content = (self.title, self.rows, self.columns, self.values, self.mark)
        return terminal_heatmap(*content, corner="block", **SHARES)

    def draw(self, axes: Any) -> None:
        from localsteer.evaluate.heatmap import draw_heatmap

        draw_heatmap(axes, self.rows, self.columns, self.values, self.mark, **SHARES)
        # a title wider than the picture would be cut off at both ends
        axes.set_title(fill(self.title, int(TITLE_CHARACTERS * axes.figure.get_figwidth())))
        axes.set_ylabel("block")


def heatmaps(label: str, tuned: Tuned) -> list[HeatMap]:
    """Block x positions; with several strengths one map of block x strength for each of the positions."""
    trials = {trial.setting: trial for trial in tuned.trials if trial.setting is not None}
    several_strengths = len({setting.strength for setting in trials}) > 1
    several_modes = len({setting.mode for setting in trials}) > 1
    n, quick = tuned.record["n"], tuned.record["search"] == "quick"
    maps = []
    keys = {(setting.mode, setting.positions if several_strengths else None) for setting in trials}
    for key in sorted(keys, key=lambda key: (key[0], _rank(key[1]) if key[1] else 0)):
        chosen = {
            setting: trial
            for setting, trial in trials.items()
            if setting.mode == key[0] and key[1] in (None, setting.positions)
        }
        parts = [label, key[0] if several_modes else None, key[1], f"score on {n} queries"]
        title = ", ".join(part for part in parts if part)
        title += " (quick: on fewer, or none, where it could hardly win)" if quick else ""
        maps.append(_heatmap(title, chosen, tuned.setting, several_strengths))
    return maps


def _heatmap(title: str, trials: dict[Setting, Trial], winner: Setting | None, by_strength: bool) -> HeatMap:
    column = (lambda setting: setting.strength) if by_strength else (lambda setting: setting.positions)
    rows = sorted({setting.layer for setting in trials})
    columns = sorted({column(setting) for setting in trials}, key=_rank)
    found = {
        (setting.layer, column(setting)): trial.score for setting, trial in trials.items() if trial.replies
    }
    values = tuple(tuple(found.get((row, each)) for each in columns) for row in rows)
    mark = (rows.index(winner.layer), columns.index(column(winner))) if winner in trials else None
    names = tuple(f"{each:g}" if by_strength else each for each in columns)
    return HeatMap(title, tuple(rows), names, values, mark)


def _rank(column: float | str) -> float:
    return options.POSITIONS.index(column) if isinstance(column, str) else column


def draw(done: Sequence[tuple[str, Tuned]], path: str) -> None:
    """One picture of all maps. Raises LocalsteerError."""
    from localsteer.evaluate.heatmap import new_figure, save_figure

    maps = [each for label, tuned in done for each in heatmaps(label, tuned)]
    height = sum(1.4 + 0.3 * len(each.rows) for each in maps)
    width = 3.5 + 0.8 * max(len(each.columns) for each in maps)
    figure = new_figure(max(6.0, width), height)
    for axes, each in zip(figure.subplots(len(maps), 1, squeeze=False)[:, 0], maps, strict=True):
        each.draw(axes)
    save_figure(figure, path)
