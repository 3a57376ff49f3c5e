"""Turns pydantic's validation errors into sentences: field, value, what is allowed."""

import types
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

# Pydantic's error types, in the words of somebody who writes YAML. {braces} are the error's own context.
_ALLOWED = {
    "bool_type": "must be true or false",
    "dict_type": "must be a section of `key: value` pairs",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be greater than {gt:.10g}",
    "greater_than_equal": "must be at least {ge:.10g}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "less_than": "must be less than {lt:.10g}",
    "less_than_equal": "must be at most {le:.10g}",
    "literal_error": "must be {expected}",
    "model_attributes_type": "must be a section of `key: value` pairs",
    "model_type": "must be a section of `key: value` pairs",
    "path_type": "must be a path",
    "string_type": "must be text; put a number or a date in quotes",
    "too_long": "must have at most {max_length} items",
    "too_short": "must have at least {min_length} items",
    "tuple_type": "must be a list",
    "union_tag_invalid": "must be one of {expected_tags}",
}


def describe(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One line `field=value: what is allowed` for each problem that pydantic found."""
    return [_line(detail, root) for detail in error.errors(include_url=False)]


def show(value: object) -> str:
    """A value as it would stand in YAML, cut to a readable length."""
    if isinstance(value, str):
        text = repr(value)
    elif value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(show(v) for v in value) + "]"
    else:
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _line(detail: ErrorDetails, root: type[BaseModel]) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    path, section = _locate(detail["loc"], root)
    if kind == "refusal":
        return f"{_join(path, context['field'])}={show(context['value'])}: {context['allowed']}"
    if kind == "missing":
        return f"{_join(path)}: missing"
    if kind == "union_tag_not_found":
        return f"{_join(path, 'name')}: missing; must be one of {_names(section)}"
    if kind == "union_tag_invalid":
        path, value = [*path, "name"], context["tag"]
    if kind == "invalid_key":
        return f"{_join(path[:-1]) or 'top level'}: the key {show(value)} must be text"
    if kind == "extra_forbidden":
        allowed = _unknown(str(path[-1]), section, root)
    elif kind == "value_error":
        allowed = str(context["error"])
    else:
        allowed = _ALLOWED[kind].format(**context) if kind in _ALLOWED else detail["msg"]
    if kind in ("literal_error", "union_tag_invalid") and isinstance(value, str):
        choices = [word.strip("'") for word in allowed.replace(",", " ").split() if word.startswith("'")]
        allowed += _did_you_mean(value, choices)
    return f"{_join(path)}={show(value)}: {allowed}"


def _unknown(key: str, section: list[type[BaseModel]], root: type[BaseModel]) -> str:
    """What to say about a key that its section does not have."""
    here, *others = section
    known = list(here.model_fields)
    if near := _did_you_mean(key, known):
        return f"unknown key{near}"
    for other in others:
        if key in other.model_fields:
            return (
                f"a key of {_tag(other)!r}, not of {_tag(here)!r}, which takes {', '.join(known)}; "
                "to change the name, replace the whole section"
            )
    if elsewhere := [path for path in _fields(root) if path.rpartition(".")[2] == key]:
        return f"unknown key; did you mean {' or '.join(elsewhere)}?"
    return f"unknown key; allowed are {', '.join(known)}"


def _did_you_mean(word: str, choices: list[str]) -> str:
    near = get_close_matches(word, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _locate(loc: tuple[int | str, ...], root: type[BaseModel]) -> tuple[list[int | str], list[type[BaseModel]]]:
    """The path without pydantic's union tags, and the section it ends in (of a union: that variant first)."""
    path: list[int | str] = []
    section = [root]
    steps = iter(loc)
    for step in steps:
        path.append(step)
        field = section[0].model_fields.get(str(step)) if section else None
        if field is None:
            continue  # an unknown key of `section`, or something inside a plain value
        variants = list(_sections(field.annotation))
        if field.discriminator is not None and (tag := next(steps, None)) is not None:
            variants.sort(key=lambda variant: _tag(variant) != tag)
        section = variants
    return path, section


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section types that an annotation allows."""
    if get_origin(annotation) in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _sections(option)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _fields(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields below a section."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for below in _sections(field.annotation):
            yield from _fields(below, f"{prefix}{name}.")


def _tag(variant: type[BaseModel]) -> str:
    return str(get_args(variant.model_fields["name"].annotation)[0])


def _names(variants: list[type[BaseModel]]) -> str:
    return ", ".join(repr(_tag(variant)) for variant in variants)


def _join(path: list[int | str], *more: str) -> str:
    """`task.operators[0]` from ["task", "operators", 0]."""
    text = ""
    for step in [*path, *more]:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text
