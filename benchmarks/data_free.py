"""What the service costs an attack of many small, serial queries: DFME through Serve and on a model in its own process.

Both sides run the same attack from the same seed and so do the same work but for the way to the victim: float32
queries, a few hundred images at a time, the next ones depending on the answers to the last. They alternate.
"""

from __future__ import annotations

import os
import time

from actors.transport import ServeTransport
from benchmarks.measure import Line, Outcome, Spread, Target
from benchmarks.query_path import CLASSES, SHAPE, TOKEN, served
from simulator.attacks.base import ATTACKS
from simulator.context import Context
from simulator.data.patches import patches
from simulator.data.pool import Pool
from simulator.models import build, from_bytes, to_bytes
from simulator.seeding import generator_for
from simulator.service.oracle import ModelOracle, Oracle, ServiceOracle

#: of the wall time through the service to that in process
TARGET = Target("at most", 1.5)


def attack_seconds(oracle: Oracle) -> float:
    """Wall time of one attack that spends the oracle's budget."""
    attack = ATTACKS.make({"name": "dfme", "generator_learning_rate": 5e-4})
    generator = generator_for("bench")
    surrogate = build("naivenet", channels=SHAPE[0], size=SHAPE[1], classes=CLASSES, generator=generator)
    images = patches(1, *SHAPE[:2], generator)
    pool = Pool("none", images.images, images.labels)
    start = time.perf_counter()
    attack.extract(oracle, surrogate, pool, Context(generator))
    return time.perf_counter() - start


def run(rounds: int = 3, queries: int | None = None) -> Outcome:
    """Alternates the two sides; ``EXSIM_BENCH_QUERIES`` changes the number of queries of a round."""
    budget = queries or int(os.environ.get("EXSIM_BENCH_QUERIES", "12000"))
    data = to_bytes(build("naivenet", channels=SHAPE[0], size=SHAPE[1], classes=CLASSES).eval())
    near, far = [], []
    names = [f"round-{number}" for number in range(rounds)]
    with served(data, {"warm": 512, **dict.fromkeys(names, budget)}) as (handle, _, _):
        transport = ServeTransport(handle)

        def remote(account: str, count: int) -> ServiceOracle:
            return ServiceOracle(transport, account, TOKEN, labels="soft", classes=CLASSES, shape=SHAPE, budget=count)

        def local(count: int) -> ModelOracle:
            return ModelOracle(from_bytes(data), labels="soft", classes=CLASSES, shape=SHAPE, budget=count)

        attack_seconds(remote("warm", 512))
        attack_seconds(local(512))
        for name in names:
            near.append(attack_seconds(local(budget)))
            far.append(attack_seconds(remote(name, budget)))
    ratios = [there / here for there, here in zip(far, near, strict=True)]
    return Outcome(
        title=f"DFME, {budget:,} queries, naivenet 28x28",
        unit="seconds",
        rounds=rounds,
        lines=(
            Line("in process", Spread.of(near)),
            Line("through Serve and ledger", Spread.of(far), Spread.of(ratios), TARGET),
        ),
        note="The attacker is this process; the service has processes of its own.",
    )
