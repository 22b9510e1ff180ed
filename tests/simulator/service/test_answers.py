import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import shapiro
from torch import Tensor

from simulator.errors import InputError
from simulator.service.answers import answer_policy, check_labels, gives_labels, keeps_zeros, one_hot

ROWS = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("soft", ROWS.tolist()),
        ("hard", [[1, 0, 0, 0], [0, 0, 0, 1]]),
        ("top-1", [[1, 0, 0, 0], [0, 0, 0, 1]]),
        ("top-2", [[0.625, 0.375, 0, 0], [0, 0, 3 / 7, 4 / 7]]),
        ("top-4", ROWS.tolist()),
        ("top-99", ROWS.tolist()),
        ("round-2", ROWS.tolist()),
        ("round-1", [[0.5, 0.3, 0.2, 0], [0.1, 0.2, 0.3, 0.4]]),
    ],
)
def test_closed_forms(mode: str, expected: list[list[float]]) -> None:
    wanted = torch.tensor(expected, dtype=torch.float32)
    if mode == "round-1":  # 0.15 may round either way, and the row is scaled to sum to one
        answer = answer_policy(mode)(ROWS)
        low = torch.tensor([0.5, 0.3, 0.1, 0.0]) / 0.9
        assert any(torch.allclose(answer[0], row / row.sum()) for row in (wanted[0], low, torch.tensor([5.0, 3, 2, 1])))
        torch.testing.assert_close(answer[1], wanted[1])
    else:
        torch.testing.assert_close(answer_policy(mode)(ROWS), wanted)


def test_rows_that_round_to_nothing_become_the_label() -> None:
    rows = torch.full((1, 100), 0.009)
    rows[0, 7] = 1 - 0.009 * 99
    assert torch.equal(answer_policy("round-1")(torch.full((1, 100), 0.01)).sum(1), torch.ones(1))
    assert answer_policy("round-1")(rows).argmax(1).tolist() == [7]


@st.composite
def probabilities(draw: st.DrawFn) -> Tensor:
    """Softmax rows ``(B, K)`` without ties for the first place."""
    shape = (draw(st.integers(1, 5)), draw(st.integers(2, 12)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.1, 1.0, 10.0, 100.0]))
    logits += torch.nn.functional.one_hot(logits.argmax(1), shape[1]) * 0.1
    return logits.softmax(1)


SIMPLE = [
    "soft",
    "hard",
    "top-1",
    "top-2",
    "top-5",
    "round-1",
    "round-3",
    "round-9",
    "noise-0.1",
    "noise-3",
    "noise-999",
]
COMPOSED = ["top-3 then round-2", "round-1 then noise-1 then top-2", "noise-0.5 then hard", "noise-1 then noise-1"]
MODES = st.sampled_from([*SIMPLE, *COMPOSED])


@given(probabilities(), MODES)
def test_every_answer_is_a_float32_probability_row(rows: Tensor, mode: str) -> None:
    before = rows.clone()
    answers = answer_policy(mode)(rows)
    assert answers.dtype == torch.float32
    assert answers.shape == rows.shape
    assert (answers >= 0).all()
    torch.testing.assert_close(answers.sum(1), torch.ones(len(rows)), atol=1e-5, rtol=0)
    assert torch.equal(rows, before), "the victim's own rows stay as they are"


@given(probabilities(), st.sampled_from(["soft", "hard", "top-1", "top-2", "top-5"]))
def test_the_label_is_kept(rows: Tensor, mode: str) -> None:
    assert torch.equal(answer_policy(mode)(rows).argmax(1), rows.argmax(1))


@given(probabilities(), st.integers(1, 6))
def test_top_k_keeps_at_most_k_in_proportion(rows: Tensor, count: int) -> None:
    answers = answer_policy(f"top-{count}")(rows)
    kept = answers > 0
    assert (kept.sum(1) <= count).all()
    scaled = rows * kept
    torch.testing.assert_close(answers, scaled / scaled.sum(1, keepdim=True), atol=1e-6, rtol=1e-5)


def test_one_hot_takes_the_first_of_equals() -> None:
    assert one_hot(torch.tensor([[0.5, 0.5]])).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    "mode",
    [
        *["", "Soft", "top", "top-0", "top-", "top--1", "top-1.5", "round-0", "round-10", "soft\n", " hard", "logits"],
        # one number, one spelling: a mode is part of a scenario's id
        *[
            "noise",
            "noise-0",
            "noise-0.0",
            "noise-0.50",
            "noise-.5",
            "noise-01",
            "noise-1.0",
            "noise-1e3",
            "noise-1000",
        ],
        *[
            "noise--1",
            "noise-inf",
            "soft then hard",
            "top-3 then soft",
            "top-3 then",
            "top-3,round-2",
            "top-3 then  hard",
        ],
    ],
)
def test_other_modes_are_refused(mode: str) -> None:
    for function in (check_labels, answer_policy):
        with pytest.raises(InputError, match="is not one of soft, hard, top-K") as caught:
            function(mode)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("mode", ["hard then top-2", "top-3 then hard then noise-1", "hard then hard"])
def test_nothing_comes_after_hard(mode: str) -> None:
    with pytest.raises(InputError, match="'hard' leaves nothing for a later step"):
        check_labels(mode)


@pytest.mark.parametrize(
    ("mode", "labels", "zeros"),
    [
        ("soft", False, True),
        ("noise-1", False, True),
        ("hard", True, False),
        ("noise-1 then hard", True, False),
        ("top-3 then noise-1", False, False),
        ("round-2", False, False),
    ],
)
def test_what_attacks_may_conclude_from_a_mode(mode: str, labels: bool, zeros: bool) -> None:
    assert (gives_labels(mode), keeps_zeros(mode)) == (labels, zeros)


@given(probabilities(), st.lists(st.sampled_from(["top-2", "top-5", "round-1", "round-3"]), min_size=1, max_size=4))
def test_steps_are_taken_in_their_order(rows: Tensor, steps: list[str]) -> None:
    wanted = rows
    for step in steps:
        wanted = answer_policy(step)(wanted)
    assert torch.equal(answer_policy(" then ".join(steps))(rows), wanted)


NOISY = ["noise-1", "top-3 then noise-0.5", "noise-2 then round-2"]


@pytest.mark.parametrize("mode", NOISY)
def test_noise_is_a_function_of_the_query_and_the_mode(mode: str) -> None:
    rows = torch.full((50, 4), 0.25)
    answers = answer_policy(mode, "victim", "account", 3)(rows)
    state = torch.get_rng_state()
    torch.manual_seed(1)  # whatever else has been drawn meanwhile
    assert torch.equal(answer_policy(mode, "victim", "account", 3)(rows), answers)
    torch.set_rng_state(state)
    for other in (("victim", "account", 4), ("victim", "another", 3), ("other", "account", 3)):
        assert not torch.equal(answer_policy(mode, *other)(rows), answers)
    assert len(answers.unique(dim=0)) > 10, "every image of a query has noise of its own"
    # one policy may serve a query twice
    policy = answer_policy(mode, "victim", "account", 3)
    assert torch.equal(policy(rows), policy(rows))


@pytest.mark.parametrize("deviation", ["0.1", "1", "2.5"])
def test_noise_is_gaussian_on_the_logits(deviation: str) -> None:
    """``log p'_1 / p'_2`` is the victim's with noise of variance 2 S², whatever the rows are."""
    count = 20_000
    rows = ROWS[:1].expand(count, 4)
    answers = answer_policy(f"noise-{deviation}", "statistics")(rows).double()
    ratios = (answers[:, 0] / answers[:, 1]).log()
    wanted, deviations = math.log(0.5 / 0.3), 2**0.5 * float(deviation)
    assert abs(ratios.mean() - wanted) < 5 * deviations / count**0.5
    assert abs(ratios.std() / deviations - 1) < 5 / (2 * count) ** 0.5
    assert shapiro(ratios[:4000].numpy()).statistic > 0.998


def test_noise_leaves_zeros_and_one_hot_rows_alone() -> None:
    assert torch.equal(answer_policy("noise-5", 1)(torch.eye(4)), torch.eye(4))
    kept = answer_policy("top-2 then noise-5", 1)(ROWS)
    assert ((kept > 0) == (answer_policy("top-2")(ROWS) > 0)).all()


def test_averaging_paid_answers_averages_the_noise_down() -> None:
    """As the docstring warns: n keys, noise of S/√n."""
    logs = torch.stack([answer_policy("noise-1", key)(ROWS[:1].expand(500, 4)).log() for key in range(16)]).mean(0)
    assert (logs[:, 0] - logs[:, 1]).std() == pytest.approx(2**0.5 / 4, rel=0.2)
