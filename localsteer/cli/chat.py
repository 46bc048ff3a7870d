"""`localsteer chat`: a conversation in the terminal, steered differently from turn to turn."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localsteer.errors import HostError, LocalsteerError, PromptError

from . import interrupt, options
from .console import answer, note, print_json, progress, shown, table
from .models import load_engine, model_file, own_sampling, set_variables
from .options import Params
from .vector_spec import VectorSpec, with_own_strength

if TYPE_CHECKING:
    from localsteer.chat import Chat
    from localsteer.runtime.sampling import Sampling
    from localsteer.vector import ControlVector

N_SEQ_MAX = 2  # /compare answers twice at once
EXTRA = 'chat in a terminal needs prompt_toolkit: pip install "localsteer[chat]".'
GREETING = "/help lists the commands, Alt-Enter starts a new line, Ctrl-D quits."


@click.command("chat", short_help="Chat with a model, and change its steering from turn to turn.")
@options.model
@options.vectors
@click.option("--vectors", "folder", metavar="DIR", help="A folder of vector files that /steer can name.")
@click.option(
    "--ensure",
    "ensured",
    multiple=True,
    metavar="NAME",
    help="Steer by this only if the plain reply fails its verifier.",
)
@click.option(
    "--tries",
    type=click.IntRange(min=1),
    default=3,
    metavar="N",
    help="At most this many replies with --ensure, including the plain one. [default: 3]",
)
@click.option(
    "--keep-cache",
    is_flag=True,
    help="Don't recompute what the model has already read when the steering changes.",
)
@options.settings
@options.always_steer
@options.ridge
@options.steer_forms
@click.option("--system", "-sys", metavar="TEXT", help="A system message before the conversation.")
@options.reply_length(512, "a")
@options.stop("a")
@options.sampling
@options.template_variables
@options.engine
@options.rpc
@options.instruction_data
@click.option("--no-history", is_flag=True, help="Don't save the lines you type in the cache folder.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON document on stdout at the end, instead of replies.",
)
def command(
    model: str,
    specs: tuple[str, ...],
    instructions: tuple[str, ...],
    ensured: tuple[str, ...],
    as_json: bool,
    **params: Any,
) -> None:
    """Chat with a model. A line that begins with a slash is a command: /steer json:0.8 steers from the next
    reply on, /compare answers the last question plain and steered, /help lists all commands.

    New steering applies to the whole conversation so far, which the model reads again under it. Ctrl-C stops
    a reply, Ctrl-D quits. Without a terminal, each line of the standard input is a question or a command.

    \b
    Examples:
      localsteer chat --instruction json
      localsteer chat -m MODEL.gguf -s json.gguf:0.8 --vectors vectors/
      printf '%s\\n' "Tell me about foxes." "/steer json" "And hares?" | localsteer chat --temp 0
    """
    from localsteer.stores import is_stored_name

    from .run import load_vectors, sampling_of, stays_plain, tell_of_forms, vector_of

    lines = _piped_lines() if not sys.stdin.isatty() else None
    if lines is None:
        _require_prompt_toolkit()
    sampling = sampling_of(own_sampling(model, params))
    plain_forms = stays_plain(sampling, params["steer_forms"])
    names = [Path(VectorSpec.parse(spec).path).stem for spec in specs]
    vectors = load_vectors(specs, params)
    insisted = with_own_strength(specs, vectors)
    loading = {name: params[name] for name in options.LOADING}
    shelf = Shelf(model, params, loading)
    shelf.add_folder(params["folder"])
    vectors += [vector_of(model, text, params, loading) for text in instructions]
    names += [vector.name for vector in vectors[len(names) :]]
    model_file(model)  # a bundled model that does not exist yet is made here, not in the chat's thread
    with _opened(model, sampling, params, loading, plain_forms) as chat:
        set_variables(chat.engine, params["variables"])
        chat.engine.check_template()  # before the first question is typed
        session = Session(chat, shelf, quiet=as_json, piped=lines is not None)
        session.begin(names, vectors, ensured, insisted)
        if plain_forms:
            tell_of_forms(vectors)
        if lines is None:
            note(f"{model if is_stored_name(model) else chat.engine.path.name}: {GREETING}")
            lines = _typed_lines(session, None if params["no_history"] else _history_file())
        session.run(lines)
        if as_json:
            print_json(chat.document())


def _opened(model: str, sampling: Sampling, params: Params, loading: Params, plain_forms: bool) -> Chat:
    from localsteer.chat import Chat

    return Chat(
        partial(load_engine, model, **loading, as_asked=True, n_seq_max=N_SEQ_MAX),
        sampling=sampling,
        max_tokens=None if params["predict"] < 0 else params["predict"],
        always_steer=params["always_steer"] or params["strength"] is not None,
        plain_forms=plain_forms,
        on_note=note,
        **{name: params[name] for name in ("system", "stop", "ridge", "keep_cache", "tries")},
    )


class Shelf:
    """Vectors that the user may name and that are not loaded yet."""

    def __init__(self, model: str, params: Params, loading: Params) -> None:
        self.model, self.given, self.loading = model, params, loading
        self.files: dict[str, Path] = {}

    def add_folder(self, folder: str | None) -> None:
        """Add the vector files of a folder, by name without the suffix."""
        if folder is None:
            return
        if not Path(folder).is_dir():
            raise click.UsageError(f"--vectors {folder}: there is no such folder.")
        self.files = {path.stem: path for path in sorted(Path(folder).glob("*.gguf"))}
        if not self.files:
            raise click.UsageError(f"--vectors {folder}: the folder has no vector file (*.gguf).")

    def find(self, name: str) -> tuple[str, ControlVector] | None:
        """(name, vector) of a file in the folder, a file by its path, or an instruction of the catalogue."""
        from localsteer.vector import ControlVector

        from .models import catalog_of
        from .run import SETTINGS, vector_of

        settings = {key: self.given[key] for key in SETTINGS}
        path = self.files.get(name) or Path(name)
        if path.is_file():
            return path.stem, ControlVector.load(path).at(**settings)
        if name in catalog_of(self.model, self.given["catalog"]).instructions:
            return name, vector_of(self.model, name, self.given, self.loading)
        return None


class Session:
    """Takes lines, and prints replies and notes. quiet: no replies on stdout. piped: there is nobody who
    could ask again. Commands are its methods `do_NAME`."""

    def __init__(self, chat: Chat, shelf: Shelf, *, quiet: bool = False, piped: bool = False) -> None:
        self.chat, self.shelf, self.quiet, self.piped = chat, shelf, quiet, piped
        self.left = False

    def begin(
        self,
        names: list[str],
        vectors: list[ControlVector],
        ensured: tuple[str, ...],
        insisted: Sequence[ControlVector] = (),
    ) -> None:
        """Steer by the vectors of the command line; a name in use gets a number. insisted: those for which
        the user set a strength."""
        for name, vector in zip(names, vectors, strict=True):
            again = sum(known.partition("#")[0] == name for known in self.chat.vectors)
            unique = f"{name}#{again + 1}" if again else name
            self.chat.add(unique, vector)
            self.chat.steer(unique, strength=vector.strength if vector in insisted else None)
        if ensured:
            self.chat.ensure(*map(self._find, ensured))

    def run(self, lines: Iterator[str]) -> None:
        """Handle the lines in turn; a bad one gives one line on stderr, and Ctrl-C stops only what runs.

        Raises PromptError if a pipe begins with a question that can't be asked, for instance because the
        context is small, and HostError if, in a pipe, the model loses a host.
        """
        for line in lines:
            try:
                self._take(line)
            except (LocalsteerError, click.ClickException) as error:
                ends = HostError if self.chat.turns else (HostError, PromptError)
                if self.piped and isinstance(error, ends):
                    raise
                note(
                    " ".join(
                        (error.message if isinstance(error, click.ClickException) else str(error)).split()
                    )
                )
            except KeyboardInterrupt:
                note("stopped.")
            interrupt.forgive()
            if self.left:
                return

    def _take(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].strip().partition(" ")
            act = COMMANDS.get(name)
            if act is None:
                raise LocalsteerError(
                    f"unknown command /{name}: /help lists them; write // to begin a question with /."
                )
            act(self, rest.strip())
        elif line.strip():
            self._ask(line[1:] if line.startswith("//") else line)

    def _ask(self, question: str) -> None:
        last = "\n"

        def write(text: str) -> None:
            nonlocal last
            last = text
            if not self.quiet:
                sys.stdout.write(shown(text))
                sys.stdout.flush()

        notes: list[str] = []
        tell, self.chat.on_note = (
            self.chat.on_note,
            lambda text: notes.append(text) if last != "\n" else tell(text),
        )
        try:
            turn = self.chat.ask(question, on_text=write)
        finally:
            self.chat.on_note = tell
            if not last.endswith("\n") and not self.quiet:
                click.echo()
        for text in notes:
            note(text)
        if turn.finish_reason == "cancelled":
            note("the reply was stopped.")

    # -- commands -----------------------------------------------------------------------------------

    def do_steer(self, text: str) -> None:
        """NAME[:STRENGTH][@LAYER] ...: steer by these too, or change their settings."""
        for spec in map(VectorSpec.parse, self._words(text, "/steer NAME, as in /steer json:0.8")):
            vector = self.chat.steer(self._find(spec.path), strength=spec.strength, layer=spec.layers)
            note(f"steering by {_described(vector)}.")

    def do_unsteer(self, text: str) -> None:
        """[NAME ...]: leave these out; without a name, all."""
        names = self.chat.unsteer(*text.split())
        note(f"no longer steering by {', '.join(names)}." if names else "there was no steering.")

    def do_vectors(self, text: str) -> None:
        """List the available vectors, and those that steer."""
        chat = self.chat
        rows = table("vector", "", "strength", "layers", "positions", "mode", numbers=("strength",))
        for name, known in chat.vectors.items():
            vector = chat.active.get(name, known)
            state = "steers" if name in chat.active else "ensured" if name in chat.ensured else ""
            layers = ",".join(map(str, vector.layers))
            rows.add_row(name, state, f"{vector.strength:g}", layers, vector.positions, vector.mode)
        for name in self.shelf.files:
            if name not in chat.vectors:
                rows.add_row(name, "", "", "", "", "")
        answer().print(
            rows if rows.row_count else "no vectors yet: /steer takes a file, or the name of an instruction."
        )

    def do_strength(self, text: str) -> None:
        """[NAME] X: set the strength of one steering vector, or of all."""
        *name, value = self._words(text, "/strength 0.8, or /strength json 0.8", most=2)
        self._change(name, strength=value)

    def do_positions(self, text: str) -> None:
        """[NAME] all|prompt|last|generation: set the positions of one steering vector, or of all."""
        *name, value = self._words(text, "/positions prompt, or /positions json prompt", most=2)
        self._change(name, positions=value)

    def do_ensure(self, text: str) -> None:
        """[NAME ...]: steer by these only if a reply fails its verifier; without a name, off."""
        self.chat.ensure(*map(self._find, text.split()))
        names = ", ".join(self.chat.ensured)
        note(f"{names}: steering only if the plain reply fails." if names else "ensuring nothing.")

    def do_compare(self, text: str) -> None:
        """Answer the last question again, plain and steered side by side."""
        plain, steered = self.chat.compare()
        columns = table("plain", " + ".join(map(_described, self.chat.active.values())))
        for column in columns.columns:
            column.ratio = 1
        columns.expand = True
        columns.add_row(shown(plain.text), shown(steered.text))
        answer().print(columns)

    def do_trace(self, text: str) -> None:
        """Show what steering did to the last reply, token by token."""
        from localsteer.trace.terminal import print_trace

        with progress("tracing") as on_progress:
            traced = self.chat.trace(on_progress)
        print_trace(traced, answer())

    def do_save(self, text: str) -> None:
        """FILE: write the conversation, with the steering of each turn, as JSON."""
        (path,) = self._words(text, "/save FILE", most=1)
        self.chat.save(path)
        note(f"wrote {path}: {_turns(len(self.chat.turns))}.")

    def do_load(self, text: str) -> None:
        """FILE: continue a saved conversation instead of this one."""
        (path,) = self._words(text, "/load FILE", most=1)
        self.chat.load(path)
        steering = ", ".join(map(_described, self.chat.active.values())) or "nothing"
        note(f"read {path}: {_turns(len(self.chat.turns))}; steering by {steering}.")

    def do_undo(self, text: str) -> None:
        """Remove the last question and its reply."""
        turn = self.chat.undo()
        note(f"removed {_short(turn.question)!r}; {_turns(len(self.chat.turns))} left.")

    def do_clear(self, text: str) -> None:
        """Forget the conversation; steering stays."""
        note(f"forgot {_turns(self.chat.clear())}.")

    def do_help(self, text: str) -> None:
        """List the commands."""
        commands = table("command", "")
        for name, act in COMMANDS.items():
            what, colon, rest = (act.__doc__ or "").strip().partition(": ")
            usage, said = (f"/{name} {what}", rest) if colon else (f"/{name}", what)
            commands.add_row(usage, said[:1].upper() + said[1:])
        answer().print(commands)

    def do_quit(self, text: str) -> None:
        """Quit, as Ctrl-D does."""
        self.left = True

    def _change(self, name: list[str], **settings: Any) -> None:
        for changed in self.chat.change(*name, **settings):
            note(f"steering by {_described(self.chat.active[changed])}.")

    def _find(self, name: str) -> str:
        """Load a vector if it is new, and return its name in this chat. Raises LocalsteerError."""
        if name in self.chat.vectors:
            return name
        shelved = self.shelf.find(name)
        if shelved is None:
            known = [*dict.fromkeys([*self.chat.vectors, *self.shelf.files])]
            raise LocalsteerError(
                f"there is no vector {name!r}: choose {', '.join([*known, 'a file'])}, or an instruction of "
                "the catalogue."
            )
        stem, vector = shelved
        unique = name if stem in self.chat.vectors else stem  # another file of the same name
        self.chat.add(unique, vector)
        return unique

    @staticmethod
    def _words(text: str, usage: str, most: int = 100) -> list[str]:
        try:
            words = shlex.split(text) if os.name == "posix" else text.split()
        except ValueError:
            words = []
        if not 1 <= len(words) <= most:
            raise LocalsteerError(f"write {usage}.")
        return words


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    name.removeprefix("do_"): act for name, act in vars(Session).items() if name.startswith("do_")
}


def _described(vector: ControlVector) -> str:
    layers = ",".join(map(str, vector.layers))
    return f"{vector.name}:{vector.strength:g}@{layers} {vector.mode} {vector.positions}"


def _turns(n: int) -> str:
    return "1 turn" if n == 1 else f"{n} turns"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else f"{line[:37]}..."


# --- where lines come from ---------------------------------------------------------------------------------


def _piped_lines() -> Iterator[str]:
    """Yields the lines of the standard input as they arrive."""
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            note(f"line {number} of the standard input is not UTF-8 text (byte {error.start}): skipped.")


def _require_prompt_toolkit() -> None:
    try:
        import prompt_toolkit  # noqa: F401
    except ImportError:
        raise LocalsteerError(EXTRA) from None


def _history_file() -> Path | None:
    """The history file, readable only by its owner; None if the cache folder can't be written."""
    from localsteer.cache import cache_folder

    try:
        path = cache_folder() / "chat-history"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except (OSError, LocalsteerError):
        return None
    return path if path.is_file() else None


def _typed_lines(session: Session, history: Path | None) -> Iterator[str]:
    """Yields lines from the terminal, with editing, history and completion, until Ctrl-D."""
    from .chat_prompt import Prompt

    prompt = Prompt(session.chat, session.shelf, list(COMMANDS), history)
    while True:
        with suppress(KeyboardInterrupt):
            try:
                yield prompt.ask()
            except EOFError:
                return
