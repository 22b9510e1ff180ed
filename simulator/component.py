"""The one shape of every extension point: a frozen, strict pydantic model with one method.

A watermark scheme, a stealing attack or a removal attack subclasses :class:`Component`. Its fields are the paper's
hyper-parameters with the paper's defaults, so one class gives the YAML and its errors, the line in ``exsim list``,
the search space of a sweep, the Parquet column and the behaviour.

A family (all attacks, say) is a :class:`Registry`: it imports every module of the family's package, and every entry
point of the family's group, so a newcomer adds one file and edits none. Things that are no classes, such as model
architectures, stand in a :class:`Table`, which entry points extend too.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, ClassVar, Generic, Protocol, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializationInfo,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)
from pydantic.fields import FieldInfo

from simulator.errors import InputError, one_line

log = logging.getLogger(__name__)

#: how ids and rows name the model without a watermark
BENIGN = "benign"
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

    Subclasses narrow ``name`` to a ``Literal`` with that value as its default. A subclass that only inherits a name is
    in no registry.
    """

    name: str

    #: where it was published, for ``exsim list`` and the README, e.g. ``"Orekondy et al., CVPR 2019"``
    paper: ClassVar[str] = ""
    #: fields that are younger than published figures: at their default they are left out of ``params()`` and of what a
    #: model is dumped as, so that the ids of older models stay what they are
    later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_later(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """All fields, with the context ``{"whole": True}``; else those of :attr:`later` that are not at their default,
        and all the others."""
        found: dict[str, Any] = dump(self)
        if not (info.context or {}).get("whole"):
            for name in self.later:
                if getattr(self, name) == type(self).model_fields[name].default:
                    found.pop(name, None)
        return found

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
    # what pydantic adds for itself is no place: its validators, and tags of unions, which are in brackets
    where = ".".join(part for part in map(str, first["loc"]) if part != "function-before" and not part.startswith("("))
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
    """The entry points of a group. The answer is kept for each path of imports: a configuration asks dozens of times,
    and each search reads the description of every installed package."""
    return tuple(entry_points(group=group))


#: entry points that this process has found to be of no use, and has told the user about
_skipped: set[EntryPoint] = set()


def plugins(group: str, fits: Callable[[Any], bool], wanted: str) -> list[tuple[str, Any]]:
    """What the entry points of a group name, each with the place that it comes from.

    An entry that cannot be imported, or that does not fit, is skipped. The first time, one line says so on stderr, by
    way of :mod:`logging`: ``exsim: plug-in stealing:Idle of somebody 1.0 is skipped: it is not an attack``.

    Args:
        group: of the entry points, e.g. ``exsim.attacks``.
        fits: whether an entry is what the group is for.
        wanted: what the group is for, e.g. ``an attack``.
    """
    found = []
    for entry in _installed(group, tuple(sys.path)):
        if entry in _skipped:
            continue
        where = f"{entry.value} of {entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        try:
            value = entry.load()
            problem = "" if fits(value) else f"it is not {wanted}"
        except (Exception, SystemExit) as error:  # a stranger's module may raise anything
            problem = one_line(error)
        if problem:
            _skipped.add(entry)
            log.warning("exsim: plug-in %s is skipped: %s", where, problem)
        else:
            found.append((where, value))
    return found


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """What a configuration calls it."""
        ...


T = TypeVar("T", bound=Named)


class Table(Mapping[str, T]):
    """The things of one kind by name: the program's own, in their order, then those of plug-ins, sorted.

    Entry points are looked up at each use, never at import. Every use raises an `InputError` if two things have one
    name.
    """

    def __init__(self, kind: str, base: type[T], group: str, own: Iterable[T]) -> None:
        self.kind = kind
        self.base = base
        self.group = group
        self.own = {each.name: each for each in own}

    def __getitem__(self, name: str) -> T:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def known(self, name: str) -> str:
        """The name, unchanged.

        Raises:
            InputError: nothing has that name; the line lists the names that there are.
        """
        if name not in self:
            raise InputError(one_of(name, list(self)))
        return name

    def _all(self) -> dict[str, T]:
        found = dict(self.own)
        places = dict.fromkeys(found, "the program's own")
        added = plugins(self.group, lambda entry: isinstance(entry, self.base), _article(self.kind))
        for where, entry in sorted(added, key=lambda each: each[1].name):
            if found.setdefault(entry.name, entry) is not entry:
                raise InputError(f"two {self.kind}s are called {entry.name!r}: {places[entry.name]} and {where}")
            places[entry.name] = where
        return found


class Registry(Generic[C]):
    """The components of one family, by name, discovered from a package and from installed entry points.

    ``group`` is the entry points' group; the default for the kind ``ownership test`` is ``exsim.ownership_tests``.
    """

    def __init__(self, kind: str, base: type[C], package: str, group: str | None = None) -> None:
        self.kind = kind
        self.base = base
        self.package = package
        self.group = group or f"exsim.{kind.replace(' ', '_')}s"

    def classes(self) -> dict[str, type[C]]:
        """Every component of the family by its name, sorted.

        Looks again at each call (the modules are imported once), so a module that appears later is found too. A class
        that is defined again under its old module and name, as by a notebook's cell, replaces the old one.

        Raises:
            InputError: two classes have one name.
        """
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        added = plugins(self.group, self._is_component, _article(self.kind))
        places = {cls: where for where, cls in added}
        found: dict[str, type[C]] = {}
        queue = [self.base]
        for cls in queue:
            queue.extend(cls.__subclasses__())
            if not self._is_component(cls):
                continue
            name = cls.model_fields["name"].default
            other = found.get(name, cls)
            if _path(other) != _path(cls):
                both = " and ".join(places.get(each, _path(each)) for each in (other, cls))
                raise InputError(f"two {self.kind}s are called {name!r}: {both}")
            found[name] = cls
        return dict(sorted(found.items()))

    def _is_component(self, entry: object) -> bool:
        """A class of the family with a name of its own, in a module whose import did not fail."""
        return (
            isinstance(entry, type)
            and issubclass(entry, self.base)
            and entry.__module__ in sys.modules
            and "name" in inspect.get_annotations(entry)
            and isinstance(entry.model_fields["name"].default, str)
        )

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
            raise InputError(f"{value!r} is not {_article(self.kind)}: give a name, or a mapping with 'name'")
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


def family_of(field: FieldInfo) -> Registry[Any] | None:
    """The family whose component a field holds (see :meth:`Registry.field`); None for another field."""
    makers = (getattr(note.func, "__self__", None) for note in field.metadata if isinstance(note, BeforeValidator))
    return next((maker for maker in makers if isinstance(maker, Registry)), None)


def _path(cls: type) -> str:
    """Where a class is defined: its module and its name there."""
    return f"{cls.__module__}.{cls.__qualname__}"
