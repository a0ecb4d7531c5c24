from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, logging

from .base import Teacher
from .fingerprint import fingerprint


logger = logging.get_logger(__name__)


class ExternalTeacher(Teacher):
    """
    Another model, never trained. It is no part of checkpoints: a resumed run loads it again.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The teacher, over the policy's vocabulary. Its width, depth and quantisation are its own, and its dtype
            too, unless DeepSpeed casts it with the rest.
        shard (`Callable[[nn.Module], nn.Module]`):
            Wraps it for the distributed setup in use.
    """

    def __init__(self, model: PreTrainedModel, shard: Callable[[nn.Module], nn.Module]):
        self.fingerprint = fingerprint(model)
        self.description = f"{model.config.name_or_path or type(model).__name__}, never trained"
        self._num_tokens = model.config.get_text_config().vocab_size
        self._wrapped = shard(model.requires_grad_(False).eval())

    @contextmanager
    def weights(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self._wrapped

    def shared_tokens(self, num_tokens: int) -> int | None:
        return None if num_tokens == self._num_tokens else min(num_tokens, self._num_tokens)


def check_external_teacher(
    path: str, model_init_kwargs: dict[str, Any], tokenizer: PreTrainedTokenizerBase, model_config: Any
) -> None:
    """
    Refuse an external teacher over other tokens than the policy's, before any model is loaded. Where one of them is
    padded to more rows than the tokenizer has tokens, a warning says that the padding is left out.

    Args:
        path (`str`):
            Model of the teacher.
        model_init_kwargs (`dict[str, Any]`):
            What it is loaded with.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        model_config ([`~transformers.PreTrainedConfig`]):
            Configuration of the policy.

    Raises:
        ValueError: Naming the first difference.
    """
    names = ("revision", "trust_remote_code", "subfolder", "token", "cache_dir")
    kwargs = {name: value for name, value in model_init_kwargs.items() if name in names}
    # Other token ids would not even raise an error: the teacher would score another text
    ours, theirs = tokenizer.get_vocab(), AutoTokenizer.from_pretrained(path, **kwargs).get_vocab()
    if ours != theirs:
        different = min(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
        raise ValueError(
            f"`teacher_model_name_or_path='{path}'` has another vocabulary than the policy: {different!r} is token "
            f"{theirs.get(different)} there and {ours.get(different)} here. Choose a teacher with the policy's "
            "tokenizer."
        )
    configs = (model_config, AutoConfig.from_pretrained(path, **kwargs))
    size, teacher_size = (config.get_text_config().vocab_size for config in configs)
    if size == teacher_size:
        return
    if min(size, teacher_size) <= max(ours.values()):
        raise ValueError(
            f"`teacher_model_name_or_path='{path}'` has logits over {teacher_size} tokens and the policy over "
            f"{size}, fewer than their tokenizer has. Resize one of them with "
            f"`model.resize_token_embeddings({max(size, teacher_size)})` and save it."
        )
    logger.warning(
        f"`teacher_model_name_or_path='{path}'` has logits over {teacher_size} tokens and the policy over {size}; "
        f"their tokenizer has {len(ours)}. What is beyond {min(size, teacher_size)} is padding: it is left out "
        "on both sides."
    )
