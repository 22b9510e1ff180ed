"""What a sweep writes without Ray: the table of trials, the recommendation, the plots and the page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from simulator.cli import main
from simulator.errors import InputError
from simulator.records.provenance import collect_provenance, write_run_info
from tuning.config import SweepConfig, read_sweep
from tuning.importance import importances
from tuning.objective import Measured, Stolen, metrics
from tuning.plots import front
from tuning.recommend import Confirmation, recommend
from tuning.records import TrialRecord, read_trials, record, write_trials
from tuning.report import print_sweep, write_sweep_report
from tuning.space import Setting, setting_id

TRIALS = 12


@pytest.fixture(scope="module")
def config() -> SweepConfig:
    return read_sweep("digits", [f"trials={TRIALS}", "seeds=[0, 1]"])


def seed(number: int, wsr: float, drop: float, attacks: int) -> Measured:
    names = [f"attack{at} soft patches 1000" for at in range(attacks)]
    stolen = tuple(Stolen(attack=name, accuracy=0.9, wsr=wsr, low=wsr / 2) for name in names)
    return Measured(
        seed=number, benign_accuracy=0.97, accuracy=0.97 - drop, victim_wsr=1.0, benign_wsr=0.0, stolen=stolen
    )


def trials(config: SweepConfig) -> list[TrialRecord]:
    """Twelve trials in which a larger margin costs accuracy and helps the WSR; three were stopped, one failed."""
    records = []
    for number in range(TRIALS):
        margin = 0.3 * 1.25**number
        setting: Setting = {
            "watermarks.0.centroid": "batch" if number % 2 else "learnable",
            "watermarks.0.inter_weight": 0.1 + number * 7 % 5,
            "watermarks.0.margin": margin if number else 1.0,
            "watermarks.0.watermark_weight": 1.0,
        }
        setting = config.default() if number == 0 else setting
        status = {3: "stopped", 5: "stopped", 7: "failed"}.get(number, "done")
        attacks = {3: 0, 5: 1}.get(number, config.attacks())
        found = [seed(at, min(1.0, margin / 4 + 0.02 * at), margin / 500, attacks) for at in config.seeds]
        stage = {3: "victim", 5: "attack 1"}.get(number, config.stages()[-1])
        report = {"stage": stage, "found": "[]", "error": "loss is nan", "value": config.objective.worst}
        if status != "failed":
            text = "[" + ", ".join(one.model_dump_json() for one in found) + "]"
            report = {"stage": stage, "found": text, **metrics(config.objective, found, config.attacks())}
        data = record(number, setting_id(setting), setting, report, status)
        records.append(TrialRecord.model_validate_json(json.dumps(data)))
    return records


def confirmed(wsr: Mapping[str, float], config: SweepConfig) -> Any:
    """What the workshop would say on fresh seeds: the search's attacks with this WSR, unseen ones with half of it."""

    def confirm(settings: Mapping[str, Setting]) -> dict[str, Confirmation]:
        found = {}
        for name, setting in settings.items():
            seeds = []
            for at in config.holdout.seeds:
                known, unseen = seed(at, wsr[name], 0.004, config.attacks()), seed(at, wsr[name] / 2, 0.004, 2)
                seeds.append(known.model_copy(update={"stolen": known.stolen + unseen.stolen}))
            found[name] = Confirmation(setting=dict(setting), found=tuple(seeds))
        return found

    return confirm


def test_the_table_of_trials_reads_back_equal_and_has_a_column_for_each_setting_and_attack(
    config: SweepConfig, tmp_path: Path
) -> None:
    path, records = tmp_path / "trials.parquet", trials(config)
    write_trials(path, records, config.to_yaml())
    assert read_trials(path) == records
    table = pq.read_table(path)
    assert table["setting.watermarks.0.margin"].to_pylist()[0] == 1.0
    assert table["wsr.attack0 soft patches 1000"].to_pylist()[3] is None
    assert table["status"].to_pylist().count("stopped") == 2
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_trials(path)


def test_the_winner_is_within_the_limit_if_any_trial_is_and_is_confirmed_beside_the_default(
    config: SweepConfig,
) -> None:
    records = trials(config)
    chosen = recommend(config, records, confirmed({"the winner": 0.8, "the default setting": 0.6}, config))
    # margin / 500 <= .005, and of those the largest WSR
    best = max(
        (one for one in records if one.done and (one.drop or 0) <= 0.005), key=lambda one: one.value_lower or 0.0
    )
    assert (chosen.winner.setting, chosen.feasible) == (best.setting, True)
    assert chosen.default.setting == config.default()
    assert (chosen.trials, chosen.stopped, chosen.failed) == (TRIALS, 2, 1)
    assert chosen.winner.fresh is not None
    assert chosen.winner.unseen is not None
    assert (chosen.winner.fresh.worst_wsr, chosen.winner.unseen.worst_wsr) == pytest.approx((0.8, 0.4))
    assert "BEATS the default setting's worst stolen WSR: 80.0 % against 60.0 % (+20.0 points)" in chosen.verdict()
    worse = recommend(config, records, confirmed({"the winner": 0.5, "the default setting": 0.6}, config))
    assert "does NOT beat" in worse.verdict()


def test_a_sweep_whose_trials_all_failed_recommends_nothing(config: SweepConfig) -> None:
    with pytest.raises(InputError, match="no trial ran to its end: loss is nan"):
        recommend(config, [one for one in trials(config) if one.status == "failed"], confirmed({}, config))


def test_nothing_on_the_front_is_beaten_in_both(config: SweepConfig) -> None:
    records = trials(config)
    line = front(records)
    for one in (one for one in records if one.done):
        assert any(
            (best.drop or 0) <= (one.drop or 0) and (best.worst_wsr or 0) >= (one.worst_wsr or 0) for best in line
        )
    assert [best.drop for best in line] == sorted(best.drop or 0 for best in line)


def test_the_margin_is_what_decides(config: SweepConfig) -> None:
    found = importances(trials(config), config.space)
    assert [one.outcome for one in found] == ["accuracy drop", "worst stolen WSR"]
    for one in found:
        at = one.paths.index("watermarks.0.margin")
        assert one.means[at] == max(one.means) > 0.5
        assert all(math.isfinite(value) for value in one.means)
    assert importances(trials(config)[:5], config.space) == []


def test_the_page_says_it_all_and_names_no_address(config: SweepConfig, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    (run / "sweep").mkdir(parents=True)
    (run / "sweep" / "config.yaml").write_text(config.to_yaml())
    info = collect_provenance(["exsim"], name="digits-sweep", mode="ray", seeds=[0], config_yaml="")
    write_run_info(run, info.model_copy(update={"status": "done"}))
    with pytest.raises(InputError, match="holds no trials yet"):
        write_sweep_report(run)
    records = trials(config)
    write_trials(run / "sweep" / "trials.parquet", records, config.to_yaml())
    assert "Recommendation" not in write_sweep_report(run).read_text()  # the sweep goes on
    chosen = recommend(config, records, confirmed({"the winner": 0.8, "the default setting": 0.6}, config))
    (run / "sweep" / "recommendation.json").write_text(chosen.model_dump_json())
    page = write_sweep_report(run).read_text()
    assert "BEATS" in page
    assert page.count("<svg") == 3
    assert "loss is nan" in page
    assert not re.findall(r"(?:href|src)=[\"']?https?:", page)
    names = ("pareto.svg", "map.svg", "importance.svg", "table.md")
    first = [(run / "report" / name).read_bytes() for name in names]
    assert main(["report", str(run)]) == 0
    assert [(run / "report" / name).read_bytes() for name in names] == first
    assert "fresh seeds, unseen attacks" in capsys.readouterr().out
    print_sweep(run, Console(width=100))
    assert max(map(len, capsys.readouterr().out.splitlines()[:-6])) <= 100
