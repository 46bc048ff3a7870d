"""Help: at once, for every command, with an example."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from cli_runs import invoke, program

from localsteer.cli import localsteer
from localsteer.cli.main import COMMANDS

HEAVY = ("torch", "transformers", "llama_cpp", "numpy", "gguf", "matplotlib", "rich")
CHECKOUT = Path(__file__).parents[1]


def commands(command: click.Command = localsteer, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        with click.Context(command) as context:
            for name in command.list_commands(context):
                yield from commands(command.get_command(context, name), (*path, name))


ALL = list(commands())


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_loads_nothing_heavy(path):
    code = (
        "import sys\nfrom localsteer.cli import main\n"
        f"try: main({[*path, '--help']!r})\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("\n[]\n"), done.stdout[-300:] + done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_has_a_worked_example(path):
    text = invoke(*path, "--help").out
    assert f"  {' '.join(('localsteer', *path))}" in text.replace("Usage: localsteer", "")


@pytest.mark.parametrize("path", [(), ("convert",)], ids=["localsteer", "convert"])
def test_a_command_left_out_brings_the_help_as_it_is(path):
    done = invoke(*path)
    # click before 8.2 takes it for a wish, and prints the help as an answer
    assert (done.err or done.out).rstrip() == invoke(*path, "--help").out.rstrip()
    assert done.status == (2 if done.err else 0)


@pytest.mark.parametrize("path", [path for path in ALL if path], ids=" ".join)
def test_every_command_takes_json_unless_it_only_holds_others(path):
    command = localsteer
    for name in path:
        with click.Context(command) as context:
            command = command.get_command(context, name)
    if isinstance(command, click.Group) and not command.invoke_without_command:
        return
    assert any("--json" in option.opts for option in command.params)


def test_every_command_has_its_own_file():
    folder = CHECKOUT / "localsteer" / "cli"
    if not folder.is_dir():
        pytest.skip("not run from a checkout")
    for names in COMMANDS.values():
        for name in names:
            assert (folder / f"{name}.py").is_file()


def test_choices_written_down_for_speed_are_those_of_the_library():
    from localsteer import bundled
    from localsteer.cli import convert, extract, models
    from localsteer.convert import CONVENTIONS
    from localsteer.convert.checkpoint import FTYPES

    assert convert.CONVENTIONS == CONVENTIONS
    assert set(convert.FTYPES) == set(FTYPES)
    assert models.is_bundled("bundled:" + bundled.DEFAULT_QUANT)
    torch_backend = pytest.importorskip("localsteer.extract.torch_backend")
    assert extract.DTYPES == torch_backend.DTYPES


def test_the_version_is_the_package_s():
    import localsteer as package

    assert invoke("--version").out == f"localsteer {package.__version__}\n"


def test_python_dash_m_is_the_same_program():
    run = program("--version")
    assert (run.status, run.err) == (0, "")
    assert run.out.startswith("localsteer ")
