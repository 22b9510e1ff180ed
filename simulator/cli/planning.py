"""``exsim plan``: what a configuration would run, what that costs, and how much of it runs at once."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from simulator.cli import terminal
from simulator.errors import InputError

if TYPE_CHECKING:
    from simulator.plan.config import RunConfig
    from simulator.plan.tree import Plan


def show_plan(config: RunConfig, data: Path | None, address: str | None) -> int:
    """Prints the plan of a configuration; returns the exit status.

    Raises:
        InputError: a run would be refused, or no cluster is at the address.
    """
    from simulator.experiment.preflight import look_at
    from simulator.plan.tree import make_plan

    plan = make_plan(config)
    foreign, absent = look_at(config, data)
    costs = _estimate(config, plan, data, address, foreign)
    console = terminal.console()
    console.print(_table(config, plan))
    share = config.resources
    console.print(
        f"to train: {len(plan.benigns)} benign, {len(plan.victims)} marked; "
        f"victim queries at most: {sum(scenario.budget for scenario in plan.scenarios):,} images\n"
        f"actors: attackers {share.attackers} x {share.attacker:g}, trainers {share.trainers} x {share.trainer:g}, "
        f"replicas {share.replicas} x {share.victim:g}, collectors {share.collectors} x {share.collector:g} "
        f"(of a GPU where there is one, else of a CPU; collectors always of a CPU)",
        soft_wrap=True,
    )
    for line in [*costs, absent] if absent else costs:
        console.print(line, soft_wrap=True, highlight=False)
    return 0


def _table(config: RunConfig, plan: Plan) -> Table:
    from simulator.component import BENIGN
    from simulator.plan.subjects import Marked, Removed

    after = {"removals": len(plan.removals), "evasions": len(plan.guards)}
    more = "".join(f", {count} {name}" for name, count in after.items() if count)
    table = Table(title=f"{config.name}: {len(plan.scenarios)} scenarios{more}", title_justify="left")
    for name in ("scenario", "attack", "labels", "pool", "architecture", "from", "seed"):
        table.add_column(name, overflow="fold")
    table.add_column("budget", justify="right")
    for scenario in plan.scenarios:
        last = scenario.stages[-1]
        table.add_row(
            scenario.id,
            "+".join(stage.attack.name for stage in scenario.stages),
            scenario.stages[0].labels,
            scenario.stages[0].pool_label,
            last.architecture or scenario.victim.architecture,
            scenario.victim.watermark.name if isinstance(scenario.victim, Marked) else BENIGN,
            str(scenario.seed),
            f"{scenario.budget:,}",
        )
    for copy in plan.after:
        does = f"then {copy.removal.name} of" if isinstance(copy, Removed) else f"behind {copy.evasion.name}:"
        table.add_row(
            copy.id,
            f"{does} {copy.target.id}",
            "",
            copy.pool.label if copy.pool else "none",
            copy.architecture,
            copy.owner.watermark.name if isinstance(copy.owner, Marked) else BENIGN,
            str(copy.seed),
            "",
        )
    return table


def _estimate(
    config: RunConfig, plan: Plan, data: Path | None, address: str | None, foreign: Mapping[str, int]
) -> list[str]:
    """Lines on what a plan costs (see :mod:`simulator.plan.estimate`), and on how much of it runs at once on the
    cluster at ``address``, or on this machine."""
    from simulator.data.dataset import outline
    from simulator.plan.estimate import architectures, calibrate, estimate, span
    from simulator.training.predict import use_one_thread

    terminal.quiet_ray()
    from actors.cluster import connected
    from actors.layout import lay_out, nodes, this_machine

    there = this_machine()
    if address:
        with tempfile.TemporaryDirectory() as logs, connected(address, Path(logs)):
            there = nodes()
    use_one_thread()
    images = replace(outline(config.dataset, data), foreign=foreign)
    speeds = {name: calibrate(name, images, config.training.batch_size) for name in architectures(plan)}
    found = estimate(config, plan, images, speeds)
    cpus, gpus = (sum(node.get(kind, 0) for node in there) for kind in ("CPU", "GPU"))
    count = f"{len(there)} node" if len(there) == 1 else f"{len(there)} nodes"
    where = f"{address or 'this machine'} ({count}, {cpus:g} CPUs, {gpus:g} GPUs)"
    lines = found.lines()
    try:
        layout = lay_out(config, len(plan.scenarios), there)
    except InputError as error:
        return [*lines, f"{where}: it does not fit: {error}"]
    clock = found.wall(layout.attackers, layout.trainers, layout.replicas, layout.collectors, cpus)
    share = f"{layout.attacker.share:g} of a {'GPU' if layout.gpu else 'CPU'}"
    time = "" if layout.gpu else f", at least {span(clock)} of the clock"
    return [*lines, f"{where}: {layout.attackers} attackers at once, each {share}{time}"]
