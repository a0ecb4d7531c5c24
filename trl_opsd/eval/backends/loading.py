"""From the fields of an evaluation to a loaded model."""

from typing import Any, cast

from transformers import AutoConfig, PreTrainedTokenizerBase

from ..arguments import EvalArguments
from .base import Backend, end_token_ids


def load_backend(arguments: EvalArguments, tokenizer: PreTrainedTokenizerBase) -> Backend:
    """
    Loads the model, or finds the server.

    Args:
        arguments ([`EvalArguments`]):
            Fields of the evaluation.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.

    Returns:
        [`Backend`]:
            Backend that is ready to generate.

    Raises:
        ValueError: If the backend is not installed, or the server cannot be used.
    """
    name = str(arguments.model_name_or_path)
    loading = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
    if arguments.backend == "vllm_server":
        from .vllm_server import VLLMServerBackend

        # The server's name for a model need not be a place to load from
        ends = end_token_ids(tokenizer, arguments.tokenizer or name, **loading)
        return VLLMServerBackend(arguments.base_url, name, ends, arguments.batch_size)
    ends = end_token_ids(tokenizer, name, **loading)
    load = _load_vllm if arguments.backend == "vllm" else _load_transformers
    return load(arguments, name, loading, ends)


def _load_transformers(arguments: EvalArguments, name: str, loading: dict[str, Any], ends: list[int]) -> Backend:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from .transformers import TransformersBackend

    given = cast(dict[str, Any], arguments.model_init_kwargs or {})
    init_kwargs = {"dtype": arguments.dtype, **loading, **given}
    model = AutoModelForCausalLM.from_pretrained(name, **init_kwargs)
    if arguments.adapter:
        model = PeftModel.from_pretrained(model, arguments.adapter)
    if torch.cuda.is_available() and "device_map" not in init_kwargs:
        model = model.to("cuda")
    return TransformersBackend(model, ends, arguments.batch_size)


def _load_vllm(arguments: EvalArguments, name: str, loading: dict[str, Any], ends: list[int]) -> Backend:
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise ValueError(
            f"vLLM cannot be imported ({error}). Install it with `pip install 'trl-opsd[vllm]'`, or choose another "
            "`backend`: transformers or vllm_server."
        ) from error

    from .vllm import VLLMBackend

    init_kwargs: dict[str, Any] = {}
    lora_request = None
    if arguments.adapter:
        from peft import PeftConfig

        rank = PeftConfig.from_pretrained(arguments.adapter).r
        # vLLM knows powers of two from 8 on
        init_kwargs = {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}
        lora_request = LoRARequest("adapter", 1, arguments.adapter)
    dtype: Any = arguments.dtype
    if dtype == "auto":
        # vLLM's own `auto` computes in half precision what was saved in fp32
        dtype = AutoConfig.from_pretrained(name, **loading).dtype or "auto"
    own = {"model": name, "tokenizer": arguments.tokenizer, "dtype": dtype, **loading, **init_kwargs}
    llm = LLM(**{**own, **cast(dict[str, Any], arguments.model_init_kwargs or {})})
    return VLLMBackend(llm, ends, lora_request)
