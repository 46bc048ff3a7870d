"""The form that a request demands of its reply, in fields of OpenAI, llama-server and vLLM, as one
constraint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from localsteer.constrain import Constraint
from localsteer.errors import ConstraintError

from .errors import ApiError
from .limits import MAX_SCHEMA

if TYPE_CHECKING:
    from .models import Served
    from .schemas import ResponseFormat, SamplingFields, StructuredOutputs, Tool

Wanted = tuple[str, str, Any]  # the request's field, its kind of constraint, and its value


def constraint_of(body: SamplingFields, served: Served) -> Constraint | None:
    """The request's constraint, or None if any text is allowed. It is compiled here, so that what can't be
    enforced is refused with the field and the path in it.

    This takes a while: call it in a worker thread. Raises ApiError.
    """
    wanted = list(_wanted(body))
    if len(wanted) > 1:
        raise ApiError(f"{wanted[1][0]}: excludes {wanted[0][0]}: send one of them.", param=wanted[1][0])
    return enforced(served, *wanted[0]) if wanted else None


def constraining_field(body: SamplingFields) -> str | None:
    """The name of the field with the constraint, for refusals."""
    return next((field.partition(".")[0] for field, _, _ in _wanted(body)), None)


def enforced(served: Served, field: str, kind: str, value: Any) -> Constraint:
    """Raise ApiError for an unusable constraint; its param is the field and, for a schema, the path to the
    keyword."""
    try:
        constraint = _MADE[kind](value)
        if len(constraint.text) > MAX_SCHEMA:
            raise ApiError(
                f"{field}: must be at most {MAX_SCHEMA} bytes, not {len(constraint.text)}.", param=field
            )
        served.engine.token_bytes.matcher(constraint)
    except ConstraintError as error:
        raise _refusal(field, error) from None
    return constraint


def enforced_call(served: Served, tools: Sequence[Tool], numbers: Sequence[int]) -> Constraint:
    """A constraint to one call of one of the tools. numbers: their positions in the request."""
    try:
        constraint = Constraint.tool_call(
            [(tool.function.name, tool.function.parameters or {"type": "object"}) for tool in tools]
        )
        if len(constraint.text) > MAX_SCHEMA:
            raise ApiError(
                f"tools: must be at most {MAX_SCHEMA} bytes for a call that must be made, not "
                f"{len(constraint.text)}.",
                param="tools",
            )
        served.engine.token_bytes.matcher(constraint)
    except ConstraintError as error:
        if not error.path:
            raise _refusal("tools", error) from None
        number, *path = error.path
        field = f"tools.{numbers[int(number)]}.function.parameters"
        raise _refusal(field, ConstraintError(str(error), tuple(path), error.why)) from None
    return constraint


def _refusal(field: str, error: ConstraintError) -> ApiError:
    param = ".".join([field, *error.path])
    return ApiError(f"{param}: {error.why.rstrip('.')}.", param=param, code="constraint_unsupported")


_MADE = {
    "json": Constraint.json_schema,
    "regex": Constraint.regex,
    "grammar": Constraint.grammar,
    "choice": Constraint.choice,
}


def _wanted(body: SamplingFields) -> Iterator[Wanted]:
    yield from _of_response_format(body.response_format)
    if body.grammar:
        yield "grammar", "grammar", body.grammar
    if body.json_schema is not None:
        yield "json_schema", "json", body.json_schema
    if body.structured_outputs is not None:
        yield from _of_structured_outputs(body.structured_outputs)
    if body.guided_json is not None:
        yield "guided_json", "json", body.guided_json
    if body.guided_json_object:
        yield "guided_json_object", "json", {"type": "object"}
    for kind in ("regex", "choice", "grammar"):
        value = getattr(body, f"guided_{kind}")
        if value is not None:
            yield f"guided_{kind}", kind, value


def _of_response_format(given: ResponseFormat | None) -> Iterator[Wanted]:
    if given is None or given.type == "text":
        return
    if given.type == "regex":
        yield "response_format.pattern", "regex", given.pattern
    elif given.type == "grammar":
        yield "response_format.grammar", "grammar", given.grammar
    elif given.json_schema is not None and given.type == "json_schema":
        yield "response_format.json_schema.schema", "json", given.json_schema.schema_
    elif given.schema_ is not None:
        yield "response_format.schema", "json", given.schema_
    else:
        yield "response_format", "json", {"type": "object"}


def _of_structured_outputs(given: StructuredOutputs) -> Iterator[Wanted]:
    if given.json_ is not None:
        yield "structured_outputs.json", "json", given.json_
    if given.json_object:
        yield "structured_outputs.json_object", "json", {"type": "object"}
    for kind in ("regex", "choice", "grammar"):
        value = getattr(given, kind)
        if value is not None:
            yield f"structured_outputs.{kind}", kind, value
