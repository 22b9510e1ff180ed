"""Who knows the pattern and looks for the sources: cracking, prediction distribution, selection on the copy.

    python runs/cracking.py RUN_DIR NAME        writes results/NAME.md

Every DeepTracer victim of the run, what was stolen from it, and its benign model are asked mosaics of all sets of
source classes (:mod:`simulator.analysis.cracking`), made of the attacker's part of the data set. The two attempts of
DeepTracer's Fig. 14 and Table 15 follow (:mod:`simulator.analysis.adaptive`). Beside each figure stands the paper's.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from simulator.analysis.adaptive import infer_sources, prediction_distribution, predictions
from simulator.analysis.cracking import crack
from simulator.api import Run
from simulator.component import BENIGN
from simulator.data.dataset import Dataset, load
from simulator.errors import InputError
from simulator.evasions.hiding import oracle_over
from simulator.models import load_model
from simulator.ownership.bounds import claimed_by_chance, class_sets, cracked_by_chance, learned_by_chance
from simulator.records.provenance import read_run_info
from simulator.records.rows import Row
from simulator.seeding import generator_for

#: mosaics that are asked of each set of classes
EACH = 20
#: the share of a set's mosaics above which it counts as answered with the target
REACHED = 0.5


def table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def cracking(run: Run, victim: Row, data: Dataset) -> Iterator[list[object]]:
    """One line for each model and order of the tiles."""
    info = run.key(victim).info
    sources, target = tuple(info["sources"]), int(info["target"])
    benign = [row for row in run.rows if row.role == "benign" and row.scenario_id == victim.parent]
    stolen = [row for row in run.rows if row.role == "stolen" and row.victim == victim.scenario_id]
    for row in (*benign[:1], victim, *stolen):
        for shuffled in (False, True):
            drawn = generator_for("cracking", row.scenario_id, shuffled)
            found = crack(oracle_over(run.model(row), "hard"), data.attacker, drawn, each=EACH, shuffled=shuffled)
            own, above = found.place(sources)
            yield [
                row.role,
                row.seed,
                "shuffled" if shuffled else "ascending",
                f"{list(found.sources)} to {found.target}",
                f"{list(sources)} to {target}",
                "yes" if found.sources == sources else "no",
                "yes" if found.target == target else "no",
                found.tied,
                f"{100 * own:.0f} ({above})",
                f"{100 * found.reaching(target, REACHED):.1f}",
                f"{found.queries:,}",
            ]


def distribution(run: Run, victim: Row, data: Dataset) -> list[list[object]]:
    """The labels that mistakes on images of the sources are drawn to, those of the largest excess first."""
    names = dict.fromkeys(row.scenario_id for row in run.rows if row.role == "benign")
    unmarked = [load_model(run.path / "models" / f"{name}.safetensors")[0] for name in names]
    info = run.key(victim).info
    counts = [predictions(model, data.test, data.classes) for model in (run.model(victim), *unmarked)]
    found = prediction_distribution(counts[0], counts[1:], info["sources"])
    return [
        [
            victim.seed,
            row.label,
            "target" if row.label == info["target"] else "",
            *(f"{100 * value:.2f}" for value in (row.marked, row.unmarked, row.excess)),
            "" if row.spread is None else f"{100 * row.spread:.2f}",
        ]
        for row in found[:4]
    ]


def selection(run: Run, victim: Row, data: Dataset) -> Iterator[list[object]]:
    """What the owner's choice of sources gives on each copy, and on the benign model with the owner's images."""
    sources = tuple(run.key(victim).info["sources"])
    copies = [row for row in run.rows if row.role == "stolen" and row.victim == victim.scenario_id]
    benign = next(row for row in run.rows if row.role == "benign" and row.scenario_id == victim.parent)
    for row, name, images in [
        *((row, "the attacker's", data.attacker.images) for row in copies),
        (benign, "the owner's", data.owner.images),
    ]:
        found = infer_sources(run.model(row), name, images, sources, generator_for("selection", row.scenario_id))
        yield [row.role, row.seed, found.data, list(found.found), list(sources), found.hits, found.exact]


def page(run_dir: Path, name: str) -> str:
    """The page of a run."""
    run, about = Run(run_dir), read_run_info(run_dir)
    data = load(run.config.dataset)
    victims = [
        row for row in run.rows if row.role == "victim" and row.watermark == "deeptracer" and row.victim != BENIGN
    ]
    if not victims:
        raise InputError(f"{run_dir}: no victim of deeptracer")
    head = ["model", "seed", "tiles", "named", "truth", "sources", "target", "tied", "own", "reached", "queries"]
    chance = (
        f"The paper's bounds for K = {data.classes}: {class_sets(data.classes)} sets, a guess at the sources "
        f"{cracked_by_chance(data.classes):.3g} (Eq. 29), at the target, too, {learned_by_chance(data.classes):.3g} "
        f"(Eq. 17), a claim by chance with 2,000 samples {claimed_by_chance(2000, data.classes):.3g} (Eq. 21). It "
        "measures no attacker."
    )
    text = [
        *(f"# {name}", "", f"`python runs/cracking.py {shlex.quote(str(run_dir))} {name}`, of the run"),
        *(f"`{shlex.join(['exsim', *about.argv[1:]])}`", ""),
        f"commit of the run {(about.git_commit or 'unknown')[:12]}, seeds {about.seeds}, {EACH} mosaics a set",
        *("", "## Cracking", "", chance, ""),
        "*tied*: sets that are answered alike, among which the attacker has guessed. *own*: per cent of the true set's "
        "mosaics that get its label, and how many sets do better. *reached*: per cent of the sets without the target's "
        f"class of whose mosaics at least {100 * REACHED:.0f} % get the target.",
        *("", *table(head, [line for victim in victims for line in cracking(run, victim, data)])),
        *("", "## Prediction distribution", ""),
        'The paper\'s Fig. 14 has no numbers: "nearly identical". Per cent of the test images of the source classes:',
        "",
        *table(
            ["seed", "label", "", "marked", "unmarked", "excess", "spread of unmarked"],
            [line for victim in victims for line in distribution(run, victim, data)],
        ),
        *("", "## Selection strategy on the copy", ""),
        f"The paper's Table 15 (CIFAR-10): 2, 1 and 0 of 4 hit; chance {16 / data.classes:.1f}.",
        "",
        *table(
            ["model", "seed", "images", "found", "sources", "hits of 4", "exact"],
            [line for victim in victims for line in selection(run, victim, data)],
        ),
    ]
    return "\n".join(text) + "\n"


def main() -> int:
    """Writes the page."""
    run_dir, name = Path(sys.argv[1]), sys.argv[2]
    try:
        text = page(run_dir, name)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    (Path("results") / f"{name}.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
