from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import dedent
from typing import Any, ClassVar

from ..context import TemplateContext
from ..sampling.sources import Completions, CompletionSource, Prompts, TokenIds, mixed, teacher_prompts
from ..trainer.config import SelfDistillationConfig
from ..trainer.method import Method


@dataclass
class BRTSConfig(
    SelfDistillationConfig,
    defaults={
        "num_generations": 2,
        "privileged_context": "none",
        "teacher": "external",
        "completions": "trl_opsd.methods.brts.BestOfTeacher",
        "completions_kwargs": {"num_candidates": 4},
        "divergence": "reverse_kl",
        "divergence_support": "student_top_k",
        "divergence_top_k": 16,
        "divergence_tail": "bucket",
        "replaced_divergence": {"divergence": "forward_kl", "support": "teacher_top_k", "top_k": 16, "tail": "bucket"},
        "token_weights": {"replaced": {"weight": 10.0}},
        "loss_type": "dapo",
        "temperature": 1.0,
        "max_completion_length": 7168,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
    },
):
    r"""
    Learn from another model on own rollouts, and on the best of its own.

    Defaults of BRTS, from [On-Policy Distillation with Best-of-N Teacher Rollout
    Selection](https://huggingface.co/papers/2605.09725). Of the two completions of a prompt, one is the student's ŷ
    and the other the teacher's y′, chosen among several, see [`BestOfTeacher`]:

    L = Σ_t KL(p_S ‖ p_T)(ŷ₍<t₎) + λ · Σ_t KL(p_T ‖ p_S)(y′₍<t₎),

    over the student's 16 most probable tokens in the first and the teacher's in the second, and one entry for all
    others; λ = 10 is the `weight` of `replaced` in `token_weights`. The teacher is another model
    (`teacher_model_name_or_path`) with the student's vocabulary, and reads what the student reads. It needs a reward,
    and an `answer` column.

    The released code differs from the paper: its second term is off by default and, unless its mode is changed, has a
    gradient without a teacher in it. This is the paper's. Deviations: both terms are one mean over all tokens, so that
    λ is the ratio of a token's weights, where the code has a mean of each; how near a teacher's completion is to the
    student, is read along that completion, where the code compares it with another sequence place by place; the
    wording of the guided prompt is this library's. Chosen here: the entry for all other tokens (`tail`), and that of
    two right completions as near, the first is taken.

    All parameters are those of [`SelfDistillationConfig`].
    """

    method: ClassVar[Method] = Method(
        name="BRTS",
        paper="2605.09725",
        title="On-Policy Distillation with Best-of-N Teacher Rollout Selection",
        citation=dedent("""\
            @article{zhang2026onpolicy,
                title        = {{On-Policy Distillation with Best-of-N Teacher Rollout Selection}},
                author       = {Ke Zhang and Yunjie Tian and Dongdi Zhao and Yijiang Li and Yuanye Liu and
                                Vishal M. Patel and Di Fu},
                year         = 2026,
                eprint       = {arXiv:2605.09725},
            }"""),
        status="seen-paper, seen-code",
    )


_GUIDED = """{prompt}

Between us: the final answer should come out as {answer}. Keep it to yourself. Work the problem out from what it says \
and nothing else, never mention that you were told, and only when you have arrived somewhere look whether it agrees; \
if it does not, find the mistake. Give the final answer in the form the problem asks for."""


class BestOfTeacher(CompletionSource):
    """
    One of several completions of the teacher's in the place of every second rollout of a prompt:

    1. of those that are right, the one that is nearest to the student, as the share of its tokens that are among the
       `top_k` which the student, reading it, finds most probable;
    2. if none is right, one that the teacher writes from a prompt that tells the answer, if that is right;
    3. else, of the wrong ones, the nearest.

    The teacher reads that prompt to write, and never to score. Rewards are computed here, and once more for the whole
    batch as always.

    Args:
        num_candidates (`int`, *optional*, defaults to `4`):
            Completions to choose among.
        guided (`bool`, *optional*, defaults to `True`):
            Whether there is the second of these.
        temperature (`float`, *optional*, defaults to `0.7`):
            Temperature that the teacher samples at.
        top_p (`float`, *optional*, defaults to `0.95`):
            Probability of the tokens that it samples from.
        top_k (`int`, *optional*, defaults to `16`):
            Number of tokens that are near.
        column (`str`, *optional*, defaults to `"answer"`):
            Dataset column with the answer.
        template (`str`, *optional*):
            Text of the last user turn that tells it, with the placeholders `{prompt}` and `{<column>}`.

    Raises:
        ValueError: If a number is out of range, or the template is malformed.
    """

    needs_rewards = True
    samples_teacher = True
    group_size = 2

    def __init__(
        self,
        num_candidates: int = 4,
        guided: bool = True,
        temperature: float = 0.7,
        top_p: float = 0.95,
        top_k: int = 16,
        column: str = "answer",
        template: str | None = None,
    ):
        if num_candidates < 1 or top_k < 1:
            raise ValueError(f"`num_candidates` and `top_k` must be at least 1, got {num_candidates} and {top_k}.")
        self.num_candidates, self.top_k = num_candidates, top_k
        self.teacher_sampling: Mapping[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": 0}
        template = _GUIDED.replace("{answer}", f"{{{column}}}") if template is None else template
        self.context = TemplateContext(template) if guided else None
        self.columns = () if self.context is None else self.context.columns

    @property
    def description(self) -> str:
        return f"every second one is the best of {self.num_candidates} of the teacher's instead"

    def __call__(self, prompts: Prompts) -> Completions:
        first = prompts.process_index * len(prompts.rows)
        given = teacher_prompts(prompts.teacher_prompt, range((first + 1) % 2, len(prompts.rows), 2))
        rows = [row for row in given for _ in range(self.num_candidates)]
        candidates = prompts.sample_teacher([given[row] for row in rows])
        graded = prompts.grade(rows, candidates)
        near = prompts.share_in_top_k(rows, candidates, self.top_k)
        places = {row: [place for place, its in enumerate(rows) if its == row] for row in given}
        # Right before wrong, and then the nearest; the first of equals
        best = {row: max(its, key=lambda at: (graded[at] is True, near[at])) for row, its in places.items()}
        chosen = {row: candidates[place] for row, place in best.items()}
        unsolved = [row for row, place in best.items() if graded[place] is not True]
        found = self._guided(prompts, unsolved)
        completions = mixed(prompts, chosen | found)
        completions.rates = {
            "completions/teacher_right_rate": (graded.count(True), len(rows)),
            "completions/tier_1_rate": (len(best) - len(unsolved), len(best)),
            "completions/tier_2_rate": (len(found), len(best)),
            "completions/tier_3_rate": (len(unsolved) - len(found), len(best)),
        }
        return completions

    def _guided(self, prompts: Prompts, rows: Sequence[int]) -> dict[int, TokenIds]:
        """Right completions of the teacher that was told the answer, by row."""
        if self.context is None:
            return {}
        told = teacher_prompts(lambda row: prompts.prompt_with(row, self.context), rows)
        written = prompts.sample_teacher(list(told.values()))
        right = prompts.grade(list(told), written)
        return {row: ids for row, ids, is_right in zip(told, written, right, strict=True) if is_right}
