from dataclasses import dataclass
from typing import ClassVar

from ..trainer.method import Method
from .rethinking_opd import RethinkingOPDConfig


@dataclass
class RethinkingOPDCodeConfig(
    RethinkingOPDConfig,
    defaults={"divergence": "student_rewards", "divergence_tail": "bucket"},
):
    r"""
    Reward the few tokens that the student would write by what a teacher thinks of them.

    Defaults of the released code of the on-policy distillation of [Rethinking On-Policy Distillation of Large Language
    Models: Phenomenology, Mechanism, and Recipe](https://huggingface.co/papers/2604.13016), which is another loss than
    the paper's ([`RethinkingOPDConfig`]): a policy gradient over the student's 16 most probable tokens, sampled or
    not,

    L = −mean over tokens of Σ_v A_v·p_S(v) / p_old(v), A_v = w_v·(log p_T(v) − log p_S(v)) as data,

    with w the student's probabilities divided by their sum over the support, and the log-ratio that of the
    distributions as they are. `divergence="teacher_rewards"` and `"even_rewards"` are the code's other weights,
    `divergence_support` has most of its supports. No reward takes part. The divergence that is logged is −Σ_v A_v.

    Deviations: the code bounds the ratio p_S / p_old, which is 1 where a generation serves one optimizer step, as in
    its launcher; here p_old is p_S in any case. Its intersection and its union without that are left out, and so is
    the sum with GRPO's advantage (`policy_loss_coef=1.0` adds GRPO's loss). The teacher is as in
    [`RethinkingOPDConfig`].

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="Rethinking-OPD-Code",
        paper="2604.13016",
        title=RethinkingOPDConfig.method.title,
        citation=RethinkingOPDConfig.method.citation,
        status="notes, seen-code",
    )
