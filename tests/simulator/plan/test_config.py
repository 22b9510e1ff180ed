import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simulator.attacks.knockoff import Knockoff
from simulator.data.dataset import DataConfig
from simulator.data.pool import PoolSpec
from simulator.errors import InputError
from simulator.plan.config import RunConfig, Then, check_config, read_config
from simulator.plan.settings_file import presets
from simulator.service.answers import check_labels

BASE = "name: test\ndataset: digits\nwatermarks: [deeptracer]\n"
#: a configuration with every key written out
RESOLVED: dict[str, Any] = read_config("digits").model_dump(mode="json")
WRITTEN = read_config("digits").to_yaml()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


def read_text(text: str, folder: Path, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(text)
    return read_config(str(path), overrides)


def one_line(error: InputError) -> bool:
    return len(str(error).splitlines()) == 1


# -- what is read ---------------------------------------------------------------------------------------------------


def test_every_preset_loads_and_says_what_it_is() -> None:
    assert "digits" in presets()
    for name, what in presets().items():
        assert read_config(name).name == name
        assert what
        assert "\n" not in what


@pytest.mark.parametrize("name", presets())
def test_a_preset_written_out_reads_back_equal(name: str, folder: Path) -> None:
    config = read_config(name)
    assert read_text(config.to_yaml(), folder) == config
    assert check_config(json.loads(config.to_json())) == config


def test_the_short_forms_stand_for_the_long_ones(folder: Path) -> None:
    short = read_text(BASE + "seeds: 3\nscenarios: [{attack: knockoff, pool: attacker, budget: 7}]", folder)
    assert short.seeds == (3,)
    assert short.dataset == DataConfig(name="digits")
    (entry,) = short.scenarios
    assert entry.attack == Knockoff()
    assert (entry.pool, entry.labels, entry.budget) == ((PoolSpec(parts={"attacker": 1.0}),), ("soft",), (7,))


def test_a_scenario_expands_to_all_combinations(folder: Path) -> None:
    text = (
        "scenarios: [{attack: knockoff, pool: [patches, owner], labels: [soft, hard, top-3], "
        "architecture: [null, alexnet], budget: [10, 20]}]"
    )
    (entry,) = read_text(BASE + text, folder).scenarios
    grid = entry.expand()
    assert len(grid) == len(set(grid)) == 2 * 3 * 2 * 2
    assert all(len(stages) == 1 for stages in grid)
    assert {stages[0].labels for stages in grid} == {"soft", "hard", "top-3"}


def test_stages_are_one_scenario_in_their_order(folder: Path) -> None:
    text = "scenarios: [{stages: [{attack: knockoff, budget: 9}, {attack: distillation, pool: owner}]}]"
    (entry,) = read_text(BASE + text, folder).scenarios
    ((first, second),) = entry.expand()
    assert (first.attack.name, first.budget, second.attack.name) == ("knockoff", 9, "distillation")


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-3", 1e-3), ("2E-3", 2e-3), ("+1e-3", 1e-3), (".5e0", 0.5), ("1.e-2", 1e-2), ("1.5e+1", 15.0), ("1", 1.0)],
)
def test_a_number_with_an_exponent_is_a_float(written: str, value: float, folder: Path) -> None:
    config = read_text(f"{BASE}training: {{learning_rate: {written}}}", folder)
    assert config.training.learning_rate == value
    assert type(config.training.learning_rate) is float


@pytest.mark.parametrize("name", ["1e5", "2026-01-31", "1.5", "17", "null", "true", "0x1F", "1_000"])
def test_a_name_that_looks_like_something_else_survives_writing_and_reading(name: str, folder: Path) -> None:
    config = read_config("digits").model_copy(update={"name": name})
    assert read_text(config.to_yaml(), folder) == config


def test_a_run_may_be_named_by_a_day(folder: Path) -> None:
    assert read_text(BASE.replace("test", "2026-01-31"), folder).name == "2026-01-31"


def test_anchors_and_merge_keys_work(folder: Path) -> None:
    text = "training: &a {epochs: 3}\nkey_filter: {training: {<<: *a, batch_size: 8}}"
    config = read_text(BASE + text, folder)
    assert (config.key_filter.training.epochs, config.key_filter.training.batch_size) == (3, 8)


@pytest.mark.parametrize("merge", [False, True], ids=["list", "merge keys"])
def test_aliases_may_not_stand_for_very_much(merge: bool, folder: Path) -> None:
    """Nine levels of nine: 387 million values, that nobody waits for."""
    first, rest = ("{k: v}", "{<<: [%s]}") if merge else ("[v, v]", "[%s]")
    levels = [f"a0: &a0 {first}"]
    levels += [f"a{n}: &a{n} {rest % ', '.join([f'*a{n - 1}'] * 9)}" for n in range(1, 10)]
    with pytest.raises(InputError, match=r"its aliases stand for [0-9,]+ characters .* allowed: 250,000") as caught:
        read_text("\n".join(levels), folder)
    assert one_line(caught.value)


def test_a_hundred_aliases_of_a_recipe_are_read(folder: Path) -> None:
    entries = ", ".join(["{attack: {name: knockoff, training: *a}}"] * 100)
    config = read_text(f"{BASE}training: &a {{epochs: 3}}\nscenarios: [{entries}]", folder)
    assert {entry.attack.params()["training"]["epochs"] for entry in config.scenarios if entry.attack} == {3}


# -- what a thief does after the theft ---------------------------------------------------------------------------------


def fractions(entry: Then) -> list[float]:
    return [removal.params()["fraction"] for removal in entry.removal]


def test_a_list_makes_siblings_and_a_nested_then_a_chain(folder: Path) -> None:
    text = """
scenarios:
  - attack: knockoff
    then:
      - removal: {name: pruning, fraction: [0.2, 0.4], scope: [global, layer]}
        pool: owner
        then: [{removal: pruning}]
      - removal: [pruning, {name: pruning, fraction: [0.1, 0.9]}]
"""
    (entry,) = read_text(BASE + text, folder).scenarios
    first, second = entry.then
    assert [(one.params()["fraction"], one.params()["scope"]) for one in first.removal] == [
        (0.2, "global"),
        (0.2, "layer"),
        (0.4, "global"),
        (0.4, "layer"),
    ]
    assert fractions(second) == [0.5, 0.1, 0.9]
    assert (first.pool, second.pool) == (PoolSpec(parts={"owner": 1.0}), PoolSpec(parts={"attacker": 1.0}))
    assert [fractions(each) for each in first.then] == [[0.5]]
    assert (second.then, len(entry.expand())) == ((), 1)


def test_a_scenario_of_stages_may_have_a_then_and_one_with_nothing_else_steals_nothing(folder: Path) -> None:
    text = "scenarios: [{stages: [{attack: knockoff}, {attack: knockoff}], then: [{removal: pruning}]}, "
    text += "{then: [{removal: pruning}]}]"
    staged, leaked = read_text(BASE + text, folder).scenarios
    assert (staged.leaked, leaked.leaked) == (False, True)
    assert (len(staged.expand()), leaked.expand()) == (1, [])


@pytest.mark.parametrize(
    "entry",
    [
        "{attack: knockoff, then: [{removal: pruning}]}",
        "{attack: knockoff, budget: [7, 9], then: [{removal: {name: pruning, fraction: [0.1, 0.2]}, pool: owner}]}",
        "{attack: knockoff, then: [{removal: pruning, then: [{removal: [pruning], then: [{removal: pruning}]}]}]}",
        "{stages: [{attack: knockoff}, {attack: knockoff}], then: [{removal: pruning}]}",
        "{then: [{removal: pruning, pool: {parts: owner, size: 9}}]}",
    ],
)
def test_what_follows_a_theft_written_out_reads_back_equal(entry: str, folder: Path) -> None:
    config = read_text(f"{BASE}scenarios: [{entry}]", folder)
    assert read_text(config.to_yaml(), folder) == config
    assert check_config(json.loads(config.to_json())) == config


def test_an_override_reaches_into_what_follows(folder: Path) -> None:
    text = BASE + "scenarios: [{attack: knockoff, then: [{removal: {name: pruning, fraction: 0.1}}]}]"
    config = read_text(text, folder, "scenarios.0.then.0.removal.fraction=[0.7, 0.8]")
    assert fractions(config.scenarios[0].then[0]) == [0.7, 0.8]


# -- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_reach_into_mappings_lists_and_bare_names(folder: Path) -> None:
    text = BASE.replace("[deeptracer]", "[{name: deeptracer}]") + "scenarios: [{attack: knockoff}]"
    config = read_text(
        text,
        folder,
        "seeds=[1, 2]",
        "watermarks.0.margin=2.5",
        "training.learning_rate=1e-4",
        "dataset.owner=800",
        "scenarios.0.attack.training={epochs: 2}",
        "scenarios.0.labels=[soft, hard]",
        "name=a=b".replace("=b", "-b"),
    )
    assert config.seeds == (1, 2)
    assert config.watermarks[0].params()["margin"] == 2.5
    assert config.training.learning_rate == 1e-4
    assert config.dataset == DataConfig(name="digits", owner=800)
    assert config.scenarios[0].attack is not None
    assert config.scenarios[0].attack.params()["training"]["epochs"] == 2
    assert config.scenarios[0].labels == ("soft", "hard")
    assert config.name == "a-b"


def test_an_override_changes_the_place_that_it_names_and_no_other_of_the_anchor() -> None:
    before, after = (
        json.loads(read_config("digits", changes).to_json()) for changes in ((), ["key_filter.training.batch_size=9"])
    )
    assert after["key_filter"]["training"]["batch_size"] == 9
    after["key_filter"]["training"]["batch_size"] = before["key_filter"]["training"]["batch_size"]
    assert after == before


def test_the_last_override_wins_and_the_preset_is_not_changed() -> None:
    assert read_config("digits", ["seeds=1", "seeds=2"]).seeds == (2,)
    assert read_config("digits").seeds == (0,)


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("seeds", "wanted key=value"),
        ("=3", "wanted key=value"),
        ("a\nb", "wanted key=value"),
        ("sedes=3", "sedes: no such setting; 'sedes' is not one of name, seeds, dataset"),
        ("sedes=3", "(did you mean 'seeds'?)"),
        ("trainig.epochs=3", "trainig: no such setting; 'trainig' is not one of name"),
        ("training.epoch=3", "training.epoch: no such setting; 'epoch' is not one of epochs, batch_size"),
        ("training.epoch=3", "(did you mean 'epochs'?)"),
        ("watermarks.0.marginn=3", "watermarks.0: deeptracer: marginn: no such setting; 'marginn' is not one of name"),
        ("watermarks.0.marginn=3", "(did you mean 'margin'?)"),
        ("key_filter.training.epoch=3", "key_filter.training.epoch: no such setting; 'epoch' is not one of epochs"),
        ("scenarios.0.lables=soft", "scenarios.0.lables: no such setting; 'lables' is not one of attack, pool, labels"),
        ("scenarios.3.stages.0.bugdet=3", "stages.0.bugdet: no such setting; 'bugdet' is not one of attack"),
        ("scenarios.0.attack.training.epoch=3", "training.epoch: no such setting; 'epoch' is not one of epochs"),
        ("key_filter.pool={parts: patches, szie: 3}", "no such setting; 'szie' is not one of parts, size, classes"),
        ("training.epochs=1" + "0" * 26, "training.epochs: 1" + "0" * 26 + " is too large; whole numbers must be"),
        ("key_filter.keep=9223372036854775808", "key_filter.keep: 9223372036854775808 is too large"),
        ("watermarks.0.candidates=100000000000000000000", "candidates: 100000000000000000000 is too large"),
        ("training.decay_at=[2, -1]", "training.decay_at: [2.0, -1.0] must be fractions of the epochs, above 0"),
        ("training.decay_at=[0.5, 0.5]", "training.decay_at: [0.5, 0.5] must be fractions"),
        ("training.decay_at=[0.0]", "training.decay_at: [0.0] must be fractions"),
        ("training.decay_at=[1.0]", "training.decay_at: [1.0] must be fractions"),
        ("training.decay_at=[0.6, 0.3]", "training.decay_at: [0.6, 0.3] must be fractions"),
        ("seeds=[1", "not YAML"),
        ("seeds=0x_", "not YAML"),
        ("watermarks.1.margin=2", "'1' is not a position in a list of 1"),
        ("watermarks.first.margin=2", "'first' is not a position"),
        ("watermarks.-1.margin=2", "'-1' is not a position"),
        ("watermarks." + "9" * 5000 + "=2", "is not a position"),
        ("watermarks.0.margin=big", "watermarks.0: deeptracer: margin: Input should be a valid number, found 'big'"),
        ("watermarks.0.margin.x=2", "margin"),
        ("controls.x.y=2", "controls"),
        ("name.first=x", "name: Input should be a valid string"),
        ("scenarios=3", "scenarios"),
        ("training.epochs=", "training.epochs: Input should be a valid integer, found None"),
    ],
)
def test_a_bad_override_is_one_line(override: str, fragment: str) -> None:
    with pytest.raises(InputError) as caught:
        read_config("digits", [override])
    assert fragment in str(caught.value)
    assert one_line(caught.value)


# -- what is refused ------------------------------------------------------------------------------------------------

BAD = [
    ("", "is empty; a configuration is a mapping of settings"),
    ("# nothing but a comment", "is empty"),
    ("[1, 2]", "a configuration is a mapping of settings, found list"),
    ("name: x", "dataset: Field required"),
    ("{name: x, dataset: digits}", "watermarks: Field required"),
    (BASE + "name: again", "key 'name' is given twice, again in line 4"),
    (BASE + "training: {epochs: 1, epochs: 2}", "key 'epochs' is given twice"),
    (BASE + "traning: {}", "traning: no such setting"),
    (BASE + "training: {epoch: 3}", "training.epoch: no such setting"),
    (BASE + "training: {epochs: 0}", "training.epochs: Input should be greater than or equal to 1, found 0"),
    (BASE + "training: {epochs: '3'}", "training.epochs: Input should be a valid integer, found '3'"),
    (BASE + "training: {epochs: 1.5}", "training.epochs: Input should be a valid integer"),
    (BASE + "training: {optimizer: adamw}", "found 'adamw'"),
    (BASE + "training: {learning_rate: 0}", "training.learning_rate: Input should be greater than 0"),
    (BASE + "training: {learning_rate: .nan}", "training.learning_rate: Input should be a finite number"),
    (BASE + "training: 5", "training: Input should be an object, found 5"),
    (BASE + "architecture: lenet", "architecture: 'lenet' is not one of linear, naivenet"),
    (BASE + "architecture: lenet", "(did you mean 'lenet5'?)"),
    (BASE + "device: tpu", "device: Input should be 'auto', 'cpu' or 'cuda', found 'tpu'"),
    (BASE + "seeds: []", "seeds: [] must be at least one, all different"),
    (BASE + "seeds: [1, 1]", "seeds: [1, 1] must be at least one, all different"),
    (BASE + "seeds: -1", "seeds.0: Input should be greater than or equal to 0, found -1"),
    (BASE + "seeds: 9223372036854775808", "seeds.0: Input should be less than 9223372036854775808"),
    (BASE + "accuracy_tolerance: 2", "accuracy_tolerance: Input should be less than or equal to 1"),
    (BASE + "verification: {threshold: 1}", "threshold 1.0 is not between 0 and 1"),
    (BASE + "resources: {attackers: many}", "resources.attackers"),
    (BASE + "resources: {attacker: 0}", "resources.attacker: Input should be greater than 0"),
    (BASE + "key_filter: {keep: 0}", "key_filter.keep"),
    (BASE + "key_filter: {pool: patchs}", "'patchs' is not one of attacker, owner, triggers, patches"),
    (BASE.replace("test", "a/b"), "name: String should match pattern"),
    (BASE.replace("test", "3"), "name: Input should be a valid string, found 3"),
    (BASE.replace("digits", "digit"), "'digit' is not one of"),
    (BASE.replace("digits", "{size: 8}"), "dataset.name: Field required"),
    (BASE.replace("digits", "{name: digits, size: 4}"), "dataset.size: Input should be greater than or equal to 8"),
    (BASE.replace("digits", "x" * 5000), "File name too long"),
    (BASE.replace("deeptracer", "deeptrace"), "'deeptrace' is not one of"),
    (BASE.replace("[deeptracer]", "deeptracer"), "watermarks: Input should be a valid array, found 'deeptracer'"),
    (BASE.replace("[deeptracer]", "[{name: deeptracer, margin: -1}]"), "watermarks.0: deeptracer: margin"),
    (BASE + "scenarios: {attack: knockoff}", "scenarios: Input should be a valid array"),
    (BASE + "scenarios: [{attack: knokoff}]", "(did you mean 'knockoff'?)"),
    (BASE + "scenarios: [{attack: {name: [knockoff]}}]", "scenarios.0.attack: ['knockoff'] is not one of"),
    (BASE + "scenarios: [{pool: patches}]", "scenarios.0: a scenario has either 'attack' or 'stages'"),
    (BASE + "scenarios: [{attack: knockoff, stages: []}]", "a scenario has either 'attack' or 'stages'"),
    (BASE + "scenarios: [{stages: [{attack: knockoff}]}]", "'stages' needs two entries or more"),
    (BASE + "scenarios: [{stages: [{attack: knockoff}, {attack: knockoff}], budget: 5}]", "no other key beside it"),
    (BASE + "scenarios: [{then: []}]", "scenarios.0: a scenario has either 'attack' or 'stages', or only 'then'"),
    (BASE + "scenarios: [{then: [{removal: pruning}], budget: 9}]", "has no other key than 'then'"),
    (BASE + "scenarios: [{then: [{}]}]", "scenarios.0.then.0: removal: an empty list removes nothing"),
    (BASE + "scenarios: [{then: [{removal: []}]}]", "removal: an empty list removes nothing"),
    (
        BASE + "scenarios: [{then: [{removal: {name: pruning, fraction: []}}]}]",
        "fraction: an empty list removes nothing",
    ),
    (BASE + "scenarios: [{then: [{removal: prunning}]}]", "'prunning' is not one of adaptive"),
    (
        BASE + "scenarios: [{then: [{removal: [pruning, prune]}]}]",
        "scenarios.0.then.0.removal.1: 'prune' is not one of",
    ),
    (BASE + "scenarios: [{then: [{removal: {name: [pruning]}}]}]", "['pruning'] is not one of"),
    (BASE + "scenarios: [{then: [{removal: {fraction: 1}}]}]", "is not a removal: give a name"),
    (BASE + "scenarios: [{then: [{removal: 5}]}]", "5 is not a removal: give a name"),
    (
        BASE + "scenarios: [{then: [{removal: {name: pruning, fraction: 1.5}}]}]",
        "pruning: fraction: Input should be less",
    ),
    (BASE + "scenarios: [{then: [{removal: {name: pruning, fraction: [0.5, -1]}}]}]", "removal.1: pruning: fraction"),
    (BASE + "scenarios: [{then: [{removal: {name: pruning, fraction: .nan}}]}]", "pruning: fraction: Input should be"),
    (
        BASE + "scenarios: [{then: [{removal: {name: pruning, scope: all}}]}]",
        "scope: Input should be 'global' or 'layer'",
    ),
    (
        BASE + "scenarios: [{then: [{removal: {name: pruning, ratio: 1}}]}]",
        "'ratio' is not one of name, fraction, scope",
    ),
    (
        BASE + "scenarios: [{then: [{removal: pruning, pol: owner}]}]",
        "pol: no such setting; 'pol' is not one of removal, evasion, pool",
    ),
    (BASE + "scenarios: [{then: [{removal: pruning, pool: atacker}]}]", "(did you mean 'attacker'?)"),
    (BASE + "scenarios: [{then: {removal: pruning}}]", "scenarios.0.then: Input should be a valid array"),
    (BASE + "scenarios: [{stages: [{attack: knockoff, then: []}]}]", "then: no such setting"),
    (
        BASE + "scenarios: [{then: [{removal: pruning, then: [{removal: [pruning, prune]}]}]}]",
        "then.0.then.0.removal.1: 'prune'",
    ),
    (BASE + "scenarios: [{attack: knockoff, budget: 0}]", "scenarios.0.budget.0"),
    (BASE + "scenarios: [{attack: knockoff, budget: []}]", "budget: an empty list runs nothing"),
    (BASE + "scenarios: [{attack: knockoff, budget: 9, curve: [9]}]", "scenarios.0: curve: [9] must ascend"),
    (BASE + "scenarios: [{attack: knockoff, curve: [3, 2]}]", "scenarios.0: curve: [3, 2] must ascend"),
    (BASE + "scenarios: [{attack: knockoff, budget: [50, 9], accounts: 10}]", "9 images are too few for 10 accounts"),
    (BASE + "scenarios: [{attack: knockoff, accounts: 10001, budget: 20000}]", "less than or equal to 10000"),
    (BASE + "scenarios: [{attack: knockoff, labels: top-0}]", "'top-0' is not one of soft, hard, top-K"),
    (BASE + "scenarios: [{attack: knockoff, pool: {patches: 0}}]", "weight of 'patches' is 0.0"),
    (BASE + "scenarios: [{attack: knockoff, pool: {patches: 1, parts: 2}}]", "pool"),
    (
        BASE + "scenarios: [{attack: knockoff, architecture: [null, resnet]}]",
        "scenarios.0.architecture.1: 'resnet' is not",
    ),
    (
        BASE + "scenarios: [{stages: [{attack: knockoff}, {attack: knockoff, architecture: a}]}]",
        "architecture: 'a' is not",
    ),
    (BASE + "key_filter: {architecture: alexnett}", "key_filter.architecture: 'alexnett' is not one of"),
    ("a: [1", "not YAML"),
    ("a: 0x_", "not YAML"),
    ("a: !!timestamp x", "not YAML"),
    ("a: !!map [1]", "not YAML"),
    ("a: " + "9" * 5000, "not YAML"),
    ("[" * 2000, "not YAML"),
    ("!!python/object/apply:os.getcwd []", "not YAML"),
    ("? [1, 2]\n: 3", "not YAML"),
    ("a: &a [*a]", "line 1: a list or mapping contains itself"),
    ("a: &a\n  b: [1, {c: *a}]", "contains itself"),
    ("a: !!set {x, y}", "not JSON serializable"),
    ('a: "\\ud800"', "Invalid JSON"),
    ("a: 1\n--- \nb: 2", "not YAML"),
    ("a: \x01", "not YAML"),
]


@pytest.mark.parametrize(("text", "fragment"), BAD, ids=[fragment[:40] for _, fragment in BAD])
def test_a_bad_file_is_refused_with_one_line_that_says_why(text: str, fragment: str, folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_text(text, folder)
    assert fragment in str(caught.value)
    assert str(caught.value).startswith(str(folder)), "the message begins with the file"
    assert one_line(caught.value)


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        ("digit", "(did you mean 'digits'?)"),
        ("nowhere.yaml", "nowhere.yaml: no such file"),
        ("no/where", "no/where: no such file"),
        ("no\nwhere.yaml", "no where.yaml: no such file"),
        ("/", "/: is a directory; wanted a YAML file"),
        ("simulator", "simulator is a directory; no preset or file of that name: 'simulator' is not one of"),
        ("x" * 5000, "no preset or file of that name"),
        ("\0", "no preset or file of that name"),
        ("", "no preset or file of that name"),
    ],
)
def test_a_source_that_is_not_there_is_refused(source: str, fragment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    with pytest.raises(InputError) as caught:
        read_config(source)
    assert fragment in str(caught.value)
    assert one_line(caught.value)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(InputError, match="cannot be read as text"):
        read_config(str(tmp_path / "run.yaml"))


def test_a_large_wrong_value_is_not_shown_whole(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_text(f"{BASE}training: [{'1, ' * 10_000}]", folder)
    assert str(caught.value).endswith("1, 1...")
    assert len(str(caught.value)) < 400


# -- fuzzing --------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(["digits", "knockoff", "soft", "top-3", "patches", "deeptracer", "alexnet", "auto", "name"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=8) | st.just("x" * 300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested mappings and lists, the outermost left out."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """The resolved digits preset with up to three changes anywhere."""
    data = copy.deepcopy(RESOLVED)
    for _ in range(draw(st.integers(1, 3))):
        *parents, key = draw(st.sampled_from(list(places(data)) or [("name",)]))
        place: Any = data
        for parent in parents:
            place = place[parent]
        change = draw(st.sampled_from(["replace", "replace", "drop", "add", "misspell"]))
        if change == "replace":
            place[key] = draw(JSON)
        elif change == "drop":
            place.pop(key, None) if isinstance(place, dict) else place.pop(key)
        elif isinstance(place, list):
            place.insert(key, draw(JSON))
        elif change == "add":
            place[draw(st.text(max_size=8))] = draw(JSON)
        else:
            spelt = list(key)
            spelt[draw(st.integers(0, len(spelt) - 1)) if spelt else 0 :] = draw(st.text(max_size=3))
            place["".join(spelt)] = place.pop(key)
    return data


def accepted(read: Callable[[], RunConfig]) -> RunConfig | None:
    """What was read, or None for a refusal, which must be one line and no other exception."""
    try:
        return read()
    except InputError as error:
        refusal = error
    assert one_line(refusal)
    return None


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_a_mutated_configuration_is_valid_or_refused_with_one_line(data: dict[str, Any]) -> None:
    config = accepted(lambda: check_config(data))
    if config is not None:
        assert check_config(json.loads(config.to_json())) == config


@settings(max_examples=30)
@given(
    start=st.integers(0, 1500),
    length=st.integers(0, 30),
    piece=st.text("-[]{}:,&*!|>'\"%@#?\n\t 01e.xa_=~<", max_size=8),
)
def test_a_damaged_yaml_file_is_valid_or_refused_with_one_line(
    start: int, length: int, piece: str, folder: Path
) -> None:
    config = accepted(lambda: read_text(WRITTEN[:start] + piece + WRITTEN[start + length :], folder))
    if config is not None:
        assert read_text(config.to_yaml(), folder) == config


@given(
    st.text(max_size=30) | st.builds(lambda path, value: f"{path}={value}", st.text(max_size=8), st.text(max_size=8))
)
def test_any_override_is_applied_or_refused_with_one_line(override: str) -> None:
    accepted(lambda: read_config("digits", [override]))


@given(
    st.from_regex(r"soft|hard|top-[1-9][0-9]{0,3}|round-[1-9]( then noise-[1-9]\.[1-9])?( then hard)?", fullmatch=True)
)
def test_every_answer_mode_is_accepted_as_it_is_written(mode: str) -> None:
    data = {**RESOLVED, "scenarios": [{"attack": "knockoff", "labels": mode}]}
    assert check_config(data).scenarios[0].labels == (check_labels(mode),)
