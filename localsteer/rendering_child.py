"""The process that runs chat templates: jinja2 under limits, one request after another, stdin to stdout.

A request is 8 bytes with its length, and a pickle of (template, values, most characters of the answer). An
answer is one line of JSON: {"text"}, or {"fault": "template" or "messages", "why"}. `rendering.py` starts it.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

MEMORY = 512 << 20  # bytes of address space, if the system can limit it
SECONDS = 5  # of processor time for one request; the parent, which limits real time, may be gone
_SIZE = 8  # bytes of a request's length


def serve(niceness: int = 0) -> None:
    """Answer requests until stdin ends. niceness: as in os.nice, where the system has it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, which still needs this process
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _limit_memory()
    environment()  # before the first request, whose time is limited
    answers.write(b"ready\n")
    answers.flush()
    if niceness and hasattr(os, "nice"):  # not before: others wait for the start
        os.nice(niceness)
    while size := requests.read(_SIZE):
        _limit_time()
        answer = json.dumps(_answer(requests, int.from_bytes(size, "big")), ensure_ascii=False)
        answers.write(answer.encode("utf-8", "surrogatepass") + b"\n")
        answers.flush()


def _answer(requests: BinaryIO, size: int) -> Mapping[str, str]:
    try:
        template, values, most = pickle.loads(requests.read(size))
    except Exception as error:  # values of classes that are not importable here
        return {"fault": "messages", "why": one_line(error)}
    try:
        compiled = _compiled(template)
    except MemoryError:
        return {"fault": "template", "why": "it takes too much memory"}
    except Exception as error:
        return {"fault": "template", "why": one_line(error)}
    try:
        text = compiled.render(values)
    except MemoryError:
        return {"fault": "messages", "why": "it takes too much memory"}
    except Exception as error:  # a template can raise anything
        return {"fault": "messages", "why": one_line(error)}
    if len(text) > most:
        return {"fault": "messages", "why": f"it makes more than {most} characters of them"}
    return {"text": text}


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    return environment().from_string(template)


@lru_cache(maxsize=1)
def environment() -> Any:
    """jinja2 as transformers sets it up: templates are written against exactly these settings."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}` marks the assistant's words for training; here its body is just rendered."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # jinja2's tojson escapes <, > and &, which a model must see unchanged
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return sandbox


def one_line(error: BaseException) -> str:
    """The first line of an error's message, for messages of ours: without what could control a terminal."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:2000]
    return "".join(c if c.isprintable() else "\ufffd" for c in line)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    except (OSError, ValueError):  # macOS has the name but not the limit
        return


def _limit_time() -> None:
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(used.ru_utime + used.ru_stime) + SECONDS + 1
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


if __name__ == "__main__":
    serve()
