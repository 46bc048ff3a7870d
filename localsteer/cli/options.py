"""Options that several commands share, so that they have the same name and meaning everywhere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from localsteer.terms import MODES, POSITIONS

from . import completed

Command = TypeVar("Command", bound=Callable[..., Any])
Params = dict[str, Any]  # what click passes to a command: the values of its options, by parameter name

MAX_RANGE = 10_000  # layers in `A-B`; no model has that many


class Layers(click.ParamType):
    """`12`, `3,4` or `3-5`: 0-based layers, as a tuple."""

    name = "layers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return parse_layers(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def parse_layers(text: str) -> tuple[int, ...]:
    """Raises ValueError with a sentence for the user."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part, re.ASCII)
        if not match:
            raise ValueError(f"{text!r} is not a layer: write 12, 3,4 or 3-5 (the first layer is 0).")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + MAX_RANGE:
            raise ValueError(
                f"{part.strip()!r} is not a range of layers: write the lower number first, as in 3-5."
            )
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


class Slot(click.ParamType):
    """`n=5`: a value for a {slot} of an instruction; whole numbers become numbers."""

    name = "name=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        name, equals, text = value.partition("=")
        if not equals or not name.strip():
            self.fail(f"{value!r} is not NAME=VALUE, as in n=5.", param, ctx)
        is_number = re.fullmatch(r"-?\d{1,15}", text.strip(), re.ASCII)
        return name.strip(), int(text) if is_number else text


class Variables(click.ParamType):
    """`{"enable_thinking": false}`: a JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            parsed = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            self.fail(
                f"{value!r:.80} is not a JSON object, like '{{\"enable_thinking\": false}}'.", param, ctx
            )
        return parsed


class Finite(click.types.FloatParamType):
    """A number that is neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def all_of(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator for several options, which --help lists in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")

model = click.option(
    "-m",
    "--model",
    default="bundled",
    show_default=True,
    metavar="GGUF",
    shell_complete=completed.models,
    help="The model: a GGUF file, or a name: bundled (or bundled:Q4_K_M), bundled-base, smol, hf:ORG/REPO, "
    "ollama:NAME, lmstudio:NAME, llama.cpp:NAME (docs/models.md).",
)


class Renamed(click.Option):
    """An option that still accepts its former names, which --help does not mention."""

    def __init__(self, *args: Any, old: Sequence[str], **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.old = list(old)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        parser.add_option(self, self.old, self.name, action="store", nargs=self.nargs)


def layers_to_try(help: str) -> Callable[[Command], Command]:
    """`--layer` of commands that choose between layers, as `layers`."""
    return click.option(
        "--layer", "layers", cls=Renamed, old=["--blocks"], type=Layers(), metavar="LAYERS", help=help
    )


threads = click.option("-t", "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.")

engine = all_of(
    click.option(
        "-c",
        "--ctx-size",
        type=click.IntRange(min=0),
        default=0,
        metavar="N",
        help="Tokens of prompt and reply together. [default: 0 = what the model allows, at most 4096]",
    ),
    threads,
    click.option(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        type=int,
        metavar="N",
        help="Layers to keep on a GPU, or on the hosts of --rpc. [default: 0; all with --rpc]",
    ),
)

rpc = all_of(
    click.option(
        "--rpc",
        multiple=True,
        metavar="HOST:PORT,...",
        help="Hosts that hold and compute the model's layers: llama.cpp's ggml-rpc-server (docs/scale.md).",
    ),
    click.option(
        "--rpc-timeout",
        "rpc_seconds",
        type=click.FloatRange(0.1, 86_400),
        metavar="SECONDS",
        help="How long a host may be silent before it counts as gone. [default: 300]",
    ),
)
# those of the options above that load_engine takes
LOADING = ("ctx_size", "threads", "gpu_layers", "rpc", "rpc_seconds")

template_variables = click.option(
    "--chat-template-kwargs",
    "variables",
    type=Variables(),
    metavar="JSON",
    help="Variables for the model's chat template, like '{\"enable_thinking\": false}'.",
)

sampling = all_of(
    click.option(
        "--temp", type=float, default=0.8, metavar="X", help="Temperature; 0 is greedy. [default: 0.8]"
    ),
    click.option("--top-k", type=int, default=40, metavar="N", help="[default: 40; 0 = off]"),
    click.option("--top-p", type=float, default=0.95, metavar="X", help="[default: 0.95; 1 = off]"),
    click.option("--min-p", type=float, default=0.05, metavar="X", help="[default: 0.05; 0 = off]"),
    click.option("--repeat-penalty", type=float, default=1.0, metavar="X", help="[default: 1 = off]"),
    click.option(
        "--repeat-last-n",
        type=int,
        default=64,
        metavar="N",
        help="Number of last tokens that the penalties look at. [default: 64]",
    ),
    click.option("--presence-penalty", type=float, default=0.0, metavar="X", help="[default: 0 = off]"),
    click.option("--frequency-penalty", type=float, default=0.0, metavar="X", help="[default: 0 = off]"),
    click.option("--seed", type=int, metavar="N", help="[default: a new one each time]"),
    click.option("--grammar", metavar="GBNF", help="A grammar that the reply must follow."),
    click.option("--grammar-file", type=click.Path(), metavar="FILE", help="The same, from a file."),
    click.option(
        "-j",
        "--json-schema",
        metavar="JSON_OR_FILE",
        help="A JSON schema that the reply must follow: its text, or a file; {} is any JSON.",
    ),
)

vectors = all_of(
    click.option(
        "-s",
        "--steer",
        "specs",
        multiple=True,
        metavar="VECTOR",
        shell_complete=completed.files,
        help="A vector file: FILE[:STRENGTH][@LAYER[,LAYER]]; repeat for several.",
    ),
    click.option(
        "-i",
        "--instruction",
        "instructions",
        multiple=True,
        metavar="ID_OR_TEXT",
        shell_complete=completed.instructions,
        help="Steer by the vector of this instruction, made on first use: an id of the catalogue, "
        "or your own words.",
    ),
)

settings = all_of(
    click.option("--layer", type=Layers(), metavar="LAYERS", help="Layers to steer: 12, 3,4 or 3-5."),
    click.option("--mode", type=click.Choice(MODES), help="What is done to the residual stream."),
    click.option("--positions", type=click.Choice(POSITIONS), help="Which tokens are steered."),
    click.option("--strength", type=Finite(), metavar="X", help="1 is the full effect, 0 none."),
)

always_steer = click.option(
    "--always-steer",
    is_flag=True,
    help="Apply a vector even if the prompt already asks for the same and its file says that it "
    "then does harm; an "
    "explicit strength does the same.",
)

ridge = click.option(
    "--ridge",
    type=float,
    default=0.0,
    metavar="X",
    help="Allow nearly parallel vectors at one layer; try 0.1. [default: 0]",
)

raw = click.option("--raw", is_flag=True, help="Send the prompt as it is, without the chat template.")


def reply_length(default: int, whose: str = "the") -> Callable[[Command], Command]:
    """`-n` as `predict`. whose: `the` reply, or `a` reply if there are many."""
    return click.option(
        "-n",
        "--predict",
        "--n-predict",
        type=click.IntRange(min=-1),
        default=default,
        metavar="N",
        help=f"At most this many tokens in {whose} reply; -1 = until the context is full. "
        f"[default: {default}]",
    )


def stop(whose: str = "the") -> Callable[[Command], Command]:
    return click.option(
        "-r",
        "--reverse-prompt",
        "--stop",
        "stop",
        multiple=True,
        metavar="TEXT",
        help=f"End {whose} reply before TEXT.",
    )


steer_forms = click.option(
    "--steer-forms",
    is_flag=True,
    help="Also steer what is generated under --json-schema or --grammar, which otherwise stays plain.",
)

instruction_data = all_of(
    click.option(
        "--catalog",
        metavar="TOML",
        help="Instructions and queries: your own file, `general` or `bundled`. "
        "[default: bundled for the bundled model, else general]",
    ),
    click.option(
        "--slot",
        "slots",
        type=Slot(),
        multiple=True,
        metavar="NAME=VALUE",
        help="Fill a {slot} of the instruction.",
    ),
    click.option("--queries", type=click.Path(), metavar="TXT", help="Your own base queries, one per line."),
    click.option(
        "--pairs", type=click.IntRange(min=1), metavar="N", help="Prompt pairs to extract from. [default: 50]"
    ),
)
