"""What reward functions, environments and rows say of completions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import parse_response
from trl.data_utils import is_conversational
from trl.trainer.utils import nanstd

from .config import SelfDistillationConfig


def no_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Stands in where there is no reward function, since GRPOTrainer insists on one when it is constructed."""
    return [0.0] * len(completions)


def forget_rewards(metrics: dict[str, list[float]]) -> None:
    """Leave out of what GRPOTrainer logs what it says of rewards that stand in for none."""
    for name in ("reward", "reward_std", "frac_reward_zero_std"):
        metrics.pop(name, None)


def hand_policy(
    reward_funcs: Sequence[Any],
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tokenize: Callable[[list[Any]], list[list[int]]],
    args: SelfDistillationConfig,
) -> None:
    """
    Give the policy to reward functions that read it, and print what they will take.

    Args:
        reward_funcs (`Sequence[Any]`):
            Reward functions. `read_policy(policy, tokenizer, tokenize, num_tokens)` of those that have it is called
            once, and returns the seconds that it takes to reward a completion of so many tokens.
        policy (`nn.Module`):
            Policy, not wrapped.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        tokenize (`Callable`):
            From prompts to token ids.
        args ([`SelfDistillationConfig`]):
            Configuration.
    """
    longest = args.max_completion_length or 128
    number = args.per_device_train_batch_size * cast(int, args.steps_per_generation)
    for function in reward_funcs:
        if not hasattr(function, "read_policy"):
            continue
        seconds = function.read_policy(policy, tokenizer, tokenize, longest)
        if args.process_index == 0:
            print(
                f"The reward `{function.__name__}` takes {seconds:.3g} s for a rollout of {longest} tokens: up to "
                f"{number * seconds:.3g} s for the {number} of a generation on each process."
            )


def graded(
    rewards: Callable[[list[Mapping[str, Any]], list[Any], list[Any], list[list[int]]], torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    weights: torch.Tensor,
    success_threshold: float,
    process_index: int,
    rows: list[Mapping[str, Any]],
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
) -> list[bool | None]:
    """
    Whether completions are right by the reward functions. All processes call this at once, with as many rows.

    Args:
        rewards (`Callable`):
            From rows, prompts, completions and their token ids to the rewards of all processes, of shape `(number of
            all rows, number of reward functions)`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        weights (`torch.Tensor`):
            Weights of the reward functions.
        success_threshold (`float`):
            Least reward of a right completion.
        process_index (`int`):
            Number of the process.
        rows (`list[Mapping[str, Any]]`):
            Dataset rows.
        prompt_ids (`list[list[int]]`):
            Token ids of their prompts.
        completion_ids (`list[list[int]]`):
            Token ids of the completions.

    Returns:
        `list[bool | None]`: `None` where no function applied.
    """
    prompts = [row["prompt"] for row in rows]
    completions = decoded(tokenizer, prompts[0], prompt_ids, completion_ids)
    own = rewards(rows, prompts, completions, completion_ids)[process_index * len(rows) :][: len(rows)]
    totals = total_rewards(own, weights).tolist()
    return [None if math.isnan(total) else total >= success_threshold for total in totals]


def decoded(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
) -> list[Any]:
    """
    Completions as GRPOTrainer shows them to reward functions, without tools.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        prompt (`str` or `list[dict[str, Any]]`):
            One of the prompts, all of which are text or messages.
        prompt_ids (`Sequence[list[int]]`):
            Token ids of the prompts.
        completion_ids (`Sequence[list[int]]`):
            Token ids of the completions.
    """
    if not is_conversational({"prompt": prompt}):
        return tokenizer.batch_decode(list(completion_ids), skip_special_tokens=True)
    parses = any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema"))
    if parses:
        pairs = zip(prompt_ids, completion_ids, strict=True)
        return [[parse_response(tokenizer, ids, prefix=prefix, tools=None)] for prefix, ids in pairs]
    texts = tokenizer.batch_decode(list(completion_ids), skip_special_tokens=True)
    return [[{"role": "assistant", "content": text}] for text in texts]


def total_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    The reward of each rollout: the weighted sum over the functions that applied.

    Args:
        rewards (`torch.Tensor` of shape `(num_rollouts, num_reward_funcs)`):
            NaN where a function did not apply.
        weights (`torch.Tensor` of shape `(num_reward_funcs,)`):
            Weights of the functions.

    Returns:
        `torch.Tensor` of shape `(num_rollouts,)`, fp32: NaN where none applied.
    """
    totals = (rewards * weights.to(rewards.device)).nansum(dim=1).float()
    return totals.masked_fill(rewards.isnan().all(dim=1), torch.nan)


def check_finite(rewards: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """
    The rewards as they are, of shape `(num_rollouts, num_reward_funcs)`.

    Raises:
        ValueError: If one is infinite, naming the function.
    """
    infinite = rewards.isinf().any(dim=0).tolist()
    if any(infinite):
        raise ValueError(
            f"The reward function `{names[infinite.index(True)]}` gave an infinite reward. Give a finite number, or "
            "`None`."
        )
    return rewards


def reward_streams(rewards: torch.Tensor, success_threshold: float, num_generations: int) -> dict[str, torch.Tensor]:
    """
    What is known of each rollout's success.

    Args:
        rewards (`torch.Tensor` of shape `(num_rollouts,)`):
            Of all processes, the rollouts of a prompt next to one another. NaN where unknown.
        success_threshold (`float`):
            Least reward of a correct rollout.
        num_generations (`int`):
            Rollouts of a prompt.

    Returns:
        `dict[str, torch.Tensor]` of shape `(num_rollouts,)` each, fp32: `rewards`; `correct`, 1 or 0; `success_rate`,
        the mean of `correct` over those rollouts of the prompt in which it is known. NaN where unknown.
    """
    correct = (rewards >= success_threshold).float().masked_fill(rewards.isnan(), torch.nan)
    rates = correct.view(-1, num_generations).nanmean(dim=1)
    return {"rewards": rewards, "correct": correct, "success_rate": rates.repeat_interleave(num_generations)}


def group_advantages(
    rewards: torch.Tensor, weights: torch.Tensor, num_generations: int, scale: str, aggregation: str
) -> torch.Tensor:
    """
    GRPO's advantages of completions that [`~trl.GRPOTrainer`] has not sampled.

    Args:
        rewards (`torch.Tensor` of shape `(num_rollouts, num_reward_funcs)`):
            NaN where a function did not apply.
        weights (`torch.Tensor` of shape `(num_reward_funcs,)`):
            Weights of the functions.
        num_generations (`int`):
            Rollouts of a prompt, which follow one another.
        scale (`str`):
            The trainer's `scale_rewards`.
        aggregation (`str`):
            Its `multi_objective_aggregation`.

    Returns:
        `torch.Tensor` of shape `(num_rollouts,)`, fp32: 0 where no function applied.
    """

    def spread(values: torch.Tensor) -> torch.Tensor:
        return nanstd(values, dim=1, keepdim=True) if values.size(1) > 1 else torch.zeros_like(values[:, :1])

    if aggregation == "normalize_then_sum":
        groups = rewards.view(-1, num_generations, rewards.size(1))
        groups = (groups - groups.nanmean(dim=1, keepdim=True)) / (spread(groups) + 1e-4)
        totals = (groups.view(rewards.shape) * weights.to(rewards.device)).nansum(dim=1).float()
        totals = totals.masked_fill(rewards.isnan().all(dim=1), torch.nan)
        advantages = (totals - totals.nanmean()) / (spread(totals.view(1, -1)).squeeze() + 1e-4)
    else:
        groups = total_rewards(rewards, weights).view(-1, num_generations)
        advantages = groups - groups.nanmean(dim=1, keepdim=True)
        if scale != "none":
            others = groups if scale == "group" else groups.view(1, -1)
            advantages = advantages / (spread(others) + 1e-4)
    return advantages.flatten().nan_to_num(0.0)


def added_feedback(
    earlier: Sequence[str | None] | None, values: Sequence[Any], num_rows: int, names: Sequence[str]
) -> list[str | None]:
    """
    Feedback of one more reward function.

    Args:
        earlier (`Sequence[str | None]`, *optional*):
            That of others.
        values (`Sequence[Any]`):
            What the function says of each rollout.
        num_rows (`int`):
            Number of rollouts.
        names (`Sequence[str]`):
            Names of all functions, for the message.

    Raises:
        ValueError: If it is no text.
    """
    who = " or ".join(f"`{name}`" for name in names)
    values = check_feedback(values, num_rows, f"The reward function {who}")
    return [joined_feedback(*pair) for pair in zip(earlier or [None] * num_rows, values, strict=True)]


def all_feedback(
    logged: Sequence[str | None] | None, environments: Sequence[Any] | None, rows: Sequence[Mapping[str, Any]]
) -> list[str | None]:
    """
    What reward functions, environments and rows say about each rollout, in this order.

    Args:
        logged (`Sequence[str | None]`, *optional*):
            By reward functions.
        environments (`Sequence[Any]`, *optional*):
            Of the rollouts; an attribute `feedback` is read, unless it is a method.
        rows (`Sequence[Mapping[str, Any]]`):
            Of the dataset; a column `feedback` is read.

    Raises:
        ValueError: If something is no text.
    """
    nothing = [None] * len(rows)
    felt = [getattr(environment, "feedback", None) for environment in environments or nothing]
    felt = [None if callable(value) else value for value in felt]
    names = " or ".join(sorted({f"`{type(environment).__name__}`" for environment in environments or ()}))
    felt = check_feedback(felt, len(rows), f"The environment {names}")
    told = check_feedback([row.get("feedback") for row in rows], len(rows), "The column `feedback`")
    return [joined_feedback(*given) for given in zip(logged or nothing, felt, told, strict=True)]


def joined_feedback(*given: str | None) -> str | None:
    """What several say about one rollout, with a blank line between; `None` where nobody says anything."""
    return "\n\n".join(text for text in given if text is not None and text.strip()) or None


def check_feedback(values: Sequence[Any], num_rows: int, who: str) -> list[str | None]:
    """
    Feedback that is text, or `None`, for each row.

    Raises:
        ValueError: If it is something else, or not one for each row, naming who gives it.
    """
    if len(values) != num_rows:
        raise ValueError(
            f"{who} gives feedback on {len(values)} completions of {num_rows}. Give a list with text or `None` for "
            "each."
        )
    for index, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"{who} gives {type(value).__name__} as feedback on completion {index} of its batch. Give text, or "
                "`None` where there is none."
            )
    return list(values)
