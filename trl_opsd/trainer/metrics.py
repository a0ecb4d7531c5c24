"""What is logged: sums and counts, reduced over processes once per optimizer step."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence

import psutil
import torch

from ..objective import FusedDivergence
from ..sampling.loops import is_repetitive


class Metrics:
    """
    Rates and maxima since they were last taken.

    A rate is a sum over a count, both over all micro-batches and processes: no mean of means. What was never counted
    is absent, not zero. Every process adds the same names in the same order.
    """

    def __init__(self) -> None:
        # Of this process since the last reduction, and of all processes before
        self._rates: dict[str, torch.Tensor] = {}
        self._maxima: dict[str, torch.Tensor] = {}
        self._minima: set[str] = set()  # of the maxima, those of values with the sign turned
        self._reduced_rates: dict[str, tuple[float, float]] = {}
        self._reduced_maxima: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        """The rates of the last reduction, by name."""

    def add_rate(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        """
        Add to both sums of a rate.

        Args:
            name (`str`):
                Name of the rate.
            total (`torch.Tensor`):
                Scalar, the numerator.
            count (`torch.Tensor`):
                Scalar on the same device, the denominator.
        """
        pair = torch.stack([total.float(), count.float()])
        self._rates[name] = self._rates[name] + pair if name in self._rates else pair

    def add_rates(self, pairs: Mapping[str, Sequence[float]], device: torch.device) -> None:
        """
        Add to both sums of rates that are counted in Python.

        Args:
            pairs (`Mapping[str, Sequence[float]]`):
                Numerator and denominator of each, by its name.
            device (`torch.device`):
                Device of all rates.
        """
        for name, pair in pairs.items():
            self.add_rate(name, *torch.tensor(pair, device=device))

    def add_maximum(self, name: str, values: torch.Tensor) -> None:
        """
        Take values into a maximum.

        Args:
            name (`str`):
                Name of the maximum.
            values (`torch.Tensor` of shape `(N,)`):
                Values, or none.
        """
        value = values.float().max() if len(values) else torch.tensor(-math.inf, device=values.device)
        self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def add_minimum(self, name: str, values: torch.Tensor) -> None:
        """As [`add_maximum`], of a minimum."""
        self._minima.add(name)
        self.add_maximum(name, -values)

    def reduce(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """
        Reduce what was added over processes. All of them call this.

        Args:
            gather (`Callable[[torch.Tensor], torch.Tensor]`):
                From a tensor of shape `(1, n)` to those of all processes, of shape `(number of processes, n)`.
        """
        self.latest = {}
        if not self._rates and not self._maxima:
            return
        own = torch.cat([*self._rates.values(), *(value.view(1) for value in self._maxima.values())])
        columns = iter(zip(*gather(own.unsqueeze(0)).tolist(), strict=True))  # of the processes' values
        for name in self._rates:
            total, count = sum(next(columns)), sum(next(columns))
            if count:
                self.latest[name] = total / count
            before = self._reduced_rates.get(name, (0.0, 0.0))
            self._reduced_rates[name] = before[0] + total, before[1] + count
        for name in self._maxima:
            self._reduced_maxima[name] = max(*next(columns), self._reduced_maxima.get(name, -math.inf))
        self._rates, self._maxima = {}, {}

    def take(self) -> dict[str, float]:
        """What has been reduced, by name, which then begins anew."""
        values = {name: total / count for name, (total, count) in self._reduced_rates.items() if count}
        for name, value in self._reduced_maxima.items():
            if value != -math.inf:
                values[name] = -value if name in self._minima else value
        self._reduced_rates, self._reduced_maxima = {}, {}
        return values


def add_divergence(
    metrics: Metrics, output: FusedDivergence, knows_teacher_entropy: bool, clips: bool, prefix: str = ""
) -> None:
    """
    Add what a pass over some tokens tells of them. A statistic is averaged over the tokens for which it is finite, of
    those whose divergence is.

    Args:
        metrics ([`Metrics`]):
            Where it goes.
        output ([`FusedDivergence`]):
            Of the tokens in the loss.
        knows_teacher_entropy (`bool`):
            Whether the teacher's distribution is known to the last token.
        clips (`bool`):
            Whether there is a clip.
        prefix (`str`, *optional*, defaults to `""`):
            What the names begin with.
    """
    statistics = {
        "distillation_loss": output.divergence,
        "entropy": output.student_entropy,
        "teacher_advantage": output.teacher_log_prob - output.student_log_prob,
        "top_k_overlap": output.top_k_overlap,
        "student_mass_on_teacher_top_k": output.top_k_mass,
    }
    if knows_teacher_entropy:
        statistics["teacher_entropy"] = output.teacher_entropy
        statistics["entropy_gap"] = output.student_entropy - output.teacher_entropy
    if clips:
        statistics["clipped_share"] = output.clipped
        statistics["clipped_mass"] = output.clipped_mass
    finite = output.finite.bool()
    for name, values in statistics.items():
        known = finite & values.isfinite()
        metrics.add_rate(prefix + name, values.where(known, 0.0).sum(), known.sum())
    metrics.add_rate(f"{prefix}skipped_token_rate", (~finite).sum(), finite.new_tensor(len(finite), dtype=torch.int64))


def add_contexts(metrics: Metrics, batch: Mapping[str, torch.Tensor], num_empty: int, has_rewards: bool) -> None:
    """
    Add how many rows have a context, and a reward, and how long the teacher's prompts are.

    Args:
        metrics ([`Metrics`]):
            Where it goes.
        batch (`Mapping[str, torch.Tensor]`):
            With `has_context`, `rewards` and `teacher_prompt_mask`.
        num_empty (`int`):
            Rows whose completion is empty, which have none.
        has_rewards (`bool`):
            Whether there are reward functions.
    """
    has_context = batch["has_context"]
    num_rows, empty = torch.tensor([len(has_context), num_empty], device=has_context.device)
    lengths = batch["teacher_prompt_mask"].sum(1)[has_context]
    metrics.add_rate("context_rate", has_context.sum(), num_rows - empty)
    metrics.add_rate("empty_completion_rate", empty, num_rows)
    if has_rewards:
        metrics.add_rate("rewards/unknown_rate", batch["rewards"].isnan().sum(), num_rows)
    metrics.add_rate("teacher_prompts/mean_length", lengths.sum(), has_context.sum())
    metrics.add_maximum("teacher_prompts/max_length", lengths)


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows lacks

    # In KiB, but for macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def add_peak_memory(metrics: Metrics, device: torch.device) -> None:
    """
    Add the most memory that this process has held so far, in GiB: what PyTorch has allocated on a GPU, elsewhere the
    resident memory.

    Args:
        metrics ([`Metrics`]):
            Where it goes.
        device (`torch.device`):
            Device of the policy.
    """
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    metrics.add_maximum("memory/peak", torch.tensor([peak / 2**30], device=device))


def add_degeneration(
    metrics: Metrics,
    texts: Sequence[str],
    mask: torch.Tensor,
    truncated: torch.Tensor,
    correct: torch.Tensor,
    counted: torch.Tensor,
) -> None:
    """
    Add how long the student's rollouts are, how many were cut off, end in a loop, and are right.

    Args:
        metrics ([`Metrics`]):
            Where it goes.
        texts (`Sequence[str]`):
            Completions.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 for their tokens.
        truncated (`torch.Tensor` of shape `(B,)`, bool):
            Whether they were cut off before their end.
        correct (`torch.Tensor` of shape `(B,)`):
            1 if they are right, 0 if not, NaN where unknown.
        counted (`torch.Tensor` of shape `(B,)`, bool):
            Whether they are the student's own, and have a token.
    """
    loops = torch.tensor([is_repetitive(text) for text in texts], device=truncated.device)
    metrics.add_rate("rollouts/mean_length", (mask.sum(1) * counted).sum(), counted.sum())
    metrics.add_rate("rollouts/truncated_rate", (truncated & counted).sum(), counted.sum())
    metrics.add_rate("rollouts/repetition_rate", (loops & counted).sum(), counted.sum())
    known = counted & ~correct.isnan()
    metrics.add_rate("rollouts/correct_rate", (correct.nan_to_num() * known).sum(), known.sum())


def add_sampler_difference(metrics: Metrics, log_prob: torch.Tensor, sampled: torch.Tensor) -> None:
    """
    Add how far the sampler's log-probabilities are from the trainer's.

    Args:
        metrics ([`Metrics`]):
            Where it goes.
        log_prob (`torch.Tensor` of shape `(N,)`):
            The trainer's, of the sampled tokens.
        sampled (`torch.Tensor` of shape `(N,)`):
            The sampler's, NaN where it gave none.
    """
    difference = (log_prob - sampled).abs()
    difference = difference[difference.isfinite()]
    name = "sampling/sampling_logp_difference"
    metrics.add_rate(f"{name}/mean", difference.sum(), difference.new_tensor(len(difference)))
    metrics.add_maximum(f"{name}/max", difference)


def add_policy(
    metrics: Metrics, logged: Mapping[str, list[float]], tokens: torch.Tensor, by_sequence: bool
) -> dict[str, list[float]]:
    """
    Add what [`~trl.GRPOTrainer`] logged of its own loss of some rows.

    Args:
        metrics ([`Metrics`]):
            Where its means and extremes go. Its `entropy` goes nowhere: it may be that of other tokens, at another
            temperature.
        logged (`Mapping[str, list[float]]`):
            One value by name, the same on every process.
        tokens (`torch.Tensor` of shape `(B, T)`):
            1 for the tokens of the loss, else 0.
        by_sequence (`bool`):
            Whether importance ratios, and so what is clipped of them, are one of a row.

    Returns:
        `dict[str, list[float]]`: the rest.
    """
    num_tokens, num_rows = tokens.sum(), tokens.new_tensor(len(tokens))
    ratio_count = num_rows if by_sequence else num_tokens
    counts = {
        "kl": num_tokens,
        "clip_ratio/low_mean": ratio_count,
        "clip_ratio/high_mean": ratio_count,
        "clip_ratio/region_mean": ratio_count,
        "cispo_clip_ratio": ratio_count,
        "vespo/phi_seq_mean": num_rows,
    }
    for name, count in counts.items():
        for mean in logged.get(name, ()):
            metrics.add_rate(name, mean * count, count)
    for name, add in (
        ("clip_ratio/low_min", metrics.add_minimum),
        ("clip_ratio/high_max", metrics.add_maximum),
    ):
        if name in logged:
            values = torch.tensor(logged[name], device=tokens.device)
            add(name, values[~values.isnan()])
    known = {*counts, "clip_ratio/low_min", "clip_ratio/high_max", "entropy"}
    return {name: values for name, values in logged.items() if name not in known}
