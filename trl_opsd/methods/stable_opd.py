from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

import torch

from ..sampling.sources import Completions, CompletionSource, Prompts, mixed
from ..signal import Advantage, Batch, TokenScores, TokenWeighting
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class StableOPDConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 4,
        "privileged_context": "solution",
        "completions": "trl_opsd.methods.stable_opd.GoldRollout",
        "teacher": "initial",
        "divergence_coef": 0.0,
        "policy_loss_coef": 1.0,
        "advantage": "trl_opsd.methods.stable_opd.TeacherReward",
        "likelihood_coef": 0.1,
        "token_weights": {"trl_opsd.methods.stable_opd.GoldOnly": {}},
        "beta": 0.01,
        "temperature": 1.0,
        "max_completion_length": 8192,
        "learning_rate": 1e-6,
    },
):
    r"""
    Distil a teacher by policy gradient, held by gold solutions and by the initial policy.

    Defaults of Stable-OPD, from [Demystifying OPD: Length Inflation and Stabilization Strategies for Large Language
    Models](https://huggingface.co/papers/2604.08527), which keeps on-policy distillation from ending in long and
    repetitive rollouts:

    L = mean over sequences of 1/|ŷ| Σ_t [clipped policy gradient with advantage δ_t + β·KL(p_S‖p_initial)]
        + λ · mean over gold completions y* of 1/|y*| Σ_t −log p_S(y*_t),

    with δ_t = log p_T(ŷ_t) − log p_S(ŷ_t) on the student's own rollouts, and 0 on a gold one. β is `beta`, and its KL
    GRPO's estimate; λ is `likelihood_coef`. Of the 4 rollouts of a prompt, the last is replaced by the dataset's
    `completion` (see [`GoldRollout`]). No reward takes part. `rollouts/truncated_rate` and `rollouts/repetition_rate`
    are what the paper watches.

    Chosen here: λ 0.1 and β 0.01, which none of our sources has; that the gold completion takes the place of one of
    the 4 rollouts, and that the mean of the first two terms goes over it too; the mean over sequences (`loss_type`);
    the longest completion. Deviations: the paper distils an external teacher that reads the student's prompt
    (`teacher="external"`, `privileged_context="none"`), and here the initial policy reads the solution; the wording of
    its prompt is this library's. It was written from two reviews that agree, and not from the paper.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="Stable-OPD",
        paper="2604.08527",
        title="Demystifying OPD: Length Inflation and Stabilization Strategies for Large Language Models",
        citation=dedent("""\
            @article{luo2026demystifying,
                title        = {{Demystifying OPD: Length Inflation and Stabilization Strategies for Large Language
                                Models}},
                author       = {Feng Luo and Yu-Neng Chuang and Guanchu Wang and Zicheng Xu and Xiaotian Han and
                                Tianyi Zhang and Vladimir Braverman},
                year         = 2026,
                eprint       = {arXiv:2604.08527},
            }"""),
        status="notes",
    )


class GoldRollout(CompletionSource):
    """
    A completion of the dataset's in the place of every n-th rollout of a prompt.

    Args:
        column (`str`, *optional*, defaults to `"completion"`):
            Dataset column that has it, text or messages.
        every (`int`, *optional*, defaults to `4`):
            n.
    """

    def __init__(self, column: str = "completion", every: int = 4):
        if every < 2:
            raise ValueError(f"`every` of `completions_kwargs` must be at least 2, got {every}.")
        self.column, self.group_size = column, every
        self.columns = (column,)

    @property
    def description(self) -> str:
        return f"one in {self.group_size} is the dataset's {self.column} instead"

    def __call__(self, prompts: Prompts) -> Completions:
        first = prompts.process_index * len(prompts.rows)  # the rollouts of a prompt may lie on several processes
        rows = range(-(first + 1) % self.group_size, len(prompts.rows), self.group_size)
        return mixed(prompts, {row: prompts.encode(prompts.rows[row][self.column]) for row in rows})


class TeacherReward(Advantage):
    """δ_t = log p_T(y_t) − log p_S(y_t) on the student's own rollouts, where the teacher has read them, else 0."""

    needs_reward: ClassVar[bool] = False
    reads_own_rollout: ClassVar[bool] = True
    reads_replaced: ClassVar[bool] = False

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        assert scores is not None
        return scores.delta.masked_fill(batch.replaced, 0.0)


class GoldOnly(TokenWeighting):
    """Keeps, in the likelihood, completions that took the place of a rollout."""

    terms: ClassVar[tuple[str, ...]] = ("likelihood",)
    selects: ClassVar[bool] = True
    needs_replaced: ClassVar[bool] = True

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        return batch.replaced
