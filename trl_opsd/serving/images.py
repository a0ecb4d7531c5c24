"""Images that an engine reads: in their places, and with the weights that it has been sent."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from trl.generation.vllm_client import VLLMClient


def read_images(llm: Any, image_token_id: int | None) -> None:
    """
    Have every call of an engine read prompts with images as the policy does.

    GRPOTrainer's prompts have as many tokens as an image takes. vLLM (0.31) puts that many in place of the first of
    them and keeps the others, without a word.

    Args:
        llm (`vllm.LLM`):
            The engine. Its `generate` is replaced, and raises a `ValueError` where it has read another prompt.
        image_token_id (`int`, *optional*):
            The token that stands for a part of an image.
    """
    generate = llm.generate

    def generate_as_asked(prompts: Sequence[dict[str, Any]], *args: Any, **kwargs: Any) -> list[Any]:
        outputs: list[Any] = generate([_with_places(prompt, image_token_id) for prompt in prompts], *args, **kwargs)
        for prompt, output in zip(prompts, outputs, strict=True):
            asked, read = list(prompt["prompt_token_ids"]), list(output.prompt_token_ids)
            if "multi_modal_data" in prompt and read != asked:
                raise ValueError(
                    f"vLLM has read another prompt than the policy: with images, it has {len(read)} tokens instead of "
                    f"{len(asked)}, or others. Set `vllm_mode='server'`, which is sent the images' features, or "
                    "`use_vllm=False`."
                )
        return outputs

    llm.generate = generate_as_asked


def forget_images(client: VLLMClient) -> None:
    """
    Have a server forget what the weights before made of images whenever it forgets what they made of prompts, and
    those that it has seen before it is asked again: vLLM (0.31) leaves out what it thinks that its engine still has.

    Args:
        client ([`~trl.generation.vllm_client.VLLMClient`]):
            Its client, some of whose methods are replaced.
    """
    reset_prefix_cache, image_features = client.reset_prefix_cache, client.image_features

    def reset() -> None:
        reset_prefix_cache()
        _post(client, "/reset_encoder_cache")

    def features(images: Any) -> Any:
        _post(client, "/reset_mm_cache")
        return image_features(images)

    vars(client).update(reset_prefix_cache=reset, image_features=features)


def _post(client: VLLMClient, path: str) -> None:
    response = client.session.post(f"{client.base_url}{path}")
    if response.status_code != 200:
        raise RuntimeError(
            f"it keeps images of before: `{path}` is answered with status {response.status_code}. Start it by `trl "
            "vllm-serve`, or with `VLLM_SERVER_DEV_MODE=1`"
        )


def _with_places(prompt: dict[str, Any], image_token_id: int | None) -> dict[str, Any]:
    """The prompt with one token for each image."""
    if "multi_modal_data" not in prompt:
        return prompt
    ids: list[int] = []
    for token_id, run in groupby(prompt["prompt_token_ids"]):
        ids += [token_id] if token_id == image_token_id else run
    return {**prompt, "prompt_token_ids": ids}
