"""Whether what the losses read of a model is what the model itself gives."""

from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.nn.functional import linear
from trl.trainer.utils import maybe_gather_lm_head_ctx

from .heads import causal_lm, head_of, unsharded
from .positions import positions
from .states import completion_states, evaluation_mode


_NUM_TOKENS = 8


@torch.no_grad()
def check_logits(
    model: nn.Module,
    device: torch.device,
    within: Callable[[Callable[[], torch.Tensor]], torch.Tensor] = lambda forward: forward(),
) -> None:
    """
    Refuse a model whose logits are more than one matrix makes of its backbone's states: what is computed from backbone
    and head would be about another model. A few of its logits are compared.

    Args:
        model (`nn.Module`):
            Causal language model, or a `PeftModel` of one. Where its parameters are sharded, every process calls this.
        device (`torch.device`):
            Where its forward pass runs.
        within (`Callable`, *optional*):
            Runs a forward pass it is given inside that of a wrapper.

    Raises:
        ValueError: If they differ, or if the backbone cannot be run by itself.
    """
    policy = causal_lm(model)
    name = type(policy).__name__
    head = policy.get_output_embeddings()
    if head is None:
        raise ValueError(f"{name} has no language-model head. Choose a causal language model.")
    if isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper) and not isinstance(head, ModulesToSaveWrapper):
        raise ValueError(
            f"The adapter changes the head of {name} by a product of its own ({type(head).__name__}), and the loss "
            "applies a head that is one matrix. Leave the head out of `target_modules`, and, where it is tied to the "
            "embedding, `trainable_token_indices` unset. `modules_to_save` trains a head as a whole."
        )
    with evaluation_mode(model):
        try:
            problem = _problem(*_logits(model, device, within))
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"{name} cannot be trained: its backbone ({type(policy.base_model).__name__}) does not give hidden "
                f"states by itself ({error}). Choose a model of another architecture."
            ) from error
    if problem is not None:
        raise ValueError(
            f"{name} cannot be trained: its logits are not those of its head ({type(head).__name__}) applied to the "
            f"last hidden states, which the loss computes: {problem}. There is another layer, factor or cap between, "
            "which its configuration does not declare in a known way. Choose a model of another architecture."
        )


@torch.no_grad()
def check_packing(
    model: nn.Module,
    device: torch.device,
    within: Callable[[Callable[[], torch.Tensor]], torch.Tensor] = lambda forward: forward(),
) -> None:
    """
    Refuse a model that takes packed rows for one sequence, as one does that keeps from its attention where they begin.
    The states of a few short rows are compared with those of the same rows, padded.

    Args:
        model (`nn.Module`):
            Causal language model for which [`can_pack`] holds, or a `PeftModel` of one. Where its parameters are
            sharded, every process calls this.
        device (`torch.device`):
            Where its forward pass runs.
        within (`Callable`, *optional*):
            Runs a forward pass it is given inside that of a wrapper.

    Raises:
        ValueError: If they differ by more than rounding, and the experts it chooses, can explain.
    """
    policy = causal_lm(model)
    size = policy.config.get_text_config().vocab_size
    ids = (size // 2 + torch.arange(3 * _NUM_TOKENS)).remainder(size).view(3, _NUM_TOKENS).to(device)
    mask = torch.ones_like(ids).tril(diagonal=_NUM_TOKENS - 3)
    selected = mask[:, 1:].bool()
    with evaluation_mode(model):
        packed = within(lambda: completion_states(model, ids, mask, selected, pack=True)).float()
        padded = within(lambda: completion_states(model, ids, mask, selected)).float()
    difference = ((packed - padded).norm() / padded.norm()).item()
    if not difference < 0.1:
        raise ValueError(
            f"{type(policy).__name__} reads rows without padding between them otherwise than apart: its hidden states "
            f"differ by {difference:.0%}. Load it with another `attn_implementation` than "
            f"{policy.config._attn_implementation!r}, such as 'sdpa', with which rows are padded."
        )


def _problem(logits: torch.Tensor | None, own_logits: torch.Tensor) -> str | None:
    if logits is None:
        return "the states have another width than it reads"
    if logits.shape != own_logits.shape:
        return f"there are {logits.size(-1)}, and {own_logits.size(-1)} of the model's"
    difference = (logits - own_logits).abs().max().item()
    tolerance = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 3e-2
    is_close = difference <= tolerance * own_logits.abs().max().item()
    return None if is_close else f"they differ by up to {difference:.3g}"


def _logits(
    model: nn.Module, device: torch.device, within: Callable[[Callable[[], torch.Tensor]], torch.Tensor]
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Logits as the losses compute them, if they can, and the model's own, of shape (number of tokens, V)."""
    policy = causal_lm(model)
    size = policy.config.get_text_config().vocab_size
    # From the middle of the vocabulary, where no token stands for an image
    ids = (size // 2 + torch.arange(_NUM_TOKENS)).remainder(size)[None].to(device)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
    # Two passes, since ZeRO-3 keeps whole what a single one needs twice. `forward` is called because the model is
    # being called already, by its wrapper
    states = within(lambda: completion_states(model, ids, mask, mask[:, 1:].bool()))
    own = within(lambda: policy.forward(**inputs).logits)
    head = head_of(model)
    with maybe_gather_lm_head_ctx(head.weight, head.bias):
        head = unsharded(head)
        fits = states.size(-1) == head.weight.size(-1)
        logits = head.finish.logits(linear(states.to(head.weight.device), head.weight)) if fits else None
    return logits, own[0, :-1].to(head.weight.device, torch.float32)
