"""Limits on what one request may hold. A refusal names the field, the limit and the value."""

from __future__ import annotations

from dataclasses import dataclass

MAX_MESSAGES = 1000
MAX_TEXT = 1 << 20  # characters of one text; the context is a further limit
MAX_PROMPTS = 32  # of one call to /v1/completions
MAX_INPUTS = 2048  # texts of one call to /v1/embeddings, as at OpenAI: clients send documents whole
MAX_N = 16  # choices
MAX_STOP = 16
MAX_STOP_TEXT = 256
MAX_TOKENS = 1 << 20
MAX_BIASES = 1024  # of logit_bias
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 128  # as at OpenAI: a front end's built-in tools and its users' add up to more than 64
MAX_VECTORS = 16  # that steer one request
MAX_STRENGTH = 100.0
MAX_NAME = 64  # characters of a vector's name
MAX_MODEL_NAME = 512
MAX_SCHEMA = 64 << 10  # bytes of a JSON schema
MAX_GRAMMAR = MAX_SCHEMA  # characters of a grammar or pattern
MAX_CHOICES = 1000  # texts of guided_choice
MAX_TRACE_TOKENS = 512
MAX_INSTRUCTION = 1000  # characters of a sentence for which a vector is made
# log-probabilities in one answer; each takes half a kilobyte while the answer is written
MAX_SCORES = 1 << 18
MAX_VARIABLES = 32  # for the chat template
# of a body: pydantic needs some 20 microseconds for an object, and no thread runs meanwhile
MAX_CONTAINERS = 20_000  # lists and objects; 128 tools with 20 parameters each are 6,000
MAX_MEMBERS = 20_000
MAX_VALUES = 300_000  # OpenAI takes as many tokens in one call for embeddings
MAX_DEPTH = 64


@dataclass(frozen=True)
class Limits:
    """The limits that the command line sets, in bytes and seconds.

    max_held: for all bodies together. request_seconds: for a request, from its head to the end of its answer;
    head_seconds, body_seconds: for its head and its body to arrive. write_seconds: how long one piece of a
    reply may wait for a client that does not read. job_seconds: for a vector made on request; 0 means none is
    made. predict: tokens of a reply if the request sets no limit; None: until the context is full.
    ignored_fields: fields of requests to ignore.
    """

    max_body: int = 4 << 20
    max_upload: int = 16 << 20  # 126 layers of 16,384, as in the largest known model, take 8 MiB
    max_held: int = 64 << 20
    max_connections: int = 512
    max_files: int = 1000
    request_seconds: float = 600.0
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    job_seconds: float = 3600.0
    predict: int | None = 1024
    ignored_fields: frozenset[str] = frozenset()
