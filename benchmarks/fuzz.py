"""Throws rubbish at whatever takes input: queries at the service, configurations at the reader.

    python -m benchmarks.fuzz --cases 10000        (make fuzz)

Six tenths of the cases are queries to the plain service, four tenths configurations, and to these comes one twentieth
of queries to the deployed service: a replica on Ray Serve with its ledger actor. Every case is judged:

- a query is answered with the model's rows and charged, or refused by MalformedQuery, Unauthorised, KeyReused or
  OverBudget in one short line at no charge, as a model of the account book says (:mod:`benchmarks.fuzz_queries`);
- the deployed service's processes are the same afterwards, and healthy;
- a configuration is valid or one line of InputError (:mod:`benchmarks.fuzz_configs`).

An episode, a row of cases, is drawn from the seed and its number alone, so a fault that is found is found again by
``--seed`` and ``--only NUMBER``. What this does not try: a message whose unpickling itself does harm. Ray's messages
are pickles, so whoever may send one to a cluster is trusted with it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

# Ray reads these when it is imported
os.environ.pop("RAY_ADDRESS", None)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from benchmarks import fuzz_configs, fuzz_queries
from benchmarks.fuzz_queries import Book, Case, Tally, audit, draw, judge, terms
from simulator.chain import head_file
from simulator.models import save_model
from simulator.training.predict import use_one_thread

#: cases in an episode
QUERIES, CONFIGS, DEPLOYED = 50, 25, 100
#: of the plain cases, how many are queries; and how many deployed ones come to them
SHARE, ON_RAY = 0.6, 0.05


def episodes(kind: str, run: Callable[[Random, int], Tally], size: int, cases: int, options: Any) -> Tally:
    """As many episodes of a kind as it takes for ``cases`` cases, each with its own dice."""
    tally, start = Tally(), time.monotonic()
    for number in range(-(-cases // size)):
        if options.only is not None and options.only != number:
            continue
        one = run(Random(f"{options.seed} {kind} {number}"), min(size, cases - number * size))
        one.faults = [f"{kind} episode {number}: {fault}" for fault in one.faults]
        tally.add(one)
    refused = ", ".join(f"{count} {name}" for name, count in sorted(tally.refused.items())) or "none"
    print(
        f"{kind}: {tally.cases} cases, {tally.answered} good, refused: {refused}; {len(tally.faults)} faults, "
        f"{time.monotonic() - start:.0f} s"
    )
    return tally


def deployed(dice: Random, cases: int) -> Tally:
    """A row of cases against a replica on Serve and its ledger actor, several queries to a message; at the end the same
    processes have to be there and well."""
    import ray
    from ray import serve

    from actors.cluster import connected
    from actors.devices import Placement
    from actors.ledger import LedgerActor
    from actors.replica import deploy
    from actors.stores import ShelfActor
    from actors.transport import direct

    tally, book, model, name = Tally(), Book(), fuzz_queries.victim(), "exsim-fuzz"
    with tempfile.TemporaryDirectory(prefix="exsim-fuzz-") as folder, connected(None, Path(folder), cpus=4):
        log = Path(folder) / "ledger.log"
        save_model(model, Path(folder) / "models" / f"{fuzz_queries.VICTIM}.safetensors")
        ledger: Any = LedgerActor.remote(str(log), False)
        shelf: Any = ShelfActor.remote(folder)
        ray.get(ledger.open.remote({account: terms(account) for account in fuzz_queries.ACCOUNTS}))
        handle = direct(deploy(name, ledger, shelf, Placement(False, 0.5)))
        before = [processes(name), ray.get(ledger.__ray_call__.remote(lambda _: os.getpid()))]
        for _ in range(cases):
            _message(handle, [draw(dice) for _ in range(dice.choice([1, 1, 1, 2, 4]))], book, model, tally)
            if tally.cases >= cases:
                break
        charged = {account: book.spent(account) for account in fuzz_queries.ACCOUNTS}
        if ray.get(ledger.all_spent.remote()) != charged:
            tally.faults.append(f"charged {ray.get(ledger.all_spent.remote())}, wanted {charged}")
        after = [processes(name), ray.get(ledger.__ray_call__.remote(lambda _: os.getpid()))]
        if before != after:
            tally.faults.append(f"processes of replica and ledger: {before}, afterwards {after}")
        status = serve.status().applications[name].status
        if status != "RUNNING":
            tally.faults.append(f"the application is {status}")
        serve.delete(name)
        ray.kill(shelf)
        copy = log.with_name("copy.log")
        shutil.copy(head_file(log), head_file(copy))
        audit(Path(shutil.copy(log, copy)), book, tally)
        ray.kill(ledger)
    return tally


def _message(handle: Any, cases: list[Case], book: Book, model: Any, tally: Tally) -> None:
    """Sends several queries at once. Where the service refuses one by an exception, as for an unknown account, all of
    the message are refused at no charge."""
    from ray.exceptions import RayTaskError

    saved = {account: dict(paid) for account, paid in book.paid.items()}
    expected = [book.expect(case) for case in cases]
    try:
        replies: Any = handle.answer.remote([case.query for case in cases]).result(timeout_s=60)
    except Exception as error:  # whatever comes is judged
        cause: Any = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        at = next((number for number, one in enumerate(expected) if one is type(cause)), 0)
        book.paid = saved
        judge(cases[at], expected[at], cause, model, tally)
        return
    for case, wanted, reply in zip(cases, expected, replies, strict=True):
        judge(case, wanted, reply, model, tally)


def processes(app: str) -> list[int]:
    """The processes of an application's replicas."""
    import ray

    named: Any = ray.util.list_named_actors(all_namespaces=True)
    replicas = [ray.get_actor(each["name"], each["namespace"]) for each in named if f"::{app}#" in each["name"]]
    return sorted(ray.get([each.__ray_call__.remote(lambda _: os.getpid()) for each in replicas]))


def main(argv: list[str] | None = None) -> int:
    """``make fuzz``: 0 without a fault, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="on the plain service and the reader, together")
    parser.add_argument("--deployed", type=int, help="on the deployed service (default: a twentieth more)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this episode of each kind alone")
    options = parser.parse_args(argv)
    use_one_thread()
    queries = round(options.cases * SHARE)
    on_ray = round(options.cases * ON_RAY) if options.deployed is None else options.deployed
    total = episodes("queries", fuzz_queries.episode, QUERIES, queries, options)
    total.add(episodes("configurations", fuzz_configs.episode, CONFIGS, options.cases - queries, options))
    total.add(episodes("deployed queries", deployed, max(DEPLOYED, on_ray), on_ray, options))
    print(f"{total.cases} cases, seed {options.seed}: {len(total.faults)} faults")
    for fault in total.faults[:50]:
        print(fault)
    return 1 if total.faults else 0


if __name__ == "__main__":
    sys.exit(main())
