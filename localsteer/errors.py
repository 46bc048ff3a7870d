"""The closed set of errors that a user can cause.

Each message is one line: what is wrong, which value, what to do. The command line prints it as it is and
exits with `exit_code`; a traceback is a bug.
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
    """A vector and a model that do not belong together: width, depth, tokens."""


class PlanError(LocalsteerError):
    """Steering settings that make no sense: unknown mode, layer out of range, parallel directions."""


class PromptError(LocalsteerError):
    """A prompt that can't be sent: an empty one, a role that the template does not know."""


class ContextError(PromptError):
    """A prompt that leaves no room for a reply."""


class UnsupportedModelError(LocalsteerError):
    """A model whose residual stream can't be steered with certainty."""


class HostError(LocalsteerError):
    """A host that runs part of a model (--rpc) and can't be reached, is something else, or is gone.

    In the middle of a reply: the reply is lost, and the model is loaded anew once its hosts are back.
    """


class CatalogError(LocalsteerError):
    """An instruction or query file that can't be read, or an unknown instruction."""


class QueueFullError(LocalsteerError):
    """More requests than the scheduler lets wait; later there may be room."""


class SchedulerClosedError(LocalsteerError):
    """A request to a scheduler that is closing."""


class ConstraintError(LocalsteerError):
    """A schema, pattern or grammar that can't be read, or asks for more than can be enforced.

    path: of a JSON schema, the keys that lead to the keyword at fault. why: the same without the path.
    """

    def __init__(self, message: str, path: tuple[str, ...] = (), why: str = "") -> None:
        super().__init__(message)
        self.path, self.why = path, why or message
