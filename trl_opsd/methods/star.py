from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar

from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class STaRConfig(
    SelfDistillationConfig,
    defaults={
        "privileged_context": "answer",
        "completions": "hinted_retry",
        "token_weights": {"correct_only": {}},
        "divergence_coef": 0.0,
        "likelihood_coef": 1.0,
        "temperature": 0.01,
        "top_p": 0.9,
        "distillation_temperature": 1.0,
        "learning_rate": 1e-6,
    },
):
    r"""
    Train on own solutions that are right, also on those that took a hint.

    Defaults of STaR, from [STaR: Bootstrapping Reasoning With Reasoning](https://huggingface.co/papers/2203.14465). A
    rollout ŷ that is wrong is sampled once more from a prompt that shows the answer. What is right, at the first or
    the second try, is learnt as an answer to the prompt x without the hint:

    L = −mean over right completions of 1/|ŷ| Σ_t log p(ŷ_t | x, ŷ₍<t₎).

    It needs a reward and an `answer` column. The paper hints with the whole solution on GSM8K
    (`privileged_context="solution"`).

    Deviations: completions are sampled anew by the policy of each step, where the paper's outer loop samples all of
    them and begins again from the initial weights; a completion may be as long as GRPO's default, where the paper
    stops after 96 tokens; the prompts are those of a chat, without worked examples.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="STaR",
        paper="2203.14465",
        title="STaR: Bootstrapping Reasoning With Reasoning",
        citation=dedent("""\
            @inproceedings{zelikman2022star,
                title        = {{STaR: Bootstrapping Reasoning With Reasoning}},
                author       = {Eric Zelikman and Yuhuai Wu and Jesse Mu and Noah D. Goodman},
                booktitle    = {Advances in Neural Information Processing Systems},
                year         = 2022,
                eprint       = {arXiv:2203.14465},
            }"""),
        status="seen-code",
    )
