"""From plain values to a model that generates."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from .base import Backend, end_token_ids


def load_backend(
    backend: str,
    model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokenizer_name: str | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    model_init_kwargs: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    base_url: str | None = None,
) -> Backend:
    """
    Loads the model, or finds the server.

    Args:
        backend (`str`):
            `"transformers"`, `"vllm"`, or `"vllm_server"`.
        model_name_or_path (`str`):
            Model, or its name on the server.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        tokenizer_name (`str`, *optional*):
            Where the tokenizer comes from, if not from the model.
        adapter (`str`, *optional*):
            LoRA adapter to put on the model.
        revision (`str`, *optional*):
            Branch, tag or commit of the model.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the model may run.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype of the weights, `"auto"` for the one they are saved in.
        model_init_kwargs (`Mapping[str, Any]`, *optional*):
            Keyword arguments of `from_pretrained` or of `vllm.LLM`. They win over the other arguments.
        batch_size (`int`, *optional*, defaults to `8`):
            Completions that transformers generates together, or requests a server gets at once.
        base_url (`str`, *optional*):
            Address of the server.

    Returns:
        [`Backend`]:
            Backend that is ready to generate.

    Raises:
        ValueError: If the backend is not installed, or the server cannot be used.
    """
    loading = {"revision": revision, "trust_remote_code": trust_remote_code}
    given = dict(model_init_kwargs or {})
    if backend == "vllm_server":
        from .vllm_server import VLLMServerBackend

        # The server's name for a model need not be a place to load from
        ends = end_token_ids(tokenizer, tokenizer_name or model_name_or_path, **loading)
        return VLLMServerBackend(str(base_url), model_name_or_path, ends, batch_size)
    ends = end_token_ids(tokenizer, model_name_or_path, **loading)
    if backend == "vllm":
        own = {"tokenizer": tokenizer_name, "dtype": dtype, **loading}
        return _load_vllm(model_name_or_path, adapter, own, given, ends)
    init_kwargs = {"dtype": dtype, **loading, **given}
    return _load_transformers(model_name_or_path, adapter, init_kwargs, ends, batch_size)


def _load_transformers(
    name: str, adapter: str | None, init_kwargs: dict[str, Any], ends: list[int], batch_size: int
) -> Backend:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from .transformers import TransformersBackend

    model = AutoModelForCausalLM.from_pretrained(name, **init_kwargs)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    if torch.cuda.is_available() and "device_map" not in init_kwargs:
        model = model.to("cuda")
    return TransformersBackend(model, ends, batch_size)


def _load_vllm(name: str, adapter: str | None, own: dict[str, Any], given: dict[str, Any], ends: list[int]) -> Backend:
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise ValueError(
            f"vLLM cannot be imported ({error}). Install it with `pip install 'trl-opsd[vllm]'`, or choose another "
            "`backend`: transformers or vllm_server."
        ) from error

    from .vllm import VLLMBackend

    lora_request = None
    if adapter:
        from peft import PeftConfig

        rank = PeftConfig.from_pretrained(adapter).r
        # vLLM knows powers of two from 8 on
        own |= {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}
        lora_request = LoRARequest("adapter", 1, adapter)
    if own["dtype"] == "auto":
        # vLLM's own `auto` computes in half precision what was saved in fp32
        loading = {key: own[key] for key in ("revision", "trust_remote_code")}
        own["dtype"] = AutoConfig.from_pretrained(name, **loading).dtype or "auto"
    return VLLMBackend(LLM(**{"model": name, **own, **given}), ends, lora_request)
