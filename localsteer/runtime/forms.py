"""Which parts of a reply are in a form that a program parses: a tool call, or all of it under a constraint.

Steering changes what is said. Inside a form it would change brackets and quotes too, and break the call.
"""

from __future__ import annotations

# How models begin a call -> how they end it; other calls continue to the end of the reply. docs/clients.md
CALLS = {
    b"<tool_call>": b"</tool_call>",
    b"<function=": b"</function>",
    b"[TOOL_CALLS]": None,
    b"<|python_tag|>": None,
}
OPENERS = b"{["  # a reply that begins like this may be a call by itself
_LONGEST = max(len(mark) for pair in CALLS.items() for mark in pair if mark)


class FormWatch:
    """Follows the bytes of a reply, token by token; `inside` says whether the next token is inside a form.

    forced: the whole reply is.
    """

    def __init__(self, forced: bool) -> None:
        self.inside = forced
        self._ends_by: bytes | None = None
        self._is_new = True  # nothing but white space so far
        self._tail = b""

    def push(self, piece: bytes) -> bool:
        """Take in the next token's bytes. Returns whether the next token may be inside a form; if a mark
        takes several tokens, the rest of it counts as inside."""
        if self.inside and self._ends_by is None:
            return True
        text = self._tail + piece
        if self._is_new and text.strip():
            self._is_new = False
            if text.lstrip()[:1] in (OPENERS[:1], OPENERS[1:]):
                self.inside = True
                return True
        text = self._cross_marks(text)
        self._tail = text[-(_LONGEST - 1) :]
        return self.inside or _begins_mark(self._tail)

    def _cross_marks(self, text: bytes) -> bytes:
        """Enter and leave forms by the marks in a text; returns what follows the last mark."""
        while True:
            marks = [self._ends_by] if self.inside else list(CALLS)
            places = [(at, mark) for mark in marks if mark and (at := text.find(mark)) >= 0]
            if not places:
                return text
            at, mark = min(places)
            text = text[at + len(mark) :]
            self._ends_by = None if self.inside else CALLS[mark]
            self.inside = not self.inside


def _begins_mark(text: bytes) -> bool:
    """Whether a text ends with the beginning of a mark."""
    return any(text.endswith(mark[:n]) for mark in CALLS for n in range(1, min(len(mark), len(text) + 1)))
