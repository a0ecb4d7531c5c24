from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class SDPOConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 8,
        "privileged_context": "peers",
        "context_kwargs": {"correct": 1, "feedback": "without_correct", "strip_thinking": True},
        "teacher": "ema",
        "teacher_update_rate": 0.05,
        "divergence": "jsd",
        "jsd_weight": 0.5,
        "divergence_support": "student_top_k",
        "divergence_top_k": 100,
        "divergence_tail": "bucket",
        "token_weights": {"importance_clip": {"most": 2.0}},
        "loss_type": "dapo",
        "temperature": 1.0,
        "chat_template_kwargs": {"enable_thinking": False},
        "max_completion_length": 8192,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
    },
):
    r"""
    Learn from own successes and from feedback, token by token.

    Defaults of SDPO, from [Reinforcement Learning via Self-Distillation](https://huggingface.co/papers/2601.20802),
    for tasks without rich feedback. A moving average of the policy (θ_T ← 0.95·θ_T + 0.05·θ) reads c, another correct
    rollout of the same prompt or, where there is none, the feedback on the rollout:

    L = mean over tokens of min(p_S(ŷ_t) / p_old(ŷ_t), 2) · JSD_½(p_T, p_S),

    with p_T = p(· | x, c, ŷ₍<t₎) and p_S = p(· | x, ŷ₍<t₎), over the student's 100 most probable tokens and one entry
    for all others. A rollout with neither context is masked, and counted in no mean. It needs a reward; 1 is success
    (`success_threshold`; the released code's recipes take 0.5).

    Two sources disagree whether a successful rollout reads itself. As in the released code, it does not; for the
    other, set `include_own: true` in `context_kwargs`. With rich feedback, the paper takes `teacher_update_rate` 0.01,
    `divergence="reverse_kl"`, `divergence_top_k` 20 and `learning_rate` 1e-6. Deviations: the mean is that of the
    whole optimizer step, where the released code's is that of a micro-batch; the wording of the teacher's prompt is
    this library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="SDPO",
        paper="2601.20802",
        title="Reinforcement Learning via Self-Distillation",
        citation=dedent("""\
            @article{hubotter2026reinforcement,
                title        = {{Reinforcement Learning via Self-Distillation}},
                author       = {Jonas H\\"ubotter and Frederike L\\"ubeck and Lejs Behric and Anton Baumann and
                                Marco Bagatella and Daniel Marta and Ido Hakimi and Idan Shenfeld and
                                Thomas Kleine Buening and Carlos Guestrin and Andreas Krause},
                year         = 2026,
                eprint       = {arXiv:2601.20802},
            }"""),
        status="seen-paper, seen-code",
    )
