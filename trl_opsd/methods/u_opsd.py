import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from textwrap import dedent
from typing import Any, ClassVar, NamedTuple

from ..context import Rollout, Rollouts, SiblingContext
from ..parts import import_object
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class UOPSDConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 8,
        "privileged_context": "trl_opsd.methods.u_opsd.MajorityForOther",
        "teacher": "initial",
        "divergence": "forward_kl",
        "temperature": 1.1,
        "top_p": 0.95,
        "top_k": 20,
        "chat_template_kwargs": {"enable_thinking": False},
        "max_completion_length": 4096,
        "learning_rate": 5e-6,
        "max_grad_norm": 0.1,
    },
):
    r"""
    Learn from what most of the own attempts agree on, without labels.

    Defaults of U-OPSD, from [On-Policy Self-Distillation without Any
    Supervision](https://huggingface.co/papers/2608.06296). Of 8 rollouts of a prompt, the answer that most give is
    taken for right. The shortest rollout that gives it, y⁺, is what the initial policy reads while it scores one that
    gives another, y⁻:

    L = mean over prompts of 1/|y⁻| Σ_t KL(p_T ‖ p_S), p_T = p(· | x, y⁺, y⁻₍<t₎), p_S = p(· | x, y⁻₍<t₎).

    A prompt has no such pair, and counts in no mean, if all answers agree, none can be read, or the share of those
    that agree is below `threshold`. No reward takes part. See [`MajorityForOther`].

    The paper says two things twice. The teacher is the initial policy in its ablations, the default here, and the
    current one in its method (`teacher="live"`). y⁻ is drawn in its algorithm, the default here, and the longest one
    in its abstract (`other: longest` in `context_kwargs`).

    Chosen here: the share is one of the rollouts whose answer can be read; no entry of the divergence is clipped, as
    in the paper's formula; the teacher's chat template does not think either. The wording of the teacher's prompt is
    this library's.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="U-OPSD",
        paper="2608.06296",
        title="On-Policy Self-Distillation without Any Supervision",
        citation=dedent("""\
            @article{li2026onpolicy,
                title        = {{On-Policy Self-Distillation without Any Supervision}},
                author       = {Yijiang Li and Bingyang Wang and Yijun Liang and Yunjie Tian and Di Fu and
                                Nuno Vasconcelos},
                year         = 2026,
                eprint       = {arXiv:2608.06296},
            }"""),
        status="seen-paper",
    )


_AGREED = """{prompt}

For your eyes only, this is an attempt at the problem. Most others end with the same answer.

<<< attempt >>>
{attempt}
<<< end of attempt >>>

Understand how it gets there, then solve the problem yourself in your own words, without mentioning the attempt. Give \
the final answer in the form the problem asks for."""


class Vote(NamedTuple):
    """
    What the rollouts of a prompt agree on.

    Args:
        agreeing (`tuple[int, ...]`):
            Those with the answer that most give, by their positions.
        others (`tuple[int, ...]`):
            Those with another one. What cannot be read is in neither.
    """

    agreeing: tuple[int, ...]
    others: tuple[int, ...]

    @property
    def share(self) -> float:
        """Share of the first among both."""
        return len(self.agreeing) / max(1, len(self.agreeing) + len(self.others))


class MajorityForOther(SiblingContext):
    """
    The teacher of one rollout whose answer differs from that of most reads one that agrees with them. No other rollout
    has a context, and none in a group whose answers all agree, cannot be read, or agree too little.

    Args:
        threshold (`float`, *optional*, defaults to `0.5`):
            Least share of the answers that can be read, that have to agree.
        agreeing (`str`, *optional*, defaults to `"shortest"`):
            Which of those that agree is read: the `"shortest"` or the `"longest"`.
        other (`str`, *optional*, defaults to `"any"`):
            Which of the others has a context: `"any"` draws one, `"longest"` takes the longest.
        answer_of (`str`, *optional*):
            Import path of a function from the text of a completion to its answer, `None` if it gives none. Defaults to
            the scorer of the evaluation.
        same_answer (`str`, *optional*):
            Import path of a function from two answers to whether they are the same. Defaults to that scorer's, by
            which 1/2 is 0.5.
        seed (`int`, *optional*, defaults to `0`):
            Decides, with the texts, which answer wins of several that as many give, and what is drawn.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholders `{prompt}` and `{attempt}`, besides any dataset
            columns.
        strip_thinking (`bool`, *optional*, defaults to `False`):
            Whether to leave out the attempt's reasoning up to `</think>`.

    Raises:
        ValueError: If a value is out of range, or a path cannot be imported.
    """

    needs_rewards = False

    def __init__(
        self,
        threshold: float = 0.5,
        agreeing: str = "shortest",
        other: str = "any",
        answer_of: str = "trl_opsd.eval.scorer.answer_of",
        same_answer: str = "trl_opsd.eval.scorer.is_same_answer",
        seed: int = 0,
        template: str | None = None,
        strip_thinking: bool = False,
    ):
        super().__init__(_AGREED if template is None else template, strip_thinking)
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"`threshold` must be in [0, 1], got {threshold}.")
        for name, value, known in (("agreeing", agreeing, _AGREEING), ("other", other, _OTHERS)):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {list(known)}, got {value!r}.")
        self.threshold, self.agreeing, self.other, self.seed = threshold, agreeing, other, seed
        self._answer_of, self._is_same = _imported("answer_of", answer_of), _imported("same_answer", same_answer)
        self.vote = lru_cache(maxsize=1024)(self._vote)  # asked once for each rollout of a group

    def _one_of(self, candidates: Sequence[Any], what: str, texts: tuple[str, ...]) -> Any:
        return random.Random("\n".join([str(self.seed), what, *texts])).choice(candidates)

    def _vote(self, texts: tuple[str, ...]) -> Vote:
        camps: list[tuple[Any, list[int]]] = []
        for index, text in enumerate(texts):
            answer = self._answer_of(text)
            if answer is None:
                continue
            camp = next((members for theirs, members in camps if self._is_same(theirs, answer)), None)
            if camp is None:
                camps.append((answer, [index]))
            else:
                camp.append(index)
        if not camps:
            return Vote((), ())
        most = max(len(members) for _, members in camps)
        winner = self._one_of([members for _, members in camps if len(members) == most], "winner", texts)
        return Vote(tuple(winner), tuple(sorted(index for _, its in camps if its is not winner for index in its)))

    def chosen(self, rollouts: Rollouts) -> Rollout | None:
        texts = tuple(rollouts.texts)
        vote = self.vote(texts)
        if not vote.others or vote.share < self.threshold:
            return None
        if self.other == "any":
            scored = self._one_of(vote.others, "other", texts)
        else:
            scored = max(vote.others, key=lambda index: len(rollouts.all[index].token_ids))
        if scored != rollouts.index:
            return None
        return _AGREEING[self.agreeing]([rollouts.all[index] for index in vote.agreeing], key=_length)

    def rates(self, rows: Sequence[Mapping[str, Any]], groups: Sequence[Rollouts]) -> dict[str, tuple[float, float]]:
        """What there was to agree on: of each rollout's group."""
        votes = [self.vote(tuple(rollouts.texts)) for rollouts in groups]
        read = [vote for vote in votes if vote.agreeing]
        split = [vote for vote in read if vote.others]
        return {
            "votes/unreadable_rate": (len(votes) - len(read), len(votes)),
            "votes/unanimous_rate": (len(read) - len(split), len(votes)),
            "votes/below_threshold_rate": (sum(vote.share < self.threshold for vote in split), len(votes)),
            "votes/mean_share": (sum(vote.share for vote in read), len(read)),
        }


def _length(rollout: Rollout) -> int:
    return len(rollout.token_ids)


def _imported(name: str, path: str) -> Any:
    try:
        return import_object(path)
    except ImportError as error:
        raise ValueError(f"`{name}={path!r}` cannot be imported: {error}.") from error


_AGREEING: dict[str, Any] = {"shortest": min, "longest": max}
_OTHERS = ("any", "longest")
