"""What the terms of DeepTracer's loss do, from a run of the preset ``coupling-ablation``: its Table 4, paper / ours.

    python runs/coupling_table.py RUN_DIR NAME          writes results/NAME.md

Differences are paired: the same seed and theft with and without the other terms. Their interval is Student's t over
seeds, for the last column of the seeds' means over thefts. What the run has not measured is a dash; figures of one
seed have no interval.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import t

from simulator.records.provenance import read_run_info
from simulator.records.rows import Row, read_rows

#: (L_wm, L_intra, L_inter) and Table 4's accuracy and WSR of the victim and of the stolen model, CIFAR-10
PAPER = {
    (True, False, False): ("L_wm", "84.94/99.99 → 75.07/82.30"),
    (False, True, False): ("L_intra", "84.36/56.86 → 75.83/1.71"),
    (False, False, True): ("L_inter", "82.22/.06 → 76.47/.10"),
    (True, True, False): ("L_wm + L_intra", "85.41/99.97 → 75.78/89.62"),
    (True, False, True): ("L_wm + L_inter", "84.94/99.99 → 75.07/84.35"),
    (False, True, True): ("L_intra + L_inter", "84.16/64.38 → 75.88/5.58"),
    (True, True, True): ("all", "85.59/100 → 75.87/94.61"),
}
Terms = tuple[bool, bool, bool]
Figures = Mapping[int, float]


def terms(row: Row) -> Terms:
    """Which terms of the loss a row's victim was trained with."""
    params = json.loads(row.watermark_params)
    coupled = params["coupling_weight"] > 0
    return (
        params["watermark_weight"] > 0,
        coupled and params["intra_weight"] > 0,
        coupled and params["inter_weight"] > 0,
    )


def theft(row: Row) -> str:
    """What tells a theft of the preset from the others."""
    return f"{row.attack}, {row.pool}, {row.budget}"


def spread(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean and standard deviation of percentages; of one value that alone."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def interval(values: Sequence[float]) -> str:
    """The 95 % interval of a mean of paired differences."""
    if len(values) < 2:
        return spread(values, signed=True)
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return f"{mean:+.1f} [{mean - half:+.0f}, {mean + half:+.0f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def paired(first: Figures, second: Figures) -> dict[int, float]:
    """Differences of the seeds that both have."""
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


def main() -> int:
    """Writes the page."""
    run, name = Path(sys.argv[1]), sys.argv[2]
    rows = [row for row in read_rows(run) if row.status == "ok"]
    victims = {(terms(row), row.seed): row for row in rows if row.role == "victim"}
    benign = {row.seed: row.accuracy or 0.0 for row in rows if row.role == "benign"}
    stolen: dict[str, dict[Terms, dict[int, float]]] = {}
    for row in rows:
        if row.role == "stolen":
            stolen.setdefault(theft(row), {}).setdefault(terms(row), {})[row.seed] = 100 * (row.wsr or 0.0)
    config = yaml.safe_load((run / "config.yaml").read_text())
    thefts = [one for one in dict.fromkeys(map(theft, rows)) if one in stolen]
    text = [f"# {name}\n", _about(run, config), "## Table 4\n", _table_four(victims, benign, stolen, thefts)]
    text += ["## Paired differences of the stolen WSR\n", _differences(stolen, thefts)]
    text += ["## Share of pairs within the margin, accuracy drop and WSR\n", _map(victims, benign, stolen)]
    Path("results").mkdir(exist_ok=True)
    Path(f"results/{name}.md").write_text("\n".join(text))
    print(f"results/{name}.md")
    return 0


def _about(run: Path, config: Mapping[str, Any]) -> str:
    if not (run / "run.json").is_file():
        return f"preset `{config['name']}`, seeds {config['seeds']}\n"
    info = read_run_info(run)
    commit = (info.git_commit or "unknown")[:12] + (" with changes" if info.git_dirty else "")
    return f"`{shlex.join(['exsim', *info.argv[1:]])}`\n\ncommit {commit}, seeds {info.seeds}, status {info.status}\n"


def _table_four(
    victims: Mapping[tuple[Terms, int], Row],
    benign: Figures,
    stolen: Mapping[str, Mapping[Terms, Figures]],
    thefts: Sequence[str],
) -> str:
    lines = []
    for which, (label, paper) in PAPER.items():
        own = [row for (found, _), row in victims.items() if found == which]
        drops = [100 * (benign[row.seed] - (row.accuracy or 0.0)) for row in own]
        cells = [spread([100 * (getattr(row, rate) or 0.0) for row in own]) for rate in ("accuracy", "wsr")]
        cells += [spread(drops, signed=True), spread([100 * (row.false_trigger or 0.0) for row in own])]
        copies = [spread(list(stolen[one].get(which, {}).values())) for one in thefts]
        lines.append([label, paper, str(len(own)), *cells, *copies])
    head = ["terms", "paper, CIFAR-10", "seeds", "victim acc. %", "victim WSR %", "drop, points", "false trigger %"]
    return table([*head, *thefts], lines)


def _differences(stolen: Mapping[str, Mapping[Terms, Figures]], thefts: Sequence[str]) -> str:
    bare, everything = (True, False, False), (True, True, True)
    pairs = [(which, bare) for which in PAPER if which[0] and which != bare]
    pairs += [(everything, (True, True, False)), (everything, (True, False, True))]
    lines = []
    for first, second in pairs:
        found = [paired(stolen[one].get(first, {}), stolen[one].get(second, {})) for one in thefts]
        means = [
            statistics.fmean(one[seed] for one in found if seed in one)
            for seed in sorted({s for one in found for s in one})
        ]
        each = [interval(list(one.values())) for one in found]
        lines.append([f"{PAPER[first][0]} − {PAPER[second][0]}", *each, interval(means)])
    return table(["", *thefts, "mean of the thefts"], lines)


def _map(
    victims: Mapping[tuple[Terms, int], Row], benign: Figures, stolen: Mapping[str, Mapping[Terms, Figures]]
) -> str:
    lines = []
    for (which, seed), row in sorted(victims.items(), key=lambda each: (each[0][0], each[0][1]), reverse=True):
        told = json.loads(row.diagnostics or "{}")
        phase = told["training"].get("phase 2", {"share": {}, "within_margin": math.nan})
        rates = [found[which][seed] for found in stolen.values() if seed in found.get(which, {})]
        shares = [f"{100 * phase['share'].get(term, 0):.1f}" for term in ("watermark", "intra", "inter")]
        lines.append(
            [
                *(PAPER[which][0], str(seed), f"{told['margin']:.2f}", f"{100 * told['within_margin']:.2f}"),
                *(f"{100 * phase['within_margin']:.2f}", " · ".join(shares)),
                " · ".join(f"{told['victim'][key]:.1f}" for key in ("least", "median", "largest", "own")),
                f"{100 * (benign[seed] - (row.accuracy or 0.0)):+.1f}",
                f"{statistics.fmean(rates):.1f} of {len(rates)}" if rates else "–",
            ]
        )
    head = ["terms", "seed", "margin", "within, test %", "within, phase 2 %", "gradient, phase 2: wm · intra · inter %"]
    return table([*head, "centroids: least · median · largest · own", "drop", "mean stolen WSR %, thefts"], lines)


if __name__ == "__main__":
    sys.exit(main())
