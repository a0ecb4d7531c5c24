"""What a method needs to be tried out on a tiny model, and its formula, written down from its paper."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import plain_loop
import torch


@dataclass
class Generated:
    """What is known of all rollouts that are trained on together."""

    num_generations: int
    rewards: list[float]
    has_context: list[bool]

    def success_rate(self, index: int) -> float:
        """Of the group of a rollout."""
        start = index - index % self.num_generations
        return sum(self.rewards[start : start + self.num_generations]) / self.num_generations


@dataclass
class Seen:
    """What a formula may read of a rollout of T tokens. Distributions are of shape (T, V), in float64."""

    token_ids: torch.Tensor  # (T, 1)
    is_right: bool
    advantage: float  # GRPO's
    ratio: torch.Tensor  # of the student's probability of each token to what it was when it was sampled
    student: torch.Tensor  # when it was sampled
    teacher: torch.Tensor | None  # at that time too; none without a context
    contrasts: list[torch.Tensor]  # the teacher's, after other prompts
    without: torch.Tensor  # the teacher's, after the student's prompt
    student_now: torch.Tensor  # in the loss
    batch: "list[Seen]"  # all rollouts that are trained on together, this one among them
    index: int  # among all rollouts
    all: Generated

    @property
    def delta(self) -> torch.Tensor:
        """log p_T − log p_S of the tokens."""
        log_p_s, log_p_t = (p.gather(1, self.token_ids)[:, 0].log() for p in (self.student, self.teacher))
        return log_p_t - log_p_s


def nothing(seen: Seen) -> dict[str, list]:
    return {}


def right_ones(seen: Seen) -> dict[str, list]:
    return {"selected": [int(seen.is_right)] * len(seen.token_ids)}


def at_most_twice(seen: Seen) -> dict[str, list]:
    return {"divergence_weights": seen.ratio.clamp(max=2.0).tolist()}


def after_three(seen: Seen) -> dict[str, list]:
    return {"selected": [int(t >= 3) for t in range(len(seen.token_ids))], **at_most_twice(seen)}


def in_the_sweet_spot(seen: Seen) -> dict[str, list]:
    weights = [(rate * (1 - rate)) ** 0.5 for rate in map(seen.all.success_rate, range(len(seen.all.rewards)))]
    counted = [weight for weight in weights if weight > 0]
    weight = weights[seen.index] / (sum(counted) / len(counted))
    return {"divergence_weights": (weight * seen.ratio.clamp(max=2.0)).tolist()}


def parted(seen: Seen) -> dict[str, Any]:
    """Wrong ones are distilled; of the right ones, those of hard prompts are left out, and those of easy ones half."""
    rate = seen.all.success_rate(seen.index)
    factor = (0.0 if rate < 0.3 else 0.5 if rate > 0.45 else 1.0) * seen.is_right
    return {"advantage": factor * seen.advantage, **at_most_twice(seen)}


def softly_parted(seen: Seen) -> dict[str, Any]:
    """In a first batch: of 4 rollouts, the estimate is c·(s + 1)/6 + (1 − c)/2 with c = 4/12."""
    rate = (4 * seen.all.success_rate(seen.index) + 1) / 6 / 3 + 1 / 3
    hard, easy = (1 / (1 + math.exp(-distance / 0.08)) for distance in (0.3 - rate, rate - 0.7))
    shares = [hard, (1 - hard) * (1 - easy), easy]
    hard, medium, easy = (share / sum(shares) for share in shares)
    size = len(seen.token_ids)
    if seen.teacher is None:
        return {"advantage": seen.advantage, "selected": [0] * size}
    if not seen.is_right:
        weight = (hard + 0.35 * easy) * seen.ratio.clamp(max=2.0)
        return {"advantage": 0.0, "divergence_weights": weight.tolist()}
    factor = seen.advantage * (0.3 * hard + medium + 0.05 * easy)
    surer = (-seen.delta - 0.01).clamp(min=0).exp().clamp(max=2.0) - 1
    return {"advantage": (factor * (1 + medium * surer)).tolist(), "selected": [0] * size}


def around_the_mean(seen: Seen) -> dict[str, Any]:
    return {"advantage": seen.all.rewards[seen.index] - seen.all.success_rate(seen.index)}


def guided_by_a_plan(seen: Seen) -> dict[str, Any]:
    """The teacher reads nothing but references, which are in groups of which nothing is right."""
    if seen.teacher is None:
        return {"selected": [0] * len(seen.token_ids)}
    p_s, p_t = (p.gather(1, seen.token_ids)[:, 0] for p in (seen.student, seen.teacher))
    return {"likelihood_weights": (p_s * p_t).sqrt().tolist(), "advantage": 0.0}


def undecided(seen: Seen) -> dict[str, list]:
    """4p(1 − p) in the first three tokens; the mean is one over prompts."""
    rate, number = seen.all.success_rate(seen.index), len(seen.token_ids)
    num_prompts = len(seen.all.rewards) / seen.all.num_generations
    weight = 4 * rate * (1 - rate) * sum(seen.all.has_context) / num_prompts
    return {"divergence_weights": [weight] * number, "selected": [int(t < 3) for t in range(number)]} | {
        "advantage": seen.advantage
    }


def mixed(seen: Seen, direction: float, clip: float) -> list[float]:
    """A·[(1 − λ) + λ·clip((p_T / p_S)^(± sign A), 1 ± ε)] with λ = 0.5."""
    sign = 1.0 if seen.advantage > 0 else -1.0
    factor = (direction * sign * seen.delta).exp().clamp(1 - clip, 1 + clip)
    return (seen.advantage * (0.5 + 0.5 * factor)).tolist()


def with_the_teacher(seen: Seen) -> dict[str, Any]:
    return {"advantage": seen.advantage if seen.teacher is None else mixed(seen, 1.0, 0.2)}


def against_the_teacher(seen: Seen) -> dict[str, Any]:
    return {"advantage": mixed(seen, -1.0, 0.5) if seen.is_right and seen.teacher is not None else seen.advantage}


def contrasted(seen: Seen) -> dict[str, Any]:
    if not seen.contrasts:
        return {"advantage": seen.advantage}
    right, wrong = (p.gather(1, seen.token_ids)[:, 0] for p in (seen.teacher, torch.stack(seen.contrasts).mean(0)))
    pull = 0.5 * torch.tanh((right / wrong).log() / 0.02)
    pulled = seen.advantage + pull
    pulled = pulled.clamp(min=0) if seen.advantage >= 0 else pulled.clamp(max=0)
    marked = pull.abs() > 0.02
    # Of each set the mean, which the loss takes over all tokens
    share = len(pull) * torch.where(marked, 1 / marked.sum(), 1 / (~marked).sum())
    return {"advantage": (share * torch.where(marked, pulled, seen.advantage)).tolist()}


def purified(seen: Seen) -> dict[str, Any]:
    [alone] = seen.contrasts
    gain = (seen.teacher / alone).log()
    gain = gain - gain.mean(dim=1, keepdim=True)
    target = seen.without * (10 * torch.tanh(gain / 10)).exp()
    return {"target": target / target.sum(dim=1, keepdim=True)}


def decisive(row, rollout):
    """Of right completions the first three characters, of wrong ones the second; the rest cannot be used."""
    if not rollout.correct:
        return '[{"start": 1, "end": 2, "type": "sign_error"}, {"start": 1, "end": 99, "type": "sign_error"}]'
    return [{"start": 0, "end": min(3, len(rollout.text)), "type": "key_formula"}]


def routed(seen: Seen) -> dict[str, Any]:
    """In the first step, with half of a rollout's tokens at most in spans, and a quarter of all rollouts right."""
    size = len(seen.token_ids)
    num_marked = min(size // 2, 3 if size > 3 else size - 1)
    key = [int(seen.is_right and t < num_marked) for t in range(size)]
    error = [int(not seen.is_right and t == 1 and size > 2) for t in range(size)]
    return {
        "advantage": [seen.advantage * (1 - k - e) for k, e in zip(key, error, strict=True)],
        "selected": key,
        "divergence_weights": [num_marked / size * 0.25] * size,
    }


def routed_to_errors(seen: Seen) -> dict[str, Any]:
    """The same where wrong ones are pulled at, whose only marked token is the second, if they have three."""
    errors = [known and reward == 0.0 for known, reward in zip(seen.all.has_context, seen.all.rewards, strict=True)]
    size, weight = len(seen.token_ids), sum(errors) / len(errors)
    return {
        "advantage": routed(seen)["advantage"],
        "selected": [int(not seen.is_right and t == 1 and size > 2) for t in range(size)],
        "divergence_weights": [weight / size] * size,
    }


def routed_to_both(seen: Seen) -> dict[str, Any]:
    """Each rollout with a span has one divergence, by whether it is right."""
    one = routed(seen) if seen.is_right else routed_to_errors(seen)
    share = sum(seen.all.has_context) / len(seen.all.has_context) / len(seen.token_ids)
    weights = {"divergence_weights": [sum(one["selected"]) * share] * len(seen.token_ids)}
    return one | weights | {"objective": {"divergence": "forward_kl" if seen.is_right else "reverse_kl"}}


def by_success(seen: Seen) -> dict[str, Any]:
    """1 − s where it is right, s where it is wrong, with a mean of 1 over all."""
    right = [reward == 1.0 for reward in seen.all.rewards]
    rate = min(max(sum(right) / len(right), 1 / len(right)), 1 - 1 / len(right))
    weights = [1 - rate if is_right else rate for is_right in right]
    weight = weights[seen.index] / (sum(weights) / len(weights))
    return {"divergence_weights": [weight] * len(seen.token_ids)}


def entropies(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.log()).sum(dim=1)


def by_entropy(seen: Seen) -> dict[str, Any]:
    entropy, scaled = entropies(seen.student), seen.delta / (seen.delta.abs().quantile(0.5) + 1e-3)
    deviation = (entropy - entropy.mean()).abs().mean() + 1e-3
    weight = torch.tanh((entropy.quantile(0.2) - entropy) / deviation) * torch.sigmoid(scaled.abs() - 1)
    return {"advantage": (seen.advantage + 0.1 * weight * scaled).tolist()}


def away_from_the_teacher(seen: Seen) -> dict[str, Any]:
    if seen.teacher is None:
        return {"advantage": seen.advantage}
    phi = 0.5 * ((1 + seen.delta.exp()).log() - torch.log(torch.tensor(2.0)))
    return {"advantage": (seen.advantage - 0.5 * phi).tolist()}


def gated(seen: Seen, lookahead: int) -> dict[str, Any]:
    """In a batch of the warm-up."""
    length = len(seen.token_ids)
    advantage = seen.is_right * (1 + 0.5 * (1 - length / 8)) - 0.5
    ratio = (seen.delta if advantage > 0 else -seen.delta).exp().clamp(0.8, 1.2)
    largest = max(1.0, *(entropies(one.teacher).max().item() for one in seen.batch))
    entropy = entropies(seen.teacher)
    least = torch.stack([entropy[t : t + 1 + lookahead].min() for t in range(length)])
    return {"advantage": (advantage * ratio * (1 - 0.3 * least / largest).clamp(min=0.1)).tolist()}


def by_both_perspectives(seen: Seen) -> dict[str, Any]:
    """At a K of 8."""
    top = seen.teacher.topk(8).values
    certainty = 1 - entropies(top / top.sum(dim=1, keepdim=True)) / math.log(8)
    weights = certainty * (1 - seen.student_now.gather(1, seen.teacher.argmax(dim=1, keepdim=True))[:, 0])
    return {"divergence_weights": (weights * len(weights) / weights.sum()).tolist()}


def where_above_the_mean(seen: Seen) -> dict[str, Any]:
    return {"divergence_weights": [float(seen.advantage > 0)] * len(seen.token_ids)}


def held_by_gold(seen: Seen) -> dict[str, Any]:
    is_gold = seen.index % 4 == 3
    return {"advantage": 0.0 if is_gold else seen.delta.tolist(), "selected": [int(is_gold)] * len(seen.token_ids)}


def with_a_baseline(seen: Seen) -> dict[str, Any]:
    inside = plain_loop.top_k_mask(seen.student, 20)
    q_s, q_t = (plain_loop.reduced(p, inside, "renormalize") for p in (seen.student, seen.teacher))
    baseline = (q_s * plain_loop.log_ratio(q_s, q_t)).sum(dim=1)
    return {"advantage": (seen.delta + baseline).tolist()}


def better_than_before(seen: Seen) -> dict[str, Any]:
    """DPO with β = 0.1, whose mean over pairs is a mean over twice as many rows."""
    [position] = [position for position, one in enumerate(seen.batch) if one is seen]
    worse, better = (-one.delta.sum() for one in seen.batch[position - position % 2 :][:2])
    slope = 2 * 0.1 / (1 + (0.1 * (better - worse)).exp())
    sign = 1.0 if position % 2 else -1.0
    return {"likelihood_weights": [sign * slope.item()] * len(seen.token_ids)}


def ten_times_what_the_teacher_wrote(seen: Seen) -> dict[str, Any]:
    [position] = [position for position, one in enumerate(seen.batch) if one is seen]
    if position % 2 == 0:
        return {}
    return {
        "divergence_weights": [10.0] * len(seen.token_ids),
        "objective": {"divergence": "forward_kl", "support": "teacher_top_k"},
    }


def told_apart_with_the_context(seen: Seen) -> dict[str, Any]:
    """BCO with β = 0.1 in a first batch, of rows that are counted together."""
    if seen.teacher is None:
        return {"selected": [0] * len(seen.token_ids)}
    both = [
        [0.1 * one.delta.sum() for one in seen.batch if one.teacher is not None and one.is_right == kind]
        for kind in (True, False)
    ]
    right, wrong = map(torch.stack, both)
    middle = (right.mean() + wrong.mean()) / 2
    sign, number = (1.0, len(right)) if seen.is_right else (-1.0, len(wrong))
    slope = sign * 0.1 / (1 + (sign * (0.1 * seen.delta.sum() - middle)).exp())
    weight = (slope * (len(right) + len(wrong)) / number).item()
    return {"likelihood_weights": [weight] * len(seen.token_ids), "reads_context": True}


def less_the_mean_of_its_group(seen: Seen) -> dict[str, Any]:
    [position] = [position for position, one in enumerate(seen.batch) if one is seen]
    group = seen.batch[position - position % 4 :][:4]
    return {"advantage": seen.is_right - sum(one.is_right for one in group) / 4}


@dataclass(frozen=True)
class StandIn:
    """
    The settings of a method's loss, what its formula makes of a rollout (streams of a row of the plain loop), settings
    that make it small, whether it needs a reward, whether its teacher is the policy itself, and metrics that it logs.
    """

    loss: plain_loop.Method
    formula: Callable[[Seen], Mapping[str, Any]] = nothing
    settings: Mapping[str, Any] = field(default_factory=dict)
    has_reward: bool = False
    has_live_teacher: bool = False
    metrics: tuple[str, ...] = ("distillation_loss", "divergence_row_rate", "teacher_entropy")


GROUPS = {"num_generations": 4}
# GRPO's loss, and what the scores that shape its advantages say
SHAPED = ("distillation_loss", "teacher_entropy", "clip_ratio/region_mean")
GRPO = {"divergence_coef": 0.0, "policy_loss_coef": 1.0, "loss_type": "dapo"}

STAND_INS = {
    "opsd": StandIn(plain_loop.Method("forward_kl", clip=0.05, temperature=1.1)),
    "purified_opsd": StandIn(plain_loop.Method("jsd", temperature=1.1), purified),
    "opsdc": StandIn(plain_loop.Method("reverse_kl")),
    "pbsd": StandIn(
        plain_loop.Method(divergence_coef=0.0, likelihood_coef=1.0, loss_type="luspo", temperature=1.1),
        better_than_before,
        metrics=("likelihood_row_rate", "preference/loss", "preference/pair_rate", "completions/off_policy_rate"),
    ),
    "brts": StandIn(
        plain_loop.Method("reverse_kl", support="student_top_k", top_k=16, loss_type="dapo"),
        ten_times_what_the_teacher_wrote,
        {"teacher": "initial", "privileged_context": "solution", "completions_kwargs": {"num_candidates": 2}},
        has_reward=True,
        metrics=("distillation_loss", "replaced_distillation_loss", "completions/tier_1_rate"),
    ),
    "vpd": StandIn(
        plain_loop.Method(divergence_coef=0.0, likelihood_coef=1.0, loss_type="luspo"),
        told_apart_with_the_context,
        {**GROUPS, "token_weights": {"trl_opsd.methods.vpd.EStep": {"every": 1}}},
        has_reward=True,
        has_live_teacher=True,
        metrics=("likelihood_row_rate", "e_step/rate", "e_step/skip_rate"),
    ),
    "atmanrl": StandIn(
        plain_loop.Method(divergence_coef=0.0, policy_loss_coef=1.0),
        less_the_mean_of_its_group,
        GROUPS,
        has_reward=True,
        metrics=("clip_ratio/region_mean",),
    ),
    "sdft": StandIn(plain_loop.Method("forward_kl"), after_three),
    "sdpo": StandIn(
        plain_loop.Method("jsd", support="student_top_k", top_k=100, loss_type="dapo"),
        at_most_twice,
        GROUPS,
        has_reward=True,
    ),
    "sc_sdpo": StandIn(
        plain_loop.Method("jsd", support="student_top_k", top_k=100, loss_type="dapo"),
        in_the_sweet_spot,
        GROUPS,
        has_reward=True,
    ),
    "ssopd": StandIn(
        plain_loop.Method("forward_kl", clip=0.05, temperature=1.2, divergence_coef=0.5, policy_loss_coef=1.0),
        undecided,
        {**GROUPS, "token_weights": {"keep_first": {"num_tokens": 3}, "trl_opsd.methods.ssopd.Undecided": {}}},
        has_reward=True,
        metrics=("distillation_loss", "divergence_row_rate", "groups/pair_rate", "clip_ratio/region_mean"),
    ),
    "u_opsd": StandIn(
        plain_loop.Method("forward_kl", temperature=1.1),
        settings={
            **GROUPS,
            "context_kwargs": {"answer_of": "methods.stand_ins.first_letter", "same_answer": "operator.eq"},
        },
        metrics=("distillation_loss", "divergence_row_rate", "votes/unanimous_rate", "votes/mean_share"),
    ),
    "drift": StandIn(
        plain_loop.Method("jsd", support="student_top_k", top_k=100, loss_type="dapo", policy_loss_coef=1.0),
        parted,
        {**GROUPS, "advantage_kwargs": {"hard": 0.3, "easy": 0.45}},
        has_reward=True,
        metrics=("distillation_loss", "divergence_row_rate", "difficulty/hard_rate", "buffer/read_rate"),
    ),
    "drift_code": StandIn(
        plain_loop.Method("jsd", support="student_top_k", top_k=100, loss_type="dapo", policy_loss_coef=1.0),
        softly_parted,
        # The teacher of a tiny model hardly differs from it
        {**GROUPS, "advantage_kwargs": {"margin": 0.01}},
        has_reward=True,
        metrics=("distillation_loss", "divergence_row_rate", "difficulty/hard_rate", "buffer/read_rate"),
    ),
    "cipo": StandIn(
        plain_loop.Method(divergence_coef=0.0, policy_loss_coef=1.0),
        around_the_mean,
        GROUPS,
        has_reward=True,
        metrics=("rewards/risk/mean", "corrections/rate", "corrections/ratio", "clip_ratio/region_mean"),
    ),
    "sort": StandIn(
        plain_loop.Method(**GRPO, epsilon_high=0.28, likelihood_coef=1.0),
        guided_by_a_plan,
        {**GROUPS, "max_completion_length": 40, "context_kwargs": {"max_new_tokens": 8}},
        has_reward=True,
        has_live_teacher=True,
        metrics=("likelihood_row_rate", "completions/failed_group_rate", "context_rate"),
    ),
    "mopd": StandIn(
        plain_loop.Method("jsd", support="student_top_k", top_k=100, loss_type="dapo"),
        at_most_twice,
        GROUPS,
        has_reward=True,
    ),
    "correct_only": StandIn(
        plain_loop.Method("reverse_kl"),
        right_ones,
        {"context_kwargs": {"max_new_tokens": 8}},
        has_reward=True,
    ),
    "rlsd": StandIn(
        plain_loop.Method(**GRPO, epsilon_high=0.28),
        with_the_teacher,
        GROUPS,
        has_reward=True,
        metrics=(*SHAPED, "teacher_ratio_clipped_rate", "schedules/advantage.mix"),
    ),
    "rlrt": StandIn(
        plain_loop.Method(**GRPO, epsilon_high=0.28),
        against_the_teacher,
        GROUPS,
        has_reward=True,
        has_live_teacher=True,
        metrics=(*SHAPED, "schedules/advantage.mix"),
    ),
    "rlcsd": StandIn(
        plain_loop.Method(**{**GRPO, "loss_type": "grpo"}),
        contrasted,
        GROUPS,
        has_reward=True,
        metrics=(*SHAPED, "contrast/marked_token_rate"),
    ),
    "trace": StandIn(
        plain_loop.Method(
            "forward_kl",
            support="teacher_top_k",
            top_k=100,
            clip=0.05,
            temperature=0.6,
            divergence_coef=0.5,
            policy_loss_coef=1.0,
            epsilon_high=0.28,
        ),
        routed,
        {**GROUPS, "context_kwargs": {"annotator": "methods.stand_ins.decisive", "most_of_it": 0.5}},
        has_reward=True,
        metrics=("distillation_loss", "spans/token_rate", "spans/dropped_rate", "clip_ratio/region_mean"),
    ),
    "resd": StandIn(
        plain_loop.Method(
            "reverse_kl", support="student_top_k", top_k=100, ratio_low=0.2, ratio_high=5.0, loss_type="luspo"
        ),
        by_success,
        {"context_kwargs": {"max_new_tokens": 8}},
        has_reward=True,
        metrics=("distillation_loss", "divergence_row_rate", "playbook/lessons"),
    ),
    "dasd": StandIn(
        plain_loop.Method(**GRPO),
        by_entropy,
        GROUPS,
        has_reward=True,
        has_live_teacher=True,
        metrics=(*SHAPED, "direction/pulled_token_rate"),
    ),
    "antisd": StandIn(
        plain_loop.Method(**GRPO),
        away_from_the_teacher,
        {**GROUPS, "schedules": None},
        has_reward=True,
        has_live_teacher=True,
        metrics=SHAPED,
    ),
    "antisd_code": StandIn(
        plain_loop.Method(**GRPO),
        settings={
            **GROUPS,
            "advantage_kwargs": {"warmup_steps": 1, "most_perplexity": 1e6},
        },  # GRPO in the first batch
        has_reward=True,
        has_live_teacher=True,
        metrics=(*SHAPED, "away/strength", "away/gate", "away/teacher_perplexity"),
    ),
    **{
        name: StandIn(
            plain_loop.Method(**GRPO, temperature=1.1),
            partial(gated, lookahead=lookahead),
            {"advantage_kwargs": {"lookahead": lookahead, "warmup_steps": 1}},
            has_reward=True,
            metrics=(*SHAPED, "entropy_gate", "teacher_ratio_clipped_rate"),
        )
        for name, lookahead in (("egrsd", 0), ("cl_egrsd", 3))
    },
    "msd": StandIn(
        plain_loop.Method("reverse_kl"),
        by_both_perspectives,
        {
            "context_kwargs": {"template": "{prompt} In English: {solution}"},
            "token_weights": {"trl_opsd.methods.msd.DualPerspective": {"top_k": 8}},
        },
    ),
    "sdpg": StandIn(
        plain_loop.Method("reverse_kl", **GRPO | {"divergence_coef": 0.5}, epsilon_high=0.28),
        where_above_the_mean,
        {**GROUPS, "divergence_coef": 0.5, "beta": 0.0, "warmup_steps": 0},  # no reference: it would be loaded
        has_reward=True,
        has_live_teacher=True,
        metrics=(*SHAPED, "divergence_row_rate", "positive_advantage_rate"),
    ),
    "rethinking_opd": StandIn(
        plain_loop.Method("reverse_kl", support="student_top_k", top_k=16, tail="renormalize", loss_type="dapo"),
        settings=GROUPS,
    ),
    "rethinking_opd_code": StandIn(
        plain_loop.Method("student_rewards", support="student_top_k", top_k=16, loss_type="dapo"), settings=GROUPS
    ),
    "stable_opd": StandIn(
        plain_loop.Method(divergence_coef=0.0, policy_loss_coef=1.0, likelihood_coef=0.1),
        held_by_gold,
        {"completions_kwargs": {"column": "answer"}, "beta": 0.0},  # no reference: it would be loaded
        metrics=(*SHAPED, "likelihood_loss", "rollouts/truncated_rate", "rollouts/repetition_rate"),
    ),
    "vopd": StandIn(plain_loop.Method(**GRPO), with_a_baseline, metrics=SHAPED),
    "star": StandIn(
        plain_loop.Method(divergence_coef=0.0, likelihood_coef=1.0),
        right_ones,
        has_reward=True,
        metrics=("likelihood_loss", "likelihood_row_rate", "completions/retry_rate"),
    ),
}

# What else a paper has under the name of a method: its name, and something behind a colon
VARIANTS = {
    "resd:paper": replace(
        STAND_INS["resd"],
        loss=replace(STAND_INS["resd"].loss, bounded="ratio"),
        settings={**STAND_INS["resd"].settings, "divergence_bounded": "ratio"},
    ),
    "trace:errors": replace(
        STAND_INS["trace"],
        loss=replace(STAND_INS["trace"].loss, divergence="reverse_kl"),
        formula=routed_to_errors,
        settings={
            **STAND_INS["trace"].settings,
            "divergence": "reverse_kl",
            "token_weights": {"trl_opsd.methods.trace.InSpans": {"kinds": ["error"]}},
        },
    ),
    "trace:both": replace(
        STAND_INS["trace"],
        formula=routed_to_both,
        settings={
            **STAND_INS["trace"].settings,
            "spans_divergence": {
                "error": {"divergence": "reverse_kl", "support": "teacher_top_k", "top_k": 100, "clip": 0.05}
            },
            "token_weights": {"trl_opsd.methods.trace.InSpans": {"kinds": ["key", "error"]}},
        },
    ),
}


def begins_with_r(completions, log_extra, **kwargs):
    texts = [completion[-1]["content"] for completion in completions]
    log_extra("feedback", [feedback_on(text) for text in texts])
    return [float(text.startswith("R")) for text in texts]


def first_letter(text: str) -> str:
    return text[0]


def feedback_on(text: str) -> str | None:
    """On wrong completions of more than two letters."""
    return f"It is not {text[1:]}." if text.startswith("W") and len(text) > 2 else None


class Sampler:
    """
    Made-up completions of two to eight tokens, the same whenever a prompt is answered. Those that are right begin with
    "R", others with "W". Of the rollouts of a prompt, two of four, one of four or none are right.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.patterns = ("RWRW", "WWRW", "WWWW")
        self.num_letters = lambda number: 5 * number % 7

    def pattern(self, prompt_ids: Sequence[int]) -> str:
        """Which of the rollouts of a prompt are right."""
        return self.patterns[sum(prompt_ids) % len(self.patterns)]

    def __call__(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        completions, answered = [], dict.fromkeys(map(tuple, prompt_ids), 0)
        for ids in map(tuple, prompt_ids):
            index, answered[ids] = answered[ids] % 4, answered[ids] + 1
            number = sum(ids) + index
            letters = "".join(chr(97 + (number + 7 * t * t) % 26) for t in range(self.num_letters(number)))
            text = self.pattern(ids)[index] + letters
            completions.append([*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id])
        return completions
