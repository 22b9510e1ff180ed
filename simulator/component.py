"""The one shape of every extension point: a frozen, strict pydantic model with one method.

A watermark scheme, a stealing attack or a removal attack subclasses :class:`Component`. Its fields are the paper's
hyper-parameters with the paper's defaults, so one class gives the YAML and its errors, the line in ``exsim list``,
the search space of a sweep, the Parquet column and the behaviour.

A family (all attacks, say) is a :class:`Registry`: it imports every module of the family's package, and every entry
point of the family's group, so a newcomer adds one file and edits none.
"""

from __future__ import annotations

import difflib
import importlib
import json
import pkgutil
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, ClassVar, Generic, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationError, field_validator

from simulator.errors import InputError

#: characters of a wrong value that a message shows
LONGEST = 200


class Settings(BaseModel):
    """A frozen, strict pydantic model: unknown keys, silent conversions and changes after the fact are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _of_64_bits(cls, value: Any) -> Any:
        """Whole numbers are what rows and other programs hold: ``1e26`` would be written out digit by digit."""
        for each in value if isinstance(value, tuple) else (value,):
            if type(each) is int and not -(2**63) <= each < 2**63:
                raise InputError(f"{each} is too large; whole numbers must be less than {2**63}")
        return value


class Component(Settings):
    """A named algorithm with its hyper-parameters. ``name`` is what YAML, the rows and ``exsim list`` call it.

    Subclasses narrow ``name`` to a ``Literal`` with that value as its default.
    """

    name: str

    #: where it was published, for ``exsim list`` and the README, e.g. ``"Orekondy et al., CVPR 2019"``
    paper: ClassVar[str] = ""

    def params(self) -> dict[str, Any]:
        """Every field but ``name``, as plain JSON values."""
        return self.model_dump(mode="json", exclude={"name"})

    def params_json(self) -> str:
        """``params()`` as canonical JSON, the form in which it stands in a row."""
        return json.dumps(self.params(), sort_keys=True)


C = TypeVar("C", bound=Component)


def one_of(value: object, allowed: list[str]) -> str:
    """``"'knokoff' is not one of distillation, knockoff (did you mean 'knockoff'?)"``."""
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return f"{value!r} is not one of {', '.join(allowed)}{hint}"


def describe(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """The first problem of a pydantic error as one line: where, what was found, what is allowed; and how many more.

    Args:
        model: what was to be made of the data; with it, the line on an unknown setting lists those that there are.
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"] if part != "function-before")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        allowed = _settings_at(model, first["loc"][:-1]) if model else []
        message = f"no such setting; {one_of(first['loc'][-1], allowed)}" if allowed else "no such setting"
    elif first["type"] not in ("value_error", "missing"):
        found = repr(first["input"])
        message = f"{message}, found {found if len(found) <= LONGEST else found[: LONGEST - 3] + '...'}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return " ".join(f"{where + ': ' if where else ''}{message}{more}".split())


def _settings_at(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The names of the settings at a place of a model; none where the place cannot be followed."""
    found: type[BaseModel] | None = model
    for part in place:
        # positions, keys of mappings and pydantic's own names for the branches of a union are no fields
        if found is not None and part in found.model_fields:
            found = _model_in(found.model_fields[str(part)].annotation)
    return list(found.model_fields) if found else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The one model that an annotation such as ``tuple[Model, ...]`` or ``Model | None`` speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


@cache
def _installed(group: str, _path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of a group. To find them, every installed package's description is read, which takes a tenth of
    a second: once for a path of imports, for a configuration asks dozens of times."""
    return tuple(entry_points(group=group))


class Registry(Generic[C]):
    """The components of one family, by name, discovered from a package and from installed entry points."""

    def __init__(self, kind: str, base: type[C], package: str) -> None:
        self.kind = kind
        self.base = base
        self.package = package

    def classes(self) -> dict[str, type[C]]:
        """Every component of the family by its name, sorted.

        Looks again at each call (the modules are imported once), so a module that appears later is found too.
        """
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for entry in _installed(f"exsim.{self.kind.replace(' ', '_')}s", tuple(sys.path)):
            entry.load()
        found: dict[str, type[C]] = {}
        queue = list(self.base.__subclasses__())
        while queue:
            cls = queue.pop()
            queue.extend(cls.__subclasses__())
            name = cls.model_fields["name"].default
            if isinstance(name, str):
                found[name] = cls
        return dict(sorted(found.items()))

    def make(self, value: object) -> C:
        """A component from what YAML holds: its name, or a mapping with ``name`` and hyper-parameters.

        Raises:
            InputError: the name is missing or unknown, or a hyper-parameter is wrong.
        """
        if isinstance(value, self.base):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or "name" not in value:
            raise InputError(f"{value!r} is not {self._article()}: give a name, or a mapping with 'name'")
        classes = self.classes()
        if not isinstance(value["name"], str) or value["name"] not in classes:
            raise InputError(one_of(value["name"], list(classes)))
        try:
            # through JSON, because strict mode takes a list for a tuple only there
            return classes[value["name"]].model_validate_json(json.dumps(dict(value)))
        except ValidationError as error:
            raise InputError(f"{value['name']}: {describe(error, classes[value['name']])}") from None

    def field(self) -> Any:
        """The pydantic annotation for a field that holds a component of this family."""
        # SerializeAsAny writes the subclass's fields, not only the base's
        return Annotated[self.base, SerializeAsAny(), BeforeValidator(self.make)]  # type: ignore[type-arg]

    def _article(self) -> str:
        return f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"
