"""From rewards and scores to the streams of the loss's three terms."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from .advantage import Advantage, GroupAdvantage
from .batch import Batch, TokenScores
from .curriculum import Curriculum
from .schedule import SCORED_METRICS, Schedule
from .target import Target
from .weighting import TERMS, PolicyWeighting, TeacherWeighting, TokenWeighting


# Of the three terms. A part's own are named after it
COEFFICIENTS = ("divergence_coef", "policy_loss_coef", "likelihood_coef")


class Signals:
    """
    The parts of a method that write the streams of its loss

        Σ divergence_coef · w·D(p_S, p_T) + policy_loss_coef · GRPO(A) + likelihood_coef · v·(−log p_S)

    with a weight w, an advantage A and a weight v for each token. Weights of tokens go into w and v alike, unless they
    are of one term only. Whether a token is counted in a normaliser is decided for each term: in the first by a
    context and by the weightings that select, in the last by those alone, in GRPO's by nothing.

    Args:
        coefficients (`Mapping[str, float]`):
            Of the three terms, by their names in the configuration.
        advantage ([`Advantage`]):
            Writes A.
        weightings (`Mapping[str, TokenWeighting | PolicyWeighting | TeacherWeighting]`):
            Write w and v, multiplied, by name.
        schedules (`Mapping[str, Schedule]`):
            Of a term's coefficient, or of a field of a part: `"advantage.mix"`,
            `"token_weights.importance_clip.most"`.
        curriculum ([`Curriculum`], *optional*):
            Draws the prompts, and sees every batch.
        target ([`Target`], *optional*):
            What D pulls to instead of p_T.

    Raises:
        ValueError: If there is a schedule for a coefficient that does not exist.
    """

    def __init__(
        self,
        coefficients: Mapping[str, float],
        advantage: Advantage,
        weightings: Mapping[str, TokenWeighting | PolicyWeighting | TeacherWeighting],
        schedules: Mapping[str, Schedule],
        curriculum: Curriculum | None = None,
        target: Target | None = None,
    ):
        self.coefficients = dict(coefficients)
        self.schedules = dict(schedules)
        self.scheduled: dict[str, float] = {}
        """What follows a schedule, and its value in this step."""
        self._parts: dict[str, Any] = {"advantage": advantage}
        self._parts |= {f"token_weights.{name}": weighting for name, weighting in weightings.items()}
        self._parts |= {} if curriculum is None else {"curriculum": curriculum}
        self._parts |= {} if target is None else {"target": target}
        known = [*COEFFICIENTS]
        for name, part in self._parts.items():
            known += [f"{name}.{its.name}" for its in fields(part) if its.init] if is_dataclass(part) else []
        for name in schedules:
            if name not in known:
                raise ValueError(f"`schedules` has {name!r}, and there is no such coefficient: choose one of {known}.")

    @property
    def advantage(self) -> Advantage:
        """Writes A, with its coefficients of this step."""
        return self._parts["advantage"]

    @property
    def curriculum(self) -> Curriculum | None:
        """Draws the prompts, with its coefficients of this step."""
        return self._parts.get("curriculum")

    @property
    def target(self) -> Target | None:
        """What the divergence pulls to instead of the teacher, with its coefficients of this step."""
        return self._parts.get("target")

    def combine(self, teacher: torch.Tensor, plain: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
        """What [`target`] makes of three readings in this step."""
        assert self.target is not None
        return self.target(teacher, plain, contrast)

    @property
    def weightings(self) -> list[TokenWeighting]:
        """Write w and v when rollouts are there, with their coefficients of this step."""
        return [part for part in self._parts.values() if isinstance(part, TokenWeighting)]

    @property
    def policy_weightings(self) -> list[PolicyWeighting]:
        """Write w and v in the loss, with their coefficients of this step."""
        return [part for part in self._parts.values() if isinstance(part, PolicyWeighting)]

    @property
    def teacher_weightings(self) -> list[TeacherWeighting]:
        """Write w in the loss, with their coefficients of this step."""
        return [part for part in self._parts.values() if isinstance(part, TeacherWeighting)]

    @property
    def _asked(self) -> list[TokenWeighting]:
        """Those of a term that takes part in this step."""
        return [one for one in self.weightings if any(self.coefficients[f"{term}_coef"] for term in one.terms)]

    def begin_step(self, step: int) -> None:
        """Set all coefficients to what they are in the step after `step` others."""
        for name, schedule in self.schedules.items():
            value = self.scheduled[name] = schedule(step)
            if name in COEFFICIENTS:
                self.coefficients[name] = value
            else:
                part, _, field = name.rpartition(".")
                changed = replace(self._parts[part], **{field: value})
                if hasattr(changed, "state_dict"):
                    changed.load_state_dict(self._parts[part].state_dict())
                self._parts[part] = changed

    def observe(self, step: int, statistics: Mapping[str, float]) -> None:
        """Show the schedules the metrics of step number `step`."""
        for schedule in self.schedules.values():
            schedule.observe(step, statistics)

    def state_dict(self) -> dict[str, Any]:
        """Kinds of schedules and of parts with a memory, and what they remember, by the coefficient or the part."""
        return {name: {"kind": type(its).__name__, **its.state_dict()} for name, its in self._remembering().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on from what [`state_dict`] gave. What is new begins anew.

        Raises:
            ValueError: If something is of another kind, whose memory means nothing to it.
        """
        for name, its in self._remembering().items():
            if name not in state:
                continue
            kind, ours = state[name].get("kind"), type(its).__name__
            if kind != ours:
                raise ValueError(
                    f"`{name}` goes on as {ours}, and is a {kind} in the checkpoint, whose state it cannot take up. "
                    "Resume with the same one, or start a new run from the checkpoint's weights with `model`."
                )
            its.load_state_dict(state[name])

    def _remembering(self) -> dict[str, Any]:
        return self.schedules | {name: part for name, part in self._parts.items() if hasattr(part, "state_dict")}

    def has_term(self, coefficient: str) -> bool:
        """Whether a term ever takes part in the loss."""
        return coefficient in self.schedules or self.coefficients[coefficient] != 0.0

    @property
    def description(self) -> str:
        """The loss, in words."""
        shapes = not isinstance(self.advantage, GroupAdvantage)
        to = "" if self.target is None else f" from {type(self.target).__name__}"
        words = {
            "divergence_coef": f"divergence{to}",
            "policy_loss_coef": "GRPO's" + (f" with {type(self.advantage).__name__}" if shapes else ""),
            "likelihood_coef": "negative log-likelihood",
        }
        terms = []
        for name, word in words.items():
            value = "" if self.coefficients[name] == 1.0 else f"{self.coefficients[name]:g} · "
            if self.has_term(name):
                terms.append(f"({name}, by schedule) · {word}" if name in self.schedules else f"{value}{word}")
        weightings = [name.partition(".")[2] for name in self._parts if name.startswith("token_weights.")]
        return " + ".join(terms) + (f"; tokens weighted by {', '.join(weightings)}" if weightings else "")

    @property
    def needs_scores(self) -> bool:
        """Whether a part reads the scores, or a schedule what they say, in this step."""
        shapes = self.coefficients["policy_loss_coef"] != 0.0
        is_unmeasured = self.coefficients["divergence_coef"] == 0.0
        watches = any(schedule.metric in SCORED_METRICS for schedule in self.schedules.values())
        return (
            (shapes and self.advantage.needs_scores)
            or any(part.needs_scores for part in self._asked)
            or (is_unmeasured and watches)
        )

    @property
    def can_shape_in_loss(self) -> bool:
        """Whether all that reads the scores in this step is an advantage that follows from its own rollout."""
        reads_own = self.advantage.reads_own_rollout and not self.advantage.needs_contrast
        others = any(part.needs_scores or (part.selects and "divergence" in part.terms) for part in self._asked)
        terms = [self.coefficients[f"{term}_coef"] != 0.0 for term in ("policy_loss", "divergence")]
        return self.needs_scores and reads_own and terms == [True, False] and not others

    @property
    def needs_contrast(self) -> bool:
        """Whether a part reads the scores after the prompts that the context gives for contrast, in this step."""
        shapes = self.coefficients["policy_loss_coef"] != 0.0
        return (shapes and self.advantage.needs_contrast) or any(part.needs_contrast for part in self.weightings)

    @property
    def needs_spans(self) -> bool:
        """Whether a part reads the spans that the context marks, in this step."""
        shapes = self.coefficients["policy_loss_coef"] != 0.0
        weighs = any(self.coefficients[f"{term}_coef"] != 0.0 for term in TERMS)
        reads = weighs and any(part.needs_spans for part in self.weightings)
        return reads or (shapes and self.advantage.needs_spans)

    @property
    def reads_replaced(self) -> bool:
        """Whether the teacher's word on completions that took the place of rollouts is for anything."""
        others = self.has_term("divergence_coef") or any(part.needs_scores for part in self._asked)
        return others or self.advantage.reads_replaced

    @property
    def needs_context(self) -> bool:
        """Whether the teacher, or a part that reads what a context marks, takes part in this step."""
        return self.coefficients["divergence_coef"] != 0.0 or self.needs_scores or self.needs_spans

    def shaped(self, batch: Batch, scores: TokenScores | None) -> torch.Tensor:
        """
        The advantages of rollouts.

        Args:
            batch ([`Batch`]):
                Rollouts.
            scores ([`TokenScores`], *optional*):
                Scores of their tokens, if the advantage needs them.

        Returns:
            `torch.Tensor` of shape `(B,)` or `(B, T)`.

        Raises:
            ValueError: If the part returns another shape, or numbers that are not finite.
        """
        shaped = self.advantage(batch, scores if self.advantage.needs_scores else None)
        shaped = self._checked(self.advantage, shaped, batch)
        return shaped.squeeze(1) if shaped.size(1) == 1 else torch.where(batch.mask, shaped, 0.0)

    def streams(
        self, batch: Batch, scores: TokenScores | None, shapes_in_loss: bool = False
    ) -> dict[str, torch.Tensor]:
        """
        The streams of a generation batch.

        Args:
            batch ([`Batch`]):
                Rollouts.
            scores ([`TokenScores`], *optional*):
                Scores of their tokens, if a part needs them.
            shapes_in_loss (`bool`, *optional*, defaults to `False`):
                Whether the advantages stay GRPO's here.

        Returns:
            `dict[str, torch.Tensor]`: `advantages` of shape `(B,)` or `(B, T)`; `divergence_mask` and
            `likelihood_mask`, bool, the tokens that a term counts, and `divergence_weights` and `likelihood_weights`,
            fp32, all of shape `(B, T)`; and `likelihood_reads_context`, if the likelihood is that of the policy
            reading the teacher's prompt.

        Raises:
            ValueError: If a part returns another shape, or numbers that are not finite.
        """
        if self.curriculum is not None and batch.is_training:
            self.curriculum.see(batch)
        masks = {"divergence": batch.mask & batch.has_context, "likelihood": batch.mask}
        weights = dict.fromkeys(TERMS, torch.ones_like(batch.mask, dtype=torch.float32))
        for part in self._asked:
            given = part(batch, scores)
            for term in part.terms:
                factors = self._checked(part, given[term] if isinstance(given, Mapping) else given, batch)
                weights[term] = weights[term] * factors
                if part.selects:
                    masks[term] = masks[term] & (factors != 0)
        advantages = batch.advantages.squeeze(1)
        if self.coefficients["policy_loss_coef"] != 0.0 and not shapes_in_loss:
            advantages = self.shaped(batch, scores)
        streams = {"advantages": advantages}
        if any(part.reads_context for part in self._asked):
            streams["likelihood_reads_context"] = torch.tensor(True)
        for term in TERMS:
            streams |= {f"{term}_mask": masks[term], f"{term}_weights": weights[term] * masks[term]}
        return streams

    @staticmethod
    def _checked(part: Any, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        name, shape = type(part).__name__, tuple(batch.mask.shape)
        if not isinstance(values, torch.Tensor) or values.dim() > 2:
            raise ValueError(f"{name} has to return a tensor of shape {shape}, got {_shape_of(values)}.")
        try:
            whole = values.expand(shape)
        except RuntimeError as error:
            raise ValueError(f"{name} has to return a tensor of shape {shape}, got {_shape_of(values)}.") from error
        wrong = (~whole.isfinite() & batch.mask).any(dim=1).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"{name} gave numbers that are not finite for {len(wrong)} rollouts, row {wrong[0]} first."
            )
        return values if values.dim() == 2 else whole


def _shape_of(values: Any) -> str:
    return str(tuple(values.shape)) if isinstance(values, torch.Tensor) else type(values).__name__
