"""Whom a key accuses that was not there when it was chosen: the benign models of the run's other seeds.

    python runs/false_claims.py RUN_DIR NAME        writes results/NAME.md

The key filter (Eq. 7) drops every candidate that *this* benign model answers with the key's label and keeps only what
*this* victim answers so: a WSR of 0 of the one and of 100 of the other are by construction. Here each victim's key is
asked of the benign models of the other seeds, which took no part in choosing it: models without any watermark, of the
same architecture, recipe and owner's images, from other random weights.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from simulator.errors import InputError
from simulator.models import load_model
from simulator.ownership.base import Verdict
from simulator.ownership.key import load_key
from simulator.ownership.suspect import verify_model
from simulator.ownership.wsr import DOUBTFUL, Verification, chance_verdict
from simulator.plan.config import read_config
from simulator.records.provenance import RunInfo, read_run_info
from simulator.records.rows import Row, read_rows
from simulator.report.lines import Labels, lines, stat
from simulator.report.page import NONE, Column, markdown_table


@dataclass(frozen=True)
class Claim:
    """A victim's key asked of the benign model of another seed.

    Attributes:
        scheme: as the run's report names it.
        seed, other: of the victim, and of the benign model.
        found: the verdict with the key.
        before: the WSR of the key's candidates, in [0, 1]; None where the run kept none.
        chance: how likely a model that is right once in K would be verified with this key.
    """

    scheme: str
    seed: int
    other: int
    found: Verdict
    before: float | None
    chance: float


def measure(run_dir: Path) -> list[Claim]:
    """Every victim's key on every benign model of another seed.

    Raises:
        InputError: no run, a file that is missing, or a run of one seed.
    """
    rule = read_config(str(run_dir / "config.yaml")).ownership_test
    rows = [row for row in read_rows(run_dir) if row.status == "ok"]
    labels = Labels(lines(rows))
    victims = [row for row in rows if row.role == "victim"]
    benigns = {row.scenario_id: row for row in rows if row.role == "benign"}
    models = {name: load_model(run_dir / "models" / f"{name}.safetensors")[0] for name in benigns}
    found = []
    for victim in victims:
        key = load_key(run_dir / "keys" / f"{victim.victim}.safetensors")
        candidates = run_dir / "keys" / f"{victim.victim}.candidates.safetensors"
        unfiltered = load_key(candidates) if candidates.exists() else None
        for name, benign in benigns.items():
            if not _others(victim, benign):
                continue
            before = None if unfiltered is None else verify_model(models[name], unfiltered, rule).statistic
            chance = chance_verdict(len(key), key.classes, rule)
            verdict = verify_model(models[name], key, rule)
            found.append(Claim(labels.watermark(victim), victim.seed, benign.seed, verdict, before, chance))
    if not found:
        raise InputError(f"{run_dir}: no victim has a benign model of another seed; a run of several seeds is needed")
    return found


def _others(victim: Row, benign: Row) -> bool:
    """Whether the benign model is one that the victim's key was not chosen with, for the same task."""
    same = (victim.dataset, victim.architecture) == (benign.dataset, benign.architecture)
    return same and victim.seed != benign.seed


@dataclass(frozen=True)
class Scheme:
    """The claims of one scheme's keys."""

    name: str
    claims: tuple[Claim, ...]

    @property
    def worst(self) -> Claim:
        """The claim of the highest WSR."""
        return max(self.claims, key=lambda claim: claim.found.statistic)

    @property
    def verified(self) -> int:
        """False claims of theft."""
        return sum(claim.found.verified for claim in self.claims)


def schemes(claims: Iterable[Claim]) -> list[Scheme]:
    """The claims by scheme, the worst first."""
    groups: dict[str, list[Claim]] = {}
    for claim in claims:
        groups.setdefault(claim.scheme, []).append(claim)
    found = [Scheme(name, tuple(group)) for name, group in groups.items()]
    return sorted(found, key=lambda each: (-each.worst.found.statistic, each.name))


def _percent(values: Iterable[float | None]) -> str:
    value = stat(values)
    return NONE if value is None else f"{100 * value.mean:.1f}"


def _sizes(scheme: Scheme) -> str:
    return ", ".join(str(size) for _, size in sorted({(each.seed, each.found.samples) for each in scheme.claims}))


def _p_value(value: float) -> str:
    return f"{value:.2g}" if value else "below 1e-300"


COLUMNS: list[Column[Scheme]] = [
    Column("scheme", "scheme", lambda each: each.name, text=True),
    Column("samples", "key samples, by seed", _sizes),
    Column("before", "before the filter: WSR, mean", lambda each: _percent(claim.before for claim in each.claims)),
    Column("mean", "WSR, mean", lambda each: _percent(claim.found.statistic for claim in each.claims)),
    Column("max", "WSR, max", lambda each: _percent([each.worst.found.statistic])),
    Column("samples of max", "on samples", lambda each: str(each.worst.found.samples)),
    Column("p", "its p-value", lambda each: _p_value(each.worst.found.p_value)),
    Column("verified", "verified", lambda each: f"{each.verified} of {len(each.claims)}"),
    Column("chance", "by chance, largest", lambda each: f"{max(claim.chance for claim in each.claims):.2g}"),
]


def page(info: RunInfo, claims: Sequence[Claim], rule: Verification, name: str) -> str:
    """The whole page in Markdown."""
    found = schemes(claims)
    commit = (info.git_commit or "unknown")[:12] + (" with changes" if info.git_dirty else "")
    accused = [claim for claim in claims if claim.found.verified]
    parts = [
        f"# {name}",
        f"`{shlex.join(['exsim', *info.argv[1:]])}`, then `python runs/false_claims.py RUN_DIR {name}`",
        f"commit {commit}, seeds {info.seeds}, status {info.status}, torch {info.versions['torch']}",
        "Each victim's key asked of the benign models of the other seeds, which no filter has seen: per cent. The key "
        "filter drops what the own seed's benign model answers with the key's label, so that one's WSR is 0 by "
        f"construction. `verified`: WSR above {100 * rule.threshold:g} %, a false claim. `p-value`: of the largest "
        "WSR, Eq. 20. `by chance`: how likely a model that is right once in K is verified, with the key where that is "
        f"likeliest; above {DOUBTFUL:g} the key is too small to judge by.",
        "\n".join(markdown_table(COLUMNS, found)),
        f"False claims: {len(accused)} of {len(claims)}.",
    ]
    parts += [
        "\n".join(
            f"- {each.scheme}, key of seed {each.seed}, benign model of seed {each.other}: "
            f"{100 * each.found.statistic:.1f} of {each.found.samples} samples, p = {_p_value(each.found.p_value)}"
            for each in accused
        )
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Writes ``results/NAME.md`` for ``RUN_DIR NAME``."""
    if len(arguments) != 2:
        print("usage: false_claims.py RUN_DIR NAME", file=sys.stderr)
        return 2
    run_dir, name = Path(arguments[0]), arguments[1]
    try:
        rule = read_config(str(run_dir / "config.yaml")).verification
        text = page(read_run_info(run_dir), measure(run_dir), rule, name)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    Path("results").mkdir(exist_ok=True)
    path = Path("results") / f"{name}.md"
    path.write_text(text, encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
