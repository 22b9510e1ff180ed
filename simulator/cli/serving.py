"""``exsim serve``: a model behind HTTP, and its accounts' tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simulator.cli import terminal
from simulator.errors import InputError

_file = terminal.Typed(path_type=Path)
_directory = click.option("--dir", "directory", required=True, type=_file, help="Directory of an exsim serve.")


@click.group(invoke_without_command=True)
@click.option("--model", type=_file, help="Model file (safetensors).  [required]")
@click.option("--budget", type=click.IntRange(max=2**63 - 1), help="Images that each account may ask.  [required]")
@click.option("--labels", default="soft", show_default=True, help="Answer mode: soft, hard, top-K, round-D, ...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 lets others in.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: a free one.")
@click.option("--control-port", type=click.IntRange(0, 65535), help="For /healthz and /metrics on 127.0.0.1.")
@click.option("--accounts", type=int, help="How many accounts there are (default: 1).")
@click.option("--account", "names", multiple=True, metavar="NAME", help="An account by name; may be repeated.")
@click.option("--dir", "directory", type=_file, help="Ledger and accounts (default: runs/serve_ID).")
@click.option("--tokens", type=_file, metavar="FILE", help="Write new tokens there, and do not show them.")
@click.option("--tls-cert", type=_file, help="Certificate file (PEM), with --tls-key: the door speaks TLS.")
@click.option("--tls-key", type=_file, help="Its private key (PEM).")
@click.option("--account-rate", default=0.0, type=click.FloatRange(0), help="Requests a second of an account.  [any]")
@click.option("--address-rate", default=0.0, type=click.FloatRange(0), help="Requests a second of an address.  [any]")
@click.option("--parallel", default=16, show_default=True, type=click.IntRange(1), help="Of an account, under way.")
@click.option("--address-parallel", default=256, show_default=True, type=click.IntRange(1), help="Of an address.")
@click.option("--behind", "proxy", metavar="ADDRESS", help="A reverse proxy whose X-Forwarded-For says who asks.")
@click.option(
    "--drain",
    default=120.0,
    show_default=True,
    type=click.FloatRange(0, 3600),
    help="Seconds to end what is under way.",
)
@click.option("--evasion", metavar="NAME[:KEY=VALUE,...]", help="Answer through it, as in outliers:features=logits.")
@click.option("--evasion-images", metavar="SET", help="A data set: the images that the evasion needs.")
@click.option("--address", help="Ray cluster to serve on (default: a local one).")
@click.pass_context
def serve(context: click.Context, /, accounts: int | None, names: tuple[str, ...], **given: Any) -> int:
    """Serve a model over HTTP, with bearer tokens and a budget for each account, until Ctrl-C. See docs/http.md."""
    if context.invoked_subcommand is not None:
        return 0
    for name in ("model", "budget"):
        if given[name] is None:
            raise click.UsageError(f"Missing option '--{name}'.", context)
    if given["evasion_images"] is not None and given["evasion"] is None:
        raise click.UsageError("--evasion-images goes with --evasion.", context)
    if (given["tls_cert"] is None) != (given["tls_key"] is None):
        raise click.UsageError("--tls-cert and --tls-key go together.", context)
    terminal.quiet_ray()
    from actors.http_gate import Limits
    from actors.serving import Post, account_names, served, wait_for_the_end

    rates = {name: given[name] for name in ("account_rate", "address_rate", "parallel", "address_parallel", "proxy")}
    tls = (given["tls_cert"], given["tls_key"]) if given["tls_cert"] else None
    post = Post(given["host"], given["port"], given["control_port"], tls, Limits(**rates), given["drain"])
    offer = {
        name: given[name]
        for name in ("budget", "labels", "directory", "tokens", "address", "evasion", "evasion_images")
    }
    with served(given["model"], names=account_names(accounts, names), post=post, **offer) as (offered, url):
        terminal.console().print("\n".join(offered.lines(url)), soft_wrap=True, highlight=False, markup=False)
        wait_for_the_end()
    return 0


@serve.group()
def tokens() -> None:
    """List, replace or take back the tokens of a directory's accounts; the door may be open meanwhile."""


@tokens.command("list")
@_directory
def list_(directory: Path) -> int:
    """Say which accounts a token opens, and how each token's SHA-256 begins."""
    from actors.accounts import read

    _existing(directory)
    for name, entry in read(directory).items():
        click.echo(f"{name}: " + (f"open, SHA-256 {entry.opens[:12]}..." if entry.opens else "revoked"))
    return 0


@tokens.command()
@_directory
@click.argument("name")
def rotate(directory: Path, name: str) -> int:
    """Give account NAME a new token, which is shown; the old one opens nothing from now on."""
    from actors.accounts import rotate

    _existing(directory)
    click.echo(f"{name}: token {rotate(directory, name)}")
    return 0


@tokens.command()
@_directory
@click.argument("name")
def revoke(directory: Path, name: str) -> int:
    """Take the token of account NAME back."""
    from actors.accounts import revoke

    _existing(directory)
    revoke(directory, name)
    click.echo(f"{name}: revoked")
    return 0


def _existing(directory: Path) -> None:
    if not (directory / "ledger" / "ledger.log").is_file():
        raise InputError(f"--dir {directory}: no directory of an exsim serve")
