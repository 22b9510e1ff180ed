"""The tables of a run with many schemes, in the shape of DeepTracer's Tables 1 and 2, ours beside the paper's figures.

    python runs/paper_tables.py RUN_DIR NAME        writes results/NAME.md

Rates come from the run's rows. Rows hold the WSR of the key that the two-stage filter chose; the paper filters
DeepTracer's key alone (its Table 22 has the others "before filtering" with the figures of Tables 1 and 2). Both are
shown: the WSR before the filter is measured here, on the candidates and the models that the run has kept.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulator.errors import InputError
from simulator.models import load_model
from simulator.ownership.key import load_key
from simulator.ownership.suspect import verify_model
from simulator.ownership.wsr import Wsr
from simulator.records.provenance import read_run_info
from simulator.records.rows import Row, read_rows
from simulator.report.lines import Labels, is_control, lines, stat

NONE = "–"
#: what stands in a heading only where the rows of an attack differ in it
VARIED = ("pool", "architecture", "budget")
#: whose WSR the paper states after the filter; all others' before it
FILTERED = ("deeptracer",)

#: DeepTracer (Yang et al., AAAI 2026), Table 1, Fashion-MNIST, per cent: benign accuracy and WSR, victim's likewise
TABLE_1: dict[str, tuple[float, float, float, float]] = {
    "badnets": (91.69, 10.47, 91.13, 99.99),
    "composite": (91.53, 0.55, 89.78, 95.38),
    "abstract": (91.59, 12.62, 91.32, 100.00),
    "content": (91.51, 7.66, 91.41, 99.82),
    "noise": (91.53, 8.89, 91.28, 99.53),
    "unrelated": (91.60, 1.10, 91.28, 100.00),
    "ewe": (91.50, 0.07, 86.33, 100.00),
    "margin": (89.68, 4.00, 92.34, 100.00),
    "mea_defender": (91.71, 0.65, 88.86, 95.01),
    "deeptracer": (91.55, 0.00, 91.49, 100.00),
}

#: the columns of Table 2 in its order
COLUMNS_2 = [(attack, labels) for attack in ("jbda", "knockoff", "dfme") for labels in ("soft", "hard")]
#: Table 2, Fashion-MNIST, per cent: accuracy and WSR of the stolen model, column by column
TABLE_2: dict[str, tuple[float, ...]] = {
    "badnets": (86.56, 25.61, 81.48, 13.51, 83.05, 38.91, 57.22, 11.60, 68.35, 98.66, 57.48, 85.18),
    "composite": (85.59, 27.97, 81.26, 3.38, 48.65, 96.14, 42.23, 80.61, 34.99, 0.00, 46.42, 0.00),
    "abstract": (84.41, 19.04, 84.27, 18.30, 72.07, 39.98, 55.05, 18.26, 57.60, 17.16, 65.10, 16.38),
    "content": (87.49, 11.51, 82.63, 12.24, 83.21, 18.05, 54.16, 5.58, 68.13, 9.39, 69.92, 5.85),
    "noise": (84.86, 12.51, 81.72, 13.13, 68.85, 1.79, 38.41, 1.91, 18.31, 88.21, 25.25, 49.53),
    "unrelated": (86.63, 96.17, 83.75, 92.66, 80.55, 26.54, 48.73, 5.15, 58.36, 94.31, 61.43, 96.03),
    "ewe": (80.75, 63.74, 83.58, 56.96, 49.08, 0.00, 38.62, 0.00, 29.36, 0.00, 54.46, 0.00),
    "margin": (86.05, 49.92, 80.73, 41.12, 79.63, 10.40, 43.92, 12.96, 63.20, 5.12, 66.00, 5.28),
    "mea_defender": (84.66, 46.17, 82.42, 8.61, 64.49, 91.22, 59.86, 26.35, 44.00, 0.00, 46.92, 0.00),
    "deeptracer": (85.02, 91.65, 80.69, 86.90, 87.16, 100.00, 64.57, 100.00, 70.03, 100.00, 68.21, 100.00),
}


def paper_stolen(scheme: str, attack: str, labels: str) -> tuple[float, float] | None:
    """Table 2's accuracy and WSR in per cent, or None where the paper has none."""
    if scheme not in TABLE_2 or (attack, labels) not in COLUMNS_2:
        return None
    at = 2 * COLUMNS_2.index((attack, labels))
    return TABLE_2[scheme][at], TABLE_2[scheme][at + 1]


#: accuracy, in [0, 1], from which a stolen model is of use to a thief: the WSR of a copy that guesses says little
USABLE = 0.5


def _mean(values: Sequence[float], otherwise: float | None = None) -> Any:
    return sum(values) / len(values) if values else otherwise


@dataclass(frozen=True)
class Measured:
    """A row and its WSR before the filter (the row's own where the run had no filter)."""

    row: Row
    unfiltered: float | None

    @property
    def as_paper(self) -> float | None:
        """The WSR that the paper states of this scheme."""
        return self.row.wsr if self.row.watermark in FILTERED else self.unfiltered


def measure(run_dir: Path) -> list[Measured]:
    """Every good row of a run, measured again with the candidates of its key."""
    rows = [row for row in read_rows(run_dir) if row.status == "ok"]
    owners = {(row.watermark, row.watermark_params, row.seed): row.victim for row in rows if row.role == "victim"}
    found = []
    for row in rows:
        key = owners.get((row.watermark, row.watermark_params, row.seed))
        candidates = run_dir / "keys" / f"{key}.candidates.safetensors"
        model = run_dir / "models" / f"{'stolen-' if row.role == 'stolen' else ''}{row.scenario_id}.safetensors"
        if not model.exists():  # a point of a budget curve
            continue
        if candidates.exists():
            found.append(Measured(row, verify_model(load_model(model)[0], load_key(candidates), Wsr()).statistic))
        else:
            found.append(Measured(row, row.wsr))
    return found


def _attack_of_paper(row: Row) -> str:
    """The attack as Table 2 has it; not an adaptive Knockoff, of which the paper does not speak."""
    adaptive = json.loads(row.attack_params or "{}").get("strategy", "random") != "random"
    return "" if adaptive or row.attack is None else row.attack


def spread(values: Iterable[float | None], factor: float = 100.0) -> str:
    """``"91.2 ± 0.4"`` in per cent, without the spread for one value."""
    value = stat(values)
    if value is None:
        return NONE
    text = f"{factor * value.mean:.1f}"
    return text if value.sd is None else f"{text} ± {factor * value.sd:.1f}"


def markdown(headings: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    rows = [headings, ["---", *["---:"] * (len(headings) - 1)], *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


class Tables:
    """The tables of one run's measured rows."""

    def __init__(self, measured: Sequence[Measured]) -> None:
        self.measured = measured
        self._labels = labels = Labels(lines(each.row for each in measured))
        self._scheme = {each.row.identity: labels.watermark(each.row) for each in measured}
        self._names = {self._scheme[each.row.identity]: each.row.watermark for each in measured}
        self.schemes = list(self._names)
        stolen = [each.row for each in measured if each.row.role == "stolen"]
        self._column = dict(zip((row.identity for row in stolen), self._headings(stolen), strict=True))
        thefts = {self._column[row.identity]: row for row in stolen if not is_control(row)}
        self.columns = list(thefts)
        self._attacks = {column: (_attack_of_paper(row), row.labels or "") for column, row in thefts.items()}
        self._paper = {each.row.dataset for each in measured} == {"fashion_mnist"}

    def _headings(self, stolen: Sequence[Row]) -> list[str]:
        """Of each row its attack's name, its answers, and what else the rows of this attack differ in."""
        names = [self._labels.attack(row).removeprefix("control: ") for row in stolen]
        seen: dict[tuple[str, str], set[object]] = {}
        for name, row in zip(names, stolen, strict=True):
            for field in VARIED:
                seen.setdefault((name, field), set()).add(getattr(row, field))
        return [
            " ".join([name, *(str(getattr(row, f)) for f in VARIED if len(seen[name, f]) > 1), row.labels or ""])
            for name, row in zip(names, stolen, strict=True)
        ]

    def settings(self) -> dict[str, str]:
        """Of each scheme its settings in JSON."""
        return {self._scheme[each.row.identity]: each.row.watermark_params for each in self.measured}

    def _of(self, scheme: str, role: str, column: str | None = None, control: bool = False) -> list[Measured]:
        return [
            each
            for each in self.measured
            if each.row.role == role
            and self._scheme[each.row.identity] == scheme
            and (column is None or self._column[each.row.identity] == column)
            and is_control(each.row) == control
        ]

    def owners(self) -> str:
        """Table 1: benign model and victim, before the filter, and how far the accuracy falls."""
        headings = ["scheme", "benign acc", "benign WSR", "victim acc", "Δ acc", "victim WSR", "false trigger"]
        headings += ["paper: benign WSR", "paper: Δ acc", "paper: victim WSR"]
        body = []
        for scheme in self.schemes:
            benign, victim = self._of(scheme, "benign"), self._of(scheme, "victim")
            seeds = {each.row.seed: each.row.accuracy or 0.0 for each in benign}
            drops = [(each.row.accuracy or 0.0) - seeds[each.row.seed] for each in victim if each.row.seed in seeds]
            paper = TABLE_1.get(self._names[scheme]) if self._paper else None
            body.append(
                [
                    scheme,
                    spread(each.row.accuracy for each in benign),
                    spread(each.unfiltered for each in benign),
                    spread(each.row.accuracy for each in victim),
                    spread(drops),
                    spread(each.unfiltered for each in victim),
                    spread(each.row.false_trigger for each in victim),
                    *(
                        [NONE] * 3
                        if paper is None
                        else [f"{paper[1]:.1f}", f"{paper[2] - paper[0]:.1f}", f"{paper[3]:.1f}"]
                    ),
                ]
            )
        return markdown(headings, body)

    def stolen(self, wsr: Callable[[Measured], float | None], *, paper: bool, control: bool = False) -> str:
        """Table 2: accuracy / WSR of every theft, the mean WSR over all of them, and over those thefts whose copies are
        of use (:data:`USABLE`); schemes by the latter."""
        headings = ["scheme"]
        for column in self.columns:
            with_paper = (
                paper
                and self._paper
                and any(paper_stolen(self._names[s], *self._attacks[column]) for s in self.schemes)
            )
            headings += [column, "paper"] if with_paper else [column]
        headings += ["mean WSR", f"mean, accuracy ≥ {100 * USABLE:.0f}"]
        body: list[tuple[float, list[str]]] = []
        for scheme in self.schemes:
            cells, means, usable = [scheme], [], []
            for column in self.columns:
                found = self._of(scheme, "stolen", column, control)
                value = stat(wsr(each) for each in found)
                means += [value.mean] if value else []
                accuracy = stat(each.row.accuracy for each in found)
                usable += [value.mean] if value and accuracy and accuracy.mean >= USABLE else []
                cells.append(f"{spread(each.row.accuracy for each in found)} / {spread(map(wsr, found))}")
                if len(headings) > len(self.columns) + 3 and headings[len(cells)] == "paper":
                    figure = paper_stolen(self._names[scheme], *self._attacks[column])
                    cells.append(NONE if figure is None else f"{figure[0]:.1f} / {figure[1]:.1f}")
            body.append((_mean(usable, -1.0), [*cells, spread([_mean(means)]), spread([_mean(usable)])]))
        return markdown(headings, [cells for _, cells in sorted(body, key=lambda entry: -entry[0])])

    def contract(self) -> str:
        """What misses the bars that the contract tests have on digits; "none" if nothing does."""
        found = []
        for scheme in self.schemes:
            bar = 0.85 if self._names[scheme] in ("composite", "ewe", "mea_defender") else 0.95
            benign = {each.row.seed: each for each in self._of(scheme, "benign")}
            for each in self._of(scheme, "victim"):
                row, other = each.row, benign[each.row.seed]
                where = f"{scheme}, seed {row.seed}"
                if each.unfiltered is not None and each.unfiltered < bar:
                    found.append(f"{where}: victim's WSR {100 * each.unfiltered:.1f}, below {100 * bar:.0f}")
                if row.accuracy is not None and other.row.accuracy is not None:
                    drop = other.row.accuracy - row.accuracy
                    if drop > 0.03:
                        found.append(f"{where}: accuracy {100 * drop:.1f} below the benign model's")
                if other.unfiltered is not None and other.unfiltered > 0.2:
                    found.append(f"{where}: a benign model's WSR is {100 * other.unfiltered:.1f}")
        return "\n".join(f"- {text}" for text in found or ["none"]) + "\n"


def page(run_dir: Path, name: str) -> str:
    """The whole page in Markdown."""
    info, tables = read_run_info(run_dir), Tables(measure(run_dir))
    command = shlex.join(["exsim", *info.argv[1:]])
    commit = (info.git_commit or "unknown")[:12] + (" with changes" if info.git_dirty else "")
    failed = [row for row in read_rows(run_dir) if row.status == "failed"]
    parts = [
        f"# {name}",
        f"`{command}`",
        f"commit {commit}, seeds {info.seeds}, status {info.status}, torch {info.versions['torch']}, "
        f"{info.host.cpus} cores; {len(failed)} rows failed",
        "Per cent, mean ± standard deviation over the seeds. Where the data are Fashion-MNIST, figures of the paper "
        "stand beside (Yang et al., AAAI 2026, Tables 1 and 2). Its victims learn 60,000 images for 200 epochs and its "
        "budgets are not stated, so what compares is the order of the schemes, not the figures.",
        "## Benign models and victims (Table 1), WSR before the filter",
        tables.owners(),
        "Misses the bars (victim's WSR 95, or 85 for `composite`, `ewe`, `mea_defender`; accuracy within 3 of benign; "
        "benign WSR at most 20):\n",
        tables.contract(),
        "## Stolen models (Table 2), accuracy / WSR, measured as in the paper\n\n"
        "`deeptracer` after the filter, all others before it.",
        tables.stolen(lambda each: each.as_paper, paper=True),
        "## The same, every scheme before the filter",
        tables.stolen(lambda each: each.unfiltered, paper=False),
        "## The same, every scheme after the filter (Table 22's question)",
        tables.stolen(lambda each: each.row.wsr, paper=False),
    ]
    if any(is_control(each.row) for each in tables.measured):
        parts += [
            "## Controls: the same thefts from a benign model, every key after the filter",
            tables.stolen(lambda each: each.row.wsr, paper=False, control=True),
            "## Controls before the filter",
            tables.stolen(lambda each: each.unfiltered, paper=False, control=True),
        ]
    parts += ["## Settings", "\n".join(f"- {scheme}: `{text}`" for scheme, text in tables.settings().items())]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Writes ``results/NAME.md`` for ``RUN_DIR NAME``."""
    if len(arguments) != 2:
        print("usage: paper_tables.py RUN_DIR NAME", file=sys.stderr)
        return 2
    try:
        text = page(Path(arguments[0]), arguments[1])
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    Path("results").mkdir(exist_ok=True)
    path = Path("results") / f"{arguments[1]}.md"
    path.write_text(text, encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
