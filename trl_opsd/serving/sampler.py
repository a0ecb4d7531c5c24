"""The vLLM engine that samples the rollouts: whether it will do, and how it gets the policy's weights."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.generation.vllm_generation import VLLMGeneration

from ..data import prompts_of
from .adapter import (
    AdapterSync,
    NotLoadedError,
    load_in_process,
    load_on_server,
    needs_adapter,
    obstacle,
    refusal,
    sample_with_adapter,
    server_obstacle,
)
from .client import check_holds_policy, check_tokenizer, context_length, limit_requests, wait_for_server
from .images import forget_images, read_images
from .merged_weights import check_mergeable, merged_weights


T = TypeVar("T")


def wait_for_sampler(base_url: str, timeout: float, is_main_process: bool) -> None:
    """
    See [`wait_for_server`]. The main process waits, and the others hear of it.

    Raises:
        ValueError: On every process, if the server is not up by then.
    """
    _asked_once(lambda: wait_for_server(base_url, timeout), is_main_process)


def prepare_sampler(
    generation: VLLMGeneration,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    request_timeout: float,
    lora_sync: str = "auto",
    shared: Path = Path(),
    told_otherwise: str | None = None,
) -> tuple[int, str]:
    """
    Have an engine take the policy's weights, its adapter merged or by itself, and refuse one that cannot sample as the
    policy.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            The engine, in the process or on a server. How it is sent weights is replaced.
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, not wrapped.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        request_timeout (`float`):
            See [`limit_requests`].
        lora_sync (`str`, *optional*, defaults to `"auto"`):
            `vllm_lora_sync`.
        shared (`Path`, *optional*):
            Folder that a server sees too.
        told_otherwise (`str`, *optional*):
            Why a server may be asked for the base without the adapter, if so.

    Returns:
        `tuple[int, str]`: tokens it takes for prompt and completion together, and what it is sent.

    Raises:
        ValueError: On every process, naming what does not fit.
    """
    sender: Any = generation
    image_token_id = getattr(policy.config, "image_token_id", None)

    def ask() -> int:
        client = sender.vllm_client
        limit_requests(client.session, request_timeout)
        limit = context_length(client)
        check_tokenizer(client, "vllm_server_base_url", tokenizer)
        check_holds_policy(client, policy.config)
        if image_token_id is not None:
            forget_images(client)
        return limit

    is_here = sender.mode == "colocate"
    limit = sender.llm.model_config.max_model_len if is_here else _asked_once(ask, sender.accelerator.is_main_process)
    if is_here:
        read_images(sender.llm, image_token_id)
    must, sent = needs_adapter(lora_sync, policy), "all weights"
    if isinstance(policy, PeftModel):
        sent = "all weights, its adapter merged"
    if must:
        problem = obstacle(policy) or _send_adapter(sender, policy, shared, told_otherwise)
        if problem is None:
            return limit, "its adapter alone"
        raise ValueError(refusal(lora_sync, policy, problem))
    if isinstance(policy, PeftModel):
        if not is_here:  # where it is, its engine was not made before
            check_mergeable(policy)
        sender._iter_named_params = partial(merged_weights, policy, sender._dist.gather_params)
    if is_here:
        sender._iter_named_params = partial(_load_into_engine, sender.llm, sender._iter_named_params)
    return limit, sent


def _send_adapter(sender: Any, policy: PeftModel, shared: Path, told_otherwise: str | None) -> str | None:
    """Have an engine get the base once, now, and then the adapter alone, or say why it cannot."""
    is_here, is_main_process = sender.mode == "colocate", sender.accelerator.is_main_process
    load: Callable[[Path], None] | None = None
    if is_here:
        load = partial(load_in_process, sender.llm)
    else:
        ask: Callable[[], str | None] = lambda: server_obstacle(sender.vllm_client, policy)  # noqa: E731
        problem = told_otherwise or _asked_once(ask, is_main_process)
        if problem is not None:
            return problem
        load = partial(load_on_server, sender.vllm_client) if is_main_process else None
    base = partial(merged_weights, policy, sender._dist.gather_params, merges=False)
    sender._iter_named_params = partial(_load_into_engine, sender.llm, base) if is_here else base
    sync = AdapterSync(sender.sync_weights, policy, sender._dist.gather_params, load, None if is_here else shared)
    failure = None
    try:
        sync()
    except Exception as error:  # the others wait to hear of it
        failure = str(error) if isinstance(error, NotLoadedError) else repr(error)
    failures = [failure for failure in gather_object([failure]) if failure is not None]
    if failures:
        return failures[0]
    sender.sync_weights = sync
    if is_here:
        sample_with_adapter(sender.llm, sync.folder)
    return None


def check_engine_context(limit: int, longest_prompt: int, max_completion_length: int | None, field: str) -> None:
    """
    Refuse an engine that cannot sample rollouts in full.

    Args:
        limit (`int`):
            Tokens it takes.
        longest_prompt (`int`):
            Tokens of the longest prompt.
        max_completion_length (`int`, *optional*):
            Most tokens of a completion.
        field (`str`):
            What sets the limit, for the message.

    Raises:
        ValueError: If they do not fit.
    """
    if longest_prompt + (max_completion_length or 1) > limit:
        raise ValueError(
            f"vLLM's context of {limit} tokens is too short for prompts of up to {longest_prompt} and "
            f"`max_completion_length={max_completion_length}`. Raise `{field}`, or lower `max_completion_length`."
        )


def longest_prompt(dataset: Any, tokenize: Callable[[list[Any]], list[list[int]]], accelerator: Accelerator) -> int:
    """
    Tokens of the longest prompt, of which each process measures its share; 0 for a stream.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with a `prompt`.
        tokenize (`Callable[[list[Any]], list[list[int]]]`):
            From prompts to token ids.
        accelerator ([`~accelerate.Accelerator`]):
            The processes.
    """
    if not isinstance(dataset, Dataset):
        return 0
    share = dataset.select(range(accelerator.process_index, len(dataset), accelerator.num_processes))
    longest = 0
    with tqdm(
        total=len(share),
        desc="Measuring prompts of `train_dataset`",
        leave=False,
        disable=None if accelerator.is_local_main_process else True,  # None: no bar where there is no terminal
    ) as progress:
        for prompts in prompts_of(share):
            longest = max(longest, *map(len, tokenize(prompts)))
            progress.update(len(prompts))
    return max(gather_object([longest]))


def _load_into_engine(llm: Any, weights: Callable[[], Iterable[tuple[str, torch.Tensor]]]) -> Iterable[Any]:
    """
    Load all weights into an engine of the process in one call, which takes them one after another, and leave none to
    TRL. In a call for each, vLLM would walk through its whole model every time: most of a synchronisation.
    """
    llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights(weights())
    llm.llm_engine.reset_encoder_cache()  # of images, what the weights before made of them
    return ()


def _asked_once(ask: Callable[[], T], is_main_process: bool) -> T:
    """What the main process is answered, on every process, or the error that it met."""
    answer, failure = None, None
    if is_main_process:
        try:
            answer = ask()
        except Exception as error:  # the others wait to hear of it
            failure = str(error)
    answer, failure = broadcast_object_list([answer, failure])
    if failure is not None:
        raise ValueError(failure)
    return answer
