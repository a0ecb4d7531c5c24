from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class CorrectOnlyConfig(
    SelfDistillationConfig,
    defaults={
        "privileged_context": "reflection",
        "teacher": "initial",
        "divergence": "reverse_kl",
        "token_weights": {"correct_only": {}},
        "temperature": 0.7,
        "distillation_temperature": 1.0,
        "max_completion_length": 8192,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
    },
):
    r"""
    Shorten the reasoning of a trained model, on rollouts that are correct.

    Defaults of correct-only self-distillation, from [OPSD Compresses What RLVR Teaches: A Post-RL Compaction Stage for
    Reasoning Models](https://huggingface.co/papers/2605.06188). The initial policy reads a reflection c that the
    student wrote once it had seen the right answer, and the student matches it where the rollout ŷ earned a reward
    r = 1:

    L = mean over correct rollouts of 1/|ŷ| Σ_t Σ_v p_S,v · (log p_S,v − log p_T,v),

    with p_T = p(· | x, c, ŷ₍<t₎) and p_S = p(· | x, ŷ₍<t₎). It needs a reward, and an `answer` column.

    Chosen here: the mean is one over the correct rollouts of a generation batch, and both distributions are taken at
    temperature 1; the paper says neither. The wording of the prompts is this library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="Correct-Only",
        paper="2605.06188",
        title="OPSD Compresses What RLVR Teaches: A Post-RL Compaction Stage for Reasoning Models",
        citation=dedent("""\
            @article{kim2026opsd,
                title        = {{OPSD Compresses What RLVR Teaches: A Post-RL Compaction Stage for Reasoning Models}},
                author       = {Jaehoon Kim and Dongha Lee},
                year         = 2026,
                eprint       = {arXiv:2605.06188},
            }"""),
        status="seen-paper",
    )
