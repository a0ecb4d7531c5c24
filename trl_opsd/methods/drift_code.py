from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..context import Message, Rollout, Rollouts, SiblingContext
from ..signal import Advantage, Batch, TokenScores, TokenWeighting
from ..trainer.method import Method
from .drift import DRIFTConfig, prompt_text


@dataclass
class DRIFTCodeConfig(
    DRIFTConfig,
    defaults={
        "privileged_context": "trl_opsd.methods.drift_code.AnySuccess",
        "token_weights": {"importance_clip": {"most": 2.0}, "trl_opsd.methods.drift_code.Corrected": {}},
        "advantage": "trl_opsd.methods.drift_code.Reinforced",
    },
):
    r"""
    Distil failures and reinforce successes by how far a prompt is hard, medium or easy.

    Defaults of the released pseudocode of DRIFT, from [DRIFT: Difficulty Routing Self-DIstillation with Rhythm-Gated
    Exploration and Success BuFfer Training](https://huggingface.co/papers/2606.30345), which routes rollouts otherwise
    than the paper's equations ([`DRIFTConfig`]). A prompt is hard, medium and easy by shares h, m and e, see
    [`Difficulty`]. Every rollout has a teacher, who reads another success of the group, or one of an earlier batch:

    - wrong ones have SDPO's loss, weighted by h + 0.35·e, see [`Corrected`];
    - right ones have GRPO's, whose advantage is multiplied by 0.3·h + m + 0.05·e and, where the student is surer of a
      token than its teacher, by more, see [`Reinforced`];
    - a rollout without a teacher has GRPO's as it is.

    It needs a reward. What is remembered is kept in checkpoints.

    Deviations: the gate of the bonus by rhythm, which the pseudocode calls and does not hold, is open, as where it is
    switched off; no warm-up by distillation alone; pass rates are never forgotten all at once; a step is a generation
    batch. Chosen here: the weight of the bonus, of which the pseudocode has no value; what SDPO's other settings are
    without feedback; both losses weigh the same, each a mean over its tokens. The wording of the prompt is this
    library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="DRIFT-Code",
        paper="2606.30345",
        title=DRIFTConfig.method.title,
        citation=DRIFTConfig.method.citation,
        status="seen-code",
    )


class AnySuccess(SiblingContext):
    """
    The teacher reads the first other correct rollout of the group; where there is none, the best that the prompt had
    in earlier batches, of equally good ones the newest, unless it is the rollout itself.

    Args:
        buffer_size (`int`, *optional*, defaults to `50000`):
            Prompts whose successes are remembered, those whose best is best and newest.
        template (`str`, *optional*):
            See [`SiblingContext`].
        strip_thinking (`bool`, *optional*, defaults to `False`):
            See [`SiblingContext`].
        per_prompt (`int`, *optional*, defaults to `4`):
            Successes that are remembered of each.

    Raises:
        ValueError: If `buffer_size` or `per_prompt` is below 1, or the template is malformed.
    """

    def __init__(
        self,
        buffer_size: int = 50_000,
        template: str | None = None,
        strip_thinking: bool = False,
        per_prompt: int = 4,
    ):
        super().__init__(template, strip_thinking)
        if buffer_size < 1 or per_prompt < 1:
            raise ValueError(f"`buffer_size` and `per_prompt` must be at least 1, got {buffer_size} and {per_prompt}.")
        self.buffer_size, self.per_prompt = buffer_size, per_prompt
        self._num_batches = 0
        # By prompt, the best first: reward, number of the batch, and text
        self._successes: dict[str, list[tuple[float, int, str]]] = {}

    def chosen(self, rollouts: Rollouts) -> Rollout | None:
        return next((one for one in rollouts.others(correct=True) if self.shown(one)), None)

    def teacher_messages(self, row: Mapping[str, Any], rollouts: Rollouts | None) -> list[Message] | None:
        text = None if rollouts is None else self._earlier(row, rollouts)
        return super().teacher_messages(row, rollouts) if text is None else self.rewritten(row, attempt=text)

    def _earlier(self, row: Mapping[str, Any], rollouts: Rollouts) -> str | None:
        if self.chosen(rollouts) is not None or rollouts.own.correct is None:
            return None
        remembered, own = self._successes.get(prompt_text(row), []), self.shown(rollouts.own)
        return next((text for _, _, text in remembered if text != own), None)

    def rates(self, rows: Sequence[Mapping[str, Any]], groups: Sequence[Rollouts]) -> dict[str, tuple[float, float]]:
        """How many rollouts read a success of an earlier batch."""
        read = [self._earlier(row, group) is not None for row, group in zip(rows, groups, strict=True)]
        return {"buffer/read_rate": (sum(read), len(read))}

    def remember(self, groups: Sequence[tuple[Mapping[str, Any], list[Rollout]]]) -> None:
        self._num_batches += 1
        for row, rollouts in groups:
            new = {self.shown(one): (one.reward or 0.0, self._num_batches) for one in rollouts if one.correct}
            old = {text: (reward, number) for reward, number, text in self._successes.get(prompt_text(row), [])}
            known = [(*rank, text) for text, rank in (old | new).items() if text]
            if known:
                self._successes[prompt_text(row)] = sorted(known, key=_rank, reverse=True)[: self.per_prompt]
        if len(self._successes) > self.buffer_size:
            ranked = sorted(self._successes.items(), key=lambda item: _rank(item[1][0]), reverse=True)
            self._successes = dict(ranked[: self.buffer_size])

    def state_dict(self) -> dict[str, Any]:
        return {"num_batches": self._num_batches, "successes": self._successes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_batches = state["num_batches"]
        self._successes = {key: [(a, b, c) for a, b, c in some] for key, some in state["successes"].items()}


def _rank(success: tuple[float, int, str]) -> tuple[float, int]:
    return success[:2]


class Difficulty:
    """
    How far prompts are hard, medium and easy: σ((0.3 − r) / 0.08), what both others leave, and σ((r − 0.7) / 0.08),
    divided by their sum. r = c·(s + 1) / (s + f + 2) + (1 − c)·½, with s and f the number of right and wrong rollouts
    of the prompt, those of an earlier batch times 0.85 for each batch since, and c = (s + f) / (s + f + 8).
    """

    decay, doubt, low, high, softness = 0.85, 8.0, 0.3, 0.7, 0.08

    def __init__(self) -> None:
        self._num_batches = 0
        self._seen: dict[int, tuple[float, float, int]] = {}  # by prompt: right, wrong, number of the batch

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Shares h, m and e of each rollout's prompt, each of shape `(B, 1)`. All processes call this at once."""
        number = batch.group(batch.rewards).size(1)
        keys, rates = (batch.gather(values).flatten().tolist() for values in (batch.prompt_keys, batch.success_rate))
        now = {key: rate * number for key, rate in zip(keys, rates, strict=True) if rate == rate}
        counts = {key: self._counts(key, right, number) for key, right in now.items()}
        if batch.is_training:
            self._num_batches += 1
            self._seen |= {key: (*its, self._num_batches) for key, its in counts.items()}
        rate = [self._rate(*counts.get(key, (0.0, 0.0))) for key in batch.prompt_keys.flatten().tolist()]
        estimate = batch.rewards.new_tensor(rate).view(-1, 1)
        hard = torch.sigmoid((self.low - estimate) / self.softness)
        easy = torch.sigmoid((estimate - self.high) / self.softness)
        shares = torch.stack([hard, (1 - hard) * (1 - easy), easy])
        hard, medium, easy = shares / shares.sum(dim=0)
        return hard, medium, easy

    def _counts(self, key: int, right: float, number: int) -> tuple[float, float]:
        before, failed, when = self._seen.get(key, (0.0, 0.0, self._num_batches + 1))
        kept = self.decay ** (self._num_batches + 1 - when)
        return kept * before + right, kept * failed + number - right

    def _rate(self, right: float, wrong: float) -> float:
        certainty = (right + wrong) / (right + wrong + self.doubt)
        return certainty * (right + 1) / (right + wrong + 2) + (1 - certainty) * 0.5

    def state_dict(self) -> dict[str, Any]:
        return {"num_batches": self._num_batches, "seen": {str(key): list(its) for key, its in self._seen.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_batches = state["num_batches"]
        self._seen = {int(key): (right, wrong, when) for key, (right, wrong, when) in state["seen"].items()}


@dataclass
class Corrected(TokenWeighting):
    """
    `hard`·h + `medium`·m + `easy`·e for wrong rollouts in the divergence, which counts no others.

    Args:
        hard (`float`, *optional*, defaults to `1.0`):
            Weight of the share in which the prompt is hard.
        medium (`float`, *optional*, defaults to `0.0`):
            In which it is medium.
        easy (`float`, *optional*, defaults to `0.35`):
            In which it is easy.
    """

    hard: float = 1.0
    medium: float = 0.0
    easy: float = 0.35
    terms: ClassVar[tuple[str, ...]] = ("divergence",)
    selects: ClassVar[bool] = True
    needs_reward: ClassVar[bool] = True
    _difficulty: Difficulty = field(default_factory=Difficulty, init=False, repr=False)

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        hard, medium, easy = self._difficulty(batch)
        weights = self.hard * hard + self.medium * medium + self.easy * easy
        return weights * (~batch.correct & ~batch.rewards.isnan())

    def state_dict(self) -> dict[str, Any]:
        return self._difficulty.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._difficulty.load_state_dict(state)


@dataclass
class Reinforced(Advantage):
    """
    Of rollouts that the teacher reads, 0 for wrong ones and for right ones A·(`hard`·h + `medium`·m + `easy`·e)·(1 +
    `bonus`·m·(clip(exp(max(−δ_t − `margin`, 0)), 1, `most`) − 1)); A of all others.

    Args:
        hard (`float`, *optional*, defaults to `0.3`):
            Weight of the share in which the prompt is hard.
        medium (`float`, *optional*, defaults to `1.0`):
            In which it is medium.
        easy (`float`, *optional*, defaults to `0.05`):
            In which it is easy.
        bonus (`float`, *optional*, defaults to `1.0`):
            Weight of what a token has besides. At 0, no pass of the teacher is taken for it.
        margin (`float`, *optional*, defaults to `0.2`):
            By which the student's log-probability has to be above the teacher's, in nats.
        most (`float`, *optional*, defaults to `2.0`):
            Largest factor.
    """

    hard: float = 0.3
    medium: float = 1.0
    easy: float = 0.05
    bonus: float = 1.0
    margin: float = 0.2
    most: float = 2.0
    _difficulty: Difficulty = field(default_factory=Difficulty, init=False, repr=False)

    @property
    def needs_scores(self) -> bool:
        return self.bonus != 0.0

    def __call__(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        hard, medium, easy = self._difficulty(batch)
        number = torch.ones_like(hard).sum()
        batch.log("difficulty/hard_rate", hard.sum(), number)
        batch.log("difficulty/easy_rate", easy.sum(), number)
        weights = (self.hard * hard + self.medium * medium + self.easy * easy) * batch.correct
        advantages = torch.where(batch.has_context, batch.advantages * weights, batch.advantages)
        if scores is None:
            return advantages
        surer = (-scores.delta - self.margin).clamp(min=0.0).exp().clamp(max=self.most) - 1
        rewarded = scores.known & batch.correct
        batch.log("difficulty/bonus", (self.bonus * medium * surer)[rewarded].sum(), rewarded.sum())
        return torch.where(rewarded, advantages * (1 + self.bonus * medium * surer), advantages)

    def state_dict(self) -> dict[str, Any]:
        return self._difficulty.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._difficulty.load_state_dict(state)
