"""The closed set of errors that a user can cause.

Each message is one line that says what is wrong, with which value, and what to do. The command line prints it
unchanged and exits with `exit_code`; a traceback is a bug.
"""

from __future__ import annotations


class LocalsteerError(Exception):
    """Base of every error that input from outside can cause."""

    exit_code = 2


class VectorFileError(LocalsteerError):
    """A control-vector file that is missing, truncated, foreign, or of a newer format."""


class ModelFileError(LocalsteerError):
    """A model or checkpoint file that is missing, truncated, or can't be loaded."""


class MismatchError(LocalsteerError):
    """A vector and a model that do not belong together, by width, depth or tokens."""


class PlanError(LocalsteerError):
    """Steering settings that make no sense: unknown mode, layer out of range, parallel directions."""


class PromptError(LocalsteerError):
    """A prompt that can't be sent: it is empty, or has a role that the template does not know."""


class ContextError(PromptError):
    """A prompt that leaves no room for a reply."""


class UnsupportedModelError(LocalsteerError):
    """A model whose residual stream can't be steered reliably."""


class HostError(LocalsteerError):
    """A host that should run part of a model (--rpc) but can't be reached, is another service, or is lost.

    In the middle of a reply, the reply is lost; the model is loaded again once its hosts are back.
    """


class CatalogError(LocalsteerError):
    """An instruction or query file that can't be read, or an unknown instruction."""


class QueueFullError(LocalsteerError):
    """More requests are waiting than the scheduler allows; there may be room later."""


class SchedulerClosedError(LocalsteerError):
    """A request was made to a scheduler that is closing."""


class ConstraintError(LocalsteerError):
    """A schema, pattern or grammar that can't be read, or requires more than can be enforced.

    path: in a JSON schema, the keys that lead to the keyword at fault. why: the message without the path.
    """

    def __init__(self, message: str, path: tuple[str, ...] = (), why: str = "") -> None:
        super().__init__(message)
        self.path, self.why = path, why or message
