"""The line editor of `localsteer chat`: prompt_toolkit with keys and completion for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.output import create_output

from .options import POSITIONS

if TYPE_CHECKING:
    from localsteer.chat import Chat

    from .chat import Shelf

LEAD, CONTINUED = "> ", ". "


class Prompt:
    """Reads one question or command at a time. Enter sends it; Alt-Enter, or a backslash before Enter, starts
    a new line; pasted lines stay together. Raises EOFError on Ctrl-D, KeyboardInterrupt on Ctrl-C."""

    def __init__(self, chat: Chat, shelf: Shelf, commands: Sequence[str], history: Path | None) -> None:
        kept: History = FileHistory(str(history)) if history else InMemoryHistory()
        self._session: PromptSession[str] = PromptSession(
            history=kept,
            completer=ChatCompleter(chat, shelf, commands),
            complete_while_typing=False,
            multiline=True,
            prompt_continuation=lambda _width, _line, _wrapped: CONTINUED,
            key_bindings=_keys(),
            # when replies go to a file, the editor stays on the terminal
            output=create_output(always_prefer_tty=True),
        )

    def ask(self) -> str:
        return self._session.prompt(LEAD)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: Any) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


class ChatCompleter(Completer):
    """Completes commands at the start of a line, and vectors, settings or files after them."""

    def __init__(self, chat: Chat, shelf: Shelf, commands: Sequence[str]) -> None:
        self._chat, self._shelf, self._commands = chat, shelf, commands
        self._paths = PathCompleter(expanduser=False)

    def get_completions(self, document: Document, complete_event: Any) -> Iterator[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, rest = text[1:].partition(" ")
        if not space:
            yield from _matching(self._commands, name)
        elif name in ("save", "load"):
            yield from self._paths.get_completions(Document(rest), complete_event)
        else:
            yield from _matching(self._words(name), rest.rpartition(" ")[2])

    def _words(self, command: str) -> list[str]:
        chat = self._chat
        words = {
            "steer": [*chat.vectors, *self._shelf.files],
            "ensure": [*chat.vectors, *self._shelf.files],
            "unsteer": [*chat.active],
            "strength": [*chat.active],
            "positions": [*POSITIONS, *chat.active],
        }
        return list(dict.fromkeys(words.get(command, [])))


def _matching(words: Sequence[str], start: str) -> Iterator[Completion]:
    for word in words:
        if word.startswith(start):
            yield Completion(word, start_position=-len(start))
