from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class SDFTConfig(
    SelfDistillationConfig,
    defaults={
        "privileged_context": "solution",
        "teacher": "ema",
        "teacher_update_rate": 0.01,
        "divergence": "forward_kl",
        "token_weights": {"skip_first": {"num_tokens": 3}, "importance_clip": {"most": 2.0}},
        "temperature": 1.0,
        "max_completion_length": 1024,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
    },
):
    r"""
    Learn a skill from demonstrations without forgetting others.

    Defaults of SDFT, from [Self-Distillation Enables Continual Learning](https://huggingface.co/papers/2601.19897), as
    its authors ran it. A moving average of the policy (θ_T ← 0.99·θ_T + 0.01·θ) reads the demonstration c, and the
    student matches it over one rollout ŷ per prompt x:

    L = mean over sequences of the mean over t > 3 of Σ_v p_T,v · (log p_T,v − log p_S,v),

    with p_T = p(· | x, c, ŷ₍<t₎) and p_S = p(· | x, ŷ₍<t₎) at temperature 1. The first three tokens are left out,
    where a teacher says that it has read something. Each token is weighted by its ratio to the policy that sampled it,
    at most 2, as far as an engine's probabilities differ.

    The paper's equation is a reverse KL; its experiments and code use the forward KL, as here. TRL's `SDFTTrainer`
    differs: top-100 tokens of the student, a JSD, the base model as teacher, a teacher prompt cut on the left.
    Deviation: the wording of the teacher's prompt is this library's. The demonstration is the `solution` column.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="SDFT",
        paper="2601.19897",
        title="Self-Distillation Enables Continual Learning",
        citation=dedent("""\
            @article{shenfeld2026selfdistillation,
                title        = {{Self-Distillation Enables Continual Learning}},
                author       = {Idan Shenfeld and Mehul Damani and Jonas H\\"ubotter and Pulkit Agrawal},
                year         = 2026,
                eprint       = {arXiv:2601.19897},
            }"""),
        status="seen-code",
    )
