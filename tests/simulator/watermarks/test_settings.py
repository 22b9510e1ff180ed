"""Every question of the paper that is a setting can be asked from YAML alone: the page's own examples are embedded."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from simulator.experiment import owner as owner_side
from simulator.experiment.owner import TrainedOwner, train_owner
from simulator.experiment.preflight import prepare
from simulator.experiment.world import World
from simulator.models import Classifier
from simulator.plan.config import RunConfig, check_config
from simulator.plan.subjects import Marked
from simulator.plan.tree import make_plan

PAGE = Path(__file__).parents[3] / "docs" / "watermarks.md"

#: beside what the page says: a task that is learned in no time
BASE: dict[str, Any] = {
    "name": "settings",
    "dataset": {"name": "digits", "size": 8, "owner": 150, "attacker": 100, "test": 150},
    "training": {"epochs": 1},
}
TINY_FILTER = {"queries": 50, "keep": 20, "training": {"epochs": 1}}
SHORT = {"deeptracer": {"first_epochs": 0, "second_epochs": 1, "candidates": 30}}


@cache
def examples() -> list[dict[str, Any]]:
    """The YAML blocks of the section about settings."""
    section = PAGE.read_text(encoding="utf-8").partition("## Settings from YAML alone")[2].partition("\n## ")[0]
    return [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)]


def shortened(example: dict[str, Any], **key_filter: Any) -> RunConfig:
    schemes = [{"name": entry} if isinstance(entry, str) else entry for entry in example["watermarks"]]
    schemes = [{**entry, **SHORT.get(entry["name"], {"candidates": 30})} for entry in schemes]
    rule = {"architecture": "lenet5", **example.get("key_filter", {}), **TINY_FILTER, **key_filter}
    return check_config({**BASE, "watermarks": schemes, "key_filter": rule})


@cache
def owned() -> tuple[World, Classifier]:
    """The data, and a benign model."""
    plan, world = prepare(check_config({**BASE, "watermarks": ["badnets"]}), None)
    return world, train_owner(plan.benigns[0], world, None, torch.device("cpu")).model


def embed(spec: Marked) -> TrainedOwner:
    world, benign = owned()
    return train_owner(spec, world, benign, torch.device("cpu"))


def test_every_setting_of_the_page_changes_the_victim() -> None:
    victims = make_plan(shortened(examples()[0], stages="none")).victims
    assert len({spec.id for spec in victims}) == len(examples()[0]["watermarks"])
    found = {str(spec.watermark): embed(spec) for spec in victims}
    weights = [torch.cat([p.flatten() for p in owner.model.parameters()]) for owner in found.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    asked = [spec.watermark.params() for spec in victims]
    # the questions that the issue of this page names
    assert {params["source_classes"] for params in asked} == {2, 4, 6, 8}
    assert {params["combination"] for params in asked} == {"tiles", "crops", "stripes"}
    assert {params["selection"] for params in asked} == {"adaptive", "random"}
    for weight in ("watermark_weight", "intra_weight", "inter_weight"):
        assert 0 in {params[weight] for params in asked}
    for spec, owner in zip(victims, found.values(), strict=True):
        assert owner.key is not None
        assert len(owner.key.info["sources"]) == spec.watermark.params()["source_classes"]


@pytest.mark.parametrize("stages", ["none", "first", "both"])
def test_the_filter_serves_every_scheme_of_the_page(stages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shortened(examples()[1], stages=stages)
    names = [scheme.name for scheme in config.watermarks]
    assert {"content", "composite", "mea_defender"} <= set(names)  # those of Table 22
    built: list[str] = []
    build = owner_side.build_surrogate

    def spy(name: str, *rest: Any) -> Classifier:
        built.append(name)
        return build("lenet5", *rest)

    monkeypatch.setattr(owner_side, "build_surrogate", spy)
    spec = make_plan(config).victims[0]
    key = embed(spec).key
    assert key is not None
    assert (key.info["filter"] == "none") == (stages == "none")
    assert ("filter_counts" in key.info) == (stages != "none")
    # the surrogate's architecture is the page's (Table 21)
    assert built == ([] if stages == "none" else [config.key_filter.architecture])
    assert config.key_filter.architecture == "resnet18"
