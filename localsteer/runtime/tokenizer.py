"""Converts between text and tokens of one model: prompts, through its chat template, and the text of
tokens."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..constrain import END, TokenBytes
from ..errors import ModelFileError, PromptError
from ..templates import DROPS_WORDS, NO_TEMPLATE, ChatTemplate, Message
from ..token_choice import tokens_of_part

if TYPE_CHECKING:
    from .ask import Prompt
    from .attach import Notices
    from .bridge import Model

TOOL_USE = "tokenizer.chat_template.tool_use"  # a template with this name, beside the default one


class Tokenizer:
    """name: of the model's file, for messages. plain_prompts: see Engine. It must not hold its engine."""

    def __init__(self, model: Model, name: str, notice: Notices, *, plain_prompts: bool = False) -> None:
        self._model, self._name, self._notice = model, name, notice
        self._pieces: dict[int, bytes] = {}
        self._ends: dict[int, bool] = {END: True}
        self._token_bytes: TokenBytes | None = None
        self._lock = threading.Lock()
        self.template = ChatTemplate(
            None if plain_prompts else model.chat_template,
            bos=self._special_text(model.bos),
            eos=self._special_text(model.eos),
            tool_use=None if plain_prompts else model.metadata.get(TOOL_USE),
        )

    def prompt_tokens(self, prompt: Prompt, raw: bool) -> list[int]:
        if raw and not isinstance(prompt, str):
            raise PromptError("a raw prompt is one text: messages need the chat template.")
        if raw and not prompt:
            raise PromptError("the prompt is empty: it needs a text to continue.")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.rendered_tokens(prompt if raw else self.render(messages))

    def check_template(self) -> None:
        if self.template.is_fallback and not self._model.chat_template:
            self._notice(NO_TEMPLATE.format(self._name))
        if not self.template.keeps_words:
            raise ModelFileError(DROPS_WORDS.format(self._name))

    def render(self, messages: Sequence[Message], **settings: Any) -> str:
        self.check_template()
        return self.template.render(messages, **settings)

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text that a template rendered; a vector's probe may be empty, a prompt may not."""
        add_special = self.template.adds_special(text)
        return self._model.tokenize(text, add_special=add_special, parse_special=True)

    def rendered_tokens(self, text: str) -> list[int]:
        tokens = self.tokenize(text)
        if not tokens:
            raise PromptError("the prompt is empty: it has no tokens.")
        return tokens

    def find_part(self, tokens: Sequence[int], part: str) -> range | None:
        # with the text of special tokens, so that parts of the template can be named too
        return tokens_of_part([self._model.token_to_piece(token, special=True) for token in tokens], part)

    def piece(self, token: int) -> bytes:
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._model.token_to_piece(token)
        return known

    def ends(self, token: int) -> bool:
        known = self._ends.get(token)
        if known is None:
            known = self._ends[token] = self._model.is_eog(token)
        return known

    @property
    def token_bytes(self) -> TokenBytes:
        with self._lock:
            if self._token_bytes is None:
                self._token_bytes = TokenBytes(self._model.pieces(), self._model.ends())
            return self._token_bytes

    def _special_text(self, token: int | None) -> str:
        if token is None or token < 0:
            return ""
        return self._model.token_to_piece(token, special=True).decode("utf-8", "replace")
