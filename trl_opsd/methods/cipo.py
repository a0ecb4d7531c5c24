import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import floor
from textwrap import dedent
from typing import Any, ClassVar

import numpy as np
import torch

from ..context import Rollout, Rollouts, TextContext
from ..sampling.prompts import RewardingPromptSource, Row
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class CIPOConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 8,
        "privileged_context": "none",
        "teacher": "live",
        "prompts": "trl_opsd.methods.cipo.Corrections",
        "divergence_coef": 0.0,
        "policy_loss_coef": 1.0,
        "scale_rewards": "none",
        "temperature": 1.0,
        "max_completion_length": 4096,
        "learning_rate": 1e-6,
    },
):
    r"""
    Train with rewards, also on correcting own attempts without knowing whether they are right.

    Defaults of CIPO, from [Learning from Failures: Correction-Oriented Policy Optimization with Verifiable
    Rewards](https://huggingface.co/papers/2605.14539). Half of the prompts of a batch show a rollout y_c of the batch
    before, and ask for a better answer y′. Both halves have GRPO's loss, each group with its own mean, and y′ has the
    reward

    R(y′) − λ_risk · 1[R(y_c) = 1 and R(y′) = 0].

    How many of the shown attempts are right follows from how well they are kept. See [`Corrections`]. There is no
    teacher. It needs a reward.

    All rollouts of one correction show the same y_c, so that the risk turns the rewards {1, 0} of a group into
    {1, −1}: divided by their standard deviation, advantages do not change. **Chosen here: they are not divided**
    (`scale_rewards="none"`), so that the risk counts; with `scale_rewards="group"` it acts through the ratio alone,
    and a warning says so. `rewards/risk/mean` is logged either way.

    Deviations: a batch does not grow, so that corrections take the place of half of its rows, which come again in
    the next epoch, and the loss is the mean over both halves where the paper adds them. Of each prompt at most one
    right and one wrong rollout, the first, can be shown; a rollout that would leave no room for a completion is not,
    and counted. The KL of the paper, 1e-4, is `beta` of its recipe. Chosen here: the number of steps below the target
    that the ratio reads begins anew once it is reached. The wording of the prompt is this library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="CIPO",
        paper="2605.14539",
        title="Learning from Failures: Correction-Oriented Policy Optimization with Verifiable Rewards",
        citation=dedent("""\
            @article{ren2026learning,
                title        = {{Learning from Failures: Correction-Oriented Policy Optimization with Verifiable
                                Rewards}},
                author       = {Mengjie Ren and Jie Lou and Boxi Cao and Xueru Wen and Hongyu Lin and Xianpei Han and
                                Le Sun and Xing Yu and Yaojie Lu},
                year         = 2026,
                eprint       = {arXiv:2605.14539},
            }"""),
        status="seen-paper",
    )


_CORRECT = """{prompt}

Here is an attempt at this problem, which may be right or wrong.

<<< attempt >>>
{attempt}
<<< end of attempt >>>

Check it, keep what holds, mend what does not, and give a complete solution of your own, with the final answer in the \
form the problem asks for."""

_COLUMN = "anchor_correct"  # of every row: whether the attempt it shows is right, `None` without one


@dataclass
class Ratio:
    """
    ρ ← clip(ρ·[1 + 0.8·(R* − R) + 0.3·max(0, R_before − R) + 0.05·min(c, 3)], 0.2, 0.8), with R the mean reward of
    corrections of right attempts, R* = `target`, and c the number of updates in a row with R < R*, this one included.

    Args:
        value (`float`, *optional*, defaults to `0.3`):
            ρ, the share of right attempts among those that are shown.
        target (`float`, *optional*, defaults to `0.8`):
            R*. With rewards 1 and −1, 0.8 means that nine of ten right attempts stay right.
    """

    value: float = 0.3
    target: float = 0.8
    before: float | None = None
    num_below: int = 0

    def update(self, reward: float) -> None:
        """Follow the mean reward of a batch."""
        self.num_below = self.num_below + 1 if reward < self.target else 0
        drop = 0.0 if self.before is None else max(0.0, self.before - reward)
        factor = 1 + 0.8 * (self.target - reward) + 0.3 * drop + 0.05 * min(self.num_below, 3)
        self.value, self.before = min(max(self.value * factor, 0.2), 0.8), reward


class Corrections(RewardingPromptSource):
    """
    Replaces prompts by others that show an attempt of the batch before and do not say whether it is right. Attempts at
    prompts of which 3/8 to 6/8 of the rollouts are right come first, in random order, then all others. Of N, the
    smaller of ⌊ρN⌋ and what there is are right, the rest is wrong, and what is missing right again.

    Args:
        share (`float`, *optional*, defaults to `0.5`):
            Share of the prompts of a batch that are replaced.
        risk (`float`, *optional*, defaults to `1.0`):
            λ_risk.
        ratio (`float`, *optional*, defaults to `0.3`):
            ρ to begin with, see [`Ratio`].
        target (`float`, *optional*, defaults to `0.8`):
            R*.
        template (`str`, *optional*):
            Text of the last user turn, with the placeholders `{prompt}` and `{attempt}`, besides any dataset columns.

    Raises:
        ValueError: If a value is out of range, or the template is malformed.
    """

    reward_name = "risk"

    def __init__(
        self,
        share: float = 0.5,
        risk: float = 1.0,
        ratio: float = 0.3,
        target: float = 0.8,
        template: str = _CORRECT,
    ):
        if not 0.0 <= share <= 1.0 or not 0.0 <= ratio <= 1.0:
            raise ValueError(f"`share` and `ratio` must be in [0, 1], got {share} and {ratio}.")
        if risk < 0:
            raise ValueError(f"`risk` must not be negative, got {risk}.")
        self.share, self.risk, self.ratio = share, risk, Ratio(ratio, target)
        self._text = TextContext(template, "attempt")
        # Of the batch before: the row, the share of its rollouts that are right, and a right and a wrong one's text
        self._attempts: list[tuple[dict[str, Any], float, dict[str, str]]] = []
        self._shown: list[bool | None] = []  # of each group of the batch at hand
        self._num_too_long = self._num_tried = 0

    def check_run(self, scale_rewards: str) -> None:
        """Warn where the risk changes no advantage."""
        if scale_rewards == "group" and self.risk:
            warnings.warn(
                f"With `scale_rewards='group'`, `risk={self.risk}` changes no advantage: all rollouts of a correction "
                "have it or none, and the standard deviation takes it out again. It acts through the ratio alone. Set "
                "`scale_rewards='none'` for the advantages to show it.",
                stacklevel=2,
            )

    def __call__(self, rows: Sequence[Row], fits: Callable[[Any], bool], step: int, seed: int) -> list[Row]:
        numbers = np.random.default_rng([seed, step])
        corrections = self._corrections(floor(self.share * len(rows)), fits, numbers)
        made: list[Row] = [{**row, _COLUMN: None} for row in rows]
        for place, row in zip(sorted(numbers.permutation(len(rows))[: len(corrections)]), corrections, strict=True):
            made[place] = row
        self._shown = [row[_COLUMN] for row in made]
        return made

    def _corrections(self, number: int, fits: Callable[[Any], bool], numbers: np.random.Generator) -> list[Row]:
        order = numbers.permutation(len(self._attempts))
        ranked = sorted((self._attempts[index] for index in order), key=lambda its: not 3 / 8 <= its[1] <= 6 / 8)
        self._num_too_long = self._num_tried = 0
        right, wrong = (self._fitting(ranked, is_right, fits) for is_right in (True, False))
        made = list(islice(right, floor(self.ratio.value * number)))
        made += islice(wrong, number - len(made))
        return made + list(islice(right, number - len(made)))

    def _fitting(self, ranked: Sequence[tuple[Any, ...]], is_right: bool, fits: Callable[[Any], bool]) -> Any:
        for row, _, texts in ranked:
            if str(is_right) in texts:
                corrected = {**row, "prompt": self._prompt(row, texts[str(is_right)]), _COLUMN: is_right}
                is_fitting = fits(corrected["prompt"])
                self._num_tried, self._num_too_long = self._num_tried + 1, self._num_too_long + (not is_fitting)
                if is_fitting:
                    yield corrected

    def _prompt(self, row: Row, attempt: str) -> Any:
        is_plain = isinstance(row["prompt"], str)
        prompt = [{"role": "user", "content": row["prompt"]}] if is_plain else row["prompt"]
        messages = self._text.rewritten({**row, "prompt": prompt}, attempt=attempt)
        return messages[0]["content"] if is_plain else messages

    def reward(self, correct: torch.Tensor) -> torch.Tensor:
        was_right = correct.new_tensor([shown is True for shown in self._shown]).view(-1, 1)
        return -self.risk * was_right * (correct == 0)

    def rates(self, rows: Sequence[Row], groups: Sequence[Rollouts]) -> dict[str, tuple[float, float]]:
        """How many are corrections, of what, and what became of them."""
        shown = [(row.get(_COLUMN), group.own.correct is True) for row, group in zip(rows, groups, strict=True)]
        right, wrong = ([is_right for was_right, is_right in shown if was_right is kind] for kind in (True, False))
        number = len(right) + len(wrong)
        return {
            "corrections/rate": (number, len(rows)),
            "corrections/of_right_rate": (len(right), number),
            "corrections/kept_rate": (sum(right), len(right)),
            "corrections/mended_rate": (sum(wrong), len(wrong)),
            "corrections/too_long_rate": (self._num_too_long, self._num_tried),
            "corrections/ratio": (self.ratio.value, 1.0),
        }

    def remember(self, groups: Sequence[tuple[Mapping[str, Any], list[Rollout]]]) -> None:
        rewards = [one.reward for row, its in groups if row[_COLUMN] is True for one in its if one.reward is not None]
        if rewards:
            self.ratio.update(sum(rewards) / len(rewards))
        self._attempts = []
        for row, rollouts in groups:
            graded = [rollout for rollout in rollouts if rollout.correct is not None and rollout.text.strip()]
            if row[_COLUMN] is None and graded:
                texts = {str(rollout.correct): rollout.text for rollout in reversed(graded)}  # the first of each kind
                original = {name: value for name, value in row.items() if name != _COLUMN}
                self._attempts.append((original, sum(one.correct is True for one in graded) / len(graded), texts))

    def state_dict(self) -> dict[str, Any]:
        return {"ratio": vars(self.ratio), "attempts": self._attempts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ratio = Ratio(**state["ratio"])
        self._attempts = [(row, rate, texts) for row, rate, texts in state["attempts"]]
