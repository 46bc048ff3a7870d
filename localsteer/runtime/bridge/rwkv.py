"""What llama.cpp's RWKV tokenizer can't spell. It takes the longest token at each byte; if tokens begin with
that byte but none matches, it goes back to the beginning of the text, again and again until memory runs
out."""

from __future__ import annotations

import re
from collections.abc import Iterable


class Spellings:
    """tokens: the whole vocabulary, as bytes. special: tokens at which a text is split before tokenizing."""

    def __init__(self, tokens: Iterable[bytes], special: Iterable[bytes]) -> None:
        self._tokens = frozenset(filter(None, tokens))
        self._longest = max(map(len, self._tokens), default=0)
        # in a complete vocabulary every byte is a token, and nothing can go wrong
        self._is_whole = all(bytes([byte]) in self._tokens for byte in range(256))
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self._special = re.compile(b"|".join(map(re.escape, longest_first)) or b"(?!)")

    def unknown(self, text: bytes) -> str | None:
        """The first character of a UTF-8 text that no token spells, or None."""
        for part in () if self._is_whole else self._special.split(text):
            at = 0
            while at < len(part):
                ends = range(min(self._longest, len(part) - at), 0, -1)
                n = next((n for n in ends if part[at : at + n] in self._tokens), 0)
                if not n:
                    return part[at:].decode("utf-8", "replace")[0]
                at += n
        return None
