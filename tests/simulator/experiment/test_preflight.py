"""What is checked, and cleaned, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from simulator.cli import main
from simulator.context import Context
from simulator.data.dataset import Images, load
from simulator.data.pool import Pool, PoolSpec, pool_size
from simulator.errors import InputError
from simulator.experiment.local import run_config
from simulator.experiment.preflight import load_world, look_at, pools_fit, prepare
from simulator.experiment.world import World
from simulator.models import Classifier
from simulator.plan.config import RunConfig, check_config
from simulator.plan.tree import make_plan
from simulator.removals.base import REMOVALS, Removal

BRIEF = {"epochs": 1, "batch_size": 32}


def config_of(**changes: Any) -> RunConfig:
    """A run of a second at most."""
    settings: dict[str, Any] = {
        "name": "small",
        "dataset": {"name": "digits", "size": 8, "owner": 120, "attacker": 300, "test": 80},
        "architecture": "linear",
        "training": BRIEF,
        "watermarks": ["badnets"],
        "key_filter": {"architecture": "linear", "pool": "attacker", "queries": 40, "keep": 20, "training": BRIEF},
        "controls": False,
        "device": "cpu",
    }
    return check_config({**settings, **changes})


def rows(images: torch.Tensor) -> set[bytes]:
    return {row.tobytes() for row in images.numpy()}


def save_npz(path: Path, images: Images) -> str:
    """The images as the training part of a file."""
    pixels = images.images.permute(0, 2, 3, 1).numpy()
    np.savez(path, x_train=pixels, y_train=images.labels.numpy(), x_test=pixels[:2], y_test=np.arange(2))
    return str(path)


@pytest.fixture
def leak(tmp_path: Path) -> str:
    """A file with all test images and fifty others."""
    data = load(config_of().dataset)
    images = torch.cat([data.test.images, data.attacker.images[:50]])
    return save_npz(tmp_path / "leak.npz", Images(images, torch.cat([data.test.labels, data.attacker.labels[:50]])))


def refused(**changes: Any) -> str:
    """What is said of a configuration before anything runs."""
    with pytest.raises(InputError) as caught:
        prepare(config_of(**changes))
    message = str(caught.value)
    assert "\n" not in message
    return message


def world_of(config: RunConfig) -> World:
    return load_world(config, make_plan(config))


class TestTestImages:
    def test_no_pool_of_an_attacker_has_one(self, leak: str) -> None:
        pool = {"attacker": 1, leak: 1}
        config = config_of(scenarios=[{"attack": "knockoff", "pool": [leak, pool], "budget": 200}])
        world = world_of(config)
        for value in (leak, pool):
            for view in (world, world.for_attackers()):
                found = view.pool(PoolSpec.parse(value), 200, torch.Generator().manual_seed(0))
                assert not rows(found.images) & rows(world.dataset.test.images)
        assert len(world.for_attackers().pool(PoolSpec.parse(leak), 200, torch.Generator())) == 50

    def test_no_attacker_asks_one(self, leak: str, tmp_path: Path) -> None:
        scenario = {"attack": {"name": "knockoff", "training": BRIEF}, "pool": leak, "budget": 130}
        config = config_of(scenarios=[scenario], save_transfer_sets=True)
        found = [row for row in run_config(config, tmp_path / "run") if row.role == "stolen"]
        assert [(row.status, row.queries) for row in found] == [("ok", 50)]
        (kept,) = (tmp_path / "run" / "transfer").iterdir()
        asked = load_file(kept)["images"]
        assert len(asked) == 50
        assert not rows(asked) & rows(world_of(config).dataset.test.images)


class TestFilterPool:
    def test_it_is_checked_with_all_its_images(self) -> None:
        rule = {"architecture": "linear", "pool": "patches", "training": BRIEF}
        said = refused(key_filter={**rule, "queries": 10**11})
        assert "key_filter.queries: 100000000000: pool patches of 100,000,000,000 images takes 5,960 GB" in said
        prepare(config_of(key_filter={**rule, "queries": 8000}))
        # what is not asked needs no memory
        prepare(config_of(key_filter={**rule, "queries": 10**11, "pool": {"parts": "patches", "size": 40}}))
        prepare(config_of(key_filter={**rule, "queries": 10**11, "stages": "none"}))

    def test_it_has_to_be_there(self) -> None:
        pool = {"parts": "attacker", "classes": [12]}
        assert "key_filter: pool: class 12 is not one of digits's" in refused(key_filter={"pool": pool})

    @pytest.mark.parametrize("left", [0, 3])
    def test_the_images_that_count_are_those_that_are_left(self, left: int, tmp_path: Path) -> None:
        data = load(config_of().dataset)
        images = torch.cat([data.test.images, data.attacker.images[:left]])
        labels = torch.cat([data.test.labels, data.attacker.labels[:left]])
        file = save_npz(tmp_path / "leak.npz", Images(images, labels))
        if not left:
            assert "is a test image" in refused(key_filter={"architecture": "linear", "pool": file})
            return
        # of 9 to 1, three images carry no more than three of the other part
        pool = {"parts": {"attacker": 1, file: 9}, "size": 300}
        config = config_of(key_filter={"architecture": "linear", "pool": pool})
        world = world_of(config)
        pools_fit(config, make_plan(config), world)
        spec = config.key_filter.pool
        counted = pool_size(
            spec, dataset=world.dataset, count=40, foreign=lambda name: world.foreign[name], triggers=None
        )
        assert counted == len(world.pool(spec, 40, torch.Generator())) == 3


class Hungry(Removal):
    """Asks for images. It has no name of its own, so that no other test finds it in the registry."""

    def remove(self, model: Classifier, pool: Pool | None, context: Context) -> Classifier:
        return model


@pytest.fixture
def hungry(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = REMOVALS.classes()
    monkeypatch.setattr(REMOVALS, "classes", lambda: {**classes, "hungry": Hungry})


class TestPoolsOfRemovals:
    """What a thief has for a removal is looked at before anything runs, as what it asks is."""

    def then(self, images: object, **scenario: Any) -> list[dict[str, Any]]:
        return [{**scenario, "then": [{"removal": "pruning", "then": [{"removal": "hungry", "pool": images}]}]}]

    def test_foreign_sets_are_loaded_without_test_images(self, leak: str, hungry: None) -> None:
        config = config_of(scenarios=self.then(leak))
        plan, world = prepare(config)
        assert len(world.foreign[leak]) == 50
        (removed,) = (each for each in plan.removals if each.pool is not None)
        assert removed.pool is not None
        images = world.for_attackers().pool(removed.pool, 10_000, torch.Generator()).images
        assert not rows(images) & rows(world.dataset.test.images)

    @pytest.mark.parametrize(
        ("pool", "words"),
        [
            ("./missing.npz", "missing.npz"),
            ({"parts": "attacker", "classes": [12]}, "class 12 is not one of"),
            ({"owner": 9, "triggers": 1}, "'triggers' is for thefts; a removal's pool has none"),
        ],
    )
    def test_one_that_cannot_be_built_is_one_line(self, pool: object, words: str, hungry: None) -> None:
        assert words in refused(scenarios=self.then(pool))
        assert words in refused(scenarios=self.then(pool, attack="knockoff", pool="attacker", budget=9))

    def test_triggers_are_refused_where_a_theft_has_the_same_pool(self, hungry: None) -> None:
        pool = {"owner": 9, "triggers": 1}
        said = refused(scenarios=self.then(pool, attack="knockoff", pool=pool, budget=9))
        assert "'triggers' is for thefts; a removal's pool has none" in said

    def test_a_removal_that_needs_no_images_has_its_pool_left_alone(self) -> None:
        prepare(config_of(scenarios=[{"then": [{"removal": "pruning", "pool": "triggers"}]}]))


class TestLabels:
    @pytest.mark.parametrize("mode", ["top-11", "noise-0.5 then top-11 then round-2", "top-3 then top-99"])
    def test_no_more_classes_than_there_are(self, mode: str) -> None:
        scenario = {"attack": "knockoff", "pool": "attacker", "budget": 9}
        said = refused(scenarios=[{**scenario, "labels": ["soft", mode]}])
        assert f"labels: {mode!r} keeps " in said
        assert "digits has 10: top-1 to top-10 are allowed" in said
        rule = {"architecture": "linear", "pool": "attacker"}
        assert f"key_filter.labels: {mode!r}" in refused(key_filter={**rule, "labels": mode})
        prepare(config_of(scenarios=[{**scenario, "labels": ["soft", "hard", "top-10", "top-1 then round-2"]}]))


class TestPlan:
    """``exsim plan`` looks at what a run would, as far as it is there."""

    def test_what_is_there_is_counted_without_test_images(self, leak: str) -> None:
        scenario = {"attack": "knockoff", "pool": leak, "budget": 90}
        assert look_at(config_of(scenarios=[scenario])) == ({leak: 50}, "")

    def test_a_known_set_that_is_absent_is_not_downloaded_and_files_are_read(
        self, leak: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torchvision import datasets

        def unwanted(_self: object) -> None:
            raise AssertionError("nothing is to be downloaded")

        monkeypatch.setattr(datasets.MNIST, "download", unwanted)
        scenario = {"attack": "knockoff", "pool": {leak: 1, "mnist": 1}, "budget": 90}
        for changes in ({}, {"dataset": "fashion_mnist"}):
            counts, absent = look_at(config_of(**changes, scenarios=[scenario]), tmp_path)
            assert counts == {leak: 130}
            assert absent == (
                f"{'fashion_mnist' if changes else 'mnist'}: not in {tmp_path}: what depends on its images was not "
                "checked"
            )
        Path(leak).write_bytes(Path(leak).read_bytes()[:400])
        with pytest.raises(InputError, match="truncated or corrupt"):
            look_at(config_of(dataset="fashion_mnist", scenarios=[scenario]), tmp_path)

    def test_the_plan_says_what_it_did_not_check(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", "fashion-mnist-quick", "--data", str(tmp_path)]) == 0
        assert f"fashion_mnist: not in {tmp_path}: what depends on its images" in capsys.readouterr().out
