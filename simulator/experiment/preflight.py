"""Checks before anything runs: of the plan, the data sets, the pools, the architectures."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from simulator.data.dataset import AbsentError, Dataset, load, training_images
from simulator.data.pool import OWN_PARTS, PoolSpec, pool_size, without_test_images
from simulator.errors import InputError, one_line
from simulator.experiment.world import World
from simulator.models import build
from simulator.ownership.key import KeySamples
from simulator.plan.config import RunConfig
from simulator.plan.subjects import POOL, Removed, Stolen, Suspect
from simulator.plan.tree import Plan, make_plan
from simulator.seeding import generator_for
from simulator.service.answers import most_kept


def prepare(config: RunConfig, data_dir: Path | None = None, *, download: bool = True) -> tuple[Plan, World]:
    """Makes the plan of a run and loads its images. All that can be checked before anything runs is checked.

    Raises:
        AbsentError: a known set is not there, and ``download`` is false.
        InputError: a data set, a pool or an architecture does not fit what the run asks.
    """
    plan = make_plan(config)
    if not plan.victims:
        raise InputError(f"{config.name}: watermarks: an empty list leaves nothing to measure; give one or more")
    world = load_world(config, plan, data_dir, download=download)
    labels_fit(plan, world.dataset)
    architectures_fit(plan, world.dataset)
    watermarks_fit(plan, world.dataset)
    pools_fit(config, plan, world)
    evasions_fit(config, plan, world)
    removals_fit(config, plan, world.dataset)
    return plan, world


def look_at(config: RunConfig, data_dir: Path | None = None) -> tuple[dict[str, int], str]:
    """Makes the checks of :func:`prepare` without downloading anything. If a data set is absent, fewer are made.

    Returns:
        The number of images of each foreign set that is there, and one line that says what is missing (empty if nothing
        is). The numbers leave the victim's test images out if every set is there.

    Raises:
        InputError: a run would be refused.
    """
    try:
        _, world = prepare(config, data_dir, download=False)
    except AbsentError as error:
        absent = str(error)
    else:
        return {name: len(images) for name, images in world.foreign.items()}, ""
    counts = {}
    for name in foreign_names(config, make_plan(config)):
        with suppress(AbsentError):
            counts[name] = len(training_images(name, data_dir, download=False))
    return counts, f"{absent}: what depends on its images was not checked"


def foreign_names(config: RunConfig, plan: Plan) -> list[str]:
    """The data sets beside the victim's that pools of a run draw from, sorted."""
    specs = [pool for _, pool in attackers_pools(plan)]
    if config.watermarks and config.key_filter.stages != "none":
        specs.append(config.key_filter.pool)
    return sorted({name for spec in specs for name in spec.parts if name not in OWN_PARTS})


def attackers_pools(plan: Plan) -> Iterator[tuple[Suspect, PoolSpec]]:
    """Every pool that a thief draws from, with the model that is made with it."""
    for scenario in plan.scenarios:
        yield from ((scenario, pool) for stage in scenario.stages for pool in stage.pools)
    yield from ((copy, copy.pool) for copy in plan.after if copy.pool is not None)


def load_world(config: RunConfig, plan: Plan, data_dir: Path | None = None, *, download: bool = True) -> World:
    """Loads every data set that a run needs; the foreign ones without the victim's test images.

    Raises:
        AbsentError: a known one is not there, and ``download`` is false.
        InputError: one is missing, damaged, too small for what the run asks, or too poor in classes.
    """
    dataset = load(config.dataset, data_dir, download=download)
    if config.watermarks and "triggers" in config.key_filter.pool.parts:
        raise InputError("key_filter.pool: 'triggers' is for attackers' pools; the owner's filter has no use for it")
    foreign = {
        name: without_test_images(training_images(name, data_dir, download=download), dataset, name)
        for name in foreign_names(config, plan)
    }
    return World(dataset, foreign)


def pools_fit(config: RunConfig, plan: Plan, world: World) -> None:
    """Checks that every pool can be built: those of the attackers with a few images, the key filter's by its full size
    in memory.

    Raises:
        InputError: one cannot. The message names the pool and what it lacks.
    """
    if config.watermarks and config.key_filter.stages != "none":
        _filter_pool_fits(config, world)
    tried: dict[str, None] = {}
    triggers = KeySamples(world.dataset.owner.images[:1], world.dataset.owner.labels[:1], world.dataset.classes)
    for copy, spec in attackers_pools(plan):
        if not isinstance(copy, Stolen) and "triggers" in spec.parts:
            what = "a removal" if isinstance(copy, Removed) else "an evasion"
            raise InputError(f"{config.name}: pool {spec.label}: 'triggers' is for thefts; {what}'s pool has none")
        if spec.model_dump_json() in tried:
            continue
        tried[spec.model_dump_json()] = None
        try:
            world.pool(spec, 4, generator_for("check"), triggers)
        except InputError as error:
            raise InputError(f"{config.name}: pool {spec.label}: {error}") from None
        except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError if memory is short
            raise InputError(f"{config.name}: pool {spec.label}: cannot be built: {one_line(error)}") from None


def _filter_pool_fits(config: RunConfig, world: World) -> None:
    rule = config.key_filter
    try:
        count = pool_size(
            rule.pool,
            dataset=world.dataset,
            count=rule.queries,
            foreign=lambda name: world.foreign[name],
            triggers=None,
        )
    except InputError as error:
        raise InputError(f"{config.name}: key_filter: {error}") from None
    needed, there = count * math.prod(world.shape), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"{config.name}: key_filter.queries: {rule.queries}: pool {rule.pool.label} of {count:,} images takes "
            f"{needed / 2**30:,.0f} GB, this machine has {there / 2**30:,.0f} GB of memory"
        )


def evasions_fit(config: RunConfig, plan: Plan, world: World) -> None:
    """Checks before anything runs that every evasion has as many images as it needs.

    Raises:
        InputError: naming the evasion and its pool.
    """
    for subject in plan.guards:
        if subject.pool is not None:
            count = pool_size(
                subject.pool, dataset=world.dataset, count=POOL, foreign=lambda name: world.foreign[name], triggers=None
            )
            try:
                subject.evasion.check(count)
            except InputError as error:
                raise InputError(f"{config.name}: pool {subject.pool.label}: {error}") from None


def labels_fit(plan: Plan, dataset: Dataset) -> None:
    """Checks that no answer mode keeps more classes than the data set has.

    Raises:
        InputError: one does, e.g. ``top-20`` of 10 classes.
    """
    modes = {stage.labels: "labels" for scenario in plan.scenarios for stage in scenario.stages}
    modes |= {spec.key_filter.labels: "key_filter.labels" for spec in plan.victims}
    for mode, where in modes.items():
        if most_kept(mode) > dataset.classes:
            raise InputError(
                f"{where}: {mode!r} keeps {most_kept(mode)} classes, {dataset.name} has {dataset.classes}: "
                f"top-1 to top-{dataset.classes} are allowed"
            )


def removals_fit(config: RunConfig, plan: Plan, dataset: Dataset) -> None:
    """Checks before anything runs that every removal has what it needs.

    Raises:
        InputError: naming the removal and what it lacks.
    """
    for removed in plan.removals:
        removal, where = removed.removal, f"{config.name}: {removed.removal.name}"
        if "transfer" in removal.needs and removed.theft is None:
            raise InputError(f"{where}: it needs the transfer set of a theft, and the victim itself was not stolen")
        if removed.pool is not None and "labels" in removal.needs and not removed.pool.labelled:
            raise InputError(
                f"{where}: labels: pool {removed.pool.label} has no true labels of {dataset.name}: "
                "pools of 'attacker' and 'owner' have"
            )
        removal.check(dataset)


def watermarks_fit(plan: Plan, dataset: Dataset) -> None:
    """Checks that every watermark scheme can mark a model of this data set.

    Raises:
        InputError: one cannot. The message says why.
    """
    for spec in plan.victims:
        spec.watermark.check(dataset)
    for scenario in plan.scenarios:
        of = scenario.triggers_of
        if of is not None and not of.watermark.marks:
            raise InputError(f"pool: 'triggers' of {of.watermark.name}: it has none; name other images")


def architectures_fit(plan: Plan, dataset: Dataset) -> None:
    """Checks that every architecture takes the images' size.

    Raises:
        InputError: one does not. The message names it and the smallest size it takes.
    """
    names = {spec.architecture for spec in plan.benigns}
    optional = {spec.key_filter.architecture for spec in plan.victims}
    optional |= {stage.architecture for scenario in plan.scenarios for stage in scenario.stages}
    optional |= {removed.architecture for removed in plan.removals}
    for name in sorted(names | {name for name in optional if name}):
        with torch.device("meta"):
            build(name, channels=dataset.channels, size=dataset.size, classes=dataset.classes)
