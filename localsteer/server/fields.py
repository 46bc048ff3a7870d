"""Every field of a request either works, is harmless, or is refused by name with 400.

What works is in schemas.py. The tables here cover the request models of OpenAI, llama-server and vLLM, and
what front ends made for Ollama send. An unknown field is refused, since it might have changed the reply.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..jsonable import JsonObject
from .errors import ApiError, shown

# These change what is stored or how the reply is computed, or add to the answer, but never change the reply.
HARMLESS: Mapping[str, tuple[str, ...]] = {
    "they say who asks and what to store, and nothing is stored here": (
        "user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key",
        "prompt_cache_retention", "request_id", "session_id", "chat_id", "message_id", "id",
    ),
    "they say how to compute the reply, which the server decides": (
        "prediction", "cache_prompt", "id_slot", "n_cache_reuse", "n_keep", "n_discard", "priority",
        "cache_salt", "kv_transfer_params", "backend_sampling", "guided_decoding_backend",
        "num_ctx", "num_keep", "num_batch", "num_thread", "num_gpu", "main_gpu", "low_vram", "numa",
        "use_mmap", "use_mlock", "keep_alive",
    ),
    "they ask for extras beside the reply, which this server does not return": (
        "timings_per_token", "return_progress", "verbose", "sse_ping_interval",
    ),
    "settings of something that is off here": (
        "mirostat_tau", "mirostat_eta", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
        "dry_sequence_breakers", "xtc_threshold", "dynatemp_exponent", "adaptive_decay",
        "preserved_tokens", "chat_format", "thinking_forced_open",
    ),
}  # fmt: skip
_HARMLESS_BEGINNING = "speculative."

# Other names of fields that work.
ALIASES = {
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "n_cmpl": "n",
    "repetition_penalty": "repeat_penalty",
}

# Fields that this server lacks, with the values that ask for nothing. Any other value is refused.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": (), "modalities": (["text"],), "moderation": (), "verbosity": ("medium",),
    "web_search_options": (), "function_call": ("none", "auto"),
    # vLLM
    "add_special_tokens": (), "allowed_token_ids": (), "bad_words": (),
    "best_of": (1,), "chat_template": (), "documents": (), "echo": (False,), "ignore_eos": (False,),
    "include_reasoning": (True,), "include_stop_str_in_output": (False,), "length_penalty": (1,),
    "logits_processors": (), "min_tokens": (0,), "mm_processor_kwargs": (), "prompt_logprobs": (),
    "prompt_embeds": (), "repetition_detection": (), "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "stop_token_ids": (), "structural_tag": (),
    "thinking_token_budget": (), "truncate_prompt_tokens": (), "use_beam_search": (False,), "embed_dtype": (),
    "normalize": (True,), "use_activation": (), "vllm_xargs": (),
    # llama-server
    "adaptive_target": (-1,), "dry_multiplier": (0,), "dynatemp_range": (0,), "embd_normalize": (2,),
    "grammar_lazy": (False,), "grammar_triggers": (),
    "image_data": (), "lora": (), "min_keep": (0,), "mirostat": (0,), "n_indent": (0,), "n_probs": (0,),
    "parse_tool_calls": (True,), "post_sampling_probs": (False,), "reasoning_budget": (-1,),
    "reasoning_format": ("none", "auto"), "response_fields": (), "return_tokens": (False,), "samplers": (),
    "t_max_predict_ms": (0, -1), "thinking_budget_tokens": (-1,), "top_n_sigma": (0, -1), "typical_p": (1,),
    "xtc_probability": (0,),
    # Ollama
    "num_predict_ms": (), "penalize_newline": (True,), "template": (), "tfs_z": (1,), "think": (False,),
    "truncate": (),
}  # fmt: skip
EMPTY = (None, "", [], {})  # what front ends send for a setting that was opened but not filled in


@dataclass(frozen=True)
class Rules:
    """The tables of one API. harmless: names, by reason; aliases: other names of what works; neutral: for
    fields that are otherwise refused, the values that ask for nothing."""

    harmless: Mapping[str, tuple[str, ...]]
    neutral: Mapping[str, tuple[Any, ...]]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def is_harmless(self, name: str) -> bool:
        return any(name in names for names in self.harmless.values()) or name.startswith(_HARMLESS_BEGINNING)

    def asks_for_nothing(self, name: str, value: Any) -> bool:
        # 1 is True and 0 is False to Python
        return any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
            for neutral in self.neutral.get(name, ())
        )


OPENAI = Rules(HARMLESS, NEUTRAL, ALIASES)


def accepted(
    document: JsonObject,
    known: Collection[str],
    ignored: Collection[str] = (),
    rules: Rules = OPENAI,
) -> JsonObject:
    """The fields that a model of schemas.py reads, under the names used there. known: these names. ignored:
    the fields of `--ignore-field`. Raises ApiError for a field that would change the reply, or might."""
    found = {name: value for name, value in document.items() if name in known}
    for name, value in document.items():
        if name in known or value in EMPTY or rules.is_harmless(name) or name in ignored:
            continue
        target = rules.aliases.get(name)
        if target in known:
            if found.setdefault(target, value) != value:
                raise ApiError(f"{name}: is another name of {target}: send one of them.", param=name)
        elif not rules.asks_for_nothing(name, value):
            raise _refusal(name, value, rules)
    return found


def _refusal(name: str, value: Any, rules: Rules) -> ApiError:
    if name in rules.neutral:
        why = f"this server does not support it (it is {shown(value)}): leave it out"
    else:
        why = (
            "this server knows no such field, and it might change the reply: leave it out, or start the "
            "server with --ignore-field"
        )
    return ApiError(f"{shown(name)[1:-1]}: {why}.", param=shown(name)[1:-1], code="unsupported_field")
