"""The loss of a micro-batch: three terms, each with a stream of its own, from one pass of the student."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import nn
from transformers import logging
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..objective import (
    FusedDivergence,
    Head,
    Objective,
    aggregation_weights,
    fused_divergence,
    share_of_rows,
)
from ..scoring import (
    Networks,
    can_pack,
    can_share_prompts,
    causal_lm,
    evaluation_mode,
    head_of,
    reads_more_than_text,
    rows_of,
)
from ..signal import Signals, TokenScores
from ..teacher import Teacher, TokenTargets
from .config import SelfDistillationConfig
from .metrics import Metrics, add_divergence, add_sampler_difference
from .pass_loss import Found, MicroBatchLoss, PassLoss
from .policy import PolicyTerm, scaled_term
from .signals import shaped_advantages
from .token_groups import in_order, joined, marked_tokens, some_of, teacher_numbers, token_groups


logger = logging.get_logger(__name__)


class SelfDistillationLoss:
    """
    The loss of a micro-batch,

        divergence_coef · Σ w·D(p_S, p_T) + GRPO's + likelihood_coef · Σ v·(−log p_S),

    of which each term is aggregated as `loss_type` says, over the tokens that it counts.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run.
        networks ([`Networks`]):
            Student and teacher.
        objective ([`Objective`]):
            Which divergence, over which tokens.
        other_objectives (`Mapping[str, Objective]`):
            Those of some tokens, if they are others, by the name that these have in a batch.
        signals ([`Signals`]):
            Coefficients of the terms, and weights of tokens that depend on the policy as it is in the loss.
    """

    def __init__(
        self,
        args: SelfDistillationConfig,
        accelerator: Accelerator,
        networks: Networks,
        objective: Objective,
        other_objectives: Mapping[str, Objective],
        signals: Signals,
    ):
        self.networks = networks
        self._args = args
        self._accelerator = accelerator
        self._objective, self._other_objectives = objective, other_objectives
        self._signals = signals
        self._logged: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # by parts that are asked in the loss
        self._is_deepspeed = accelerator.state.deepspeed_plugin is not None

    def __call__(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_micro_batches: int,
        num_generation_batches: int,
        policy: PolicyTerm | None = None,
    ) -> MicroBatchLoss:
        """
        The loss of a micro-batch. In training, the backward passes of all passes but the last are done here.

        Args:
            model (`nn.Module`):
                Policy, wrapped as it is trained.
            inputs (`dict[str, Any]`):
                Micro-batch.
            num_micro_batches (`int`):
                Number of micro-batches accumulated by an optimizer step.
            num_generation_batches (`int`):
                Number of micro-batches that were generated, and whose rows and tokens were counted, together.
            policy (`PolicyTerm`, *optional*):
                A loss that depends on the student through its log-probabilities alone, aggregated as `loss_type` says
                and divided by the number of micro-batches. It is added, from the same forward pass.
        """
        if not self.networks.has_checked_logits:
            self.networks.check_logits(model)
        # Weights are those of the whole micro-batch, so the gradients of its passes add up to its gradient. The last
        # pass is left to the caller, who runs the backward pass that synchronises.
        inputs = self._with_factors(inputs, num_generation_batches, policy is not None)
        tokens = inputs["student_mask"]
        # Alike on all processes, whose passes meet in collective operations
        is_compared = self._signals.coefficients["divergence_coef"] or "shaped_mask" in inputs
        has_targets = is_compared and inputs["num_divergence_tokens"]
        is_shared = self._accelerator.num_processes > 1
        passes = self.networks.passes(inputs)
        outputs = []
        for index, rows in enumerate(passes):
            is_last = index == len(passes) - 1
            with nullcontext() if is_last else self._postponed_synchronisation(model):
                scale = num_micro_batches * share_of_rows(rows["student_mask"], tokens, self._args.loss_type)
                is_read = has_targets and (is_shared or rows["divergence_mask"].any())
                targets = self.networks.targets(model, rows) if is_read else []
                scaled = None if policy is None else scaled_term(policy, scale)
                output = self.networks.within(model, self._student_loss, rows, targets, scaled)
                if torch.is_grad_enabled() and not is_last:
                    kwargs = {"scale_wrt_gas": False} if self._is_deepspeed else {}
                    self._accelerator.backward(output.loss / num_micro_batches, **kwargs)
                    output = output._replace(loss=output.loss.detach())
            outputs.append(output)
        loss = torch.stack([output.loss for output in outputs]).sum() / num_micro_batches
        divergence = joined([output.divergence for output in outputs])
        likelihood, log_probs, entropies = (
            torch.cat([getattr(output, name) for output in outputs])
            for name in ("likelihood", "log_probs", "entropies")
        )
        return MicroBatchLoss(loss, divergence, likelihood, log_probs, entropies, passes)

    def add_metrics(self, metrics: Metrics, result: MicroBatchLoss, compares_sampler: bool) -> None:
        """
        Add what the loss of a micro-batch tells.

        Args:
            metrics ([`Metrics`]):
                Where it goes.
            result ([`MicroBatchLoss`]):
                The loss.
            compares_sampler (`bool`):
                Whether the sampler's log-probabilities, if there are any, are compared with the student's.
        """
        for rate in self._logged:
            metrics.add_rate(*rate)
        self._logged.clear()
        if self._signals.coefficients["divergence_coef"] or "shaped_mask" in result.passes[0]:
            self._add_divergence(metrics, result.divergence, result.passes)
        elif not self._signals.needs_scores:  # which say it
            known = result.log_probs.isfinite() & result.entropies.isfinite()
            metrics.add_rate("entropy", result.entropies.where(known, 0.0).sum(), known.sum())
        first = result.passes[0]
        if compares_sampler and "sampling_per_token_logps" in first and "likelihood_reads_context" not in first:
            sampled = [rows["sampling_per_token_logps"][rows["student_mask"].bool()] for rows in result.passes]
            add_sampler_difference(metrics, result.log_probs, torch.cat(sampled))
        if self._signals.coefficients["likelihood_coef"]:
            number = result.likelihood.new_tensor(len(result.likelihood))
            metrics.add_rate("likelihood_loss", result.likelihood.sum(), number)

    def _add_divergence(self, metrics: Metrics, output: FusedDivergence, passes: Sequence[dict[str, Any]]) -> None:
        teacher, clips = self.networks.teacher, self._args.divergence_clip is not None

        def of_tokens(values: Callable[[dict[str, Any]], torch.Tensor]) -> torch.Tensor:
            return torch.cat([values(rows)[rows["divergence_mask"].bool()] for rows in passes])

        numbers, others = of_tokens(teacher_numbers), torch.ones_like(output.finite, dtype=torch.bool)
        for name in self._other_objectives:
            # Two divergences have no mean
            marked = of_tokens(partial(marked_tokens, name=name))
            finite = output.finite.bool() & marked
            divergence = output.divergence[finite]
            metrics.add_rate(f"{name}_distillation_loss", divergence.sum(), finite.sum())
            others = others & ~marked
        output, numbers = some_of(output, others), numbers[others]
        add_divergence(metrics, output, teacher.knows_entropy, clips)
        for number, (name, one) in enumerate(teacher.members.items()):
            own = numbers == number
            add_divergence(metrics, some_of(output, own), one.knows_entropy, clips, f"teachers/{name}/")
            metrics.add_rate(f"teachers/{name}/token_rate", own.sum(), own.new_tensor(len(own), dtype=torch.int64))

    @torch.no_grad()
    def scores(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        batch_size: int,
        metrics: Metrics,
        contrasts: Sequence[Sequence[list[int]]],
        num_listed: int = 0,
    ) -> TokenScores:
        """
        What student and teacher say of the tokens with a context, without a gradient. All processes call this, with as
        many rows.

        Args:
            model (`nn.Module`):
                Policy, wrapped as it is trained.
            inputs (`dict[str, Any]`):
                Generation batch, whose `divergence_mask` of shape `(B, T)` says which tokens.
            batch_size (`int`):
                Rows of a micro-batch.
            metrics ([`Metrics`]):
                Where it goes if the loss does not say it.
            contrasts (`Sequence[Sequence[list[int]]]`):
                Token ids of the prompts that the teacher reads each row after, if a part contrasts.
            num_listed (`int`, *optional*, defaults to `0`):
                Number of most probable tokens to list on both sides. Without any, nothing is said of what weighs
                tokens in the loss either.
        """
        if not self.networks.has_checked_logits:
            self.networks.check_logits(model)
        tokens = inputs["divergence_mask"].bool()
        nothing = torch.zeros(tokens.shape, device=tokens.device)
        inputs = {
            **inputs,
            **dict.fromkeys(("likelihood_factors", "likelihood_mask"), nothing),
            "divergence_factors": nothing + bool(num_listed),
            "student_mask": tokens,
            "row": torch.arange(len(tokens), device=tokens.device),
        }
        found, outputs, passes = Found.nothing(tokens, num_listed), [], []
        for some in torch.arange(len(tokens)).split(batch_size):
            for rows in self.networks.passes(rows_of(inputs, some.tolist())):
                targets = self.networks.targets(model, rows)
                with evaluation_mode(self._accelerator.unwrap_model(model)):
                    given = model, self._student_loss, rows, targets, None, num_listed
                    output = self.networks.within(*given)
                found.add(rows, output.divergence, output.divergence_factors)
                outputs.append(output.divergence)
                passes.append(rows)
        if not self._signals.coefficients["divergence_coef"]:
            self._add_divergence(metrics, joined(outputs), passes)
        scores = found.scores(num_listed)
        if not self._signals.needs_contrast:
            return scores
        prompts = [some if is_read else [] for some, is_read in zip(contrasts, tokens.any(dim=1), strict=True)]
        counts, log_probs = self.networks.contrasts(model, inputs, prompts, batch_size)
        contrasted = scores.known & (counts > 0) & log_probs.isfinite()
        return replace(scores, contrasted=contrasted, contrast_log_prob=log_probs.where(contrasted, 0.0))

    def _with_factors(
        self,
        inputs: dict[str, Any],
        num_generation_batches: int,
        has_policy_term: bool,
    ) -> dict[str, Any]:
        """With the factor of each token in the two terms that are not GRPO's, and the mask of all that is read."""
        factors: dict[str, torch.Tensor] = {}
        tokens = torch.zeros_like(inputs["completion_mask"], dtype=torch.bool)
        num_shares = self._accelerator.num_processes * num_generation_batches
        for name in ("divergence", "likelihood"):
            mask = inputs[f"{name}_mask"].bool()
            coefficient = self._signals.coefficients[f"{name}_coef"]
            if coefficient == 0.0 and not (name == "divergence" and "shaped_mask" in inputs):
                mask = torch.zeros_like(mask)
            num_rows, num_tokens = (
                inputs[f"num_{name}_{what}"].clamp(min=1.0) / num_shares for what in ("rows", "tokens")
            )
            longest = cast(int, self._args.max_completion_length)  # `None` is refused where it matters
            weights = aggregation_weights(mask, self._args.loss_type, num_rows, num_tokens, longest)
            weights = coefficient * weights * inputs[f"{name}_weights"]
            if "importance_sampling_ratio" in inputs:  # the sampler's policy differs a little from the trainer's
                weights = weights * inputs["importance_sampling_ratio"]
            factors |= {f"{name}_mask": mask, f"{name}_factors": weights}
            tokens = tokens | mask
        if has_policy_term:
            tokens = tokens | (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
        return {**inputs, **factors, "student_mask": tokens}

    @contextmanager
    def _postponed_synchronisation(self, model: nn.Module) -> Iterator[None]:
        """Inside, gradients are accumulated as they are in all but the last micro-batch of an optimizer step."""
        accelerator = self._accelerator
        if not accelerator.sync_gradients:
            yield
            return
        # As `Trainer` decides for its micro-batches. `backward` reads the flag and has DeepSpeed's engine step by it.
        synchronises = self._is_deepspeed or accelerator.gradient_state.plugin_kwargs.get("sync_each_batch")
        accelerator.sync_gradients = False
        try:
            with nullcontext() if synchronises else accelerator.no_sync(model):
                yield
        finally:
            accelerator.sync_gradients = True

    def _student_loss(
        self,
        student: nn.Module,
        rows: dict[str, Any],
        targets: Sequence[TokenTargets],
        policy: PolicyTerm | None,
        num_listed: int = 0,
    ) -> PassLoss:
        selected = rows["student_mask"].bool()
        prompt = "teacher_prompt" if "likelihood_reads_context" in rows else "prompt"
        hidden = self.networks.states(student, *self.networks.sequences(rows, prompt, selected))
        student_head = head_of(student)
        heads = [student_head, *(its.head for its in targets if its.head is not None)]
        parameters = [parameter for head in heads for parameter in (head.weight, head.bias)]
        with maybe_gather_lm_head_ctx(*parameters), self._accelerator.autocast():
            student_head = self.networks.whole(student_head)
            device = student_head.weight.device
            hidden, token_ids = hidden.to(device), rows["completion_ids"][selected]
            targets = [
                TokenTargets(states.to(device), None if head is None else self.networks.whole(head), tokens)
                for states, head, tokens in targets
            ]
            inside, scored = rows["divergence_mask"].bool()[selected], None
            if "shaped_mask" in rows:
                scored, advantages = self._shaped(rows, hidden[inside], student_head, token_ids[inside], targets)
                rows, targets = {**rows, "advantages": advantages}, []
            read = partial(self.networks.log_probs_of, hidden, student_head, token_ids, selected)
            choices = partial(self._choices, rows, selected, hidden, student_head, targets)
            factors = self._factors(rows, selected, read, choices, policy)
            marked = [(marked_tokens(rows, name)[selected], its) for name, its in self._other_objectives.items()]
            groups = token_groups(inside, targets, factors.likelihood is not None, self._objective, marked)
            loss, outputs = factors.policy_value, []
            log_probs, entropies = torch.zeros(2, len(hidden), device=device)
            for tokens, states, head, objective in groups:
                of_these = partial(_at, tokens)
                output = fused_divergence(
                    of_these(hidden),
                    states,
                    student_head,
                    head,
                    of_these(token_ids),
                    of_these(factors.divergence),
                    objective,
                    likelihood_weights=None if factors.likelihood is None else of_these(factors.likelihood),
                    memory_budget=self._args.divergence_memory,
                    kernel=self._args.divergence_kernel,
                    num_listed=num_listed,
                )
                place = slice(None) if tokens is None else tokens
                log_probs[place] = output.student_log_prob.to(log_probs).where(output.finite.bool(), torch.nan)
                entropies[place] = output.student_entropy.to(entropies)
                loss = loss + output.loss
                outputs.append(output)
            if factors.policy is not None:  # its likelihood is there for the gradient
                loss = loss + (factors.policy * log_probs.nan_to_num(0.0)).sum()
            said = in_order(outputs, groups, inside) if targets else some_of(outputs[0], slice(0))
            likelihood = -log_probs.nan_to_num(0.0)[rows["likelihood_mask"].bool()[selected]]
            return PassLoss(loss, scored or said, likelihood, log_probs, entropies, factors.divergence[inside])

    @torch.no_grad()
    def _shaped(
        self,
        rows: dict[str, Any],
        hidden: torch.Tensor,
        head: Head,
        token_ids: torch.Tensor,
        targets: Sequence[TokenTargets],
    ) -> tuple[FusedDivergence | None, torch.Tensor]:
        """What student and teacher say of some tokens, if both have read any, and the advantages that follow."""
        found, scored = Found.nothing(rows["divergence_mask"], 0), None
        if targets:
            inside, nothing = (
                torch.ones_like(token_ids, dtype=torch.bool),
                torch.zeros(len(hidden), device=hidden.device),
            )
            groups = token_groups(inside, targets, False, self._objective)
            memory, kernel = self._args.divergence_memory, self._args.divergence_kernel
            outputs = []
            for tokens, states, teacher_head, objective in groups:
                student, ids, factors = (_at(tokens, values) for values in (hidden, token_ids, nothing))
                given = student, states, head, teacher_head, ids, factors, objective
                outputs.append(fused_divergence(*given, memory_budget=memory, kernel=kernel))
            scored = in_order(outputs, groups, inside)
            numbers = torch.arange(len(rows["divergence_mask"]), device=rows["divergence_mask"].device)
            found.add({**rows, "row": numbers}, scored, nothing)
        scores, log = found.scores(0), lambda *rate: self._logged.append(rate)
        return scored, shaped_advantages(self._signals, self._args, rows, scores, log)

    def _choices(
        self,
        rows: dict[str, Any],
        selected: torch.Tensor,
        hidden: torch.Tensor,
        head: Head,
        targets: Sequence[TokenTargets],
        top_k: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inside = rows["divergence_mask"].bool()
        one, other = torch.zeros(2, *inside.shape, device=hidden.device)
        for states, teacher_head, tokens in targets:
            place = inside if tokens is None else inside.masked_scatter(inside, tokens)
            its = cast(torch.Tensor, states), cast(Head, teacher_head)  # no server's
            found = self.networks.choices_of(hidden[place[selected]], head, *its, place, top_k)
            one, other = one + found[0], other + found[1]
        return one, other

    def _factors(
        self,
        rows: dict[str, Any],
        selected: torch.Tensor,
        read: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        choices: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
        policy: PolicyTerm | None,
    ) -> "_Factors":
        read = cache(read)
        divergence, likelihood = rows["divergence_factors"], rows["likelihood_factors"]
        for part in self._signals.policy_weightings if rows.get("old_log_probs") is not None else ():
            weights = part(read()[0], rows["old_log_probs"])
            divergence, likelihood = divergence * weights, likelihood * weights
        for one in self._signals.teacher_weightings if self._signals.coefficients["divergence_coef"] else ():
            divergence = divergence * one(rows["divergence_mask"].bool(), *choices(one.top_k))
        value, slope = divergence.new_zeros(()), None
        if policy is not None:
            value, slope = policy(rows, read)
            likelihood, slope = likelihood + slope, slope[selected]
        elif self._signals.coefficients["likelihood_coef"] == 0.0:
            likelihood = None
        return _Factors(divergence[selected], None if likelihood is None else likelihood[selected], slope, value)


class _Factors(NamedTuple):
    # Of each selected token: in the divergence, in −log p_S, and GRPO's part of that, whose loss is `policy_value`
    divergence: torch.Tensor
    likelihood: torch.Tensor | None
    policy: torch.Tensor | None
    policy_value: torch.Tensor


def make_loss(
    args: SelfDistillationConfig,
    accelerator: Accelerator,
    policy: Any,
    teacher: Teacher,
    signals: Signals,
    pad_to_multiple_of: int | None,
) -> SelfDistillationLoss:
    """
    The loss of a run, of student and teacher as the configuration has them read.

    Raises:
        ValueError: If what the backbone gives makes other logits than the model's.
    """
    shares_prompts, packs_rows = [], can_pack(causal_lm(accelerator.unwrap_model(policy)))
    for one in teacher.members.values() or [teacher]:
        with one.weights(policy) as module:
            if module is not None:
                model = causal_lm(accelerator.unwrap_model(module))
                shares_prompts.append(can_share_prompts(model))
                packs_rows = packs_rows and can_pack(model)
    if args.process_index == 0 and reads_more_than_text(causal_lm(policy).config):
        logger.warning_once(
            f"{type(causal_lm(policy)).__name__} reads more than text, so rows are padded, whatever the attention, "
            "and the teacher reads a prompt for each of its rollouts: positions and masks may depend on its images."
        )
    networks = Networks(
        accelerator,
        teacher,
        bool(shares_prompts) and all(shares_prompts),
        packs_rows,
        pad_to_multiple_of,
        args.max_tokens_per_microbatch,
        cast(float, args.distillation_temperature),
        args.divergence_memory,
        args.divergence_kernel,
        teacher.shared_tokens(causal_lm(policy).config.get_text_config().vocab_size),
        None if signals.target is None else signals.combine,
    )
    if accelerator.state.deepspeed_plugin is None and getattr(accelerator.state, "fsdp_plugin", None) is None:
        networks.check_logits(policy)  # sharded models run only wrapped
    objectives = args.objective(), args.other_objectives()
    return SelfDistillationLoss(args, accelerator, networks, *objectives, signals)


def _at(tokens: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    return values if tokens is None else values[tokens]
