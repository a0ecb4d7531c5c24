from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

import torch

from ..signal import Advantage, Batch, TokenScores, TokenWeighting
from ..trainer.checks.settings import check_mean_over_sequences
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class TRACEConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 8,
        "privileged_context": "diagnosis",
        "context_kwargs": {"annotator": "policy"},
        "teacher": "periodic",
        "teacher_update_steps": 10,
        "divergence": "forward_kl",
        "divergence_support": "teacher_top_k",
        "divergence_top_k": 100,
        "divergence_tail": "bucket",
        "divergence_clip": 0.05,
        "divergence_coef": 0.5,
        "policy_loss_coef": 1.0,
        "token_weights": {"trl_opsd.methods.trace.InSpans": {"kinds": ["key"]}},
        "advantage": "trl_opsd.methods.trace.OffSpans",
        "schedules": {
            "divergence_coef": {"start": 0.5, "end": 0.0, "num_steps": 30, "delay": 10},
            "advantage.share": {"start": 0.0, "end": 1.0, "num_steps": 30, "delay": 10},
        },
        "loss_type": "grpo",
        "epsilon_high": 0.28,
        "temperature": 0.6,
        "max_completion_length": 32768,
        "learning_rate": 1e-5,
        "warmup_steps": 10,
    },
):
    r"""
    Train with rewards, and at what decides a rollout towards a teacher that knows of which kind it is.

    Defaults of TRACE, from [TRACE: Distilling Where It Matters via Token-Routed Self On-Policy
    Alignment](https://huggingface.co/papers/2605.10194). An annotator marks up to three spans of each rollout, a
    quarter of its tokens at most: key steps K of correct ones, errors E of wrong ones. The teacher, a copy of the
    policy refreshed every 10 steps, reads of which types they are, and nothing else. With λ_k = 0.5 in the first 10
    optimizer steps, from there to 0 in a straight line over 30 more, and ρ_k = 1 − λ_k / 0.5,

    L = GRPO's with the advantage A outside of the spans and ρ_k·A in them + λ_k · 1/|ŷ| Σ_{t ∈ K} KL(p_T ‖ p_S),

    whose entries, of the 100 most probable tokens, are clipped at 0.05. After 40 steps this is GRPO, without an
    annotator and without a pass of the teacher. It needs a reward. Both terms are means over all rollouts: another
    `loss_type` is refused.

    Who annotates is `context_kwargs={"annotator": ...}`: the policy itself, as in the paper's *online-self*; a model
    on a `"server"`, as in its main result; `"columns"`, or a function of one's own. What it says that cannot be used
    is left out and counted. The paper's variant for weak base models pulls at errors, by the reverse KL, instead:
    `token_weights={"trl_opsd.methods.trace.InSpans": {"kinds": ["error"]}}` and `divergence="reverse_kl"`. Both at
    once, of which the paper speaks as an option, are `{"kinds": ["key", "error"]}` and `spans_divergence={"error":
    {"divergence": "reverse_kl", "support": "teacher_top_k", "top_k": 100, "clip": 0.05}}`.

    Chosen here: the 100 tokens are the teacher's, with an entry for all others; the temperature of both distributions
    is that of the rollouts; segments are lines, and sentences in them; spans are cut where the quarter is full;
    annotators are shown the reference. Deviation: the wording of all prompts is this library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="TRACE",
        paper="2605.10194",
        title="TRACE: Distilling Where It Matters via Token-Routed Self On-Policy Alignment",
        citation=dedent("""\
            @article{wang2026trace,
                title        = {{TRACE: Distilling Where It Matters via Token-Routed Self On-Policy Alignment}},
                author       = {Jiaxuan Wang and Xuan Ouyang and Zhiyu Chen and Yulan Hu and Zheng Pan and Xin Li and
                                Lan-Zhe Guo},
                year         = 2026,
                eprint       = {arXiv:2605.10194},
            }"""),
        status="seen-paper",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mean_over_sequences(self)


@dataclass(frozen=True)
class OffSpans(Advantage):
    """
    A outside of the spans that the context marks, ρ·A in them.

    Args:
        share (`float`, *optional*, defaults to `0.0`):
            ρ. At 1 this is GRPO.
    """

    share: float = 0.0

    @property
    def needs_scores(self) -> bool:
        return False

    @property
    def needs_spans(self) -> bool:
        return self.share != 1.0

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        if not self.needs_spans or not batch.spans:
            return batch.advantages
        inside = torch.stack(list(batch.spans.values())).any(dim=0)
        return torch.where(inside, self.share * batch.advantages, batch.advantages)


@dataclass(frozen=True)
class InSpans(TokenWeighting):
    """
    Keeps the tokens of some kinds of spans, so that the divergence is, with `loss_type="grpo"`, the mean over all
    rollouts of 1/|ŷ| Σ over these tokens, where |ŷ| is the number of all tokens of a rollout.

    Args:
        kinds (`Sequence[str]`, *optional*, defaults to `("key",)`):
            Kinds of spans, as the context calls them.
    """

    kinds: Sequence[str] = ("key",)
    terms: ClassVar[tuple[str, ...]] = ("divergence",)
    selects: ClassVar[bool] = True
    needs_spans: ClassVar[bool] = True

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        if not batch.spans:  # in a step without the divergence
            return torch.zeros_like(batch.mask)
        if unknown := set(self.kinds) - batch.spans.keys():
            raise ValueError(
                f"The context marks spans of the kinds {list(batch.spans)}, and none of {sorted(unknown)}."
            )
        spans = torch.stack([batch.spans[kind] for kind in self.kinds]).any(dim=0)
        inside = spans & batch.mask & batch.has_context
        kept = inside.any(dim=1, keepdim=True)
        share_of_rows = batch.gather(kept.float()).mean()
        share_of_tokens = inside.sum(dim=1, keepdim=True) / batch.mask.sum(dim=1, keepdim=True).clamp(min=1)
        return inside * share_of_tokens * share_of_rows
