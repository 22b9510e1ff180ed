"""The command line ``exsim``, the one place that knows all three packages.

Exit status: 0 every row is done (``verify``: the watermark is there; ``serve``: it was ended), 1 some row failed
(``verify``: it is not there), 2 bad input, 130 interrupted. Bad input is one line on stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from simulator import __version__
from simulator.errors import InputError

INTERRUPTED = 130

_config = click.argument("config", default="digits")
_set = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting, by its dotted path."
)
_data = click.option("--data", type=click.Path(path_type=Path), envvar="EXSIM_DATA", help="Where data sets lie.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="exsim")
def exsim() -> None:
    """Simulates model-extraction attacks against watermarked classifiers."""


@exsim.command()
@_config
@_set
@_data
@click.option("--out", help="Run directory, or a URI such as s3://BUCKET/RUN (default: runs/<time>_<name>).")
@click.option("--resume", metavar="DIR", help="Finish an earlier run, in a directory or at a URI.")
@click.option("--local", is_flag=True, help="One process, no Ray.")
@click.option("--address", help="Ray cluster to run on (default: RAY_ADDRESS, else a local one).")
@click.option(
    "--wait", type=click.FloatRange(min=0), default=0, metavar="SECONDS", help="For an autoscaler to bring its nodes."
)
@click.pass_context
def run(
    context: click.Context,
    config: str,
    overrides: tuple[str, ...],
    data: Path | None,
    out: str | None,
    resume: str | None,
    local: bool,
    address: str | None,
    wait: float,
) -> int:
    """Run CONFIG: a preset's name (see: exsim list presets) or a YAML file."""
    from simulator.remote import mirrored
    from simulator.rundir import RunDirectory

    _quiet_ray()
    if resume is None:
        settings = _read(config, overrides)
        with mirrored(out, None) as (place, _):
            return _run(None, settings, data, place, local, address, wait)
    given = [name for name in ("config", "out") if context.get_parameter_source(name) is not _DEFAULT]
    if given or overrides:
        raise InputError("--resume takes the earlier run's configuration; leave out CONFIG, --set and --out")
    with mirrored(None, resume) as (_, earlier):
        assert earlier is not None
        directory, settings = RunDirectory.resume(earlier)
        return _run(directory, settings, data, None, local, address, wait)


def _run(
    directory: Any, config: Any, data: Path | None, out: Path | None, local: bool, address: str | None, wait: float
) -> int:
    """Checks everything that can be checked beforehand, then runs, then reports."""
    from simulator.preflight import prepare
    from simulator.rundir import RunDirectory

    plan, world = prepare(config, data)
    if local and config.device == "cuda":
        _demand_cuda()
    resumed = directory is not None
    directory = directory or RunDirectory.create(config, out)
    with directory.held():
        how: dict[str, Any] = {"local": local, "address": address, "wait": wait}
        return _run_in(directory, config, plan, world, resumed=resumed, **how)


def _run_in(directory: Any, config: Any, plan: Any, world: Any, *, resumed: bool, local: bool, **how: Any) -> int:
    """Runs in a directory that no other process works in, then reports."""
    from simulator.display import Display
    from simulator.report import render_table, write_report
    from simulator.results import collect_provenance, write_run_info

    console = _console()
    info = collect_provenance(
        sys.argv, name=config.name, mode="local" if local else "ray", seeds=config.seeds, config_yaml=config.to_yaml()
    )
    write_run_info(directory.path, info)
    display = Display(console, total=len(plan.victims) + len(directory.open_scenarios(plan)))
    state, good = "failed", False
    try:
        with display:
            good = _start(config, plan, world, directory, display, local=local, **how)
        state = "done" if good else "failed"
    except InputError:
        if not resumed:
            _discard(directory.path)
        raise
    except KeyboardInterrupt:
        state = "interrupted"
    finally:
        if directory.path.exists():
            warnings = [f"{row.victim}: {row.warning}" for row in directory.rows() if row.warning]
            update = {"status": state, "finished": datetime.now(UTC), "warnings": warnings}
            write_run_info(directory.path, info.model_copy(update=update))
    rows = directory.rows()
    shown = _shown(directory.path)
    if state == "interrupted":
        console.print(f"interrupted; {len(rows)} rows are kept. Go on with: exsim run --resume {shown}", soft_wrap=True)
        return INTERRUPTED
    console.print(render_table(rows, width=console.width))
    page = write_report(directory.path)
    console.print(f"results: {shown}   report: {_shown(page)}", soft_wrap=True)
    return 0 if good else 1


def _start(
    config: Any, plan: Any, world: Any, directory: Any, display: Any, *, local: bool, address: str | None, wait: float
) -> bool:
    """The run itself; whether every row is good."""
    if local:
        from simulator.local import LocalRun

        return LocalRun(config, plan, world, directory, display).run()
    from actors.cluster import connected, grow, lay_out
    from actors.runner import RayRun

    try:
        with connected(address, directory.path / "logs"):
            if wait:
                grow(config, len(plan.scenarios), wait)
            layout = lay_out(config, len(plan.scenarios))
            return RayRun(config, plan, world, directory, display, layout).run()
    finally:
        directory.clear_test()  # wherever it was interrupted


@exsim.command()
@_config
@_set
@_data
@click.option("--out", type=click.Path(path_type=Path), help="Sweep directory (default: runs/<time>_<name>).")
@click.option("--resume", type=click.Path(path_type=Path), metavar="DIR", help="Finish an earlier sweep.")
@click.option("--address", help="Ray cluster to run on (default: RAY_ADDRESS, else a local one).")
@click.pass_context
def sweep(
    context: click.Context,
    config: str,
    overrides: tuple[str, ...],
    data: Path | None,
    out: Path | None,
    resume: Path | None,
    address: str | None,
) -> int:
    """Search which settings let the watermark survive theft; CONFIG: a sweep preset's name or a YAML file."""
    _quiet_ray()
    from tuning.command import run_sweep

    given = [name for name in ("config", "out") if context.get_parameter_source(name) is not _DEFAULT]
    if resume is not None and (given or overrides):
        raise InputError("--resume takes the earlier sweep's configuration; leave out CONFIG, --set and --out")
    return run_sweep(config, overrides, data, out, resume, address, _console())


@exsim.command()
@_config
@_set
@_data
@click.option("--address", help="Ray cluster to fit it onto (default: this machine).")
def plan(config: str, overrides: tuple[str, ...], data: Path | None, address: str | None) -> int:
    """Show what CONFIG would run, its queries, resources, time and memory, and what fits; run nothing."""
    from simulator.plan import make_plan

    settings = _read(config, overrides)
    made = make_plan(settings)
    costs = _estimate(settings, made, data, address)
    console = _console()
    table = Table(title=f"{settings.name}: {len(made.scenarios)} scenarios", title_justify="left")
    for name in ("scenario", "attack", "labels", "pool", "architecture", "from", "seed"):
        table.add_column(name, overflow="fold")
    table.add_column("budget", justify="right")
    for scenario in made.scenarios:
        last = scenario.stages[-1]
        table.add_row(
            scenario.id,
            "+".join(stage.attack.name for stage in scenario.stages),
            scenario.stages[0].labels,
            scenario.stages[0].pool_label,
            last.architecture or scenario.victim.architecture,
            scenario.victim.watermark.name if scenario.victim.watermark else "benign",
            str(scenario.seed),
            f"{scenario.budget:,}",
        )
    console.print(table)
    share = settings.resources
    console.print(
        f"to train: {len(made.benigns)} benign, {len(made.victims)} marked; "
        f"victim queries at most: {sum(scenario.budget for scenario in made.scenarios):,} images\n"
        f"actors: attackers {share.attackers} x {share.attacker:g}, trainers {share.trainers} x {share.trainer:g}, "
        f"replicas {share.replicas} x {share.victim:g}, collectors {share.collectors} x {share.collector:g} "
        f"(of a GPU where there is one, else of a CPU; collectors always of a CPU)",
        soft_wrap=True,
    )
    for line in costs:
        console.print(line, soft_wrap=True, highlight=False)
    return 0


def _estimate(config: Any, made: Any, data: Path | None, address: str | None) -> list[str]:
    """What a plan costs, by :mod:`simulator.estimate`, and how much of it runs at once on a cluster, or on this
    machine."""
    import tempfile

    from simulator.data import outline
    from simulator.estimate import architectures, calibrate, estimate, span
    from simulator.training import use_one_thread

    _quiet_ray()
    from actors.cluster import connected, lay_out, nodes, this_machine

    there = this_machine()
    if address:
        with tempfile.TemporaryDirectory() as logs, connected(address, Path(logs)):
            there = nodes()
    use_one_thread()
    images = outline(config.dataset, data)
    speeds = {name: calibrate(name, images, config.training.batch_size) for name in architectures(made)}
    found = estimate(config, made, images, speeds)
    cpus, gpus = (sum(node.get(kind, 0) for node in there) for kind in ("CPU", "GPU"))
    count = f"{len(there)} node" if len(there) == 1 else f"{len(there)} nodes"
    where = f"{address or 'this machine'} ({count}, {cpus:g} CPUs, {gpus:g} GPUs)"
    lines = found.lines()
    try:
        layout = lay_out(config, len(made.scenarios), there)
    except InputError as error:
        return [*lines, f"{where}: it does not fit: {error}"]
    clock = found.wall(layout.attackers, layout.trainers, layout.replicas, layout.collectors, cpus)
    share = f"{layout.attacker.share:g} of a {'GPU' if layout.gpu else 'CPU'}"
    time = "" if layout.gpu else f", at least {span(clock)} of the clock"
    return [*lines, f"{where}: {layout.attackers} attackers at once, each {share}{time}"]


@exsim.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
def report(run_dir: Path) -> int:
    """Print the table of a run or a sweep and write its plots and page."""
    if (run_dir / "sweep" / "config.yaml").is_file():
        from tuning.report import print_sweep, write_sweep_report

        page = write_sweep_report(run_dir)
        print_sweep(run_dir, _console())
        _console().print(f"report: {_shown(page)}", soft_wrap=True)
        return 0
    from simulator.report import render_table, write_report
    from simulator.results import read_rows

    console = _console()
    rows = read_rows(run_dir)
    page = write_report(run_dir)
    console.print(render_table(rows, width=console.width))
    console.print(f"report: {_shown(page)}", soft_wrap=True)
    return 0 if all(row.status == "ok" for row in rows) else 1


@exsim.command()
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Key file of the owner.")
@click.option("--threshold", default=0.2, show_default=True, help="WSR above which the model counts as stolen.")
@click.option("--url", help="A suspect behind HTTP, asked in place of MODEL, no longer than a sequential test needs.")
@click.option("--token", envvar="EXSIM_TOKEN", help="Bearer token at --url (default: EXSIM_TOKEN).")
@click.option("--stolen-wsr", type=float, help="WSR from which the suspect is surely stolen (default: 2 x threshold).")
@click.option("--alpha", default=0.05, show_default=True, help="Error rate: verifying an innocent suspect.")
@click.option("--beta", default=0.05, show_default=True, help="Error rate: missing a stolen one.")
@click.option("--max-queries", type=click.IntRange(min=1), help="Ask no more than this (default: the whole key).")
@click.option("--seed", default=0, show_default=True, help="Of the order in which key samples are asked.")
@click.option("--answer-field", metavar="PATH", help="A foreign API at --url: where its answer has labels or scores.")
@click.option("--images-field", default="images", show_default=True, help="A foreign API: field of the images.")
@click.pass_context
def verify(
    context: click.Context, /, model: Path | None, key: Path, threshold: float, url: str | None, **how: Any
) -> int:
    """Say whether MODEL (safetensors), or the model behind --url, carries the watermark of a key.

    Exit status 0: yes, 1: no.
    """
    if (model is None) == (url is None):
        raise InputError("verify takes a MODEL or --url URL, one of them")
    if url is not None:
        from simulator.suspect import verify_url

        found, about = verify_url(url, key, threshold, **how)
        _console().print(about, soft_wrap=True, highlight=False)
        return 0 if found.verified else 1
    given = [name for name in how if context.get_parameter_source(name) is _GIVEN]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} goes with --url, not with a MODEL")
    assert model is not None
    return _verify_file(model, key, threshold)


def _verify_file(model: Path, key: Path, threshold: float) -> int:
    """Verifies a model on this disk with the whole key."""
    from pydantic import ValidationError

    from simulator.component import describe
    from simulator.models import load_model
    from simulator.verification import Verification, verify
    from simulator.watermarks.key import load_key

    try:
        rule = Verification(threshold=threshold)
    except ValidationError as error:
        raise InputError(f"--threshold: {describe(error)}") from None
    suspect, _ = load_model(model)
    samples = load_key(key)
    spec, shape = suspect.spec, samples.images.shape[1:]
    if tuple(shape) != (spec.channels, spec.size, spec.size) or samples.classes != spec.classes:
        raise InputError(
            f"{key}: the key's images are {tuple(shape)} of {samples.classes} classes, "
            f"the model takes {(spec.channels, spec.size, spec.size)} of {spec.classes}"
        )
    found = verify(suspect, samples, rule)
    chance = f"{found.p_value:.3g}" if found.p_value else "below 1e-300"
    answer = "VERIFIED: the model carries this watermark" if found.verified else "not verified"
    _console().print(
        f"{answer}\nWSR {found.wsr:.4f} (95 % interval {found.low:.4f} to {found.high:.4f}) on {found.samples} key "
        f"samples, threshold {threshold:g}\np-value {chance}: the chance that a model without the "
        f"watermark, right once in {samples.classes}, does as well",
        soft_wrap=True,
        highlight=False,
    )
    return 0 if found.verified else 1


@exsim.command()
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Model file (safetensors).")
@click.option("--budget", required=True, type=int, help="Images that each account may ask.")
@click.option("--labels", default="soft", show_default=True, help="Answer mode: soft, hard, top-K, round-D, ...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 lets others in.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: a free one.")
@click.option("--accounts", type=int, help="How many accounts there are (default: 1).")
@click.option("--account", "names", multiple=True, metavar="NAME", help="An account by name; may be repeated.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="Ledger and tokens (default: runs/serve_ID).")
@click.option("--address", help="Ray cluster to serve on (default: a local one).")
def serve(accounts: int | None, names: tuple[str, ...], model: Path, **offer: Any) -> int:
    """Serve a model over HTTP, with bearer tokens and a budget for each account, until Ctrl-C. See docs/http.md."""
    _quiet_ray()
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")  # 5 s by default, too few on a busy machine
    from actors.serving import account_names, served, wait_for_the_end

    try:
        with served(model, names=account_names(accounts, names), **offer) as (offered, url):
            _console().print("\n".join(offered.lines(url)), soft_wrap=True, highlight=False, markup=False)
            wait_for_the_end()
    except KeyboardInterrupt:
        pass  # Ctrl-C is how a server is ended
    return 0


@exsim.command("list")
@click.argument("what", default="all")
def list_(what: str) -> int:
    """List attacks, watermarks, detectors, removals, models, datasets, presets or sweeps."""
    from simulator.attacks.base import ATTACKS
    from simulator.component import one_of
    from simulator.config import presets
    from simulator.data import describe_datasets
    from simulator.detectors.base import DETECTORS
    from simulator.models import describe_models
    from simulator.watermarks.base import WATERMARKS

    families: dict[str, Callable[[], list[tuple[str, str]]]] = {
        "attacks": lambda: _components(ATTACKS),
        "watermarks": lambda: _components(WATERMARKS),
        "removals": lambda: [("none", "there are no removal attacks yet")],
        "detectors": lambda: _components(DETECTORS),
        "models": describe_models,
        "datasets": describe_datasets,
        "presets": lambda: list(presets().items()),
        "sweeps": lambda: list(presets("tuning").items()),
    }
    if what not in (*families, "all"):
        raise InputError(one_of(what, [*families, "all"]))
    console = _console()
    for family, entries in families.items():
        if what in (family, "all"):
            table = Table(title=family, title_justify="left", show_header=False, box=None, padding=(0, 2))
            for name, about in entries():
                table.add_row(name, about)
            console.print(table)
    return 0


def _components(registry: Any) -> list[tuple[str, str]]:
    """Name, first docstring line, paper and settings of every component of a family."""
    entries = []
    for name, cls in registry.classes().items():
        about = (cls.__doc__ or "no description").strip().splitlines()[0]
        fields = ", ".join(f"{key}={_brief(value)}" for key, value in cls().params().items())
        entries.append((name, f"{about} ({cls.paper})\n{fields}"))
    return entries


def _brief(value: object) -> str:
    return "{...}" if isinstance(value, dict) else str(value)


def _read(config: str, overrides: tuple[str, ...]) -> Any:
    from simulator.config import read_config

    return read_config(config, overrides)


def _demand_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError("device: cuda demands a GPU and torch finds none here; allowed: auto, cpu")


def _quiet_ray() -> None:
    """Settings that Ray reads at import: no usage report, no deprecation notes on the user's terminal."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _discard(path: Path) -> None:
    """Removes the directory of a run that could not start."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def _console() -> Console:
    """The terminal; a table that goes to a file or a pipe is 120 columns wide."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _shown(path: Path) -> str:
    """A path as a person would type it here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


_DEFAULT = click.core.ParameterSource.DEFAULT
_GIVEN = click.core.ParameterSource.COMMANDLINE


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        status = exsim.main(argv, prog_name="exsim", standalone_mode=False)
        return int(status or 0)
    except InputError as error:
        message = str(error)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except click.ClickException as error:
        message = error.format_message()
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"exsim: {' '.join(message.split())}", file=sys.stderr)
    return 2


def entry() -> None:
    """The console script."""
    sys.exit(main())
