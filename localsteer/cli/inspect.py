"""`localsteer inspect`: shows what a vector file holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from localsteer.errors import VectorFileError

from . import options
from .console import answer, note, print_json, table

if TYPE_CHECKING:
    from localsteer.vector import ControlVector, LayerFacts, VectorFacts

BAR_WIDTH = 6
STRIP_WIDTH = 21
SPREAD = 2  # standard deviations that the strip covers on either side
# provenance worth a line, in this order -> its label
PROVENANCE = {
    "instruction": "instruction",
    "model_name": "model",
    "architecture": "architecture",
    "backend": "extracted with",
    "method": "method",
    "convention": "convention",
    "model_hint": "model hint",
    "n_pairs": "pairs",
    "verifier": "verifier",
    "source_hash": "model's sha256",
    "template_hash": "template's sha256",
    "tool_version": "localsteer",
}

SCORES = {"plain": "none", "steered": "steered", "told": "instructed", "told and steered": "both"}
NUMBERS = ("layer", "strength", "good", "degenerate", "gap", "n")


@click.command("inspect", short_help="Show what a vector file holds.")
@click.argument("file", type=click.Path())
@click.option(
    "-m",
    "--model",
    metavar="GGUF",
    help="Show a vector that ships for this model; FILE is then an instruction's id.",
)
@click.option(
    "--plot", type=click.Path(), metavar="PNG", help="Also draw norms and projections into a picture."
)
@options.as_json
def command(file: str, model: str | None, plot: str | None, as_json: bool) -> None:
    """Show what the vector FILE holds: its origin, its settings, and for each layer the length of its
    direction and the mean projection of the model's states with and without the instruction.

    In the last column, o is the mean without the instruction, # with it, and = the spread around them (one
    standard deviation): a layer where the two are far apart is worth trying. For a vector with learned gates,
    `gate` is the bias of the weight and the length |w| of its reader.

    \b
    Examples:
      localsteer inspect json.gguf
      localsteer inspect json.gguf --plot json.png
      localsteer inspect json.gguf --json
      localsteer inspect -m smol title
    """
    from localsteer.vector import ControlVector, describe

    if plot is not None:
        from localsteer.heatmap import check_picture

        check_picture(plot)
    file = file if model is None else _shipped(model, file)
    vector = ControlVector.load(file)
    described = describe(vector)
    if plot is not None:
        draw(described, plot)
        note(f"drew {plot}")
    if as_json:
        print_json({"file": file, **described})
        return
    answer().print(_head(file, vector, described))
    answer().print()
    choice = described["provenance"].get("validation")
    if isinstance(choice, dict):
        for line in choice_lines(choice):
            answer().print(line, soft_wrap=True)
        tried = _tried(choice)
        if tried.row_count:
            answer().print(tried)
        answer().print()
    answer().print(_layers(described))


def _shipped(model: str, instruction: str) -> str:
    """The vector file in a pack. Raises LocalsteerError if none ships for the model and the instruction."""
    from localsteer.packs import pack_for

    from .models import model_file

    match = pack_for(model_file(model))
    known = match.pack.instructions if match else {}
    if instruction not in known:
        raise VectorFileError(
            f"no vector of {instruction!r} ships for {model}: {', '.join(known) or 'it has none'}."
        )
    return str(match.pack.path(instruction))


def _head(file: str, vector: ControlVector, described: VectorFacts) -> Any:
    from rich.table import Table

    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")  # a hash that is cut off would be a wrong one
    lines.add_row("file", file)
    lines.add_row("vector", f"{vector.label}, {vector.n_layer} layers x {vector.n_embd}")
    lines.add_row("settings", settings_line(described))
    for key, title in PROVENANCE.items():
        value = described["provenance"].get(key)
        if value not in (None, ""):
            lines.add_row(title, str(value))
    return lines


def choice_lines(choice: Mapping[str, Any]) -> list[str]:
    """Why these settings were chosen, as recorded by the search. The file may be anyone's, so its contents
    are not trusted."""
    scores = choice.get("scores")
    shares = (
        {name: _share(scores.get(key)) for name, key in SCORES.items()} if isinstance(scores, dict) else {}
    )
    known = ", ".join(f"{name} {share}" for name, share in shares.items() if share)
    lines = []
    if known:
        lines.append(f"checked on {choice.get('n', '?')} queries: {known}")
    gap = _share(choice.get("recovered_gap"))
    if gap:
        lines.append(
            f"by likelihood it achieves {gap} of what telling does; judged by {choice.get('judged_by')}"
        )
    if isinstance(choice.get("seconds"), (int, float)):
        lines.append(f"found in {choice['seconds']:.0f} s by the search `{choice.get('search')}`")
    advice = choice.get("advice")
    return lines + [str(line) for line in advice if line] if isinstance(advice, (list, tuple)) else lines


def _tried(choice: Mapping[str, Any]) -> Any:
    """A table of the settings that were checked, the best first."""
    rows = table("layer", "positions", "strength", "good", "degenerate", "gap", "n", numbers=NUMBERS)
    trials = choice.get("table")
    for trial in trials if isinstance(trials, (list, tuple)) else ():
        if not isinstance(trial, dict):
            continue
        where = [str(trial.get(name, "-")) for name in ("layer", "positions", "strength")]
        shares = [_share(trial.get(name)) or "-" for name in ("score", "degenerate", "recovered_gap")]
        rows.add_row(*where, *shares, str(trial.get("n", "-")))
    return rows


def _share(value: Any) -> str:
    return f"{value:.0%}" if isinstance(value, (int, float)) and not isinstance(value, bool) else ""


def settings_line(described: VectorFacts) -> str:
    """The settings in a line: `project at layer 12, positions all, strength 1`, and others if set."""
    layers = ", ".join(map(str, described["layers"]))
    plural = "s" if len(described["layers"]) > 1 else ""
    line = f"{described['mode']} at layer{plural} {layers}, positions {described['positions']}"
    line += f", strength {described['strength']:g}"
    if described["one_sided"]:
        line += ", one-sided"
    return line if described["cap"] is None else f"{line}, cap {described['cap']:g}"


def _layers(described: VectorFacts) -> Any:
    has_means = any(layer["mean_with"] is not None for layer in described["by_layer"])
    has_gates = any("gate_bias" in layer for layer in described["by_layer"])
    titles = ["layer", "norm", "", *(["gate"] if has_gates else [])]
    if has_means:
        titles += ["without", "with", "apart", ""]
    rows = table(*titles, numbers=("layer", "norm", "without", "with", "apart"))
    # of a vector with few layers, the others need no rows
    has_gaps = sum(layer["norm"] == 0 for layer in described["by_layer"]) > len(described["by_layer"]) / 2
    longest = max(layer["norm"] for layer in described["by_layer"])
    for layer in described["by_layer"]:
        if layer["norm"] == 0 and not layer["chosen"] and has_gaps:
            continue
        row = [f"{'> ' if layer['chosen'] else ''}{layer['layer']}", f"{layer['norm']:.3g}"]
        row.append(bar(layer["norm"] / longest if longest else 0, BAR_WIDTH))
        row += [_gate(layer)] if has_gates else []
        rows.add_row(
            *row, *(_projections(layer) if has_means else ()), style="bold" if layer["chosen"] else None
        )
    return rows


def _gate(layer: LayerFacts) -> str:
    """The weight of the direction: its bias, and the length of the reader of the normalised state."""
    return f"{layer['gate_bias']:.2g} + |w| {layer['gate_reader_norm']:.2g}" if "gate_bias" in layer else ""


def _projections(layer: LayerFacts) -> list[str]:
    if layer["norm"] == 0 or layer["mean_with"] is None:
        return ["", "", "", ""]
    with_, without = (_mean_and_spread(layer, side) for side in ("with", "without"))
    apart = separation(layer)
    return [without, with_, "" if apart is None else f"{apart:.1f}", strip(layer)]


def _mean_and_spread(layer: LayerFacts, side: str) -> str:
    mean, spread = layer[f"mean_{side}"], layer[f"std_{side}"]
    if mean is None:
        return ""
    return f"{mean:.3g}" if spread is None else f"{mean:.3g} ± {spread:.2g}"


def separation(layer: LayerFacts) -> float | None:
    """Distance of the two means in standard deviations (Cohen's d with the mean of the two variances)."""
    figures = [layer[key] for key in ("mean_with", "mean_without", "std_with", "std_without")]
    if None in figures:
        return None
    spread = ((figures[2] ** 2 + figures[3] ** 2) / 2) ** 0.5
    return (figures[0] - figures[1]) / spread if spread else None


def bar(part: float, width: int) -> str:
    """A bar of eighths of a character, `width` characters long at part 1."""
    eighths = round(max(0.0, min(1.0, part)) * 8 * width)
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def strip(layer: LayerFacts) -> str:
    """A strip with the two means and their spreads, on a scale of this layer."""
    sides = [(layer[f"mean_{side}"], layer[f"std_{side}"] or 0.0) for side in ("without", "with")]
    if any(mean is None for mean, _ in sides):
        return ""
    low = min(mean - SPREAD * spread for mean, spread in sides)
    high = max(mean + SPREAD * spread for mean, spread in sides)

    def column(value: float) -> int:
        return round((value - low) / (high - low) * (STRIP_WIDTH - 1)) if high > low else STRIP_WIDTH // 2

    cells = ["·"] * STRIP_WIDTH
    for mean, spread in sides:
        for i in range(column(mean - spread), column(mean + spread) + 1):
            cells[i] = "="
    for (mean, _), mark in zip(sides, "o#", strict=True):
        cells[column(mean)] = mark
    return "".join(cells)


def draw(described: VectorFacts, path: str) -> None:
    """Draw norms, and projections with their spreads, over the layers. Raises LocalsteerError."""
    from localsteer.heatmap import new_figure, save_figure

    figure = new_figure(9, 6)
    norms, projections = figure.subplots(2, 1, sharex=True)
    layers = described["by_layer"]
    numbers = [layer["layer"] for layer in layers]
    norms.bar(numbers, [layer["norm"] for layer in layers], color="tab:gray")
    norms.set_ylabel("length of the direction")
    norms.set_title(f"{described['name'] or 'vector'}: {settings_line(described)}")
    for side, colour in (("without", "tab:blue"), ("with", "tab:orange")):
        _draw_side(projections, layers, side, colour)
    projections.set_ylabel("mean projection")
    projections.set_xlabel("layer")
    for axes in (norms, projections):
        for layer in described["layers"]:
            axes.axvline(layer, color="tab:red", linestyle=":", linewidth=1)
    if projections.lines:
        projections.legend()
    save_figure(figure, path)


def _draw_side(axes: Any, layers: list[LayerFacts], side: str, colour: str) -> None:
    known = [layer for layer in layers if layer["norm"] > 0 and layer[f"mean_{side}"] is not None]
    if not known:
        return
    numbers = [layer["layer"] for layer in known]
    means = [layer[f"mean_{side}"] for layer in known]
    spreads = [layer[f"std_{side}"] or 0.0 for layer in known]
    axes.plot(numbers, means, marker="o", markersize=3, color=colour, label=f"{side} the instruction")
    low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
    high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    axes.fill_between(numbers, low, high, color=colour, alpha=0.2)
