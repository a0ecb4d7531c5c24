from dataclasses import dataclass, field

from trl.trainer.base_config import _BaseConfig

from .config import SelfDistillationConfig


@dataclass
class OPSDCConfig(SelfDistillationConfig):
    r"""
    Configuration class for the [`OPSDCTrainer`].

    The defaults are the recipe of [CRISP: Compressed Reasoning via Iterative Self-Policy
    Distillation](https://huggingface.co/papers/2603.05433), first published as OPSDC: a copy of the policy, refreshed
    every 50 optimizer steps, reads the question behind a conciseness instruction, and the student matches it with a
    reverse KL over one rollout per prompt. No reference solution and no reward take part.

    All parameters are those of [`SelfDistillationConfig`].

    > [!NOTE]
    > These parameters have default values different from [`SelfDistillationConfig`]:
    > - `privileged_context`, `teacher`, `divergence`: Default to `"concise"`, `"periodic"` and `"reverse_kl"`.
    > - `max_completion_length`: Defaults to `8192` (1k to 4k work too).
    > - `learning_rate`, `lr_scheduler_type`, `weight_decay`, `max_grad_norm`: Default to `1e-6`, `"constant"`, `0.01`
    >   and `1.0`.
    > - `per_device_train_batch_size`, `gradient_accumulation_steps`: Default to `1` and `32`, the paper's effective
    batch of
    >   32 on one process.
    > - `max_steps`: Defaults to `100`. Set `-1` to train by epochs.
    """

    # Parameters whose default values are overridden from SelfDistillationConfig
    privileged_context: str = field(
        default="concise",
        metadata={
            "help": "What the teacher reads beyond the student's prompt: 'solution', 'answer', 'concise', 'template', "
            "or the import path of a class implementing `PrivilegedContext`."
        },
    )
    teacher: str = field(
        default="periodic",
        metadata=SelfDistillationConfig.__dataclass_fields__["teacher"].metadata,
    )
    divergence: str = field(
        default="reverse_kl",
        metadata=SelfDistillationConfig.__dataclass_fields__["divergence"].metadata,
    )
    max_completion_length: int | None = field(
        default=8192, metadata={"help": "Maximum length of the generated completion."}
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(
        default="constant", metadata=_BaseConfig.__dataclass_fields__["lr_scheduler_type"].metadata
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay for AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Maximum gradient norm."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Batch size per device for training."})
    gradient_accumulation_steps: int = field(
        default=32, metadata={"help": "Number of micro-batches accumulated before an optimizer step."}
    )
    max_steps: int = field(
        default=100, metadata={"help": "Number of optimizer steps. -1 trains for `num_train_epochs` epochs."}
    )
