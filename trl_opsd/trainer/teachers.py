"""From the configuration to the teacher."""

from typing import Any, cast

from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..serving import TeacherServer, check_tokenizer, connect
from ..teacher import ServedTeacher, Teacher, check_external_teacher, make_teacher
from .config import SelfDistillationConfig


def connect_teacher(
    args: SelfDistillationConfig, tokenizer: PreTrainedTokenizerBase, model_config: Any, has_images: bool
) -> ServedTeacher | None:
    """
    The teacher on a server, if that is where it is. One that is yet to be loaded here is checked.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        model_config ([`~transformers.PreTrainedConfig`]):
            Configuration of the policy.
        has_images (`bool`):
            Whether rows have images.

    Raises:
        ValueError: If it scores other tokens than the policy's, or there is no such server.
    """
    is_external = args.teacher == "external"
    if args.teacher_server_base_url is not None:
        url, timeouts = args.teacher_server_base_url, (args.vllm_server_timeout, args.vllm_server_request_timeout)
        client = connect(url, *timeouts)
        check_tokenizer(client, "teacher_server_base_url", tokenizer)
        server = TeacherServer(client, args.divergence_top_k, model_config.get_text_config().vocab_size)
        return ServedTeacher(server, server.name if is_external else None)
    if is_external:
        path = cast(str, args.teacher_model_name_or_path)
        check_external_teacher(path, _external_kwargs(args), tokenizer, model_config, has_images)
    return None


def load_teacher(
    args: SelfDistillationConfig,
    accelerator: Accelerator,
    policy: PreTrainedModel | PeftModel,
    adapter_starts_at_zero: bool,
) -> Teacher:
    """
    The teacher whose weights are here. See [`~trl_opsd.teacher.make_teacher`] for the arguments.

    Raises:
        ValueError: If these processes cannot hold it, or training would change it unasked.
    """
    return make_teacher(
        args.teacher,
        accelerator,
        policy,
        adapter_starts_at_zero=adapter_starts_at_zero,
        update_steps=cast(int, args.teacher_update_steps),
        update_rate=cast(float, args.teacher_update_rate),
        model_name_or_path=args.teacher_model_name_or_path,
        model_init_kwargs=_external_kwargs(args),
        offloads=args.teacher_offload,
    )


def _external_kwargs(args: SelfDistillationConfig) -> dict[str, Any]:
    kwargs = cast(dict[str, Any], args.teacher_model_init_kwargs or {})
    return {"trust_remote_code": args.trust_remote_code, **kwargs}
