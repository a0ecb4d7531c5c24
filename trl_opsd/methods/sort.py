from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import dedent
from typing import Any, ClassVar

import torch

from ..context import Message, PlanContext, Rollouts
from ..sampling.sources import Completions, CompletionSource, Prompts, TokenIds
from ..signal import Advantage, Batch, TokenScores, TokenWeighting
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class SORTConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 8,
        "completions": "trl_opsd.methods.sort.ReferenceForFailure",
        "privileged_context": "trl_opsd.methods.sort.PlanOfReference",
        "teacher": "live",
        "divergence_coef": 0.0,
        "policy_loss_coef": 1.0,
        "likelihood_coef": 1.0,
        "advantage": "trl_opsd.methods.sort.OfOwnRollouts",
        "token_weights": {"trl_opsd.methods.sort.PlanGuided": {"plan_weight": 0.5}},
        "loss_type": "dapo",
        "epsilon_high": 0.28,
        "temperature": 1.0,
        "max_completion_length": 8192,
        "learning_rate": 1e-6,
    },
):
    r"""
    Train with rewards, and learn prompts that are never answered right from their reference.

    Defaults of SORT, from [Selective Off-Policy Reference Tuning with Plan
    Guidance](https://huggingface.co/papers/2605.11505). GRPO learns nothing from a group of which no rollout is right.
    There, one gives way to the reference y*, of which tokens count that follow from a plan:

    L = GRPO − mean over the tokens of references of ω_t·log p_S(y*_t | x, y*₍<t₎),

    with ω = p_S^½ · p_T^½, which has no gradient, p_T = p(· | x, plan, y*₍<t₎) by the current weights, and the plan
    what they make of the reference: its key steps. The teacher reads the plan, and the reference only as the tokens
    that it scores. It needs a reward and a `solution` column. See [`PlanGuided`].

    Deviations: the paper keeps such prompts in a buffer and takes an update of its own as soon as it is full (8 to 64
    of them), here the term is part of the same step, and its weight is `likelihood_coef`; one of the rollouts gives
    way, so that GRPO's rewards are logged with the reference's among them. A reference that is longer than a
    completion may be takes no place, and is counted. Chosen here: it takes that of the last rollout; the longest plan
    and the temperature it is sampled at. The wording of both prompts is this library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="SORT",
        paper="2605.11505",
        title="Selective Off-Policy Reference Tuning with Plan Guidance",
        citation=dedent("""\
            @article{le2026selective,
                title        = {{Selective Off-Policy Reference Tuning with Plan Guidance}},
                author       = {Duc Anh Le and Tien-Phat Nguyen and Thien Huu Nguyen and Linh Ngo Van and Trung Le},
                year         = 2026,
                eprint       = {arXiv:2605.11505},
            }"""),
        status="seen-paper",
    )


class ReferenceForFailure(CompletionSource):
    """
    The dataset's reference in the place of the last rollout of a prompt of which none is right. Where no reward
    function applies to any, they stay. Rewards are computed here, and once more for the whole batch as always.

    Args:
        column (`str`, *optional*, defaults to `"solution"`):
            Dataset column with the reference, text or messages.
    """

    needs_rewards = True
    description = "a prompt with none that is right gets its reference in the place of the last"

    def __init__(self, column: str = "solution"):
        self.columns = (column,)

    def __call__(self, prompts: Prompts) -> Completions:
        completions, size = prompts.rollouts(), len(prompts.rows)
        groups = prompts.group(prompts.grade(range(size), completions.ids))
        first = prompts.process_index * size
        last = [row for row, group in enumerate(groups) if (first + row + 1) % len(group) == 0]
        failed = [row for row in last if False in groups[row] and True not in groups[row]]
        references = {row: self._reference(prompts, row) for row in failed}
        for row, ids in references.items():
            if ids is not None:
                completions.replace(row, ids)
        completions.rates = {
            "completions/failed_group_rate": (len(failed), len(last)),
            "completions/unfit_reference_rate": (list(references.values()).count(None), len(failed)),
        }
        return completions

    def _reference(self, prompts: Prompts, row: int) -> TokenIds | None:
        try:
            return prompts.encode(prompts.rows[row][self.columns[0]])
        except ValueError:  # longer than a completion may be, or nothing
            return None


_KEY_STEPS = """{prompt}

This is a reference solution:

<<< reference solution >>>
{solution}
<<< end of reference solution >>>

Write down its key steps in order, as close to its own words as you can: the ideas that carry it, where it takes a \
wrong turn, and where it corrects itself. Leave out routine calculations and the final answer."""


class PlanOfReference(PlanContext):
    """
    The teacher of a reference that took a rollout's place reads the key steps that the current policy extracts from
    it. No other completion has a context.

    Args:
        column (`str`, *optional*, defaults to `"solution"`):
            Dataset column with the reference.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{plan}`, besides any dataset
            columns.
        sample_template (`str`, *optional*):
            Text of the last user turn that the policy answers, with the placeholder `{prompt}`, besides any dataset
            columns.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Most tokens of the plan.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature it is sampled at.
    """

    def __init__(
        self,
        column: str = "solution",
        template: str | None = None,
        sample_template: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
    ):
        asked = _KEY_STEPS.replace("{solution}", f"{{{column}}}") if sample_template is None else sample_template
        given = {} if template is None else {"template": template}
        super().__init__(
            column, sample_template=asked, max_new_tokens=max_new_tokens, temperature=temperature, **given
        )
        self.reads_rollouts = True

    def sample_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        if rollouts is not None and not rollouts.own.replaced:
            return None
        return self.question(row)


class OfOwnRollouts(Advantage):
    """A, and 0 in groups with a completion that is not the student's."""

    @property
    def needs_scores(self) -> bool:
        return False

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        is_own = ~batch.group(batch.replaced.float()).bool().any(dim=1, keepdim=True)
        return torch.where(is_own, batch.advantages, 0.0)


@dataclass(frozen=True)
class PlanGuided(TokenWeighting):
    """
    ω = p_S^(1 − β)·p_T^β of the tokens of completions that are not the student's, where the teacher has read them. No
    other token is learnt by likelihood.

    Args:
        plan_weight (`float`, *optional*, defaults to `0.5`):
            β. At 0, ω = p_S, as in dynamic fine-tuning.
    """

    plan_weight: float = 0.5
    terms: ClassVar[tuple[str, ...]] = ("likelihood",)
    selects: ClassVar[bool] = True
    needs_reward: ClassVar[bool] = True
    needs_replaced: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.plan_weight <= 1.0:
            raise ValueError(f"`plan_weight` must be in [0, 1], got {self.plan_weight}.")

    @property
    def needs_scores(self) -> bool:
        return True

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        assert scores is not None
        log_weights = scores.student_log_prob + self.plan_weight * scores.delta
        # One that is all but impossible counts too
        weights = log_weights.exp().clamp(min=torch.finfo(log_weights.dtype).tiny)
        return weights * (scores.known & batch.replaced)
