"""Sections that rooms above complete: one field names an entry of a table that stands up there.

`objective.kind` names an objective, `models.transformer.backbone` an architecture and
`quality.scorer` a scorer. Each table stands beside the code that it names, so that a new entry is
one row in one place, with settings of its own (`objective.NAME`, `models.transformer.NAME`,
`quality.NAME`) where it needs any.

The settings are the lowest room and import nothing above them: a table is named here by its module
and read when values are checked. Modules of tables import no torch, so that every command refuses
a wrong name at once and `ultraflux --help` stays light.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar

from pydantic import ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from components.settings.section import Section

Own = TypeVar("Own", bound=Section)


class _DeclaredAndOwn:
    """Fields by name as forms and messages list them, the sections of a table's entries included.

    pydantic itself validates by its private list, which holds the declared fields alone.
    """

    def __get__(self, instance: object, owner: type[OpenSection]) -> dict[str, FieldInfo]:
        own = {
            name: FieldInfo(annotation=kind, default=None, description=kind.__doc__)
            for name, kind in owner.known().items()
            if kind is not None
        }
        return {**owner.__pydantic_fields__, **own}


class OpenSection(Section):
    """A section whose fields `chosen_by` name entries of `table`; entries may bring sections."""

    # Allowed by pydantic, then checked one by one below: only names of the table pass.
    model_config = ConfigDict(extra="allow")

    chosen_by: ClassVar[str | tuple[str, ...]]
    """Field or fields that hold a name."""
    table: ClassVar[str]
    """MODULE:ATTRIBUTE of a mapping from names to entries; an entry's `settings` is the class of
    its section, or None."""
    model_fields: ClassVar[Any] = _DeclaredAndOwn()

    @classmethod
    def entries(cls) -> Mapping[str, Any]:
        """The table."""
        module, _, attribute = cls.table.partition(":")
        entries: Mapping[str, Any] = getattr(importlib.import_module(module), attribute)
        return entries

    @classmethod
    def known(cls) -> dict[str, type[Section] | None]:
        """Names of the table, each with the class of its section."""
        return {name: entry.settings for name, entry in cls.entries().items()}

    @classmethod
    def offered(cls, field: str) -> list[str]:
        """Names that `field` may hold; all of them where a section does not say otherwise."""
        del field
        return list(cls.entries())

    def own(self, name: str, kind: type[Own]) -> Own:
        """The section that the entry `name` brought, which is one of class `kind`.

        Raises:
            ValueError: these settings have none.
        """
        section = (self.__pydantic_extra__ or {}).get(name)
        if not isinstance(section, kind):
            raise ValueError(f"{name}: no such section in {type(self).__name__}")
        return section

    @model_validator(mode="wrap")
    @classmethod
    def _complete(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Parse the sections of the table's entries; all problems of the section at once."""
        if not isinstance(values, Mapping):
            return handler(values)
        known, declared = cls.known(), cls.__pydantic_fields__
        sections: dict[str, Section] = {}
        problems: list[InitErrorDetails] = []
        for name in (key for key in values if key not in declared):
            kind = known.get(name)
            if kind is None:
                problems.append(_problem("extra_forbidden", (name,), values[name]))
                continue
            try:
                sections[name] = kind.model_validate(values[name])
            except ValidationError as failure:
                problems += _problems(failure, (name,))
        lacking: set[str] = set()
        for field in (cls.chosen_by,) if isinstance(cls.chosen_by, str) else cls.chosen_by:
            chosen, offered = values.get(field), cls.offered(field)
            # A value of another type is refused by the field itself.
            if not isinstance(chosen, str):
                continue
            if chosen not in offered:
                problems.append(_problem(_unknown(chosen, offered), (field,), chosen))
            elif known[chosen] is not None and chosen not in values:
                lacking.add(chosen)
        problems += [_problem("missing", (name,), dict(values)) for name in sorted(lacking)]
        try:
            fields = {key: value for key, value in values.items() if key in declared}
            section = handler({**fields, **sections})
        except ValidationError as failure:
            problems = [*_problems(failure, ()), *problems]
        if problems:
            # pydantic puts the place of this section before the places of these problems.
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return section


def _unknown(name: str, known: list[str]) -> PydanticCustomError:
    quoted = [f"'{each}'" for each in known]
    choice = " or ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return PydanticCustomError("unknown_name", f"Input should be {choice}{hint}")  # type: ignore[arg-type]


def _problem(
    kind: str | PydanticCustomError, location: tuple[str | int, ...], value: Any
) -> InitErrorDetails:
    return InitErrorDetails(type=kind, loc=location, input=value)


def _problems(failure: ValidationError, below: tuple[str | int, ...]) -> list[InitErrorDetails]:
    """The problems of a section at their places in the section above it."""
    return [
        InitErrorDetails(
            type=error["type"],
            loc=(*below, *error["loc"]),
            input=error["input"],
            ctx=error.get("ctx", {}),
        )
        for error in failure.errors()
    ]
