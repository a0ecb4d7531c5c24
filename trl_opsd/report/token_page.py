"""The token page: what the teacher wants of every token of a few rollouts, in one file."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from ..trainer.rewards import total_rewards
from ..trainer.score import Scored
from .page import asset, page, table
from .token_text import token_bytes


# Bits of a token's flags
SCORED, IN_DIVERGENCE, IN_LIKELIHOOD = 1, 2, 4

# What a token can be coloured by: a name for people, and what it says
MEASURES = {
    "delta": ("log-ratio", "log p_T − log p_S of the sampled token: blue where the teacher wants it more"),
    "divergence": ("divergence", "the configured divergence between teacher and student, in nats, before its weight"),
    "weighted": ("w · divergence", "what the token adds to the divergence term, before it is averaged"),
    "w": ("weight w", "the method's weight of the token's divergence"),
    "A": ("advantage A", "the advantage that GRPO's term gives the token"),
    "v": ("likelihood weight v", "the method's weight of −log p_S of the token"),
    "gap": ("entropy gap", "the student's entropy less the teacher's: blue where the teacher is surer"),
    "student_entropy": ("student's entropy", "how undecided the student is, in nats"),
    "teacher_entropy": ("teacher's entropy", "how undecided the teacher is, in nats"),
}
# From what a rollout holds to what a token is coloured by
_MADE_OF = {
    "delta": ("teacher_log_prob", "student_log_prob"),
    "weighted": ("w", "divergence"),
    "gap": ("student_entropy", "teacher_entropy"),
}
# Log-probabilities of the most probable tokens are kept to a thousandth
_STEPS_PER_NAT = 1000


@dataclass
class InspectedRollout:
    """
    A rollout and what is said of its tokens.

    Args:
        student_prompt (`list[int]`):
            Token ids of what the student has read.
        teacher_prompt (`list[int]`, *optional*):
            Token ids of what the teacher has read. `None` without a context.
        completion (`list[int]`):
            Its own token ids.
        values (`dict[str, np.ndarray]`):
            By name, fp32 of shape `(T,)`: `student_log_prob`, `teacher_log_prob`, `student_entropy`,
            `teacher_entropy`, `divergence`, and the streams `w`, `A` and `v` of the terms that take part.
        flags (`np.ndarray` of shape `(T,)`):
            Whether a token is scored (1), and counted by the divergence (2) and by the likelihood (4).
        listed_tokens (`np.ndarray` of shape `(T, 2, k)`):
            The most probable tokens under student and teacher.
        listed_log_probs (`np.ndarray` of shape `(T, 2, k)`):
            Their log-probabilities, −inf where there is none.
        loss (`float`):
            What the list of rollouts is sorted by.
        facts (`dict[str, Any]`):
            What else is known, by what it is called, as JSON holds it.
    """

    student_prompt: list[int]
    teacher_prompt: list[int] | None
    completion: list[int]
    values: dict[str, np.ndarray]
    flags: np.ndarray
    listed_tokens: np.ndarray
    listed_log_probs: np.ndarray
    loss: float
    facts: dict[str, Any]


def inspected_rollouts(
    scored: Scored,
    completion_ids: Sequence[list[int]],
    coefficients: Mapping[str, float],
    knows_entropy: bool,
    facts: Sequence[dict[str, Any]],
) -> list[InspectedRollout]:
    """
    What there is to look at of scored rollouts.

    Args:
        scored ([`Scored`]):
            With streams and listed tokens.
        completion_ids (`Sequence[list[int]]`):
            Token ids of the completions.
        coefficients (`Mapping[str, float]`):
            Of the three terms, see [`~trl_opsd.signal.Signals`].
        knows_entropy (`bool`):
            Whether the teacher's entropy is known.
        facts (`Sequence[dict[str, Any]]`):
            What else is known of each.
    """
    scores, streams = scored.scores, scored.streams
    assert streams is not None
    assert scores.listed_tokens is not None
    assert scores.listed_log_probs is not None
    assert scores.teacher_weights is not None
    names = ["student_log_prob", "teacher_log_prob", "student_entropy", "divergence"]
    values = {name: getattr(scores, name) for name in [*names, *(["teacher_entropy"] if knows_entropy else [])]}
    advantages = streams["advantages"]
    advantages = advantages.unsqueeze(1).expand_as(scores.known) if advantages.dim() == 1 else advantages
    in_loss = torch.where(scores.known, scores.teacher_weights, 1.0)  # of what the parts have written
    for name, term, stream in (
        ("w", "divergence", streams["divergence_weights"] * in_loss),
        ("A", "policy_loss", advantages),
        ("v", "likelihood", streams["likelihood_weights"]),
    ):
        if coefficients[f"{term}_coef"] != 0.0:
            values[name] = stream
    values = {name: value.float().cpu() for name, value in values.items()}
    masks = [scores.known, streams["divergence_mask"].bool(), streams["likelihood_mask"].bool()]
    flags = torch.stack([mask.cpu().to(torch.uint8) << bit for bit, mask in enumerate(masks)]).sum(dim=0)
    losses = rollout_losses(scored, values, coefficients)
    rollouts = []
    for row, ids in enumerate(completion_ids):
        own = slice(len(ids))
        rollouts.append(
            InspectedRollout(
                list(scored.student_prompts[row]),
                scored.teacher_prompts[row],
                list(ids),
                {name: value[row, own].numpy() for name, value in values.items()},
                flags[row, own].numpy(),
                scores.listed_tokens[row, own].cpu().numpy().astype(np.uint32),
                scores.listed_log_probs[row, own].float().cpu().numpy(),
                losses[row],
                facts[row],
            )
        )
    return rollouts


def rollout_facts(
    trainer: Any, batch: Mapping[str, Any], generation: Any, rows: Sequence[int]
) -> list[dict[str, Any]]:
    """
    What is known of some rollouts of a generation batch beside their scores.

    Args:
        trainer ([`SelfDistillationTrainer`]):
            Has the reward functions.
        batch (`Mapping[str, Any]`):
            Batch.
        generation ([`~trl_opsd.trainer.batch.Generation`]):
            What it was made of.
        rows (`Sequence[int]`):
            Their positions.
    """
    first = trainer.accelerator.process_index * len(batch["rewards"])
    facts = []
    for row in rows:
        its = reward_facts(generation.rewards[first + row], trainer.reward_func_names, trainer.reward_weights)
        its |= {name: "yes" for name in ("truncated", "replaced") if bool(batch[name][row])}
        its["feedback"] = generation.feedback[row] if generation.feedback else None
        facts.append(its)
    return facts


def reward_facts(rewards: torch.Tensor, names: Sequence[str], weights: torch.Tensor) -> dict[str, Any]:
    """
    What reward functions say of a rollout, `None` where they do not apply.

    Args:
        rewards (`torch.Tensor` of shape `(num_reward_funcs,)`):
            NaN where a function did not apply.
        names (`Sequence[str]`):
            Names of the functions.
        weights (`torch.Tensor` of shape `(num_reward_funcs,)`):
            Their weights.

    Returns:
        `dict[str, Any]`: the total as `reward`, and that of each function where there are several.
    """
    parts = zip(names, rewards.tolist(), strict=True) if len(names) > 1 else ()
    given = {"reward": total_rewards(rewards[None], weights).item(), **dict(parts)}
    return {name: None if math.isnan(value) else value for name, value in given.items()}


def rollout_losses(
    scored: Scored, values: Mapping[str, torch.Tensor], coefficients: Mapping[str, float]
) -> list[float]:
    """
    The loss of each rollout: coefficients times means over the tokens that a term counts, of w·D, of −A (which GRPO's
    term is under the weights that sampled) and of v·(−log p_S). What else may be in the loss, such as the KL term of
    `beta`, is not.

    Args:
        scored ([`Scored`]):
            With streams.
        values (`Mapping[str, torch.Tensor]`):
            See [`InspectedRollout`], of shape `(B, T)`.
        coefficients (`Mapping[str, float]`):
            Of the three terms.
    """
    assert scored.streams is not None
    streams = {name: stream.cpu() for name, stream in scored.streams.items()}
    total = torch.zeros(len(values["divergence"]))
    for name, term, loss, mask in (
        ("w", "divergence", values["divergence"], streams["divergence_mask"] & scored.scores.known.cpu()),
        ("A", "policy_loss", torch.tensor(-1.0), streams["likelihood_mask"]),
        ("v", "likelihood", -values["student_log_prob"], streams["likelihood_mask"] & scored.scores.known.cpu()),
    ):
        if name in values:
            summed = (values[name] * loss * mask).sum(dim=1)
            total += coefficients[f"{term}_coef"] * summed / mask.sum(dim=1).clamp(min=1)
    return total.tolist()


def measure(rollout: InspectedRollout, name: str) -> np.ndarray:
    """What a rollout's tokens are coloured by, of shape `(T,)`: one of [`MEASURES`]."""
    if name not in _MADE_OF:
        return rollout.values[name]
    one, other = (rollout.values[its] for its in _MADE_OF[name])
    return one * other if name == "weighted" else one - other


def token_page(
    title: str, rollouts: Sequence[InspectedRollout], about: Sequence[tuple[str, str]], tokenizer: Any
) -> str:
    """
    Makes the page.

    Args:
        title (`str`):
            Title.
        rollouts (`Sequence[InspectedRollout]`):
            At least one.
        about (`Sequence[tuple[str, str]]`):
            Names and values that say what is shown.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.

    Returns:
        `str`: HTML.

    Raises:
        ValueError: If there is no rollout.
    """
    if not rollouts:
        raise ValueError("There is no rollout to show.")
    everything = [np.concatenate([_ids(rollout), rollout.listed_tokens.ravel()]) for rollout in rollouts]
    vocabulary = np.unique(np.concatenate(everything))
    places = np.dtype("<u2" if len(vocabulary) <= 2**16 else "<u4")
    data = {
        # A character for each byte
        "tokens": [text.decode("latin-1") for text in token_bytes(tokenizer, vocabulary.tolist())],
        "ids": vocabulary.tolist(),
        "special": np.flatnonzero(np.isin(vocabulary, list(getattr(tokenizer, "all_special_ids", [])))).tolist(),
        "measures": _measures(rollouts),
        "num_listed": rollouts[0].listed_tokens.shape[2],
        "bytes_per_place": places.itemsize,
        "rollouts": [_columns(rollout, vocabulary, places) for rollout in rollouts],
    }
    described = Markup("<details><summary>What this is</summary>{}</details>").format(table(["", ""], about))
    body = [described, Markup(asset("tokens.html"))]
    return page(title, body, style=asset("tokens.css"), script=asset("tokens.js"), data={"inspected": data})


def _ids(rollout: InspectedRollout) -> np.ndarray:
    return np.array([*rollout.student_prompt, *(rollout.teacher_prompt or []), *rollout.completion], dtype=np.uint32)


def _measures(rollouts: Sequence[InspectedRollout]) -> list[dict[str, Any]]:
    """Those that the rollouts have, with the value that has the full colour: all but the largest two in a hundred."""
    found = []
    for key, (label, help) in MEASURES.items():
        if any(name not in rollouts[0].values for name in _MADE_OF.get(key, (key,))):
            continue
        scored = [np.abs(measure(its, key)[(its.flags & SCORED) > 0]) for its in rollouts]
        sizes = np.concatenate(scored)
        sizes = sizes[sizes > 0]
        scale = float(np.quantile(sizes, 0.98)) if len(sizes) else 1.0
        found.append({"key": key, "label": label, "help": help, "scale": scale})
    return found


def _columns(rollout: InspectedRollout, vocabulary: np.ndarray, places: np.dtype) -> dict[str, Any]:
    def placed(ids: Any) -> str:
        return _packed(np.searchsorted(vocabulary, np.asarray(ids, dtype=np.uint32)).astype(places))

    num_scored = max(1, int((rollout.flags & SCORED).sum()))  # what is not scored is 0
    cost = np.clip(np.round(-rollout.listed_log_probs * _STEPS_PER_NAT), 0, 2**16 - 1)
    return {
        "loss": rollout.loss,
        "facts": rollout.facts,
        "student_prompt": placed(rollout.student_prompt),
        "teacher_prompt": None if rollout.teacher_prompt is None else placed(rollout.teacher_prompt),
        "completion": placed(rollout.completion),
        "flags": _packed(rollout.flags.astype(np.uint8)),
        "values": {name: _compact(values) for name, values in rollout.values.items()},
        "means": {key: float(measure(rollout, key).sum() / num_scored) for key in ("delta", "divergence")},
        "listed_tokens": placed(rollout.listed_tokens.ravel()),
        "listed_costs": _packed(cost.astype("<u2").ravel()),
    }


def _compact(values: np.ndarray) -> str | float:
    """One number where all tokens have the same."""
    if len(values) and (values == values[0]).all():
        return float(values[0])
    return _packed(values.astype("<f4"))


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
