"""What a key of a configuration is, and when it may change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

SECTIONS = (  # in the order of the work
    "pool",
    "ray",
    "model",
    "checkpoints",
    "loop",
    "train",
    "score",
    "eval",
    "select",
    "label",
    "compare",
)

# When a key may change, that is, what a change can do to an existing run.
NEVER = "never"  # part of the run's identity
NEXT_CYCLE = "next cycle"  # affects results: fixed once a cycle has begun
PLACE = "may move"  # the location of something whose content never changes
ANY_TIME = "any time"  # affects speed, length or tolerance, never a result


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Key(NamedTuple):
    """A documented key.

    Attributes:
        name: with its section, as `train.lr`.
    """

    name: str
    field: FieldInfo

    @property
    def changes(self) -> str:
        """NEVER, NEXT_CYCLE, PLACE or ANY_TIME."""
        extra = self.field.json_schema_extra
        assert isinstance(extra, dict)
        return str(extra["changes"])

    @property
    def default(self) -> Any:
        """None for a required key as well."""
        return None if self.field.default is PydanticUndefined else self.field.default


def key(default: Any, description: str, changes: str = NEXT_CYCLE, **constraints: Any) -> Any:
    """Declare a key: its default, description (with the unit), when it may change, bounds."""
    extra: dict[str, Any] = {"changes": changes}
    return Field(default, description=description, json_schema_extra=extra, **constraints)


def documented_keys(model: type[Section], prefix: str = "") -> Iterator[Key]:
    """Every key of a section or a whole configuration; keys outside sections come first."""
    order = {name: place for place, name in enumerate(SECTIONS, start=1)}
    for name, field in sorted(model.model_fields.items(), key=lambda item: order.get(item[0], 0)):
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from documented_keys(kind, f"{prefix}{name}.")
        else:
            yield Key(prefix + (field.alias or name), field)


def as_yaml(value: Any) -> str:
    """A value as one would type it in the file."""
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n...\n").strip()
