import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from simulator.errors import InputError
from simulator.records.provenance import collect_provenance, write_run_info
from simulator.records.rows import Row, write_row
from simulator.report import plots
from simulator.report.lines import Labels, Line, doubts, lines, stat
from simulator.report.removals import outcomes
from simulator.report.table import markdown_table, render_table, write_report

THEFT = {
    "attack": "knockoff",
    "attack_params": '{"strategy": "random"}',
    "labels": "soft",
    "pool": "attacker",
    "stage": 1,
}
CONFIG = "name: test\n"


def row(role: str, victim: str, seed: int = 0, **changes: object) -> Row:
    setting: dict[str, object] = {
        "dataset": "digits",
        "watermark": "deeptracer",
        "watermark_params": "{}",
        "architecture": "lenet5",
    }
    if role in ("stolen", "removed"):
        setting |= THEFT | {"budget": 1000, "queries": 1000}
    values = setting | {"role": role, "victim": victim, "seed": seed, "accuracy": 0.8, "wsr": 0.5, "threshold": 0.3}
    values |= {"key_filter": "both"} | changes
    if values.get("status") == "failed":
        values |= {"accuracy": None, "wsr": None}
    known = "-".join(str(values.get(key)) for key in ("attack", "labels", "pool", "budget", "architecture", "removal"))
    name = re.sub(
        r"[^A-Za-z0-9]+",
        "-",
        f"{role}-{victim}-{seed}-{known}-{values.get('attack_params')}{values.get('removal_params')}",
    )
    return Row.model_validate({"scenario_id": name, **values})


def run_rows(seeds: tuple[int, ...] = (0, 1)) -> list[Row]:
    rows = []
    for seed in seeds:
        victim = f"deeptracer-{seed}"
        rows += [
            row("benign", "benign", seed, wsr=0.1, verified=False),
            row("victim", victim, seed, wsr=1.0, false_trigger=0.04, verified=True),
        ]
        for budget in (1000, 5000):
            rows.append(row("stolen", victim, seed, budget=budget, wsr_low=0.4, wsr_high=0.6, verified=True))
            rows.append(row("stolen", "benign", seed, budget=budget, wsr=0.05, verified=False))
    return rows


def write_run(folder: Path, rows: list[Row], *, name: str = "test", config: str = CONFIG) -> Path:
    for each in rows:
        write_row(folder, each, "{}")
    (folder / "config.yaml").write_text(config)
    info = collect_provenance(["exsim", "run", name], name=name, mode="local", seeds=[0, 1], config_yaml=config)
    write_run_info(folder, info.model_copy(update={"status": "done"}))
    return folder


def text(rows: list[Row], width: int) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(render_table(rows, width=width))
    return capture.get()


def only(found: list[Line], role: str) -> Line:
    (line,) = [line for line in found if line.row.role == role]
    return line


def test_mean_and_sample_deviation() -> None:
    value = stat([0.1, None, 0.3])
    assert value is not None
    assert value.n == 2
    assert math.isclose(value.mean, 0.2)
    assert value.sd is not None
    assert math.isclose(value.sd, 0.1 * math.sqrt(2))
    assert stat([None]) is None


def test_seeds_are_one_line_beside_their_control() -> None:
    rows = [row("victim", f"v{seed}", seed) for seed in (0, 1)]
    rows += [row("stolen", f"v{seed}", seed, wsr=wsr) for seed, wsr in ((0, 0.4), (1, 0.6))]
    rows += [row("stolen", "benign", seed, wsr=wsr) for seed, wsr in ((0, 0.0), (1, 0.1))]
    stolen = only(lines(rows), "stolen")
    assert [found.wsr for found in stolen.rows] == [0.4, 0.6]
    assert [found.wsr for found in stolen.good_controls] == [0.0, 0.1]
    assert "| 50.0 ± 14.1 | 5.0 ± 7.1 |" in markdown_table(rows)


def test_one_seed_shows_its_wilson_interval() -> None:
    rows = [row("stolen", "v0", wsr=0.453, wsr_low=0.381, wsr_high=0.527), row("stolen", "benign", wsr=0.02)]
    assert "| 45.3 \\[38.1, 52.7\\] | 2.0 |" in markdown_table(rows)


@pytest.mark.parametrize(
    "other",
    [
        {"budget": 2000},
        {"labels": "hard"},
        {"pool": "noise"},
        {"architecture": "vgg"},
        {"seed": 1},
        {"watermark": "ewe"},
        {"watermark_params": '{"margin": 3}'},
        {"attack_params": '{"strategy": "adaptive"}'},
        {"role": "removed", "removal": "pruning"},
        {"stage": 2},
        {"test": "another"},
    ],
    ids=str,
)
def test_a_control_of_anything_else_is_not_taken(other: dict[str, object]) -> None:
    found = lines([row("stolen", "v0"), Row.model_validate(row("stolen", "benign").model_dump() | other)])
    assert [(line.is_control, line.controls) for line in found if not line.is_control] == [(False, ())]
    assert sum(line.is_control for line in found) == 1  # it is not lost: it has a line of its own
    assert any("no control" in note for note in doubts(found))


def test_the_benign_model_is_the_control_of_the_victim() -> None:
    found = lines([row("benign", "benign", wsr=0.1), row("victim", "v0", wsr=1.0)])
    assert [control.wsr for control in only(found, "victim").controls] == [0.1]


def test_two_victims_of_one_seed_are_two_lines() -> None:
    rows = [row("stolen", victim, seed) for victim in ("v0", "w0") for seed in (0, 1)]
    assert [{found.victim for found in line.rows} for line in lines(rows)] == [{"v0"}, {"w0"}]


def test_victims_of_two_architectures_are_not_merged() -> None:
    rows = [row("victim", "a", 0, architecture="vgg"), row("victim", "b", 1, architecture="resnet")]
    rows += [row("stolen", "a", 0), row("stolen", "b", 1)]
    assert sum(line.row.role == "stolen" for line in lines(rows)) == 2


def test_a_failed_row_is_a_line_and_its_error_is_told_everywhere(tmp_path: Path) -> None:
    error = "RuntimeError: out\n  of memory \x1b[31m"
    failed = row("stolen", "deeptracer-2", 2, status="failed", error=error)
    rows = [*run_rows(), failed, row("stolen", "benign", 3, status="failed", error="control broke")]
    assert sum(line.failed for line in lines(rows)) == 2
    page = write_report(write_run(tmp_path, rows)).read_text()
    for shown in (markdown_table(rows), text(rows, 200), page):
        assert "failed" in shown
        assert "RuntimeError: out" in shown
        assert "control broke" in shown
    assert "\x1b" not in text(rows, 200)
    assert "2 rows failed" in page


def test_a_failed_control_is_told_beside_the_line() -> None:
    rows = [row("stolen", "v0"), row("stolen", "benign", status="failed", error="broke")]
    assert "| 50.0 | failed |" in markdown_table(rows)


def test_false_claims_and_weak_victims_are_doubts() -> None:
    rows = [
        row("benign", "benign", verified=True),
        row("victim", "v0", verified=False, warning="accuracy 0.08 below the benign model"),
        row("stolen", "v0", verified=True),
        row("stolen", "benign", verified=True),
    ]
    notes = doubts(lines(rows))
    assert sum("false claim" in note for note in notes) == 2
    assert any("itself not verified" in note for note in notes)
    assert any("0.08 below" in note for note in notes)
    assert doubts(lines(run_rows())) == []


def test_labels_say_only_what_differs() -> None:
    common = '"epochs": 5'
    one, two = (
        row("stolen", "v0", attack_params=f'{{"strategy": "{name}", {common}}}') for name in ("random", "adaptive")
    )
    labels = Labels([Line((one,)), Line((two,))])
    assert [labels.attack(one), labels.attack(two)] == ["knockoff(random)", "knockoff(adaptive)"]
    assert Labels([Line((one,))]).attack(one) == "knockoff"
    stages = [row("stolen", "v0", attack="a+a", attack_params=f'[{{"t": 1}}, {{"t": {t}}}]', stage=2) for t in (2, 3)]
    assert Labels([Line(tuple(stages))]).attack(stages[0]) == "a+a(stage2.t=2), stage 2"


@pytest.mark.parametrize("width", [120, 100, 80])
def test_the_table_fits_and_keeps_what_matters(width: int) -> None:
    rows = [
        *run_rows((0, 1, 2)),
        *(
            row("stolen", "deeptracer-0", 0, labels=labels, pool=pool, architecture=architecture, agreement=0.7)
            for labels in ("soft", "hard")
            for pool in ("attacker", "kuzushiji")
            for architecture in ("resnet18", "mobilenet-v3")
        ),
    ]
    shown = text(rows, width)
    assert max(map(len, shown.splitlines())) <= width
    for word in ("accuracy", "WSR", "control", "kuzushiji", "hard", "resnet18", "false"):
        assert word in shown


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]


def test_the_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path, run_rows())).read_text()
    page = Page()
    page.feed(html)
    assert {"svg", "details", "table", "style"} <= page.tags
    assert not {"script", "link", "img", "iframe", "object"} & page.tags
    assert all(reference.startswith("#") for reference in page.references)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "://" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert len(page.ids) == len(set(page.ids))
    assert {reference.removeprefix("#") for reference in page.references} <= set(page.ids)


def test_nothing_a_user_names_becomes_markup(tmp_path: Path) -> None:
    evil = "--><script>alert(1)</script>$x_{$"
    rows = [*run_rows(), row("stolen", "v0", attack=evil, watermark=evil, status="failed", error=evil)]
    rows.append(row("stolen", "deeptracer-0", attack=evil, pool=evil, warning=evil, budget=1000))
    rows.append(row("stolen", "deeptracer-0", attack=evil, pool=evil, warning=evil, budget=2000))
    config = f"name: '{evil}'\n"
    html = write_report(write_run(tmp_path, rows, name=evil, config=config)).read_text()
    page = Page()
    page.feed(html)
    assert "script" not in page.tags
    assert html.count("&lt;script&gt;alert(1)") >= 4
    assert "<script" not in (tmp_path / "report" / "table.md").read_text()
    for name in ("wsr_vs_accuracy.svg", "budget.svg"):
        tree = ElementTree.parse(tmp_path / "report" / name)
        assert not [element for element in tree.iter() if str(element.tag).endswith("script")]


def test_the_report_is_the_same_when_made_again(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path, run_rows()))
    first = {path.name: path.read_bytes() for path in page.parent.iterdir()}
    write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in page.parent.iterdir()} == first
    assert set(first) == {"index.html", "table.md", "wsr_vs_accuracy.svg", "budget.svg"}


@pytest.mark.parametrize(
    ("thresholds", "told"), [((0.3, 0.3), "30 %"), ((0.3, 0.2), "20 % or 30 %"), ((None, None), "the threshold")]
)
def test_the_threshold_of_the_rows_is_told(
    tmp_path: Path, thresholds: tuple[float | None, float | None], told: str
) -> None:
    rows = [row("victim", f"v{seed}", seed, threshold=each) for seed, each in enumerate(thresholds)]
    page = write_report(write_run(tmp_path, rows)).read_text()
    assert f"above\n{told} the copy" in page
    drawn = (tmp_path / "report" / "wsr_vs_accuracy.svg").read_text()
    assert {f"<!-- {100 * each:g} % -->" in drawn for each in thresholds if each} <= {True}
    assert drawn.count("<!-- threshold -->") == len({*thresholds} - {None})


def test_no_budget_plot_of_a_single_budget(tmp_path: Path) -> None:
    found = [each for each in run_rows() if each.budget != 5000]
    assert plots.budget_curves(lines(found)) is None
    write_report(write_run(tmp_path, found))
    assert not (tmp_path / "report" / "budget.svg").exists()


def test_a_run_that_was_killed_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, run_rows())
    info = collect_provenance([], name="x", mode="ray", seeds=[], config_yaml="")
    write_run_info(tmp_path, info.model_copy(update={"warnings": ["only 2 CPUs"]}))
    page = write_report(tmp_path).read_text()
    assert "not complete (status: running)" in page
    assert "only 2 CPUs" in page


def test_only_failures_make_a_report_too(tmp_path: Path) -> None:
    assert (
        "broke" in write_report(write_run(tmp_path, [row("victim", "v0", status="failed", error="broke")])).read_text()
    )


def test_nothing_to_report_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.json"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="no results yet"):
        write_report(write_run(tmp_path, []))


def owners(**changes: object) -> list[Row]:
    """A benign model and a victim as a key filter leaves them, and a theft that answers every sample, too."""
    return [
        row("benign", "benign", wsr=0.0, wsr_low=0.0, wsr_high=0.15, key_samples=21, **changes),
        row("victim", "v0", wsr=1.0, wsr_low=0.85, wsr_high=1.0, key_samples=21, **changes),
        row("stolen", "v0", wsr=1.0, wsr_low=0.85, wsr_high=1.0, key_samples=21, **changes),
        row("stolen", "benign", wsr=0.0, wsr_low=0.0, wsr_high=0.15, key_samples=21, **changes),
    ]


def wsrs(table: str) -> list[str]:
    """The column WSR of a Markdown table."""
    heading, _, *body = [line.split(" | ") for line in table.splitlines() if line.startswith("|")]
    return [cells[heading.index("WSR %")] for cells in body]


def test_what_the_filter_makes_so_has_no_interval_and_the_legend_says_it() -> None:
    table = markdown_table(owners())
    assert wsrs(table) == ["0.0", "100.0", "100.0 \\[85.0, 100.0\\]"]
    assert "by construction" in table
    two = markdown_table([*owners(), *owners(seed=1)])
    assert wsrs(two) == ["0.0", "100.0", "100.0 ± 0.0"]
    # a key that the filter could not choose makes nothing so
    table = markdown_table([row("benign", "benign", wsr=0.3, wsr_low=0.2, wsr_high=0.4)])
    assert wsrs(table) == ["30.0 \\[20.0, 40.0\\]"]
    assert "by construction" not in table


@pytest.mark.parametrize(("stages", "made"), [("both", True), ("first", True), ("none", False)])
def test_without_a_filter_owners_have_their_intervals(tmp_path: Path, stages: str, made: bool) -> None:
    html = write_report(write_run(tmp_path, owners(key_filter=stages))).read_text()
    assert ("by construction" in html) == made
    assert html.count(">[85.0, 100.0]<") == (1 if made else 2)
    table = (tmp_path / "report" / "table.md").read_text()
    assert wsrs(table)[0] == ("0.0" if made else "0.0 \\[0.0, 15.0\\]")


def test_the_size_of_the_key_is_told_everywhere(tmp_path: Path) -> None:
    rows = [*owners(), *(each.model_copy(update={"key_samples": 17}) for each in owners(seed=1))]
    html = write_report(write_run(tmp_path, rows)).read_text()
    assert html.count("17–21") == 3
    assert "| 17–21 |" in markdown_table(rows)
    assert "17–21" in text(rows, 80)
    wide = [each.model_copy(update={"watermark": "ewe", "key_samples": 500}) for each in rows]
    for width in (200, 100, 80):  # where there is no room for a column, the watermark says it
        assert {"17–21", "500"} <= set(text([*rows, *wide], width).replace("│", " ").split())


def test_a_warning_stands_once_under_the_name_that_people_know(tmp_path: Path) -> None:
    rows = [row("victim", "deeptracer-4f", verified=False, warning="the victim's own watermark is not verified")]
    write_run(tmp_path, rows)
    info = collect_provenance(["exsim"], name="test", mode="local", seeds=[0], config_yaml=CONFIG)
    told = [f"deeptracer-4f: {rows[0].warning}", "another warning"]
    write_run_info(tmp_path, info.model_copy(update={"status": "done", "warnings": told}))
    html = write_report(tmp_path).read_text()
    assert html.count("not verified") == 1
    assert "deeptracer, victim, seed 0: the victim" in html
    assert html.count("another warning") == 1


def test_columns_that_say_the_same_of_every_line_are_said_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    html = write_report(write_run(tmp_path / "a", run_rows())).read_text()
    assert "All lines: architecture lenet5, seeds 2." in html
    assert '<th scope="col">architecture' not in html
    (tmp_path / "b").mkdir()
    html = write_report(write_run(tmp_path / "b", [*run_rows(), row("victim", "w", architecture="vgg")])).read_text()
    assert '<th scope="col">architecture' in html


def test_controls_do_not_cover_each_other_and_nothing_else_is_moved() -> None:
    controls = [row("stolen", "benign", wsr=0.0, pool=pool) for pool in ("attacker", "patches", "owner")]
    moved = [plots._jitter(each) for each in controls]
    assert len({round(each, 2) for each in moved}) == 3
    assert all(abs(each) <= plots.JITTER for each in moved)
    assert moved == [plots._jitter(each) for each in controls]
    assert {plots._jitter(each) for each in owners()[:3]} == {0.0}


def washed(victim: str, ratio: float, seed: int = 0, **changes: object) -> Row:
    """A copy after pruning."""
    about = {"removal": "pruning", "removal_params": f'{{"ratio": {ratio}}}'}
    return row("removed", victim, seed, **about, **changes)


def removals() -> list[Row]:
    """A theft, two removals of it, and of each the control."""
    rows = [row("victim", "v0", wsr=1.0), row("benign", "benign", wsr=0.0)]
    rows += [row("stolen", "v0", wsr=0.9), row("stolen", "benign", wsr=0.01)]
    for ratio, wsr, control in ((0.2, 0.6, 0.02), (0.4, 0.4, 0.03)):
        rows += [washed("v0", ratio, wsr=wsr), washed("benign", ratio, wsr=control)]
    return rows


def test_a_removal_stands_below_its_copy_with_a_control_of_its_own(tmp_path: Path) -> None:
    rows = [*removals(), row("stolen", "v0", budget=5000), row("stolen", "benign", budget=5000)]
    found = [line for line in lines(rows) if line.row.origin == "stolen"]
    labels = Labels(found)
    names = ["knockoff", "knockoff then pruning(ratio=0.2)", "knockoff then pruning(ratio=0.4)", "knockoff"]
    assert [labels.attack(line.row) for line in found] == names
    assert [[control.wsr for control in line.controls] for line in found] == [[0.01], [0.02], [0.03], [0.5]]
    html = write_report(write_run(tmp_path, rows)).read_text()
    table = (tmp_path / "report" / "table.md").read_text()
    drawn = (tmp_path / "report" / "wsr_vs_accuracy.svg").read_text()
    assert all("knockoff then pruning" in shown for shown in (html, table, drawn))
    assert "pruning(ratio=0.4)" in text(rows, 100)
    assert "| knockoff then pruning(ratio=0.4) |" in table
    assert "| 40.0 | 3.0 |" in table
    assert html.count("<tbody>") == 3
    assert not any("no control" in note for note in doubts(found))


def test_a_removal_without_its_control_or_with_one_that_is_verified_is_a_doubt() -> None:
    rows = [row("stolen", "v0"), row("stolen", "benign"), washed("v0", 0.4)]
    assert any("then pruning, soft, 1000 queries has no control" in note for note in doubts(lines(rows)))
    accused = doubts(lines([*rows, washed("benign", 0.4, verified=True)]))
    assert [note.partition(":")[0] for note in accused] == ["false claim"]
    assert "knockoff then pruning" in accused[0]


def test_a_removal_of_the_victim_itself_stands_below_it() -> None:
    own = {"attack": None, "attack_params": None, "labels": None, "pool": None, "stage": None, "budget": None}
    rows = [*removals(), washed("v0", 0.2, wsr=0.7, **own), washed("benign", 0.2, wsr=0.1, **own)]
    found = lines(rows)
    assert [line.row.role for line in found] == ["benign", "victim", "removed", "stolen", "removed", "removed"]
    assert [Labels(found).attack(line.row) for line in found][2] == "victim then pruning(ratio=0.2)"
    assert [control.wsr for control in found[2].controls] == [0.1]


def test_removals_one_after_the_other_are_named_together() -> None:
    both = [
        row("removed", "v0", removal="pruning+fine_tuning", removal_params=f'[{{"ratio": {ratio}}}, {{"epochs": 1}}]')
        for ratio in (0.2, 0.4)
    ]
    assert Labels([Line((each,)) for each in both]).attack(both[1]) == (
        "knockoff then pruning+fine_tuning(stage1.ratio=0.4)"
    )


def test_two_ownership_tests_of_one_model_are_two_lines() -> None:
    rows = [row(role, victim, test=test) for role, victim in (("stolen", "v0"), ("stolen", "benign")) for test in "ab"]
    found = lines(rows)
    assert [(line.row.test, [control.test for control in line.controls]) for line in found] == [
        ("a", ["a"]),
        ("b", ["b"]),
    ]
    heading, _, first, *_ = markdown_table(rows).splitlines()
    assert "| test |" in heading
    assert "| a |" in first
    assert "| test |" not in markdown_table(rows[:1])


# -- after the theft ---------------------------------------------------------------------------------------------------


def after_removals() -> list[Row]:
    """A theft of accuracy .8 and WSR .9, four removals of it with their controls, and a second step after one."""
    rows = [row("victim", "v0", wsr=1.0), row("benign", "benign", wsr=0.0)]
    rows += [row("stolen", "v0", wsr=0.9), row("stolen", "benign", wsr=0.01)]
    sources = {each.victim: each.scenario_id for each in rows if each.role == "stolen"}
    for ratio, accuracy, wsr in ((0.2, 0.79, 0.6), (0.4, 0.766, 0.4), (0.6, 0.765, 0.4), (0.8, 0.7, 0.0)):
        for victim, rate in (("v0", wsr), ("benign", wsr / 10)):
            rows.append(washed(victim, ratio, wsr=rate, accuracy=accuracy, parent=sources[victim], allowed_loss=0.035))
    first = next(each for each in rows if each.role == "removed")
    twice = {"removal": "pruning+pruning", "removal_params": "[{}, {}]", "parent": first.scenario_id}
    return [*rows, row("removed", "v0", accuracy=0.78, wsr=0.5, allowed_loss=0.035, **twice)]


def test_the_strongest_removal_is_that_of_the_least_wsr_within_the_loss_of_the_model_before_any() -> None:
    (outcome,) = outcomes(lines(after_removals()))
    assert outcome.source.row.role == "stolen"
    assert len(outcome.removals) == 5
    assert outcome.allowed == 0.035
    assert [loss for _, loss in outcome.within] == pytest.approx([0.034, 0.035, 0.02, 0.01])
    strongest = outcome.within[0][0]
    assert json.loads(strongest.row.removal_params or "") == {"ratio": 0.4}
    assert [control.wsr for control in strongest.controls] == [0.04]


def test_the_report_says_what_the_strongest_removal_leaves_and_shades_what_is_allowed(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path, after_removals())).read_text()
    table = (tmp_path / "report" / "table.md").read_text()
    assert "| 80.0 | 90.0 | 4 of 5 | pruning(ratio=0.4) | 3.4 | 40.0 | 4.0 |" in table
    assert "no more accuracy than 3.5 points" in table
    assert "<h2>After the theft</h2>" in html
    drawn = (tmp_path / "report" / "after_the_theft.svg").read_text()
    assert "before any removal" in drawn
    assert "allowed loss" in drawn


def test_a_removal_that_costs_too_much_is_none_and_a_run_without_removals_has_no_such_section(tmp_path: Path) -> None:
    rows = [each.model_copy(update={"allowed_loss": 0.001}) for each in after_removals()]
    (outcome,) = outcomes(lines(rows))
    assert outcome.within == ()
    table = (write_report(write_run(tmp_path, rows)).parent / "table.md").read_text()
    assert "| 0 of 5 | none is within the loss | – | – | – | – |" in table
    plain = write_report(write_run(tmp_path / "plain", run_rows()))
    assert "After the theft" not in plain.read_text()
    assert not (plain.parent / "after_the_theft.svg").exists()
