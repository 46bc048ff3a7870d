"""Where a reply is written in a form that a program parses: a tool call, or all of it under a constraint.

Steering changes what is said. Inside of a form it changes brackets and quotes as well, and the call is lost.
"""

from __future__ import annotations

# How models begin a call, and how they end it; the others go on to the end of the reply. docs/server.md
CALLS = {
    b"<tool_call>": b"</tool_call>",
    b"<function=": b"</function>",
    b"[TOOL_CALLS]": None,
    b"<|python_tag|>": None,
}
OPENERS = b"{["  # a reply that begins so may be a call by itself
_LONGEST = max(len(mark) for pair in CALLS.items() for mark in pair if mark)


class FormWatch:
    """Told of a reply's bytes token by token; `inside` says whether what comes next stands in a form.

    forced: all of it does.
    """

    def __init__(self, forced: bool) -> None:
        self.inside = forced
        self._ends_by: bytes | None = None
        self._is_new = True  # nothing but white space so far
        self._tail = b""

    def push(self, piece: bytes) -> bool:
        """Take in the next token's bytes. Returns whether what comes next may stand in a form: where a mark
        takes several tokens, the rest of it does."""
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
        """Go in and out by the marks in a text; what follows the last of them."""
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
    """Whether the end of a text is the beginning of a mark."""
    return any(text.endswith(mark[:n]) for mark in CALLS for n in range(1, min(len(mark), len(text) + 1)))
