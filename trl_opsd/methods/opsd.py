from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method
from ..trainer.trainer import SelfDistillationTrainer


@dataclass
class OPSDConfig(
    SelfDistillationConfig,
    defaults={
        "privileged_context": "solution",
        "teacher": "initial",
        "divergence": "forward_kl",
        "divergence_clip": 0.05,
        "temperature": 1.1,
        "top_p": 0.95,
        "top_k": 20,
        "max_completion_length": 1024,
        "chat_template_kwargs": {"enable_thinking": False},
        "teacher_chat_template_kwargs": {"enable_thinking": True},
        "learning_rate": 5e-6,
        "max_grad_norm": 0.1,
    },
):
    r"""
    Train a model to solve problems as if it had read their solutions.

    Defaults of On-Policy Self-Distillation (OPSD), from [Self-Distilled Reasoner: On-Policy Self-Distillation for
    Large Language Models](https://huggingface.co/papers/2601.18734), as released for its 1.7B and 4B models. The
    initial policy reads the reference solution c, and the student matches it with a clipped forward KL over one
    rollout ŷ per prompt x:

    L = mean over sequences of 1/|ŷ| Σ_t Σ_v min(p_T,v · (log p_T,v − log p_S,v), τ),

    with p_T = p(· | x, c, ŷ₍<t₎) and p_S = p(· | x, ŷ₍<t₎), both at the sampling temperature. τ = `divergence_clip` is
    0.05; the paper takes 0.06 for 8B. Chat templates that know no switch for thinking ignore it. The paper's batch of
    32, its 100 steps and its LoRA adapter of rank 64 belong to data and model, not to this class: see `recipes/opsd`.

    Deviations from the released code: prompts are padded on the left, where the code scores the first token from a
    pad token; the teacher's prompt is continued with `<think>` where the template leaves that to the model; the
    wording of the prompts is this library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="OPSD",
        paper="2601.18734",
        title="Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models",
        citation=dedent("""\
            @article{zhao2026selfdistilled,
                title        = {{Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models}},
                author       = {Siyan Zhao and Zhihui Xie and Mengchen Liu and Jing Huang and Guan Pang and
                                Feiyu Chen and Aditya Grover},
                year         = 2026,
                eprint       = {arXiv:2601.18734},
            }"""),
        status="seen-paper, seen-code",
    )


class OPSDTrainer(SelfDistillationTrainer):
    """
    [`SelfDistillationTrainer`] whose default configuration is [`OPSDConfig`].

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl_opsd import OPSDConfig, OPSDTrainer

    >>> dataset = Dataset.from_list([{"prompt": "What is 2 + 3?", "solution": "Two and three make five, so 5."}])
    >>> trainer = OPSDTrainer("Qwen/Qwen3-1.7B", args=OPSDConfig("Qwen3-1.7B-OPSD"), train_dataset=dataset)
    >>> trainer.train()
    ```
    """

    config_class: ClassVar[type[SelfDistillationConfig]] = OPSDConfig
