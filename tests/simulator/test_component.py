import gc
import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from pydantic import BaseModel, ValidationError

import simulator.attacks
from simulator.attacks.base import ATTACKS
from simulator.component import Component, Registry, Settings, describe, one_of
from simulator.context import Context
from simulator.errors import InputError
from simulator.plan.config import read_config
from simulator.seeding import generator_for

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


def test_installed_entry_points_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: list[str]
) -> None:
    (tmp_path / "plugin_of_somebody.py").write_text(NEW_ATTACK.format(name="plugged"))
    monkeypatch.syspath_prepend(tmp_path)
    forgotten.append("plugin_of_somebody")
    points = {"exsim.attacks": [EntryPoint("plugged", "plugin_of_somebody:Idle", "exsim.attacks")]}
    monkeypatch.setattr("simulator.component.entry_points", lambda *, group: points.get(group, []))
    assert "plugged" in ATTACKS.classes()
    assert ATTACKS.make("plugged").params()["patience"] == 2.0


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
