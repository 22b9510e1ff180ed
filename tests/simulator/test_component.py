import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import torch
from pydantic import BaseModel, SerializeAsAny, ValidationError

import simulator.attacks
from simulator.attacks.base import ATTACKS
from simulator.component import Component, Registry, Settings, Table, describe, one_of
from simulator.context import Context
from simulator.data.known_sets import KNOWN
from simulator.detectors.base import DETECTORS
from simulator.errors import InputError
from simulator.models import ARCHITECTURES
from simulator.plan.config import read_config
from simulator.seeding import generator_for
from simulator.watermarks.base import WATERMARKS

NEW_ATTACK = '''
"""An attack that a newcomer wrote."""

from typing import Literal

from pydantic import Field

from simulator.attacks.base import Attack


class Idle(Attack):
    """Asks once and learns nothing."""

    name: Literal["{name}"] = "{name}"
    patience: float = Field(2.0, gt=0)

    def extract(self, oracle, surrogate, pool, context):
        """See Attack.extract."""
        return surrogate.eval()
'''


@pytest.fixture
def forgotten() -> Iterator[list[str]]:
    """Modules named here, and the classes in them, are gone after the test."""
    names: list[str] = []
    yield names
    for name in names:
        sys.modules.pop(name, None)
        package, _, module = name.rpartition(".")
        if package:
            delattr(importlib.import_module(package), module)
    gc.collect()


def sources() -> dict[str, bytes]:
    """Every file of the package as it is on disk."""
    root = Path(simulator.attacks.__file__).parents[1]
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.py")}


def test_one_new_file_is_an_attack_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: list[str]
) -> None:
    before, files = set(ATTACKS.classes()), sources()
    (tmp_path / "attacks").mkdir()
    (tmp_path / "attacks" / "newcomer.py").write_text(NEW_ATTACK.format(name="idle"))
    monkeypatch.setattr(simulator.attacks, "__path__", [*simulator.attacks.__path__, str(tmp_path / "attacks")])
    forgotten.append("simulator.attacks.newcomer")

    assert set(ATTACKS.classes()) - before == {"idle"}
    config = tmp_path / "run.yaml"
    config.write_text(
        "{name: new, dataset: digits, watermarks: [deeptracer], "
        "scenarios: [{attack: idle}, {attack: {name: idle, patience: 1e-3}}]}"
    )
    plain, patient = (ATTACKS.make(entry.attack) for entry in read_config(str(config)).scenarios)
    assert (plain.name, plain.params()["patience"], patient.params()["patience"]) == ("idle", 2.0, 0.001)
    assert '"patience": 0.001' in patient.params_json()
    surrogate = torch.nn.Linear(1, 1)
    stolen = patient.extract(None, surrogate, None, Context(generator_for("idle")))  # type: ignore[arg-type]
    assert stolen is surrogate
    assert sources() == files, "discovery must need no other file edited"

    config.write_text(config.read_text().replace("1e-3", "-1"))
    with pytest.raises(InputError, match=r"scenarios\.1\.attack: idle: patience: .*greater than 0, found -1"):
        read_config(str(config))


def test_a_new_attack_does_not_stay_when_its_module_is_gone() -> None:
    """What the other tests rely on, and a check of the fixture above."""
    gc.collect()
    assert "idle" not in ATTACKS.classes()


def test_installed_entry_points_are_found(plug_in: Callable[..., Path]) -> None:
    plug_in("somebody", NEW_ATTACK.format(name="plugged"), attacks="Idle")
    assert "plugged" in ATTACKS.classes()
    assert ATTACKS.make("plugged").params()["patience"] == 2.0


def test_a_group_has_a_plural_name() -> None:
    registries = (ATTACKS, WATERMARKS, DETECTORS, Registry("ownership test", Component, "simulator.attacks"))
    groups = [registry.group for registry in registries]
    assert groups == ["exsim.attacks", "exsim.watermarks", "exsim.detectors", "exsim.ownership_tests"]
    assert Registry("evasion", Component, "simulator.attacks", "others").group == "others"
    assert (ARCHITECTURES.group, KNOWN.group) == ("exsim.models", "exsim.datasets")


def test_two_components_of_one_name_are_an_error(plug_in: Callable[..., Path], tmp_path: Path) -> None:
    plug_in("somebody", NEW_ATTACK.format(name="knockoff"), attacks="Idle")
    line = (
        "two attacks are called 'knockoff': simulator.attacks.knockoff.Knockoff and somebody:Idle of somebody 1.0",
        "two attacks are called 'knockoff': somebody:Idle of somebody 1.0 and simulator.attacks.knockoff.Knockoff",
    )
    for name in ("knockoff", "distillation"):
        with pytest.raises(InputError) as caught:
            ATTACKS.make(name)
        assert str(caught.value) in line
    config = tmp_path / "run.yaml"
    config.write_text("{name: a, dataset: digits, watermarks: [deeptracer], scenarios: [{attack: dfme}]}")
    with pytest.raises(InputError, match="attack: two attacks are called 'knockoff'"):
        read_config(str(config))
    assert "deeptracer" in WATERMARKS.classes(), "the other families go on"


def test_one_module_may_not_shadow_another_of_its_package() -> None:
    class Family(Component):
        pass

    class First(Family):
        name: Literal["same"] = "same"

    class Second(Family):
        name: Literal["same"] = "same"

    registry: Registry[Family] = Registry("animal", Family, "simulator.attacks")
    with pytest.raises(InputError) as caught:
        registry.classes()
    here = f"{__name__}.test_one_module_may_not_shadow_another_of_its_package.<locals>"
    assert str(caught.value) == f"two animals are called 'same': {here}.First and {here}.Second"


def test_a_class_that_is_defined_again_takes_the_place_of_the_first() -> None:
    class Family(Component):
        pass

    def cell(count: int) -> type[Family]:
        class Ant(Family):
            name: Literal["ant"] = "ant"
            legs: int = count

        return Ant

    registry: Registry[Family] = Registry("animal", Family, "simulator.attacks")
    assert len({cell(6), cell(8)}) == 2
    assert registry.make("ant").params() == {"legs": 8}


def test_a_subclass_that_only_inherits_a_name_is_not_found() -> None:
    class Family(Component):
        pass

    class Ant(Family):
        name: Literal["ant"] = "ant"

    class Variation(Ant):
        legs: int = 6

    registry: Registry[Family] = Registry("animal", Family, "simulator.attacks")
    assert issubclass(Variation, Ant)
    assert registry.classes() == {"ant": Ant}


USELESS = {
    "import": ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    "syntax": ("def", "SyntaxError: invalid syntax"),
    "raises": (NEW_ATTACK.format(name="half") + "\nraise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "absent": ("", "AttributeError: module 'useless_absent' has no attribute 'Idle'"),
    "no_class": ("Idle = 3", "it is not an attack"),
    "of_another_family": ("from simulator.watermarks.badnets import BadNets as Idle", "it is not an attack"),
    "nameless": (NEW_ATTACK.replace("name: Literal", "title: Literal").format(name="x"), "it is not an attack"),
}


@pytest.mark.parametrize("case", USELESS)
def test_a_useless_plug_in_is_skipped_and_named_once(
    case: str, plug_in: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    source, reason = USELESS[case]
    names = list(ATTACKS.classes())
    plug_in(f"useless_{case}", source, attacks="Idle")
    plug_in(f"useful_{case}", NEW_ATTACK.format(name="plugged"), attacks="Idle")
    for _ in range(2):
        assert list(ATTACKS.classes()) == sorted([*names, "plugged"])
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith(f"exsim: plug-in useless_{case}:Idle of useless_{case} 1.0 is skipped: {reason}")
    assert "\n" not in line


def test_the_command_line_lists_plug_ins_and_names_the_useless_one(plug_in: Callable[..., Path]) -> None:
    plug_in("broken", "import nowhere_to_be_found", attacks="Idle", models="Net")
    plug_in("layers", NET, models="TINY")
    site = plug_in("pictures", PICTURES, datasets="STRIPES")
    root = Path(simulator.attacks.__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-m", "simulator", "list"],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{site}"},
        capture_output=True,
        text=True,
        check=True,
    )
    reason = "of broken 1.0 is skipped: ModuleNotFoundError: No module named 'nowhere_to_be_found'"
    assert sorted(found.stderr.splitlines()) == [
        f"exsim: plug-in broken:Idle {reason}",
        f"exsim: plug-in broken:Net {reason}",
    ]
    for word in ("tiny", "a net of somebody's", "stripes", "Stripes: 60 and 20 test images, 2 classes, grey, 12x12"):
        assert word in found.stdout
    for word in ("knockoff", "resnet18", "digits"):
        assert word in found.stdout


NET = """
from torch import nn
from simulator.models import Architecture

def build(channels, size, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, 7), nn.ReLU()), nn.Linear(7, classes)

TINY = Architecture("tiny", build, "a net of somebody's", smallest=4)
"""

PICTURES = """
from simulator.data.known_sets import KnownSet

def read(directory, size, download):
    raise NotImplementedError

STRIPES = KnownSet("stripes", "Stripes", read, classes=2, channels=1, size=12, train=(60,), test=20)
"""


@pytest.mark.parametrize(
    ("group", "source", "entry", "table", "kind"),
    [
        ("models", NET.replace('"tiny"', '"linear"'), "TINY", ARCHITECTURES, "model"),
        ("datasets", PICTURES.replace('"stripes"', '"mnist"'), "STRIPES", KNOWN, "data set"),
    ],
)
def test_two_entries_of_a_table_of_one_name_are_an_error(
    plug_in: Callable[..., Path], group: str, source: str, entry: str, table: Table[Any], kind: str
) -> None:
    plug_in("somebody", source, **{group: entry})
    name = "linear" if kind == "model" else "mnist"
    where = f"somebody:{entry} of somebody 1.0"
    for ask in (lambda: table[name], lambda: table.known("digits"), lambda: list(table), lambda: name in table):
        with pytest.raises(InputError) as caught:
            ask()
        assert str(caught.value) == f"two {kind}s are called '{name}': the program's own and {where}"


def test_two_plug_ins_of_one_name_are_an_error(plug_in: Callable[..., Path]) -> None:
    plug_in("one", NET, models="TINY")
    plug_in("other", NET, models="TINY")
    with pytest.raises(InputError, match=r"two models are called 'tiny': \w+:TINY of \w+ 1.0 and \w+:TINY of \w+ 1.0"):
        ARCHITECTURES.known("tiny")


def test_an_entry_of_another_kind_is_skipped(plug_in: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    plug_in("confused", NET, datasets="TINY")
    assert "tiny" not in KNOWN
    assert caplog.messages == ["exsim: plug-in confused:TINY of confused 1.0 is skipped: it is not a data set"]


def test_names_are_sorted_and_abstract_bases_are_left_out() -> None:
    class Family(Component):
        pass

    class Middle(Family):
        pass

    class Zebra(Middle):
        name: Literal["zebra"] = "zebra"

    class Ant(Family):
        name: Literal["ant"] = "ant"

    registry: Registry[Family] = Registry("animal", Family, "simulator.attacks")
    assert registry.classes() == {"ant": Ant, "zebra": Zebra}
    assert list(registry.classes()) == ["ant", "zebra"]
    with pytest.raises(InputError, match="is not an animal: give a name"):
        registry.make(3)


def test_make_takes_a_name_a_mapping_or_the_thing_itself() -> None:
    attack = ATTACKS.make("knockoff")
    assert ATTACKS.make({"name": "knockoff"}) == attack
    assert ATTACKS.make(attack) is attack
    assert ATTACKS.make({"name": "knockoff", **attack.params()}) == attack


@pytest.mark.parametrize(
    ("value", "fragment"),
    [
        ("knokoff", "(did you mean 'knockoff'?)"),
        ({"name": ["knockoff"]}, "['knockoff'] is not one of"),
        ({"name": None}, "None is not one of"),
        ({"strategy": "random"}, "is not an attack: give a name, or a mapping with 'name'"),
        (None, "None is not an attack"),
        (["knockoff"], "is not an attack"),
        ({"name": "distillation", "temperature": 0}, "distillation: temperature: "),
        ({"name": "distillation", "temprature": 1}, "distillation: temprature: no such setting"),
        ({"name": "distillation", "training": {"epochs": 0}}, "distillation: training.epochs: "),
    ],
)
def test_make_refuses_with_one_line(value: object, fragment: str) -> None:
    with pytest.raises(InputError) as caught:
        ATTACKS.make(value)
    assert fragment in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("value", ["near", "ne\nar", 3, None, ["a"], "x" * 100])
def test_one_of_is_one_line(value: object) -> None:
    assert len(one_of(value, ["nearby", "far"]).splitlines()) == 1


def test_one_of_gives_a_hint_where_one_is_near() -> None:
    assert one_of("knokoff", ["distillation", "knockoff"]) == (
        "'knokoff' is not one of distillation, knockoff (did you mean 'knockoff'?)"
    )
    assert one_of("zzz", ["distillation", "knockoff"]) == "'zzz' is not one of distillation, knockoff"


class Inner(Settings):
    count: int = 1


class Outer(Settings):
    inner: Inner = Inner()
    values: tuple[float, ...] = ()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"inner": {"count": 1.5}}', "inner.count: Input should be a valid integer"),
        ('{"inner": {"cuont": 1}}', "inner.cuont: no such setting"),
        ('{"in\\nner": 1}', "in ner: no such setting"),
        ('{"values": [1, "a\\nb"]}', "values.1: Input should be a valid number, found 'a\\nb'"),
        ('{"values": ["a"], "inner": 3}', "(and 1 more)"),
        ('{"values": [NaN]}', "values.0: Input should be a finite number, found nan"),
        ("{", "Invalid JSON"),
    ],
)
def test_describe_is_one_line_with_the_place_and_what_was_found(text: str, line: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate_json(text)
    described = describe(caught.value)
    assert line in described
    assert len(described.splitlines()) == 1


def test_describe_does_not_say_where_for_a_problem_of_the_whole() -> None:
    class Whole(BaseModel):
        value: Annotated[int, "any"]

    with pytest.raises(ValidationError) as caught:
        Whole.model_validate({})
    assert describe(caught.value) == "value: Field required"


def test_settings_are_frozen_strict_and_hashable() -> None:
    with pytest.raises(ValidationError):
        Inner(count="1")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        Inner().count = 2  # type: ignore[misc]
    assert hash(Outer(values=(1.0,))) == hash(Outer(values=(1.0,)))


class Grown(Component):
    """A component that has got two settings since figures of it were published."""

    later: ClassVar[tuple[str, ...]] = ("added", "more")

    name: Literal["grown"] = "grown"
    first: int = 1
    added: float = 0.5
    more: tuple[int, ...] = ()


class Holder(Settings):
    held: SerializeAsAny[Component] = Grown()


def test_younger_settings_are_dumped_only_where_they_are_used() -> None:
    assert Grown().params() == {"first": 1}
    assert Grown(added=0.25).params() == {"first": 1, "added": 0.25}
    assert Holder().model_dump(mode="json") == {"held": {"name": "grown", "first": 1}}
    assert Holder(held=Grown(more=(2,))).model_dump(mode="json")["held"] == {"name": "grown", "first": 1, "more": [2]}
    # a search has to see what it may change
    whole = Holder().model_dump(mode="json", context={"whole": True})
    assert whole == {"held": {"name": "grown", "first": 1, "added": 0.5, "more": []}}
