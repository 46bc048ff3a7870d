"""localsteer in lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness): the model
`localsteer`, plain or steered.

    python -m localsteer.plugins.harness run --model localsteer --model_args model=smol,steer=json --tasks ...

The harness knows only models that have been registered, and does not search for others. This module therefore
registers `localsteer` and starts the harness's program. A Python program imports it before
`lm_eval.simple_evaluate(model="localsteer")`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lm_eval.models  # noqa: F401 - registers the harness's own, which it does only where there are none yet
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from localsteer.cli.console import in_one_line
from localsteer.cli.models import load_engine
from localsteer.errors import LocalsteerError, PromptError
from localsteer.runtime.ask import Ask
from localsteer.runtime.forward import log_probabilities
from localsteer.runtime.generate import stream_batch
from localsteer.runtime.likelihood import Likelihood, Row
from localsteer.runtime.sampling import Sampling

from .steered import SteeredModel, SteeringWords, listed_names, one_kind_of_error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Encoded = tuple[Any, Sequence[int], Sequence[int]]

MAX_GEN_TOKS = 256
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one counts
DRAWN = ("temperature", "top_p", "top_k", "min_p", "seed")
BATCH = 2048  # tokens of one decode, and so of one text that is scored
ARGUMENTS = (
    "model", "steer", "strength", "layer", "mode", "positions", "ctx_size", "threads", "gpu_layers",
    "batch_size", "max_gen_toks",
)  # fmt: skip
LOADING = {"ctx_size": 0, "threads": 1, "gpu_layers": None}  # with the least value
AT_ONCE = 16  # texts in one decode
ROWS_AT_ONCE = 256  # between two moves of the progress bar
# what the harness hands to every model, and llama.cpp settles for itself
IGNORED = ("device", "max_batch_size")


@register_model("localsteer")
class HarnessModel(TemplateLM):
    """model: as for `-m`. steer: `json`, `json+lowercase`, vector files; strength, layer, mode and positions
    override their settings. Steering is applied to every text, whatever it asks, since a benchmark's figure
    is that of the vector. batch_size: texts in one decode. Raises LocalsteerError.

    positions: the prompt is everything before the continuation or the reply.
    """

    def __init__(
        self,
        model: str = "bundled",
        steer: str | Sequence[str] | None = None,
        batch_size: int | str = AT_ONCE,
        max_gen_toks: int = MAX_GEN_TOKS,
        **settings: Any,
    ) -> None:
        super().__init__()
        loading = {name: _whole(name, settings.pop(name, None), least) for name, least in LOADING.items()}
        words = {name: settings.pop(name, None) for name in ("strength", "layer", "mode", "positions")}
        unknown = settings.keys() - set(IGNORED)
        if unknown:
            raise LocalsteerError(f"model_args: there is no {min(unknown)!r}: {', '.join(ARGUMENTS)}.")
        words["strength"] = _number("strength", words["strength"])
        self.name, self.max_gen_toks = str(model), _whole("max_gen_toks", max_gen_toks, 1)
        is_auto = batch_size is None or str(batch_size).startswith("auto")
        n_seq_max = AT_ONCE if is_auto else _whole("batch_size", batch_size, 1)
        source = SteeredModel(self.name, **loading)
        self.vectors, _checked = source.vectors(SteeringWords(listed_names(steer), **words))
        with one_kind_of_error():
            self.engine = load_engine(self.name, **source.loading, n_seq_max=n_seq_max, n_batch=BATCH)
            self.plan = self.engine.plan(self.vectors)
        self._likelihood = Likelihood(self.engine, measure=score_and_greedy)

    # -- tokens and templates ----------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.engine.model.eos

    @property
    def prefix_token_id(self) -> int:
        bos = self.engine.model.bos
        return bos if bos is not None and bos >= 0 else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Tokens that are read at once; of a longer text, the last ones."""
        return min(self.engine.n_ctx, self.engine.context.n_batch, self.engine.n_cells)

    @property
    def tokenizer_name(self) -> str:
        return f"{self.engine.path.name}-{self.engine.template.template_hash[:12]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if isinstance(chat_template, str) and chat_template:
            raise LocalsteerError(
                f"{self.name} has only one chat template, and none called {chat_template!r}."
            )
        return self.engine.template.template or "" if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not any(message.get("content") for message in chat_history):
            return ""  # of a task that scores whole texts, which has no prompts
        return self.engine.render(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_more: Any) -> list[int]:
        if add_special_tokens is False:
            return self.engine.model.tokenize(string, add_special=False, parse_special=True)
        return self.engine.rendered_tokens(string)

    # -- what the harness asks ---------------------------------------------------------------------

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        for number, pair in enumerate(request.args for request in requests):
            for part in pair:
                if not isinstance(part, str):
                    raise PromptError(f"loglikelihood, request {number}: {part!r:.80} is no text.")
            if not pair[1]:
                raise PromptError(
                    f"loglikelihood, request {number}: the continuation is empty, which leaves nothing to "
                    "score: correct the task's target."
                )
        return super().loglikelihood(requests, disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context.strip():
            return super()._encode_pair(context, continuation)
        # blanks at the end of a context belong to the continuation, which leaves none
        return [self.prefix_token_id], self.tok_encode(context + continuation, add_special_tokens=False)

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **_more: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm) as bar:
            for start in range(0, len(requests), ROWS_AT_ONCE):
                part = requests[start : start + ROWS_AT_ONCE]
                rows = [self._row(context, continuation) for _key, context, continuation in part]
                for (key, _context, _continuation), scores in zip(part, self._likelihood(rows), strict=True):
                    found.append((float(scores[:, 0].sum()), bool(scores[:, 1].all())))
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, found[-1])
                bar.update(len(part))
        return found

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> Row:
        """The row to score, cut at its beginning if it does not fit. Raises PromptError for a continuation
        that is too long."""
        room = self.max_length + 1 - len(continuation)  # the last token is scored, and never read
        if room < 1:
            raise PromptError(
                f"a continuation of {len(continuation)} tokens does not fit into the {self.max_length} that "
                "can be read at once: raise ctx_size."
            )
        return Row(list(context)[-room:], list(continuation), self.plan)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm):
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False) if text else [],
                self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            encoded = [(None, *make_disjoint_window(window)) for window in windows]
            scores = self._loglikelihood_tokens(encoded, disable_tqdm=True)
            totals.append(sum(score for score, _greedy in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asks = [self._ask(*request.args) for request in requests]
        replies = [""] * len(asks)
        with tqdm(total=len(asks), desc="Generating", disable=disable_tqdm) as bar:
            for index, reply in stream_batch(self.engine, asks):
                replies[index] = reply.text
                self.cache_hook.add_partial("generate_until", requests[index].args, reply.text)
                bar.update()
        return replies

    def _ask(self, context: str, settings: Mapping[str, Any]) -> Ask:
        settings = dict(settings)
        until = settings.pop("until", None) or ()
        lengths = [settings.pop(name, None) for name in LENGTHS]
        most = next(
            (_whole("max_gen_toks", length, 0) for length in lengths if length is not None), self.max_gen_toks
        )
        sampled = settings.pop("do_sample", None)
        drawn = {name: _drawn(name, settings.pop(name)) for name in DRAWN if settings.get(name) is not None}
        if settings:
            raise LocalsteerError(f"generation_kwargs: {min(settings)!r} is not supported: leave it out.")
        temperature = drawn.pop("temperature", 1.0 if sampled else 0.0)
        tokens = self.tok_encode(context) if context else [self.prefix_token_id]
        room = self.engine.n_ctx - most
        if room < 1:
            raise LocalsteerError(
                f"max_gen_toks {most} leaves no room for a prompt in a context of {self.engine.n_ctx} tokens."
            )
        return Ask(
            tokens=tokens[-room:],
            steer=self.plan or (),
            max_tokens=most,
            stop=_stops(until),
            sampling=Sampling(temp=temperature if sampled is not False else 0.0, **drawn),
        )


def _number(name: str, value: Any, kind: type[int] | type[float] = float) -> Any:
    """What may have come as text. None stays None. Raises LocalsteerError."""
    if value is None:
        return None
    try:
        made = kind(value)
        if isinstance(value, bool) or (isinstance(value, float) and made != value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        what = "whole number" if kind is int else "number"
        raise LocalsteerError(f"{name} must be a {what}, not {value!r:.80}.") from None
    return made


def _whole(name: str, value: Any, least: int | None = None) -> Any:
    made = _number(name, value, int)
    if made is not None and least is not None and made < least:
        raise LocalsteerError(f"{name} must be {least} or more, not {made}.")
    return made


def _drawn(name: str, value: Any) -> Any:
    return _number(name, value, int if name in ("top_k", "seed") else float)


def _stops(until: Any) -> list[str]:
    """Raises LocalsteerError for what is neither a text nor a list of them."""
    texts = [until] if isinstance(until, str) else list(until) if isinstance(until, (list, tuple)) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise LocalsteerError(f"until must be a text, or a list of texts, not {until!r:.80}.")
    return [text for text in texts if text]


def score_and_greedy(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(n, 2) float64: the log-probability of each token, and 1 if it is the likeliest, else 0."""
    greedy = logits.argmax(axis=1) == tokens
    return np.stack([log_probabilities(logits, tokens), greedy.astype(np.float64)], axis=1)


def main() -> int:
    """Run the harness's program, which then knows `--model localsteer`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LocalsteerError as error:
        print(f"localsteer: {in_one_line(error)}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
