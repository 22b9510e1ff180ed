"""The tables in the shape of the paper's: which figure stands where."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from runs.paper_tables import TABLE_1, TABLE_2, Measured, Tables, main, measure, paper_stolen, spread
from simulator.ownership.key import KeySamples, load_key, save_key
from simulator.records.rows import Row, read_rows
from simulator.watermarks.base import WATERMARKS

STARTED = datetime(2026, 1, 1, tzinfo=UTC)


def row(role: str, watermark: str, seed: int, **columns: Any) -> Row:
    """A row; a victim's id is its scheme and seed."""
    victim = "benign" if role == "benign" else f"{watermark}-{seed}"
    return Row.model_validate(
        {
            "scenario_id": f"{role}-{watermark}-{seed}-{columns.get('labels', '')}{columns.get('victim', '')}",
            **{"role": role, "victim": victim, "dataset": "fashion_mnist", "watermark": watermark},
            **{"watermark_params": "{}", "architecture": "naivenet", "seed": seed, **columns},
        }
    )


def knockoff(watermark: str, seed: int, labels: str, **columns: Any) -> Row:
    about = {"attack": "knockoff", "attack_params": "{}", "labels": labels, "pool": "patches", "stage": 1, "budget": 8}
    return row("stolen", watermark, seed, **about, **columns)


@pytest.fixture
def tables() -> Tables:
    found = []
    for seed, lost in ((0, 0.01), (1, 0.05)):
        for scheme, before, after in (("badnets", 0.3, 0.6), ("deeptracer", 0.9, 1.0)):
            found += [
                Measured(row("benign", scheme, seed, accuracy=0.9, wsr=0.0), 0.25 if scheme == "badnets" else 0.0),
                Measured(row("victim", scheme, seed, accuracy=0.9 - lost, wsr=1.0), 0.9),
                Measured(knockoff(scheme, seed, "soft", accuracy=0.8 + lost, wsr=after), before),
                Measured(knockoff(scheme, seed, "soft", victim="benign", accuracy=0.8, wsr=0.02), 0.04),
            ]
    return Tables(found)


def lines(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_figures_are_where_the_headings_say(tables: Tables) -> None:
    heading, _, *body = lines(tables.stolen(lambda each: each.as_paper, paper=True))
    assert heading == ["scheme", "knockoff soft", "paper", "mean WSR", "mean, accuracy ≥ 50"]
    # best first; DeepTracer after the filter and BadNets before it, as in the paper
    assert body == [
        ["deeptracer", "83.0 ± 2.8 / 100.0 ± 0.0", "87.2 / 100.0", "100.0", "100.0"],
        ["badnets", "83.0 ± 2.8 / 30.0 ± 0.0", "83.0 / 38.9", "30.0", "30.0"],
    ]
    _, _, *after = lines(tables.stolen(lambda each: each.row.wsr, paper=False))
    assert after[1] == ["badnets", "83.0 ± 2.8 / 60.0 ± 0.0", "60.0", "60.0"]


def test_a_copy_that_guesses_counts_in_one_mean_alone() -> None:
    good = Measured(knockoff("badnets", 0, "soft", accuracy=0.5, wsr=0.2), 0.2)
    poor = Measured(knockoff("badnets", 0, "hard", accuracy=0.49, wsr=1.0), 1.0)
    *_, first = lines(Tables([good, poor]).stolen(lambda each: each.row.wsr, paper=False))
    assert first[-2:] == ["60.0", "20.0"]
    *_, only = lines(Tables([poor]).stolen(lambda each: each.row.wsr, paper=False))
    assert only[-2:] == ["100.0", "–"]


def test_controls_are_apart(tables: Tables) -> None:
    _, _, first, _ = lines(tables.stolen(lambda each: each.row.wsr, paper=False, control=True))
    assert first[1:] == ["80.0 ± 0.0 / 2.0 ± 0.0", "2.0", "2.0"]


def test_owners(tables: Tables) -> None:
    _, _, first, _ = lines(tables.owners())
    assert first == [
        *("badnets", "90.0 ± 0.0", "25.0 ± 0.0", "87.0 ± 2.8", "-3.0 ± 2.8", "90.0 ± 0.0", "–"),
        *("10.5", "-0.6", "100.0"),
    ]


def test_other_data_and_other_attacks_have_no_figure_of_the_paper() -> None:
    plain = Measured(knockoff("badnets", 0, "soft", accuracy=0.5, wsr=0.5), 0.5)
    digits = Measured(plain.row.model_copy(update={"dataset": "digits"}), 0.5)
    adaptive = Measured(plain.row.model_copy(update={"attack_params": '{"strategy": "adaptive"}'}), 0.5)
    shown = [Tables([each]).stolen(lambda each: each.unfiltered, paper=True) for each in (plain, digits, adaptive)]
    assert ["paper" in text for text in shown] == [True, False, False]


def test_what_misses_the_bars(tables: Tables) -> None:
    found = tables.contract().splitlines()
    assert "- badnets, seed 0: victim's WSR 90.0, below 95" in found
    assert "- badnets, seed 1: a benign model's WSR is 25.0" in found
    assert "- deeptracer, seed 1: accuracy 5.0 below the benign model's" in found
    assert not any("deeptracer, seed 0: accuracy" in text for text in found)
    assert Tables([]).contract() == "- none\n"


def test_the_papers_figures() -> None:
    assert (
        set(TABLE_1)
        == set(TABLE_2)
        == set(WATERMARKS.classes())
        - {*("function_coupled", "frontier_stitching", "exponential_weighting", "unmarked")}
    )
    assert all(len(figures) == 12 for figures in TABLE_2.values())
    assert paper_stolen("mea_defender", "knockoff", "hard") == (59.86, 26.35)
    assert paper_stolen("deeptracer", "jbda", "soft") == (85.02, 91.65)
    assert paper_stolen("badnets", "dfme", "hard") == (57.48, 85.18)
    assert paper_stolen("badnets", "distillation", "hard") is None
    assert paper_stolen("function_coupled", "jbda", "hard") is None


def test_spread() -> None:
    assert (spread([0.5]), spread([0.5, 0.7]), spread([None])) == ("50.0", "60.0 ± 14.1", "–")


def test_a_run_is_measured_again_before_the_filter(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (path,) = (run / "keys").glob("*.candidates.safetensors")
    key = load_key(path)
    half = torch.arange(len(key)) < len(key) // 2
    save_key(KeySamples(key.images, torch.where(half, key.labels, (key.labels + 1) % 10), 10), path)
    found = measure(run)
    assert len(found) == len(read_rows(run))
    (victim,) = (each for each in found if each.row.role == "victim")
    assert victim.row.wsr == 1.0
    assert victim.unfiltered == pytest.approx(0.5, abs=0.1)
    monkeypatch.chdir(tmp_path)
    assert main([str(run), "tiny"]) == 0
    text = (tmp_path / "results" / "tiny.md").read_text()
    assert "deeptracer" in text
    assert "seeds [0]" in text


def test_a_wrong_directory_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), "name"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main([]) == 2
