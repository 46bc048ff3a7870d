"""The rooms of localsteer/ and what may lead where: docs/development.md draws them."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import localsteer.convert

ROOT = Path(localsteer.__file__).parent
CONVERT = Path(localsteer.convert.__file__).parent  # beside ROOT in an editable install
# A vector loads and saves itself, and the file format makes vectors: the one detour, inside two methods.
ALLOWED = {("localsteer.vector", "localsteer.convert")}
# From the ground up. A module imports from its own floor and from those below.
FLOORS = {
    "ground": (
        "errors", "terms", "jsonable", "cache", "catalog", "constrain", "vector", "convert", "plan",
        "steering", "interpreter", "templates", "rendering", "rendering_child", "heatmap", "asked",
        "model_header", "verify", "perplexity", "token_choice", "prompt_texts", "tool_calls",
    ),
    "torch": ("torch_arithmetic",),
    "vLLM": ("vllm",),  # where no llama.cpp is installed
    "runtime": ("runtime",),
    "doors": ("engine", "workers", "llama", "llama_cache", "scheduler", "generate"),
    "models": ("bundled", "stores", "model_names", "packs", "model_list"),
    "wings": ("extract", "states", "tune", "learn", "ensure", "trace", "chat", "server"),
    "evaluation": ("evaluate", "demo"),
    "command line": ("cli", "__main__", "plugins"),
}  # fmt: skip


LONGEST, MOST_PARAMETERS = 60, 6  # lines without the docstring; without self, *args and **kwargs
# What a user calls with many settings by name, a command's options, and what llama.cpp's own calls take.
WIDE = {
    "localsteer.chat.Chat.__init__", "localsteer.cli.convert.export_command",
    "localsteer.cli.convert.model_command", "localsteer.cli.similarity.command",
    "localsteer.cli.states.command", "localsteer.demo.run_demo", "localsteer.engine.Engine.__init__",
    "localsteer.ensure.ensure",
    "localsteer.evaluate.runner.run_conditions", "localsteer.evaluate.transfer.examine",
    "localsteer.extract.extract", "localsteer.extract.extract_from_texts", "localsteer.heatmap.png_heatmap",
    "localsteer.learn.examples.of_instruction", "localsteer.learn.examples.of_steered",
    "localsteer.learn.learning.learn", "localsteer.llama.SteeredLlama.__init__",
    "localsteer.plugins.mcp_tools.SteeringTools.complete", "localsteer.plugins.mcp_tools.SteeringTools.trace",
    "localsteer.runtime.bridge.context.Context.__init__", "localsteer.runtime.bridge.context.Context.decode",
    "localsteer.runtime.forward.passes", "localsteer.states.writing.write_states",
    "localsteer.trace.trace", "localsteer.trace.trace_tokens", "localsteer.tune.check.Check.__init__",
}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in ((ROOT, ["localsteer"]), (CONVERT, ["localsteer", "convert"])):
        for path in sorted(folder.rglob("*.py")):
            parts = [*package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that runs, inside functions too: what only a type checker reads is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from statements(child)


@cache
def imports(name: str) -> tuple[tuple[str, str], ...]:
    """(module, name taken from it) of every import from this package."""
    return tuple(imports_in(name))


def imports_in(name: str) -> Iterator[tuple[str, str]]:
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in statements(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield (inner, "") if inner in MODULES else (source, alias.name)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def graph() -> dict[str, set[str]]:
    """A function, so that what never runs these tests (another worker) does not read the sources."""
    return {
        name: {
            source
            for source, _ in imports(name)
            if source in MODULES and source != name and (name, source) not in ALLOWED
        }
        for name in MODULES
    }


def room(module: str) -> str:
    return module.split(".")[1]


def test_no_module_imports_itself_by_a_detour():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_private_name_is_taken_from_another_module():
    taken = [
        f"{name} takes {taken} from {source}"
        for name in MODULES
        for source, taken in imports(name)
        if source in MODULES and taken.startswith("_") and not taken.startswith("__")
    ]
    assert not taken


def test_every_room_is_on_a_floor():
    rooms = {room(name) for name in MODULES if "." in name}
    placed = {name for names in FLOORS.values() for name in names}
    assert rooms <= placed


def test_nothing_reaches_up():
    floor = {name: level for level, names in enumerate(FLOORS.values()) for name in names}
    up = [
        f"{name} ({list(FLOORS)[floor[room(name)]]}) imports {source} ({list(FLOORS)[floor[room(source)]]})"
        for name, sources in graph().items()
        for source in sources
        if "." in name and "." in source and floor[room(source)] > floor[room(name)]
    ]
    assert not up


def test_no_class_name_is_used_twice():
    places: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    assert not {name: found for name, found in places.items() if len(found) > 1}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """With their names from the module on; those inside others too."""

    def within(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            inner = f"{name}.{child.name}" if hasattr(child, "name") else name
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield inner, child
            yield from within(child, inner)

    for name, path in MODULES.items():
        yield from within(ast.parse(path.read_text("utf-8")), name)


def test_functions_are_short():
    def n_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        docstring = node.body[0] if ast.get_docstring(node) else None
        without = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
        return node.end_lineno - node.lineno + 1 - without

    assert not {name for name, node in functions() if n_lines(node) > LONGEST}


def test_functions_take_few_parameters():
    def n_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return sum(argument.arg not in ("self", "cls") for argument in given)

    assert {name for name, node in functions() if n_parameters(node) > MOST_PARAMETERS} == WIDE


def test_torch_is_imported_in_few_rooms_alone():
    importing = {
        name
        for name in MODULES
        for source, _ in imports(name)
        if source.split(".")[0] in ("torch", "transformers", "accelerate")
    }
    assert {room(name) for name in importing} <= {"extract", "learn", "torch_arithmetic", "vllm"}


@pytest.mark.parametrize(("old", "name"), [("scheduler", "Scheduler"), ("generate", "Sampling")])
def test_an_old_address_leads_to_the_same_class(old, name):
    with pytest.warns(DeprecationWarning, match=name):
        module = importlib.reload(importlib.import_module(f"localsteer.{old}"))
    assert getattr(module, name) is getattr(localsteer, name)
