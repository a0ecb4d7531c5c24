"""From the configuration to the teacher."""

from collections.abc import Sequence
from typing import Any, cast

from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..serving import TeacherServer, check_tokenizer, connect
from ..teacher import ServedTeacher, SeveralTeachers, Teacher, check_external_teacher, make_teacher
from .config import SelfDistillationConfig
from .several import each_teacher, naming


def connect_teachers(
    args: SelfDistillationConfig, tokenizer: PreTrainedTokenizerBase, model_config: Any, has_images: bool
) -> list[ServedTeacher | None]:
    """
    Each of the teachers, if it is on a server. One that is yet to be loaded here is checked.

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
    found = []
    for name, its in each_teacher(args).items():
        with naming(name):
            found.append(_connect(its, tokenizer, model_config, has_images))
    return found


def _connect(
    args: SelfDistillationConfig, tokenizer: PreTrainedTokenizerBase, model_config: Any, has_images: bool
) -> ServedTeacher | None:
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
    served: Sequence[ServedTeacher | None],
) -> Teacher:
    """
    The teacher, or several. See [`~trl_opsd.teacher.make_teacher`] for the arguments.

    Args:
        args ([`SelfDistillationConfig`]):
            Configuration.
        accelerator ([`~accelerate.Accelerator`]):
            The processes.
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, not yet wrapped.
        adapter_starts_at_zero (`bool`):
            Whether its adapter changes nothing yet.
        served (`Sequence[ServedTeacher | None]`):
            What [`connect_teachers`] has found.

    Raises:
        ValueError: If these processes cannot hold it, or training would change it unasked.
    """
    teachers = {}
    for (name, its), found in zip(each_teacher(args).items(), served, strict=True):
        with naming(name):
            teachers[name] = found or make_teacher(
                its.teacher,
                accelerator,
                policy,
                adapter_starts_at_zero=adapter_starts_at_zero,
                update_steps=cast(int, its.teacher_update_steps),
                update_rate=cast(float, its.teacher_update_rate),
                model_name_or_path=its.teacher_model_name_or_path,
                model_init_kwargs=_external_kwargs(its),
                offloads=its.teacher_offload,
                name=name,
            )
    if args.teacher != "several":
        return teachers[None]
    members = {cast(str, name): one for name, one in teachers.items()}
    return SeveralTeachers(members, cast(str, args.teacher_column), is_alone=accelerator.num_processes == 1)


def _external_kwargs(args: SelfDistillationConfig) -> dict[str, Any]:
    kwargs = cast(dict[str, Any], args.teacher_model_init_kwargs or {})
    return {"trust_remote_code": args.trust_remote_code, **kwargs}
