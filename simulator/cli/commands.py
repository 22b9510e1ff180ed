"""The commands of ``exsim``: their arguments and options, and what each hands them to."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simulator import __version__
from simulator.cli import terminal
from simulator.cli.serving import serve
from simulator.errors import InputError, RunFailed, one_line, plain

if TYPE_CHECKING:
    from simulator.plan.config import RunConfig


def _finite(_context: click.Context, _option: click.Parameter, value: float) -> float:
    """A number of seconds; a range of click's lets nan and inf pass."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number of seconds")
    return value


_path = terminal.Typed(path_type=Path)
_config = click.argument("config", default="digits")
_set = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting, by its dotted path."
)
_data = click.option("--data", type=_path, envvar="EXSIM_DATA", help="Where data sets lie.")


class _Commands(click.Group):
    """The commands of ``exsim``. An interrupt is told by :func:`main`: click would print an empty line before it."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Interrupted from None


class _Interrupted(Exception):
    """Ctrl-C, or SIGTERM."""


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="exsim")
def exsim() -> None:
    """Simulates model-extraction attacks against watermarked classifiers."""


@exsim.command()
@_config
@_set
@_data
@click.option(
    "--out",
    type=terminal.Typed(),
    help="Run directory, or a URI: s3://BUCKET/RUN (default: runs/<time>_<name>).",
)
@click.option(
    "--resume", type=terminal.Typed(), metavar="DIR", help="Finish an earlier run, in a directory or at a URI"
)
@click.option("--local", is_flag=True, help="One process, no Ray.")
@click.option("--address", help="Ray cluster to run on (default: RAY_ADDRESS, else a local one).")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    callback=_finite,
    default=0,
    metavar="SECONDS",
    help="For an autoscaler to bring its nodes.",
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
    from simulator.cli.running import Place, run_again, run_new
    from simulator.experiment.remote import mirrored

    terminal.quiet_ray()
    place = Place(local, address, wait)
    if resume is None:
        settings = _read(config, overrides)
        with mirrored(out, None) as (target, _):
            return run_new(settings, data, target, place)
    given = [name for name in ("config", "out") if context.get_parameter_source(name) is not _DEFAULT]
    if given or overrides:
        raise InputError("--resume takes the earlier run's configuration; leave out CONFIG, --set and --out")
    with mirrored(None, resume) as (_, earlier):
        assert earlier is not None
        return run_again(earlier, data, place)


@exsim.command()
@_config
@_set
@_data
@click.option("--out", type=_path, help="Sweep directory (default: runs/<time>_<name>).")
@click.option("--resume", type=_path, metavar="DIR", help="Finish an earlier sweep.")
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
    terminal.quiet_ray()
    from simulator.cli.sweeping import run_sweep

    given = [name for name in ("config", "out") if context.get_parameter_source(name) is not _DEFAULT]
    if resume is not None and (given or overrides):
        raise InputError("--resume takes the earlier sweep's configuration; leave out CONFIG, --set and --out")
    return run_sweep(config, overrides, data, out, resume, address, terminal.console())


@exsim.command()
@_config
@_set
@_data
@click.option("--address", help="Ray cluster to fit it onto (default: this machine).")
def plan(config: str, overrides: tuple[str, ...], data: Path | None, address: str | None) -> int:
    """Show what CONFIG would run, its queries, resources, time and memory, and what fits; run nothing."""
    from simulator.cli.planning import show_plan

    return show_plan(_read(config, overrides), data, address)


@exsim.command()
@click.argument("run_dir", type=_path)
def report(run_dir: Path) -> int:
    """Print the table of a run or a sweep and write its plots and page."""
    try:
        return _report(run_dir)
    except InputError:
        raise
    except Exception as error:  # a directory from elsewhere may hold anything
        raise InputError(f"{run_dir}: it cannot be reported: {one_line(error)[:300]}") from error


def _report(run_dir: Path) -> int:
    from simulator.files import demand_plain

    demand_plain(run_dir)
    if (run_dir / "sweep" / "config.yaml").is_file():
        from tuning.report import print_sweep, write_sweep_report

        page = write_sweep_report(run_dir)
        print_sweep(run_dir, terminal.console())
        terminal.console().print(f"report: {terminal.shown(page)}", soft_wrap=True)
        return 0
    from simulator.records.rows import read_rows
    from simulator.report.account import audit_run
    from simulator.report.table import render_table, write_report

    console = terminal.console()
    rows, account = read_rows(run_dir), audit_run(run_dir)
    page = write_report(run_dir, account)
    console.print(render_table(rows, width=console.width))
    console.print(account.line(), soft_wrap=True, highlight=False, markup=False)
    console.print(f"report: {terminal.shown(page)}", soft_wrap=True)
    return 0 if account.agrees and all(row.status == "ok" for row in rows) else 1


@exsim.command("audit-ledger")
@click.argument("run_dir", type=_path)
def audit_ledger(run_dir: Path) -> int:
    """Check the query account of a run against its rows, transfer sets and query log.

    Exit status 0: all agree, 1: they do not.
    """
    from simulator.files import demand_plain
    from simulator.report.account import audit_run
    from simulator.report.page import printable

    demand_plain(run_dir)
    found = audit_run(run_dir)
    terminal.console().print(found.line(), soft_wrap=True, highlight=False, markup=False)
    for fault in found.faults:
        terminal.console().print(f"  {printable(fault)}", soft_wrap=True, highlight=False, markup=False)
    return 0 if found.agrees and not found.missing else 1


@exsim.command()
@click.argument("model", required=False, type=_path)
@click.option("--key", required=True, type=_path, help="Key file of the owner.")
@click.option(
    "--test", help="Ownership test (see: exsim list ownership_tests).  [default: wsr, wsr_sequential at --url]"
)
@click.option("--threshold", type=float, help="WSR above which the model counts as stolen.  [default: 0.2]")
@click.option("--url", help="A suspect behind HTTP, asked in place of MODEL, no longer than a sequential test needs.")
@click.option("--token", envvar="EXSIM_TOKEN", help="Bearer token at --url (default: EXSIM_TOKEN).")
@click.option("--stolen-wsr", type=float, help="WSR from which the suspect is surely stolen (default: 2 x threshold).")
@click.option("--alpha", type=float, help="Error rate: verifying an innocent suspect.  [default: 0.05]")
@click.option("--beta", type=float, help="Error rate: missing a stolen one.  [default: 0.05]")
@click.option("--max-queries", type=click.IntRange(min=1), help="Ask no more than this (default: the whole key).")
@click.option("--seed", default=0, show_default=True, help="Of the order in which key samples are asked.")
@click.option("--answer-field", metavar="PATH", help="A foreign API at --url: where its answer has labels or scores.")
@click.option("--images-field", default="images", show_default=True, help="A foreign API: field of the images.")
@click.pass_context
def verify(
    context: click.Context, /, model: Path | None, key: Path, url: str | None, test: str | None, **how: Any
) -> int:
    """Say whether MODEL (safetensors), or the model behind --url, carries the watermark of a key.

    Exit status 0: yes, 1: no.
    """
    if (model is None) == (url is None):
        raise InputError("verify takes a MODEL or --url URL, one of them")
    from simulator.ownership.suspect import verify_file, verify_url

    given = [name for name in how if context.get_parameter_source(name) is _GIVEN]
    settings = {name: how.pop(name) for name in ("threshold", "stolen_wsr", "alpha", "beta")}
    try:
        if url is not None:
            found, about = verify_url(url, key, test or "wsr_sequential", settings, **how)
        else:
            for name in given:
                if name != "threshold" and (test is None or name in ("token", "answer_field", "images_field")):
                    raise InputError(f"--{name.replace('_', '-')} goes with --url, not with a MODEL")
            assert model is not None
            limits = {name: how[name] for name in ("max_queries", "seed")}
            found, about = verify_file(model, key, test or "wsr", settings, **limits)
    except InputError:
        raise
    except Exception as error:  # exit status 1 says "not verified", which a crash must never say
        raise InputError(f"{url or model}: it could not be judged: {one_line(error)}") from error
    about = "\n".join(map(plain, about.splitlines()))
    terminal.console().print(about, soft_wrap=True, highlight=False, markup=False)
    return 0 if found.verified else 1


exsim.add_command(serve)


@exsim.command("list")
@click.argument("what", default="all")
def list_(what: str) -> int:
    """List attacks, watermarks, removals, evasions, detectors, ownership_tests, models, datasets, presets, ..."""
    from simulator.cli.listing import show_list

    return show_list(what)


def _read(config: str, overrides: tuple[str, ...]) -> RunConfig:
    from simulator.plan.config import read_config

    return read_config(config, overrides)


_DEFAULT = click.core.ParameterSource.DEFAULT
_GIVEN = click.core.ParameterSource.COMMANDLINE


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        with _terminated_as_interrupted():
            status = exsim.main(argv, prog_name="exsim", standalone_mode=False)
        return int(status or 0)
    except InputError as error:
        message = str(error)
    except RunFailed as error:
        print(f"exsim: {plain(str(error))}", file=sys.stderr)
        return 1
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except click.ClickException as error:
        message = error.format_message()
    except (click.Abort, KeyboardInterrupt, _Interrupted):
        print("interrupted", file=sys.stderr)
        return terminal.INTERRUPTED
    print(f"exsim: {plain(message)}", file=sys.stderr)
    return 2


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, from its start on. Ray, while it starts, has its own handler, which exits
    with the signal's number."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except SystemExit as stop:
        if stop.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, before)


def entry() -> None:
    """The console script."""
    sys.exit(main())
