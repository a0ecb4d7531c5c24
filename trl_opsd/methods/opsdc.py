from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method
from ..trainer.trainer import SelfDistillationTrainer


@dataclass
class OPSDCConfig(
    SelfDistillationConfig,
    defaults={
        "privileged_context": "concise",
        "teacher": "periodic",
        "divergence": "reverse_kl",
        "max_completion_length": 8192,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
    },
):
    r"""
    Train a model to reason in fewer tokens.

    Defaults of On-Policy Self-Distillation for Reasoning Compression (OPSDC), published later as [CRISP: Compressed
    Reasoning via Iterative Self-Policy Distillation](https://huggingface.co/papers/2603.05433). A copy of the policy,
    refreshed every 50 optimizer steps, reads a conciseness instruction c before the question x, and the student
    matches it with a reverse KL over one rollout ŷ per prompt:

    L = mean over sequences of 1/|ŷ| Σ_t Σ_v p_S,v · (log p_S,v − log p_T,v),

    with p_T = p(· | x, c, ŷ₍<t₎) and p_S = p(· | x, ŷ₍<t₎) at temperature 1. No reference solution and no reward take
    part: the dataset needs a `prompt` column only. `max_completion_length` is 8192; the paper finds that 1k to 4k work
    too. The paper's batch of 32, its 100 steps and its weight decay of 0.01 are in `recipes/opsdc`.

    Deviation: the wording of the instructions is this library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="OPSDC",
        paper="2603.05433",
        title="CRISP: Compressed Reasoning via Iterative Self-Policy Distillation",
        citation=dedent("""\
            @article{sang2026crisp,
                title        = {{CRISP: Compressed Reasoning via Iterative Self-Policy Distillation}},
                author       = {Hejian Sang and Yuanda Xu and Zhengze Zhou and Ran He and Zhipeng Wang and
                                Jiachen Sun},
                year         = 2026,
                eprint       = {arXiv:2603.05433},
            }"""),
        status="seen-paper",
    )


class OPSDCTrainer(SelfDistillationTrainer):
    """
    [`SelfDistillationTrainer`] whose default configuration is [`OPSDCConfig`].

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl_opsd import OPSDCConfig, OPSDCTrainer

    >>> dataset = Dataset.from_list([{"prompt": "What is 2 + 3?"}])
    >>> trainer = OPSDCTrainer("Qwen/Qwen3-8B", args=OPSDCConfig("Qwen3-8B-OPSDC"), train_dataset=dataset)
    >>> trainer.train()
    ```
    """

    config_class: ClassVar[type[SelfDistillationConfig]] = OPSDCConfig
