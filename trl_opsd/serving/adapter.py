"""
The policy's adapter by itself, for an inference engine that keeps the base: whether one can load it, and how it goes
over.

What this relies on in TRL 1.16 (held by `tests/trainer/test_trl_contract.py`): GRPOTrainer makes its engine with
`VLLMGeneration` of `trl.trainer.grpo_trainer`, which makes a colocated one with `LLM` of
`trl.generation.vllm_generation`, keeps it as `llm` and samples by `llm.generate`; a server's client asks for the model
`vllm_client.model`.
"""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

from ..changed import changed
from .merged_weights import check_mergeable, quantized_parameter, whole


# What the adapter is called in an engine
NAME, _ID = "policy", 1

# Of adapters that vLLM can be made ready for
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

Gathered = Callable[[list[nn.Parameter]], AbstractContextManager[None]]


def obstacle(policy: Any) -> str | None:
    """
    Why vLLM could not load a policy's adapter and sample as the policy, if so.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, not wrapped.

    Returns:
        `str`, *optional*: for a message.
    """
    if not isinstance(policy, PeftModel):
        return "the policy has none"
    if len(policy.active_adapters) != 1:
        return f"{len(policy.active_adapters)} are active, and vLLM applies one"
    (adapter,) = policy.active_adapters
    config = policy.peft_config[adapter]
    if config.peft_type != PeftType.LORA:
        return f"it is made of `{type(config).__name__}`, and vLLM loads `LoraConfig`'s"
    base = cast(Any, policy.get_base_model())
    beside = {id(module) for module in base.modules()} - {id(module) for module in base.get_decoder().modules()}
    beside.discard(id(base.get_output_embeddings()))
    factors = set()
    for name, module in policy.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        is_lora = isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
        if not is_lora or not isinstance(module.get_base_layer(), nn.Linear):
            return f"{name} is no linear layer"
        if id(module) in beside:
            return (
                f"{name} is not of the language model, and vLLM would leave it out without a word (`exclude_modules` "
                "in the adapter's configuration keeps the adapter off it)"
            )
        for variant in cast(Any, module).lora_variant.values():
            return f"on {name} it is a variant ({type(variant).__name__}) that vLLM does not know"
        factors |= {id(one.weight) for one in _factors(module, adapter)}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and id(parameter) not in factors:
            return f"{name} is trained too, which is no part of what vLLM loads"
        if not parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            return f"{name} is quantised, and in another way than to the 4 bits of bitsandbytes"
    if rank_of(policy) > _RANKS[-1]:
        return f"its rank of {rank_of(policy)} is above vLLM's {_RANKS[-1]}"
    return None


def rank_of(policy: PeftModel) -> int:
    """The highest rank of any layer."""
    (adapter,) = policy.active_adapters
    return max(module.r.get(adapter, 0) for module in policy.modules() if isinstance(module, LoraLayer))


def adapter_weights(policy: PeftModel, gathered: Gathered) -> dict[str, torch.Tensor]:
    """
    The active adapter as its file has it, with the factor that scales each layer in the layer's second matrix, since
    vLLM knows one for all.

    Args:
        policy ([`~peft.PeftModel`]):
            Policy, not wrapped, without an [`obstacle`].
        gathered (`Callable`):
            Context manager that makes the given parameters whole, where ZeRO-3 shards them. All processes enter it.
    """
    (adapter,) = policy.active_adapters
    layers = {name: module for name, module in policy.named_modules() if isinstance(module, LoraLayer)}
    weights: dict[str, torch.Tensor] = {}
    with gathered([cast(nn.Parameter, one.weight) for layer in layers.values() for one in _factors(layer, adapter)]):
        for name, layer in layers.items():
            name = name.replace("_checkpoint_wrapped_module.", "")
            for letter, factor in zip("AB", _factors(layer, adapter), strict=False):
                scale = layer.scaling[adapter] if letter == "B" else 1.0
                weights[f"{name}.lora_{letter}.weight"] = (
                    whole(cast(nn.Parameter, factor.weight)).float() * scale
                ).cpu()
    return weights


def _factors(layer: Any, adapter: str) -> list[nn.Linear]:
    """The two matrices on a layer; none if the adapter leaves it as it is."""
    return [factors[adapter] for factors in (layer.lora_A, layer.lora_B) if adapter in factors]


def write_adapter(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write what [`adapter_weights`] gives as a folder that vLLM loads."""
    rank = max(value.shape[0] for name, value in weights.items() if name.endswith("lora_A.weight"))
    modules = sorted({name.split(".")[-3] for name in weights})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    # The engine may have the file of before mapped into its memory, which must not change under it
    save_file(weights, folder / "adapter.new")
    (folder / "adapter.new").replace(folder / "adapter_model.safetensors")


class NotLoadedError(ValueError):
    """An engine did not load an adapter."""


def engine_for_adapters(how: str) -> AbstractContextManager[None]:
    """
    Inside, GRPOTrainer makes a colocated engine ready to load the policy's adapter, if that is how it is sent.

    Args:
        how (`str`):
            `vllm_lora_sync`.
    """
    return changed(grpo_trainer, VLLMGeneration=partial(_make_generation, how))


def needs_adapter(how: str, policy: nn.Module) -> bool:
    """Whether only the adapter alone will do: if told so, or as nothing can be merged into a base of 4 bits."""
    return how == "adapter" or (how == "auto" and quantized_parameter(policy) is not None)


def _make_generation(how: str, **settings: Any) -> VLLMGeneration:
    policy = settings["model"]
    if settings["mode"] != "colocate":
        return VLLMGeneration(**settings)
    if not needs_adapter(how, policy):
        if isinstance(policy, PeftModel):
            check_mergeable(policy)
        return VLLMGeneration(**settings)
    problem = obstacle(policy)
    if settings["enable_sleep_mode"]:
        problem = "an engine that sleeps (`vllm_enable_sleep_mode=True`) has lost the base when it wakes up"
    if problem is not None:
        raise ValueError(refusal(how, policy, problem))
    rank = min(rank for rank in _RANKS if rank >= rank_of(policy))
    # The policy's own base is sent, so that the engine's need not be quantised in the same way
    ready = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "quantization": None}
    original = vllm_generation.LLM
    with changed(vllm_generation, LLM=lambda **kwargs: original(**kwargs | ready)):
        try:
            return VLLMGeneration(**settings)
        except Exception as error:
            raise ValueError(refusal(how, policy, str(error))) from error


def refusal(how: str, policy: nn.Module, problem: str) -> str:
    """The message of an error: the adapter has to go over alone, and cannot."""
    if how == "adapter":
        why, way_out = "`vllm_lora_sync='adapter'`", "Set `vllm_lora_sync='merged'`"
    else:
        why, way_out = f"{quantized_parameter(policy)} is quantised, and merged with nothing", "Train on another base"
    return f"{why}: vLLM cannot load the policy's adapter by itself: {problem}. {way_out}, or set `use_vllm=False`."


def server_obstacle(client: VLLMClient, policy: PeftModel) -> str | None:
    """Why a server could not load an adapter that has no [`obstacle`] itself, if so."""
    info = client.get_server_info()
    where, lora = f"the server at {client.base_url}", info.get("lora_config")
    if not lora:
        return f"{where} was started without `--enable-lora`"
    if lora["max_lora_rank"] < rank_of(policy):
        return f"{where} has `--max-lora-rank {lora['max_lora_rank']}`, and the adapter a rank of {rank_of(policy)}"
    if info["parallel_config"].get("_api_process_count", 1) > 1:
        return f"{where} has several API processes (`--api-server-count`), of which one would hear of it"
    return None


def load_on_server(client: VLLMClient, folder: Path) -> None:
    """
    Have a server load an adapter in place of the one before, and sample with it.

    Raises:
        NotLoadedError: If it does not.
    """
    request = {"lora_name": NAME, "lora_path": str(folder), "load_inplace": True}
    response = client.session.post(f"{client.base_url}/v1/load_lora_adapter", json=request)
    where = f"the server at {client.base_url}"
    if response.status_code == 404 and "lora" not in response.text.lower():  # of the adapter, it would name it
        raise NotLoadedError(f"{where} was started without `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` in its environment")
    if response.status_code != 200:
        raise NotLoadedError(f"{where} answers with status {response.status_code}: {response.text[:500]}")
    client.reset_prefix_cache()
    client.model = NAME


def load_in_process(llm: Any, folder: Path) -> None:
    """
    Have an engine of this process load an adapter in place of the one before.

    Raises:
        NotLoadedError: If it does not, or would leave a part of it out.
    """
    from vllm.lora.request import LoRARequest

    try:
        llm.llm_engine.add_lora(LoRARequest(NAME, _ID, str(folder), load_inplace=True))
    except Exception as error:
        raise NotLoadedError(str(error)) from error
    manager = llm.llm_engine.model_executor.driver_worker.model_runner.model.lora_manager
    left_out = sorted(manager.get_adapter(_ID).loras.keys() - manager.modules.keys())
    if left_out:
        raise NotLoadedError(f"it has no place for the adapter on {', '.join(left_out[:3])}")
    llm.reset_prefix_cache()


def sample_with_adapter(llm: Any, folder: Path) -> None:
    """Have every call of an engine of this process sample with the adapter."""
    from vllm.lora.request import LoRARequest

    llm.generate = partial(llm.generate, lora_request=LoRARequest(NAME, _ID, str(folder)))


class AdapterSync:
    """
    Takes the place of `sync_weights`: the engine gets the base once, and then the adapter alone.

    The base is sent since the one that the engine has loaded need not be the policy's: a 4-bit base holds other values
    than its checkpoint, and some initialisations of adapters (PiSSA's) change it.

    Args:
        send_base (`Callable[[], None]`):
            Sends all weights of the base.
        policy ([`~peft.PeftModel`]):
            Policy, not wrapped, without an [`obstacle`].
        gathered (`Callable`):
            See [`adapter_weights`].
        load (`Callable[[Path], None]`, *optional*):
            Has the engine load a folder, and forget what it has computed. `None` on a process that talks to none.
        shared (`Path`, *optional*):
            Folder that the engine's machine sees too. `None` is for an engine of this process.
    """

    def __init__(
        self,
        send_base: Callable[[], None],
        policy: PeftModel,
        gathered: Gathered,
        load: Callable[[Path], None] | None,
        shared: Path | None = None,
    ):
        self._send_base: Callable[[], None] | None = send_base
        self._policy, self._gathered, self.load = policy, gathered, load
        if shared is not None:
            shared.mkdir(parents=True, exist_ok=True)
        in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        # What begins with an underscore is not pushed to the Hub with the folder of a run
        self._temporary = tempfile.TemporaryDirectory(prefix="_adapter-", dir=shared or in_memory)
        self.folder = Path(self._temporary.name).absolute()

    def __call__(self) -> None:
        """Bring the engine up to date. All processes call this."""
        if self._send_base is not None:
            self._send_base()
            self._send_base = None
        weights = adapter_weights(self._policy, self._gathered)
        if self.load is not None:
            write_adapter(self.folder, weights)
            self.load(self.folder)
