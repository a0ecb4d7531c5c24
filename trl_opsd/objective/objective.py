"""Which divergence, over which part of the vocabulary: the choices that make an objective."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from .divergence import REWARDS, Divergence


Support = Literal["full", "teacher_top_k", "student_top_k", "union_top_k", "intersection_top_k", "sampled_token"]
Tail = Literal["bucket", "renormalize"]
Bounded = Literal["teacher", "ratio"]


@dataclass(frozen=True)
class Objective:
    """
    A divergence between the teacher's and the student's distribution of one token.

    Args:
        divergence (`str`, *optional*, defaults to `"forward_kl"`):
            See [`pointwise_divergence`]. `"student_rewards"`, `"teacher_rewards"` and `"even_rewards"` need the
            top-k support of one side or of either, with `tail="bucket"`.
        jsd_weight (`float`, *optional*, defaults to `0.5`):
            See [`pointwise_divergence`].
        support (`str`, *optional*, defaults to `"full"`):
            Tokens whose entries are summed:

            - `"full"`: the vocabulary.
            - `"teacher_top_k"`, `"student_top_k"`, `"union_top_k"`, `"intersection_top_k"`: the `top_k` most probable
              tokens of the teacher, of the student, of either, or of both. The choice itself carries no gradient. The
              last needs `tail="renormalize"`; it is 0 where both have at most one token in common.
            - `"sampled_token"`: the one token the student sampled, as an unbiased estimate of the divergence and of
              its gradient for tokens sampled from the student at `temperature`: the entry ℓ_y divided by p_S,y, with
              a baseline that makes the gradient vanish where teacher and student agree. With `"reverse_kl"` this is
              the policy gradient whose advantage is log p_T,y − log p_S,y.
        top_k (`int`, *optional*, defaults to `16`):
            Size of the top-k sets: those of `support`, and those whose overlap is measured.
        tail (`str`, *optional*, defaults to `"bucket"`):
            What becomes of the probability outside a top-k support: `"bucket"` adds it as one more entry, so that the
            divergence is a lower bound of the full one; `"renormalize"` divides by the probability inside, so that
            the mass a student puts outside costs nothing.
        clip (`float`, *optional*):
            Upper bound τ on the entries before they are summed, Σ_v min(ℓ_v, τ), as in the released recipe of
            [Self-Distilled Reasoner](https://huggingface.co/papers/2601.18734).
        temperature (`float`, *optional*, defaults to `1.0`):
            Both sets of logits are divided by it. The loss is not multiplied by its square.
        ratio_low (`float`, *optional*):
            The teacher's probability of each entry is raised to this share of the student's, as in
            [RESD](https://huggingface.co/papers/2605.12741), see [`bounded`].
        ratio_high (`float`, *optional*):
            It is lowered to this multiple of the student's.
        bounded (`str`, *optional*, defaults to `"teacher"`):
            What is data where a ratio is out of bounds: `"teacher"`, whose probability is that multiple of what the
            student's is now, as in RESD's released code; or `"ratio"`, so that an entry is a constant times the
            student's probability, as in the paper. The values are the same, the gradients are not.

    Raises:
        ValueError: If a value is outside its range.
    """

    divergence: Divergence = "forward_kl"
    jsd_weight: float = 0.5
    support: Support = "full"
    top_k: int = 16
    tail: Tail = "bucket"
    clip: float | None = None
    temperature: float = 1.0
    ratio_low: float | None = None
    ratio_high: float | None = None
    bounded: Bounded = "teacher"

    @property
    def description(self) -> str:
        """The divergence, for people."""
        return {
            "forward_kl": "forward KL(teacher ‖ student)",
            "reverse_kl": "reverse KL(student ‖ teacher)",
            "jsd": f"JSD, weight {self.jsd_weight:g}",
            "student_rewards": "rewards weighted by the student",
            "teacher_rewards": "rewards weighted by the teacher",
            "even_rewards": "rewards",
        }[self.divergence] + f", temperature {self.temperature:g}{self._bounds}"

    @property
    def _bounds(self) -> str:
        bounds = {"at least": self.ratio_low, "at most": self.ratio_high}
        said = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
        return f", teacher/student {' and '.join(said)}" if said else ""

    def __post_init__(self) -> None:
        for name, choices in (
            ("divergence", get_args(Divergence)),
            ("support", get_args(Support)),
            ("tail", get_args(Tail)),
            ("bounded", get_args(Bounded)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {list(choices)}, got {getattr(self, name)!r}.")
        if not 0.0 <= self.jsd_weight <= 1.0:
            raise ValueError(f"`jsd_weight` must be in [0, 1], got {self.jsd_weight}.")
        if self.top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {self.top_k}.")
        rewarded = ("teacher_top_k", "student_top_k", "union_top_k")
        fits = self.support in rewarded and self.tail == "bucket" and self.clip is None
        if self.divergence in REWARDS and not fits:
            raise ValueError(
                f"`divergence='{self.divergence}'` rewards the tokens of a top-k support by their probabilities as "
                f"they are, which `support='{self.support}'`, `tail='{self.tail}'` and `clip={self.clip}` contradict. "
                f"Choose one of {list(rewarded)}, `tail='bucket'` and no clip, or `divergence='reverse_kl'`."
            )
        if self.support == "intersection_top_k" and self.tail != "renormalize":
            raise ValueError(
                "`support='intersection_top_k'` may have no token at all, which leaves nothing but the bucket of "
                f"`tail='{self.tail}'`. Set `tail='renormalize'`, or choose another support."
            )
        single = self.top_k == 1 and self.support in ("teacher_top_k", "student_top_k", "intersection_top_k")
        if single and self.tail == "renormalize":
            raise ValueError(
                "`top_k=1` with `tail='renormalize'` leaves one token of probability 1 on both sides, whose "
                "divergence is always 0. Raise `top_k`, or set `tail='bucket'`."
            )
        if self.bounded == "ratio" and (self.support == "sampled_token" or self.ratio_low == self.ratio_high is None):
            raise ValueError(
                "`bounded='ratio'` is about entries that `ratio_low` or `ratio_high` bounds, of a support that is not "
                "`'sampled_token'`. Set a bound and another support, or leave it at `'teacher'`."
            )
        if self.clip is not None and not self.clip > 0.0:
            raise ValueError(f"`clip` must be positive, got {self.clip}. Use `None` for no clipping.")
        for name, is_inside in (
            ("ratio_low", self.ratio_low is None or 0.0 < self.ratio_low <= 1.0),
            ("ratio_high", self.ratio_high is None or 1.0 <= self.ratio_high < math.inf),
        ):
            if not is_inside:
                raise ValueError(
                    f"`{name}` must be {'in (0, 1]' if name == 'ratio_low' else 'at least 1, and finite'}, got "
                    f"{getattr(self, name)}. Use `None` for no bound."
                )
        if not self.temperature > 0.0:
            raise ValueError(
                f"`temperature` must be positive, got {self.temperature}. Set one, also where sampling is greedy."
            )
