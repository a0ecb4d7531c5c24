"""What a model and its tokenizer cannot do: all but the last before its weights are loaded."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from ...context import check_embedded
from ..config import SelfDistillationConfig


# Adapters that cannot be trained, and why: peft's kinds, and settings of LoRA. All others are in the table of
# `tests/teacher/test_adapters.py`
_KINDS = {
    "ADAPTION_PROMPT": "it takes the place of attention layers, and can be neither copied for a teacher nor merged",
    "POLY": "it reads `task_ids` in every pass, and rows have none",
    "SHADOW": "a network of its own runs beside the layers, and does not know their cached keys and values",
    "XLORA": "the weights of its experts come from a pass around the model, and the loss passes through the backbone",
}
_SETTINGS = {
    "alora_invocation_tokens": "peft looks for them around the model, and the loss passes through its backbone",
    "arrow_config": "it chooses among adapters that are trained already, and trains none",
    "layer_replication": "several layers share weights that have one place in vLLM and in a second adapter",
    "monteclora_config": "it draws noise ahead of time, which no checkpoint has, and asks for a loss of its own",
}
_FROM_DATA = {
    "corda": "`preprocess_corda(model, config, run_model)` before it",
    "eva": "`initialize_lora_eva_weights(policy, dataloader)` after it",
    "lora_ga": "`preprocess_loraga(model, config, train_step)` before it",
}


def check_model(model: Any, peft_config: Any) -> None:
    """
    Refuse adapters that cannot be trained, or that are to be initialised from data.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter that it is yet to get.

    Raises:
        ValueError: Naming the adapter, the reason and the way out.
    """
    config = peft_config or getattr(model, "active_peft_config", None)
    if config is None:
        return
    reason = _KINDS.get(config.peft_type)
    if config.is_prompt_learning:
        reason = (
            "it puts virtual tokens in front of the prompt, which would shift teacher and student against each other"
        )
    if reason is not None:
        raise ValueError(
            f"The adapter of `{type(config).__name__}` cannot be trained: {reason}. Use `LoraConfig`, or train all "
            "weights."
        )
    for name, reason in _SETTINGS.items():
        if getattr(config, name, None):
            raise ValueError(
                f"`{type(config).__name__}` with `{name}` cannot be trained: {reason}. Leave `{name}` unset."
            )
    how = getattr(peft_config, "init_lora_weights", None)
    if how in _FROM_DATA:
        raise ValueError(
            f"`init_lora_weights={how!r}` initialises the adapter from data, and from `peft_config` it would not be. "
            f"Make it with `policy = get_peft_model(model, config)` and {_FROM_DATA[how]}, and give `policy` as "
            "`model`, without `peft_config`."
        )


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None) -> None:
    """
    Refuse a tokenizer that has nothing to pad with, or pads or ends with a token that the model does not have.

    Raises:
        ValueError: Naming the token and the way out.
    """
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has neither a pad token nor an eos token to pad with. Set `tokenizer.pad_token`."
        )
    given = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    check_embedded([token_id for token_id in given if token_id is not None], tokenizer, num_embeddings)


def check_completion_length(args: SelfDistillationConfig, model_config: Any, samples_itself: bool) -> None:
    """
    Refuse completions without a limit, which transformers would end after 20 tokens.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        model_config (`PreTrainedConfig`):
            Configuration of the policy.
        samples_itself (`bool`):
            Whether this trainer samples the completions, and not a `rollout_func`.

    Raises:
        ValueError: If there is no limit.
    """
    if args.max_completion_length is None and samples_itself:
        context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
        most = "" if context is None else f": at most what the model's context of {context} leaves beside the prompts"
        raise ValueError(
            "`max_completion_length=None` sets no limit, and rollouts would end after a default of 20 tokens. Set it "
            f"to a number of tokens{most}."
        )


def check_grpo_loss(
    args: SelfDistillationConfig, policy: Any, takes_pass: bool, has_auxiliary_loss: bool, router_aux_loss_coef: float
) -> None:
    """
    Refuse a forward pass of GRPOTrainer's own with a model in which it does not find the backbone, and the auxiliary
    loss of a mixture of experts beside passes of some rows.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        policy ([`~transformers.PreTrainedModel`]):
            Causal language model. Llama 4 is one that has its backbone under another name than it states.
        takes_pass (`bool`):
            Whether there is such a pass.
        has_auxiliary_loss (`bool`):
            Whether there is such a loss.
        router_aux_loss_coef (`float`):
            Its weight.

    Raises:
        ValueError: Naming what asks for it and the way out.
    """
    if takes_pass and policy.base_model is policy:
        raise ValueError(
            f"{type(policy).__name__} can be trained, but GRPOTrainer's own forward pass does not find its backbone. "
            f"Leave out what asks for that pass: `router_aux_loss_coef={router_aux_loss_coef}` (set it to 0.0), "
            "`entropy_coef`, or a `distillation_temperature` other than `temperature` with GRPO's loss."
        )
    if has_auxiliary_loss and args.max_tokens_per_microbatch is not None:
        raise ValueError(
            f"`max_tokens_per_microbatch={args.max_tokens_per_microbatch}` cannot be combined with the auxiliary loss "
            f"of a mixture of experts (`router_aux_loss_coef={router_aux_loss_coef}`), which is a statistic of the "
            "whole micro-batch. Set `router_aux_loss_coef=0.0`, or leave `max_tokens_per_microbatch` unset."
        )
