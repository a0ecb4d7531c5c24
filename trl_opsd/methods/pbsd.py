from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from ..sampling.sources import Completions, CompletionSource, Prompts, mixed, teacher_prompts
from ..signal import Batch, TokenScores, TokenWeighting
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class PBSDConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 2,
        "privileged_context": "solution",
        "teacher": "initial",
        "completions": "trl_opsd.methods.pbsd.TeacherSecond",
        "divergence_coef": 0.0,
        "likelihood_coef": 1.0,
        "token_weights": {"trl_opsd.methods.pbsd.Preference": {"beta": 0.1}},
        "loss_type": "luspo",
        "temperature": 1.1,
        "max_completion_length": 1024,
        "learning_rate": 5e-6,
    },
):
    r"""
    Prefer what the teacher writes to what the student writes, by whole sequences.

    Defaults of PBSD, from [Preference-Based Self-Distillation: Beyond KL Matching via Reward
    Regularization](https://huggingface.co/papers/2605.05040). Of the two
    completions of a prompt, one is sampled from the student and one from the teacher, the initial policy reading the
    reference solution. See [`Preference`] for the loss, that of DPO with the teacher as its reference. No reward takes
    part: what the teacher writes is taken to be better.

    The loss reaches the student as a weight of each token's log-likelihood, which is its exact slope as long as a
    generation serves one optimizer step (GRPOConfig's default), and one of the policy that sampled after that. What is
    logged as `loss` and `likelihood_loss` is of those weights: the paper's loss is `preference/loss`.

    Chosen here: β = `beta` 0.1, which the paper prints nowhere, and log-probabilities at the temperature that is
    sampled at. Without a difference between the two, log p_S / p_T is not 0 at the start, but adds up to minus β times
    the divergences of whole sequences, so that a long answer begins with the largest slope. Deviation: the wording of
    the teacher's prompt is this library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="PBSD",
        paper="2605.05040",
        title="Preference-Based Self-Distillation: Beyond KL Matching via Reward Regularization",
        citation=dedent("""\
            @article{yu2026preferencebased,
                title        = {{Preference-Based Self-Distillation: Beyond KL Matching via Reward Regularization}},
                author       = {Xin Yu and Liuchen Liao and Yiwen Zhang and Yingchen Yu and Lingzhou Xue and
                                Qinzhen Guo},
                year         = 2026,
                eprint       = {arXiv:2605.05040},
            }"""),
        status="seen-paper",
    )


class TeacherSecond(CompletionSource):
    """
    A sample of the teacher in the place of every second rollout of a prompt. Where there is no context, the rollout
    stays.
    """

    needs_context = True
    samples_teacher = True
    group_size = 2
    description = "every second one is sampled from the teacher instead"

    def __call__(self, prompts: Prompts) -> Completions:
        first = prompts.process_index * len(prompts.rows)  # pairs may lie on two processes
        given = teacher_prompts(prompts.teacher_prompt, range((first + 1) % 2, len(prompts.rows), 2))
        return mixed(prompts, dict(zip(given, prompts.sample_teacher(list(given.values())), strict=True)))


@dataclass(frozen=True)
class Preference(TokenWeighting):
    """
    −log σ(m) with m = β·{log p_S(ŷ⁺ | x) − log p_T(ŷ⁺ | x, c) − [log p_S(ŷ⁻ | x) − log p_T(ŷ⁻ | x, c)]}, where ŷ⁺ is a
    completion of the teacher's and ŷ⁻ the student's before it, by its slope: ± β·σ(−m) for each of their tokens.
    Log-probabilities are sums over a completion. A pair that is not whole, for want of a context, of a token or of a
    finite number, counts in no mean.

    Args:
        beta (`float`, *optional*, defaults to `0.1`):
            β.
    """

    beta: float = 0.1
    terms: ClassVar[tuple[str, ...]] = ("likelihood",)
    selects: ClassVar[bool] = True
    needs_replaced: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}.")

    @property
    def needs_scores(self) -> bool:
        return True

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        assert scores is not None
        is_whole = batch.mask.any(dim=1, keepdim=True) & (scores.known == batch.mask).all(dim=1, keepdim=True)
        log_ratios = -scores.delta.sum(dim=1, keepdim=True)
        rows = batch.gather(torch.cat([log_ratios, is_whole, batch.replaced], dim=1))
        if not batch.is_training:  # in which nothing is replaced
            return torch.zeros_like(batch.mask)
        (worse, better), whole, replaced = rows.view(-1, 2, 3).permute(2, 1, 0)
        is_pair = (whole.prod(dim=0) * (1 - replaced[0]) * replaced[1]).bool()
        margin = torch.where(is_pair, self.beta * (better - worse), 0.0)
        number = is_pair.sum()
        batch.log("preference/loss", -logsigmoid(margin)[is_pair].sum(), number)
        batch.log("preference/margin", margin.sum(), number)
        batch.log("preference/accuracy", (margin > 0).sum(), number)
        batch.log("preference/pair_rate", number, torch.ones_like(margin).sum())
        # Of a mean over pairs, which have two rows. One that is certain counts too
        slopes = 2 * self.beta * torch.sigmoid(-margin).clamp(min=torch.finfo(margin.dtype).tiny) * is_pair
        return batch.own(torch.stack([-slopes, slopes], dim=1).view(-1, 1))
