import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import dedent
from typing import Any, ClassVar

import torch

from ..context import Message, Rollout, Rollouts, SiblingContext, as_text
from ..signal import Advantage, Batch, PassRates, TokenScores
from ..trainer.method import Method
from .sdpo import SDPOConfig


@dataclass
class DRIFTConfig(
    SDPOConfig,
    defaults={
        "privileged_context": "trl_opsd.methods.drift.BestSuccess",
        "context_kwargs": {"strip_thinking": True},
        "policy_loss_coef": 1.0,
        "advantage": "trl_opsd.methods.drift.ByDifficulty",
    },
):
    r"""
    Distil failures from the best success, now or earlier, and reinforce successes by how hard the prompt is.

    Defaults of DRIFT, from [DRIFT: Difficulty Routing Self-DIstillation with Rhythm-Gated Exploration and Success
    BuFfer Training](https://huggingface.co/papers/2606.30345). Rollouts part ways:

    - wrong ones have SDPO's loss, min(p_S(ŷ_t) / p_old(ŷ_t), 2) · JSD_½(p_T, p_S), whose teacher reads the best
      success of the group, the shortest of equally good ones, or else one that is remembered from an earlier batch;
    - correct ones have GRPO's loss, whose advantage is multiplied by γ(r), with r a moving average of the prompt's
      pass rate: 0 where the prompt is hard (r < 0.2), 0.5 where it is easy (r > 0.8), else 1.

    It needs a reward. Rates and successes are kept in checkpoints. See [`BestSuccess`] and [`ByDifficulty`].

    Deviations: the paper's bounded bonus for tokens of correct rollouts and its warm-up by distillation alone are left
    out (`schedules={"policy_loss_coef": {"start": 0.0, "end": 1.0, "num_steps": 1, "delay": ...}}` is such a warm-up);
    the released pseudocode routes otherwise: see [`DRIFTCodeConfig`]. Chosen here: the share of the newest pass rate
    in the average; what SDPO's other settings are without feedback; both losses weigh the same, each a mean over its
    tokens. The wording of the prompt is this library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="DRIFT",
        paper="2606.30345",
        title="DRIFT: Difficulty Routing Self-DIstillation with Rhythm-Gated Exploration and Success BuFfer Training",
        citation=dedent("""\
            @article{luo2026drift,
                title        = {{DRIFT: Difficulty Routing Self-DIstillation with Rhythm-Gated Exploration and Success
                                BuFfer Training}},
                author       = {Haisen Luo and Yiwei Liu and Haoning Wang and Dan Liu and Junxi Yin and
                                Haotian Wang and Lei Zhang and Xiaoyu Tian and Shuaiting Chen and Yuansheng Song and
                                Baoyan Guo and Xiongfei Yan and Bolan Yang and Chengwei Liu and Ming Cui and
                                Jiong Chen},
                year         = 2026,
                eprint       = {arXiv:2606.30345},
            }"""),
        status="seen-paper, seen-code",
    )


class BestSuccess(SiblingContext):
    """
    The teacher of a wrong rollout reads the correct one of its group with the highest reward, of equally good ones the
    shortest; where there is none, the best that the prompt had in earlier batches. Other rollouts have no context.

    Args:
        buffer_size (`int`, *optional*, defaults to `50000`):
            Prompts whose best success is remembered, those that succeeded last. 0 remembers none.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{attempt}`, besides any dataset
            columns.
        strip_thinking (`bool`, *optional*, defaults to `False`):
            Whether to leave out the attempt's reasoning up to `</think>`.

    Raises:
        ValueError: If `buffer_size` is negative, or the template is malformed.
    """

    def __init__(self, buffer_size: int = 50_000, template: str | None = None, strip_thinking: bool = False):
        super().__init__(template, strip_thinking)
        if buffer_size < 0:
            raise ValueError(f"`buffer_size` must not be negative, got {buffer_size}.")
        self.buffer_size = buffer_size
        # By prompt: reward, number of tokens with the sign turned, and text
        self._successes: dict[str, tuple[float, int, str]] = {}

    def chosen(self, rollouts: Rollouts) -> Rollout | None:
        return None if rollouts.own.correct is not False else self._best(rollouts.all)

    def _best(self, rollouts: Sequence[Rollout]) -> Rollout | None:
        return max((one for one in rollouts if one.correct and self.shown(one)), key=_rank, default=None)

    def teacher_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        if rollouts is None or self.chosen(rollouts) is not None or not self._reads_buffer(row, rollouts):
            return super().teacher_messages(row, rollouts)
        return self.rewritten(row, attempt=self._successes[prompt_text(row)][2])

    def _reads_buffer(self, row: Mapping[str, Any], rollouts: Rollouts) -> bool:
        return (
            rollouts.own.correct is False and self._best(rollouts.all) is None and prompt_text(row) in self._successes
        )

    def rates(self, rows: Sequence[Mapping[str, Any]], groups: Sequence[Rollouts]) -> dict[str, tuple[float, float]]:
        """How many wrong rollouts read a success of an earlier batch."""
        wrong = [(row, group) for row, group in zip(rows, groups, strict=True) if group.own.correct is False]
        return {"buffer/read_rate": (sum(self._reads_buffer(row, group) for row, group in wrong), len(wrong))}

    def remember(self, groups: Sequence[tuple[Mapping[str, Any], list[Rollout]]]) -> None:
        for row, rollouts in groups:
            best, key = self._best(rollouts), prompt_text(row)
            if best is not None:
                success = (*_rank(best), self.shown(best))
                # At the end, as the one that succeeded last
                self._successes[key] = max(success, self._successes.pop(key, success), key=lambda its: its[:2])
        for key in list(self._successes)[: max(0, len(self._successes) - self.buffer_size)]:
            del self._successes[key]

    def state_dict(self) -> dict[str, Any]:
        return {key: list(success) for key, success in self._successes.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._successes = {key: (reward, length, text) for key, (reward, length, text) in state.items()}


def _rank(rollout: Rollout) -> tuple[float, int]:
    return rollout.reward or 0.0, -len(rollout.token_ids)


def prompt_text(row: Mapping[str, Any]) -> str:
    """What tells a row's prompt from others."""
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else as_text(prompt)
    return json.dumps([[message["role"], message["content"]] for message in messages])


@dataclass
class ByDifficulty(Advantage):
    """
    A·γ(r) for correct rollouts, with r a moving average of the pass rate of the prompt that the batch at hand is in,
    and 0 for wrong ones.

    Args:
        hard (`float`, *optional*, defaults to `0.2`):
            A prompt with less than this pass rate is hard: γ = 0.
        easy (`float`, *optional*, defaults to `0.8`):
            One with more is easy: γ = `easy_weight`. Between them, γ = 1.
        easy_weight (`float`, *optional*, defaults to `0.5`):
            γ of easy prompts.
        share (`float`, *optional*, defaults to `0.3`):
            Share of the newest pass rate in the average.
    """

    hard: float = 0.2
    easy: float = 0.8
    easy_weight: float = 0.5
    share: float = 0.3
    _rates: PassRates = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.hard <= self.easy <= 1.0:
            raise ValueError(f"`hard` and `easy` must be in [0, 1], in this order, got {self.hard} and {self.easy}.")
        self._rates = PassRates(self.share)

    @property
    def needs_scores(self) -> bool:
        return False

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        self._rates.see(batch)
        pairs = zip(batch.prompt_keys.flatten().tolist(), batch.success_rate.flatten().tolist(), strict=True)
        # What has not been seen is of an evaluation
        rates = [rate if (seen := self._rates[key]) is None else seen for key, rate in pairs]
        difficulty = batch.rewards.new_tensor(rates).view(-1, 1)
        is_hard, is_easy = difficulty < self.hard, difficulty > self.easy
        number = is_hard.new_tensor(len(is_hard), dtype=torch.int64)
        batch.log("difficulty/hard_rate", is_hard.sum(), number)
        batch.log("difficulty/easy_rate", is_easy.sum(), number)
        weights = torch.where(is_hard, 0.0, torch.where(is_easy, self.easy_weight, 1.0))
        return torch.where(batch.correct, batch.advantages * weights, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"rates": self._rates.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rates.load_state_dict(state["rates"])
