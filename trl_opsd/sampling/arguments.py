"""The fields of a command that generates: which model, on what. Nothing heavy is imported here, for `--help`."""

from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml

from ..help import help_from_docstring


if TYPE_CHECKING:
    from .base import Backend

# Where a model lies and how much of it is computed at once: completions do not depend on it
_MEMORY = {
    "cpu_offload_gb", "data_parallel_size", "device_map", "enforce_eager", "gpu_memory_utilization",
    "max_num_batched_tokens", "max_num_seqs", "pipeline_parallel_size", "swap_space", "tensor_parallel_size",
}  # fmt: skip
_MODEL_FILES = (
    "*config.json", "*.safetensors*", "*.bin*", "*.gguf", "*token*", "vocab*", "merges*", "*.model", "chat_template*",
    "*.py",
)  # fmt: skip


@help_from_docstring
@dataclass
class EngineArguments:
    """
    Which model generates, and on what.

    Args:
        > Parameters that control the model

        model_name_or_path (`str`, *optional*):
            Hub id or local folder of the model. With `backend="vllm_server"`, the name the server has for it, or the
            path it was started with.
        adapter (`str`, *optional*):
            Hub id or local folder of a PEFT adapter.
        tokenizer (`str`, *optional*):
            Hub id or local folder of the tokenizer, if it is not the model's.
        revision (`str`, *optional*):
            Branch, tag or commit of the model.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype of the weights, e.g. `"bfloat16"`. `"auto"` is that of the checkpoint, on every backend.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the model.
        model_init_kwargs (`dict[str, Any]` or `str`, *optional*):
            Further keyword arguments of `from_pretrained` or, with `backend="vllm"`, of `vllm.LLM`, e.g.
            `{"tensor_parallel_size": 2}`.

        > Parameters that control the backend

        backend (`str`, *optional*, defaults to `"vllm"`):
            What generates: `"vllm"`, `"transformers"`, or `"vllm_server"` for a running `vllm serve`.
        base_url (`str`, *optional*, defaults to `"http://localhost:8000"`):
            Address of the server.
        batch_size (`int`, *optional*, defaults to `32`):
            Completions generated together by transformers, or requests under way at a server. vLLM in this process
            decides by itself.
    """

    model_name_or_path: str | None = None
    adapter: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    model_init_kwargs: dict[str, Any] | str | None = None

    backend: Literal["vllm", "transformers", "vllm_server"] = "vllm"
    base_url: str = "http://localhost:8000"
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise ValueError("No model: set `model_name_or_path` to a Hub id or a local folder.")
        self.model_init_kwargs = as_mapping("model_init_kwargs", self.model_init_kwargs)
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")
        if self.backend == "vllm_server" and (self.adapter or self.model_init_kwargs):
            raise ValueError(
                "A server has loaded its model already: with `backend` vllm_server, `adapter` and `model_init_kwargs` "
                "have no effect. Serve the adapter with `--lora-modules`, name it in `model_name_or_path`, and its "
                "base model in `tokenizer`."
            )
        folder = Path(self.model_name_or_path)
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} holds an adapter. Name it in `adapter`, and the model it belongs to in "
                "`model_name_or_path`."
            )

    def load_tokenizer(self) -> Any:
        """
        Loads the tokenizer.

        Raises:
            ValueError: If it cannot be loaded.
        """
        from transformers import AutoTokenizer

        name = self.tokenizer or str(self.model_name_or_path)
        try:
            return AutoTokenizer.from_pretrained(
                name, revision=None if self.tokenizer else self.revision, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Cannot load the tokenizer of {name}: {' '.join(str(error).split())} If only a server knows that "
                "name, or the tokenizer is elsewhere, set `tokenizer` to a folder or Hub id."
            ) from error

    def load_backend(self, tokenizer: Any) -> "Backend":
        """
        Loads the model, or finds the server.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.

        Raises:
            ValueError: As [`~trl_opsd.sampling.loading.load_backend`] does.
        """
        from . import loading

        return loading.load_backend(
            self.backend,
            str(self.model_name_or_path),
            tokenizer,
            tokenizer_name=self.tokenizer,
            adapter=self.adapter,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype,
            model_init_kwargs=cast("dict[str, Any] | None", self.model_init_kwargs),
            batch_size=self.batch_size,
            base_url=self.base_url,
        )

    def engine_settings(self, served: str | None) -> dict[str, Any]:
        """
        What completions depend on of these fields, with what changes when the weights do.

        Args:
            served (`str`, *optional*):
                Where a server loaded the model from.
        """
        names = {field.name for field in fields(EngineArguments)} - {"batch_size", "base_url"}
        settings = {name: value for name, value in vars(self).items() if name in names}
        given = cast("dict[str, Any]", self.model_init_kwargs or {})
        settings["model_init_kwargs"] = {key: value for key, value in given.items() if key not in _MEMORY} or None
        if self.backend == "vllm_server":
            is_here = served is not None and Path(served).is_dir()
            settings["weights"] = self.fingerprint(str(served)) if is_here else served
        else:
            settings["weights"] = self.fingerprint(str(self.model_name_or_path))
            settings["adapter_weights"] = self.fingerprint(self.adapter) if self.adapter else None
        return settings

    def fingerprint(self, name: str) -> str:
        """What changes when weights do: names, sizes and times of a local model's files, the commit on the Hub."""
        import hashlib

        from huggingface_hub import hf_hub_download

        if Path(name).is_dir():
            files = {file for pattern in _MODEL_FILES for file in Path(name).glob(pattern) if file.is_file()}
            stats = {file.name: file.stat() for file in sorted(files)}
            text = str([(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()])
            return hashlib.sha256(text.encode()).hexdigest()[:16]
        is_adapter = name == self.adapter
        file = "adapter_config.json" if is_adapter else "config.json"
        return Path(hf_hub_download(name, file, revision=None if is_adapter else self.revision)).parent.name


def as_mapping(name: str, value: Any) -> dict[str, Any] | None:
    """
    The value of a field that is a mapping, which a flag gives as text.

    Args:
        name (`str`):
            Field.
        value (`Any`):
            Mapping, YAML or JSON of one, or `None`.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(value, str):
        with suppress(yaml.YAMLError):
            value = yaml.safe_load(value)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"Expected `{name}` to be a mapping, such as '{{enable_thinking: false}}', got {value!r}.")
    return value
