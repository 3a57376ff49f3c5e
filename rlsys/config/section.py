"""What all sections are made of: their base, the kinds of numbers, and how a validator refuses a value."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

# Strict, because pydantic would otherwise read `workers: true` as 1 and `pin_cores: 1` as true.
Integer = Annotated[int, Field(strict=True)]
Positive = Annotated[int, Field(strict=True, ge=1)]
NonNegative = Annotated[int, Field(strict=True, ge=0)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**31)]  # numpy takes none below 0; vLLM adds a worker's number
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Momentum = Annotated[float, Field(strict=True, ge=0, lt=1)]
Flag = Annotated[bool, Field(strict=True)]
Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """Base of all sections: frozen, strict about unknown keys, documented by its attribute docstrings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


def refusal(field: str, value: object, allowed: str) -> PydanticCustomError:
    """An error about one field, to be raised by a validator of its section (or of a section above it)."""
    return PydanticCustomError(
        "refusal", "{field}={value}: {allowed}", {"field": field, "value": value, "allowed": allowed}
    )


def refuse_unused(section: Section, name: str, allowed: frozenset[str], options: set[str]) -> None:
    """Refuse an option off its default although the variant `name` does not take it: it would silently do nothing."""
    fields = type(section).model_fields
    unused = sorted(o for o in options - allowed if getattr(section, o) != fields[o].default)
    if unused:
        also = f" ({' and '.join(unused[1:])} neither)" if unused[1:] else ""
        takes = ", ".join(sorted(allowed)) or "no options"
        raise refusal(unused[0], getattr(section, unused[0]), f"not used by {name!r}, which takes {takes}{also}")


def set_options(section: Section, options: set[str]) -> dict[str, float]:
    """Those of `options` that have a value, by name."""
    return {o: float(v) for o in sorted(options) if (v := getattr(section, o)) is not None}


def require_target(target: str) -> str:
    """Check that a string can name an object of a module. It is imported later, by whoever uses it."""
    module, _, attribute = target.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError("must be package.module:name")
    return target
