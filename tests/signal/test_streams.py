import json
from dataclasses import dataclass, field

import pytest
import three_tokens
import torch

from trl_opsd.signal import Advantage, Signals, TokenScores, TokenWeighting
from trl_opsd.signal.advantage import GroupAdvantage
from trl_opsd.signal.schedule import Hysteresis, Linear
from trl_opsd.signal.weighting import CorrectOnly, ImportanceClip, Replaced, SkipFirst


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]]).bool()  # of the last, a tool wrote the second token
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5])


def make_batch(correct=(True, False, True), has_context=(True, True, False)):
    return three_tokens.make_batch(MASK, correct=correct, has_context=has_context, advantages=ADVANTAGES)


def make_signals(advantage=None, schedules=None, policy=0.0, likelihood=0.0, **weightings):
    coefficients = {"divergence_coef": 1.0, "policy_loss_coef": policy, "likelihood_coef": likelihood}
    return Signals(coefficients, advantage or GroupAdvantage(), weightings, schedules or {})


class TokenWise(Advantage):
    """Whatever it is handed."""

    def __init__(self, values):
        self.values = values

    def __call__(self, batch, scores):
        return self.values


class Halves(TokenWeighting):
    def __call__(self, batch, scores):
        return torch.tensor([0.5, 1.0, 0.0, 1.0])


def test_without_parts_a_context_decides():
    streams = make_signals().streams(make_batch(), None)

    assert streams["advantages"].equal(ADVANTAGES)
    assert streams["divergence_mask"].tolist() == (MASK & torch.tensor([[True], [True], [False]])).tolist()
    assert streams["likelihood_mask"].tolist() == MASK.tolist()
    assert streams["divergence_weights"].tolist() == streams["divergence_mask"].float().tolist()


def test_what_is_selected_leaves_the_normaliser_and_what_is_weighted_does_not():
    signals = make_signals(correct_only=CorrectOnly(), skip_first=SkipFirst(2), mine=Halves())
    streams = signals.streams(make_batch(), None)

    assert streams["divergence_mask"].int().tolist() == [[0, 0, 1, 1], [0] * 4, [0] * 4]
    assert streams["divergence_weights"].tolist() == [[0, 0, 0, 1], [0] * 4, [0] * 4]
    assert streams["likelihood_mask"].int().tolist() == [[0, 0, 1, 1], [0] * 4, [0, 0, 1, 1]]


def test_weights_of_one_term_leave_the_other_alone():
    class OfGold(Halves):
        terms = ("likelihood",)

    class OfRollouts(SkipFirst):
        terms = ("divergence",)

    streams = make_signals(likelihood=1.0, first=OfRollouts(2), mine=OfGold()).streams(make_batch(), None)
    plain = make_signals().streams(make_batch(), None)
    assert streams["divergence_mask"][0].int().tolist() == [0, 0, 1, 1]
    assert streams["divergence_weights"].equal(streams["divergence_mask"].float())
    assert streams["likelihood_mask"].equal(plain["likelihood_mask"])
    assert streams["likelihood_weights"][0].tolist() == [0.5, 1.0, 0.0, 1.0]


def test_what_selects_may_weight_too():
    class Signed(Halves):
        selects = True
        terms = ("likelihood",)

        def __call__(self, batch, scores):
            return torch.tensor([[-2.0], [0.0], [0.5]])

    streams = make_signals(likelihood=1.0, mine=Signed()).streams(make_batch(), None)
    assert streams["likelihood_mask"].equal(MASK & torch.tensor([[True], [False], [True]]))
    assert streams["likelihood_weights"].equal(torch.tensor([[-2.0], [0.0], [0.5]]) * streams["likelihood_mask"])


def test_what_took_the_place_of_rollouts_is_weighed():
    batch = three_tokens.make_batch(MASK, replaced=[False, True, False])
    assert Replaced(10.0)(batch, None).tolist() == [[1.0], [10.0], [1.0]]
    for weight in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="`weight` must not be negative or infinite"):
            Replaced(weight)


def test_weights_of_a_term_that_is_off_are_not_asked():
    class Costly(Halves):
        terms = ("likelihood",)
        needs_scores = True

        def __call__(self, batch, scores):
            pytest.fail("asked")

    signals = make_signals(mine=Costly())
    signals.coefficients["likelihood_coef"] = 0.0
    assert not signals.needs_scores
    signals.streams(make_batch(), None)
    signals.coefficients["likelihood_coef"] = 1.0
    assert signals.needs_scores


class Counting(Advantage):
    """Counts the rows it has seen, and says what it is told to."""

    def __init__(self):
        self.seen = 0

    def __call__(self, batch, scores):
        self.seen += len(batch.gather(batch.rewards))
        batch.log("seen", torch.tensor(self.seen), torch.tensor(1))
        return batch.advantages * self.seen

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_part_with_a_memory_goes_on_from_it():
    first, second = (make_signals(Counting(), policy=1.0) for _ in range(2))
    first.streams(make_batch(), None)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.streams(make_batch(), None)["advantages"].equal(6 * ADVANTAGES)
    with pytest.raises(ValueError, match="`advantage` goes on as Counting, and is a Other in the checkpoint"):
        first.load_state_dict({"advantage": {"kind": "Other"}})


def test_a_schedule_of_a_part_leaves_its_memory():
    @dataclass
    class Scaled(Counting):
        factor: float = 1.0
        seen: int = field(default=0, init=False)

    signals = make_signals(Scaled(), {"advantage.factor": Linear(0.0, 1.0, 2)}, policy=1.0)
    for step in range(3):
        signals.begin_step(step)
        signals.streams(make_batch(), None)
    assert (signals.advantage.factor, signals.advantage.seen) == (1.0, 9)


def test_skipping_more_than_there_is_leaves_a_rollout_out():
    assert not make_signals(skip_first=SkipFirst(4)).streams(make_batch(), None)["divergence_mask"].any()


def test_advantages_of_tokens():
    values = torch.arange(12.0).view(3, 4)
    streams = make_signals(TokenWise(values), policy=1.0).streams(make_batch(), None)
    assert streams["advantages"].tolist() == (values * MASK).tolist()
    assert make_signals(policy=1.0).streams(make_batch(), None)["advantages"].equal(ADVANTAGES)
    # a part of a term that is off is not asked
    assert make_signals(TokenWise(None)).streams(make_batch(), None)["advantages"].equal(ADVANTAGES)


def test_numbers_outside_of_what_the_student_wrote_are_not_read():
    values = torch.ones(3, 4).masked_fill(~MASK, torch.nan)
    assert make_signals(TokenWise(values), policy=1.0).streams(make_batch(), None)["advantages"].isfinite().all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(2, 4), r"TokenWise has to return a tensor of shape \(3, 4\), got \(2, 4\)"),
        (torch.ones(3, 4, 1), r"TokenWise has to return a tensor of shape \(3, 4\), got \(3, 4, 1\)"),
        ([1.0], r"TokenWise has to return a tensor of shape \(3, 4\), got list"),
        (torch.tensor([[1.0], [torch.inf], [0.0]]), "TokenWise gave numbers that are not finite for 1 rollouts"),
    ],
)
def test_wrong_advantages_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        make_signals(TokenWise(values), policy=1.0).streams(make_batch(), None)


def test_scores_are_asked_for_by_what_reads_them_alone():
    assert not make_signals().needs_scores
    assert not make_signals(policy=1.0).needs_scores
    assert not make_signals(TokenWise(None)).needs_scores  # GRPO's term is off
    assert make_signals(TokenWise(None), policy=1.0).needs_scores


def test_metric_that_a_schedule_follows_is_measured_while_its_coefficient_is_zero():
    signals = make_signals(schedules={"divergence_coef": Hysteresis(1.0, warmup_steps=1)})
    signals.begin_step(0)
    assert signals.needs_scores
    signals.observe(1, {"teacher_entropy": 1.0})
    signals.begin_step(1)
    assert signals.coefficients["divergence_coef"] == 1.0
    assert not signals.needs_scores  # the loss says it
    other = make_signals(schedules={"divergence_coef": Hysteresis(1.0, metric="context_rate")})
    other.begin_step(0)
    assert not other.needs_scores


def test_state_of_another_kind_of_schedule_is_refused():
    theirs = make_signals(schedules={"likelihood_coef": Linear(0.0, 1.0, 4)}).state_dict()
    with pytest.raises(ValueError, match="`likelihood_coef` goes on as Hysteresis, and is a Linear in the"):
        make_signals(schedules={"likelihood_coef": Hysteresis(1.0)}).load_state_dict(theirs)
    make_signals(schedules={"policy_loss_coef": Hysteresis(1.0)}).load_state_dict(theirs)


def test_importance_clip():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0]])
    old = torch.tensor([[-1.5, -1.0, torch.nan]])
    weights = ImportanceClip(most=1.5)(log_probs, old)
    assert weights.tolist() == [[1.5, pytest.approx(0.367879, rel=1e-5), 1.0]]


def test_schedules_move_terms_and_parts():
    signals = make_signals(
        schedules={
            "likelihood_coef": Linear(0.0, 1.0, 4),
            "token_weights.importance_clip.most": Linear(2.0, 1.0, 2, delay=2),
        },
        importance_clip=ImportanceClip(),
    )
    found = []
    for step in range(6):
        signals.begin_step(step)
        found.append((signals.coefficients["likelihood_coef"], signals.policy_weightings[0].most))
    assert found == [(0.0, 2.0), (0.25, 2.0), (0.5, 2.0), (0.75, 1.5), (1.0, 1.0), (1.0, 1.0)]
    assert signals.has_term("likelihood_coef")
    assert not signals.has_term("policy_loss_coef")


@pytest.mark.parametrize("name", ["beta", "advantage.mix", "token_weights.importance_clip.least"])
def test_schedule_of_nothing_is_refused(name):
    with pytest.raises(
        ValueError, match=rf"`schedules` has '{name}', and there is no such coefficient: choose one of"
    ):
        make_signals(schedules={name: Linear(0.0, 1.0, 4)}, importance_clip=ImportanceClip())


def test_delta():
    nothing = torch.zeros(1, 1)
    scores = TokenScores(nothing.bool(), torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), nothing, nothing, nothing)
    assert scores.delta.item() == -2.0


def test_description():
    assert make_signals().description == "divergence"
    assert make_signals(policy=0.5, skip_first=SkipFirst()).description == (
        "divergence + 0.5 · GRPO's; tokens weighted by skip_first"
    )
    scheduled = make_signals(TokenWise(None), {"likelihood_coef": Linear(0.0, 1.0, 4)}, policy=1.0)
    scheduled.coefficients["divergence_coef"] = 0.0
    assert scheduled.description == (
        "GRPO's with TokenWise + (likelihood_coef, by schedule) · negative log-likelihood"
    )
