"""What `localsteer tune` shows of a search: heat maps, the best settings, and their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any

from localsteer.terms import POSITIONS

from .console import answer, table

if TYPE_CHECKING:
    from localsteer.tune import Setting, Tuned

SHARES = {"low": 0.0, "high": 1.0, "form": "{:.0%}"}  # the colours and figures of a heat map
TITLE_CHARACTERS = 8  # in an inch of a picture
SHOWN = 8  # settings in the table; the heat map, --json and the file have all that were tried


def show(label: str, tuned: Tuned) -> None:
    """Print heat maps, the best settings and their scores on stdout."""
    console = answer()
    for heatmap in heatmaps(label, tuned):
        console.print(heatmap.rendered())
        console.print()
    console.print(_best(tuned))
    console.print()
    for line in _summary(label, tuned):
        console.print(line, soft_wrap=True)


def _best(tuned: Tuned) -> Any:
    """The best settings, and the plain model."""
    titles = ("layer", "positions", "mode", "strength", "score", "followed", "degenerate", "kept", "gap", "n")
    rows = table(
        *titles, numbers=("layer", "strength", "score", "followed", "degenerate", "kept", "gap", "n")
    )
    shown = list(tuned.trials[:SHOWN])
    shown.insert(0 if tuned.setting is None else len(shown), tuned.plain)
    for trial in shown:
        if not trial.replies:
            continue
        row, setting = trial.row(), trial.setting
        where = (setting.numbers, setting.positions, setting.mode) if setting else ("-", "plain model", "")
        shares = (_percent(row[name]) for name in ("score", "followed", "degenerate", "subject_kept"))
        strength = f"{setting.strength:g}" if setting else "0"
        style = "bold" if setting == tuned.setting else None
        rows.add_row(*map(str, where), strength, *shares, _percent(trial.gap), str(trial.n), style=style)
    return rows


def _summary(label: str, tuned: Tuned) -> Iterator[str]:
    scores, n = tuned.scores, tuned.record["n"]
    setting = tuned.setting
    if setting is not None and scores["steered"] is not None and tuned.record["judged_by"] == "verifier":
        yield (
            f"{label}: {setting.mode} at {setting.where}, positions {setting.positions}, strength "
            f"{setting.strength:g}: {_percent(scores['steered'])} of {n} validation queries, the plain model "
            f"{_percent(scores['none'])}, told in words {_percent(scores['instructed'])}, told and steered "
            f"{_percent(scores['both'])}."
        )
    for line in tuned.advice:
        yield line[0].upper() + line[1:]
    if setting is None:
        yield "The file gets strength 0, which changes nothing; --strength steers by it anyway."


def _percent(share: object) -> str:
    return "-" if share is None else f"{share:.0%}"


@dataclass(frozen=True)
class HeatMap:
    """Scores by layer and by the other settings tried."""

    title: str
    rows: tuple[int, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    mark: tuple[int, int] | None

    def rendered(self) -> Any:
        from localsteer.heatmap import terminal_heatmap

        content = (self.title, self.rows, self.columns, self.values, self.mark)
        return terminal_heatmap(*content, corner="layer", **SHARES)

    def draw(self, axes: Any) -> None:
        from localsteer.heatmap import draw_heatmap

        draw_heatmap(axes, self.rows, self.columns, self.values, self.mark, **SHARES)
        # a title wider than the picture would be cut off at both ends
        axes.set_title(fill(self.title, int(TITLE_CHARACTERS * axes.figure.get_figwidth())))
        axes.set_ylabel("layer")


def heatmaps(label: str, tuned: Tuned) -> list[HeatMap]:
    """Layer x positions, one map for each mode: the scores of an exhaustive search, or the recovered gaps of
    a search by likelihood; of several strengths the best."""
    if tuned.ranking:
        figures, what = list(tuned.ranking), "recovered gap"
    else:
        figures = [(trial.setting, trial.score) for trial in tuned.trials]
        what = f"score on {tuned.record['n']} queries"
    modes = sorted({setting.mode for setting, _ in figures})
    maps = []
    for mode in modes:
        parts = [label, mode if len(modes) > 1 else None, what]
        title = ", ".join(part for part in parts if part)
        chosen = [(setting, figure) for setting, figure in figures if setting.mode == mode]
        maps.append(_heatmap(title, chosen, tuned.setting))
    return maps


def _heatmap(title: str, figures: Sequence[tuple[Setting, float]], winner: Setting | None) -> HeatMap:
    best: dict[tuple[int, str], float] = {}
    for setting, figure in figures:
        cell = (setting.layer, setting.positions)
        best[cell] = max(figure, best.get(cell, figure))
    rows = sorted({layer for layer, _ in best})
    columns = sorted({positions for _, positions in best}, key=POSITIONS.index)
    values = tuple(tuple(best.get((row, column)) for column in columns) for row in rows)
    is_here = winner is not None and (winner.layer, winner.positions) in best
    mark = (rows.index(winner.layer), columns.index(winner.positions)) if is_here else None
    return HeatMap(title, tuple(rows), tuple(columns), values, mark)


def draw(done: Sequence[tuple[str, Tuned]], path: str) -> None:
    """One picture of all maps. Raises LocalsteerError."""
    from localsteer.heatmap import new_figure, save_figure

    maps = [heatmap for label, tuned in done for heatmap in heatmaps(label, tuned)]
    height = sum(1.4 + 0.3 * len(heatmap.rows) for heatmap in maps)
    width = 3.5 + 0.8 * max(len(heatmap.columns) for heatmap in maps)
    figure = new_figure(max(6.0, width), height)
    for axes, heatmap in zip(figure.subplots(len(maps), 1, squeeze=False)[:, 0], maps, strict=True):
        heatmap.draw(axes)
    save_figure(figure, path)
