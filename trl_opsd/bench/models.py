"""Models that exist nowhere but here: the shape of a real one, random weights and a made-up tokenizer."""

from pathlib import Path
from typing import Any

import torch


WORDS = "the of and a to in is for that on with as by from at this one two red blue green"
_NUM_WORDS = 32768

_QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
}
# As in the configurations of the models of these names
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": _NUM_WORDS,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {**_QWEN3, "hidden_size": 1024, "intermediate_size": 3072},
    "qwen3-1.7b": {**_QWEN3, "hidden_size": 2048, "intermediate_size": 6144},
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}


def save_config(folder: Path, preset: str) -> None:
    """
    Saves the configuration of a Qwen3 and a tokenizer of 32,768 words, but no weights.

    Args:
        folder (`Path`):
            Where they go.
        preset (`str`):
            Key of `PRESETS`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    words = ["<pad>", "<eos>", "<unk>", *WORDS.split()]
    words += [f"w{index}" for index in range(len(words), _NUM_WORDS)]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = Qwen3Config(
        **PRESETS[preset],
        architectures=["Qwen3ForCausalLM"],
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def random_model(folder: str | Path, device: str, dtype: str, seed: int) -> Any:
    """
    Makes a model where it will run.

    Args:
        folder (`str` or `Path`):
            Folder of its configuration.
        device (`str`):
            Where its weights are made.
        dtype (`str`):
            Their dtype.
        seed (`int`):
            Their seed: two models of one seed are equal.

    Returns:
        [`~transformers.PreTrainedModel`]:
            The model, its `name_or_path` being the folder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=getattr(torch, dtype))
    return model.eval()


def save_model(folder: Path, device: str, dtype: str, seed: int) -> None:
    """Saves [`random_model`] where its configuration is, for those who can only load one."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    random_model(folder, device, dtype, seed).save_pretrained(folder)
