import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import dedent
from typing import Any, ClassVar

from torch import nn

from ..scoring.saliency import AttentionSaliency
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class AtManRLConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 8,
        "privileged_context": "none",
        "teacher": "live",
        "divergence_coef": 0.0,
        "policy_loss_coef": 1.0,
        "scale_rewards": "none",
        "temperature": 1.0,
        "max_completion_length": 1024,
        "learning_rate": 1e-6,
    },
):
    r"""
    Train with rewards, also for reasoning that the answer depends on.

    Defaults of AtManRL, from [AtManRL: Towards Faithful Reasoning via Differentiable Attention
    Saliency](https://huggingface.co/papers/2604.16158): GRPO, whose advantage is the reward minus the mean of its
    group, with [`Faithfulness`] as one of its reward functions. There is no teacher. Give both rewards, that of the
    answer first: `reward_funcs: [accuracy_reward, trl_opsd.methods.atmanrl.faithfulness]`. Without the second, this is
    GRPO.

    A rollout takes 200 forward and backward passes of its own, with eager attention; how long that is, is measured and
    printed before training starts. Weights have to be whole on each process: no ZeRO-3, no FSDP.

    The paper's formula and its text disagree: what it prints pays for tokens whose attention is still suppressed in
    the end, that is for those which the answer does not need, and its text says the opposite. This pays for the
    others. Deviations: a right answer has 1 and a wrong one 0, where the paper has 0 and −1, which is the same minus
    the mean of a group. Chosen here: the mean over sequences of their token means (`loss_type`); where the reasoning
    ends and the answer begins (`boundary`); that a token's attention to itself is left alone, and that ten times the
    mask is added to the scores.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="AtManRL",
        paper="2604.16158",
        title="AtManRL: Towards Faithful Reasoning via Differentiable Attention Saliency",
        citation=dedent("""\
            @article{hoth2026atmanrl,
                title        = {{AtManRL: Towards Faithful Reasoning via Differentiable Attention Saliency}},
                author       = {Max Henning H{\\"o}th and Kristian Kersting and Bj{\\"o}rn Deiseroth and
                                Letitia Parcalabescu},
                year         = 2026,
                eprint       = {arXiv:2604.16158},
            }"""),
        status="seen-paper",
    )


class Faithfulness:
    """
    Reward function: 1 − mean(H / c) over the reasoning's tokens and those after them, where H is the mask of
    [`~trl_opsd.scoring.saliency.AttentionSaliency`] and c where it started: 1 if the answer needs all of it, 0 if it
    needs none, and less where it is likelier the less is attended to. A completion without a reasoning or without an
    answer has no such reward, and is counted.

    Args:
        boundary (`str`, *optional*):
            Regular expression. The answer begins where its last match ends; before that is the reasoning. Defaults to
            the end of a think block, or the beginning of a box.
        saliency_kwargs:
            Arguments of that class.

    Raises:
        ValueError: If a number is out of range.
    """

    __name__ = "faithfulness"

    def __init__(self, boundary: str = r"</think>|(?=\\boxed\{)", **saliency_kwargs: Any):
        self.boundary, self.saliency = re.compile(boundary), AttentionSaliency(**saliency_kwargs)
        self._policy: nn.Module | None = None

    def read_policy(
        self, policy: nn.Module, tokenizer: Any, tokenize: Callable[[list[Any]], list[list[int]]], num_tokens: int
    ) -> float:
        """
        Take the policy whose rollouts are to be rewarded, and measure what that takes.

        Args:
            policy (`nn.Module`):
                Policy, not wrapped.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Its tokenizer.
            tokenize (`Callable`):
                From prompts to token ids.
            num_tokens (`int`):
                Tokens of a long completion.

        Returns:
            `float`: seconds that one takes.
        """
        self._policy, self._tokenizer, self._tokenize = policy, tokenizer, tokenize
        steps = AttentionSaliency(num_steps=1)
        row = ([0], [0] * max(num_tokens - 1, 1), [0])
        steps(policy, [row])  # what is slow the first time
        started = time.perf_counter()
        steps(policy, [row])
        return self.saliency.num_steps * (time.perf_counter() - started)

    def __call__(
        self,
        prompts: list[Any],
        completion_ids: list[list[int]],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        if self._policy is None:
            raise ValueError(
                "The reward `faithfulness` reads the policy, and no trainer of this library has given it."
            )
        parts = [self.split(ids) for ids in completion_ids]
        rows = [
            (prompt, *part) for prompt, part in zip(self._tokenize(prompts), parts, strict=True) if part is not None
        ]
        rewards = iter(self._rewards(rows))
        if log_metric is not None:
            log_metric("faithfulness/unsplit_rate", parts.count(None) / len(parts))
        return [None if part is None else next(rewards) for part in parts]

    def _rewards(self, rows: Sequence[tuple[list[int], list[int], list[int]]]) -> list[float]:
        assert self._policy is not None
        masks = self.saliency(self._policy, rows)
        return [1.0 - mask[is_there].mean().item() if is_there.any() else 0.0 for mask, is_there in masks]

    def split(self, ids: list[int]) -> tuple[list[int], list[int]] | None:
        """Reasoning and answer of a completion, `None` where one of them has no token."""
        *_, last = [None, *self.boundary.finditer(self._tokenizer.decode(ids))]
        if last is None:
            return None
        few, many = 0, len(ids)  # tokens, of which the second are enough for the reasoning
        while few < many:
            middle = (few + many) // 2
            is_enough = len(self._tokenizer.decode(ids[:middle])) >= last.end()
            few, many = (few, middle) if is_enough else (middle + 1, many)
        return (ids[:many], ids[many:]) if 0 < many < len(ids) else None


faithfulness = Faithfulness()
