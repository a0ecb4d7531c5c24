from dataclasses import dataclass, field
from typing import Any

from .config import SelfDistillationConfig


@dataclass
class OPSDConfig(SelfDistillationConfig):
    r"""
    Configuration class for the [`OPSDTrainer`].

    The defaults are the released recipe of [Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language
    Models](https://huggingface.co/papers/2601.18734) for its 1.7B and 4B models: the initial policy reads the
    reference solution, and the student matches it with a clipped forward KL over one rollout per prompt. The paper
    trains a LoRA adapter of rank 64, which is a property of the model, not of this class: see `recipes/opsd`.

    All parameters are those of [`SelfDistillationConfig`].

    > [!NOTE]
    > These parameters have default values different from [`SelfDistillationConfig`]:
    > - `divergence_clip`: Defaults to `0.05` (the paper uses `0.06` for 8B).
    > - `temperature`, `top_p`, `top_k`: Default to `1.1`, `0.95` and `20`.
    > - `max_completion_length`: Defaults to `1024`.
    > - `chat_template_kwargs`, `teacher_chat_template_kwargs`: Default to `{"enable_thinking": False}` and
    >   `{"enable_thinking": True}`, the paper's best pairing. Templates that know no such switch ignore it.
    > - `learning_rate`, `max_grad_norm`: Default to `5e-6` and `0.1`.
    > - `per_device_train_batch_size`, `gradient_accumulation_steps`: Default to `4` and `8`, the paper's effective
    batch of
    >   32 on one process.
    > - `max_steps`: Defaults to `100`. The paper sees later checkpoints degrade. Set `-1` to train by epochs.
    """

    # Parameters whose default values are overridden from SelfDistillationConfig
    divergence_clip: float | None = field(
        default=0.05,
        metadata={
            "help": "Upper bound on every vocabulary entry of the divergence, applied before the sum over the "
            "vocabulary. None does not clip."
        },
    )
    temperature: float = field(default=1.1, metadata={"help": "Temperature for sampling, and inside the loss."})
    top_p: float = field(default=0.95, metadata={"help": "Cumulative probability of the top tokens to sample from."})
    top_k: int = field(default=20, metadata={"help": "Number of most likely tokens to sample from. 0 keeps them all."})
    max_completion_length: int | None = field(
        default=1024, metadata={"help": "Maximum length of the generated completion."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: {"enable_thinking": False},
        metadata={"help": "Keyword arguments for the chat template when it renders the student's prompt."},
    )
    teacher_chat_template_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: {"enable_thinking": True},
        metadata={"help": "Keyword arguments for the chat template when it renders the teacher's prompt."},
    )
    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate for AdamW."})
    max_grad_norm: float = field(default=0.1, metadata={"help": "Maximum gradient norm."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Batch size per device for training."})
    gradient_accumulation_steps: int = field(
        default=8, metadata={"help": "Number of micro-batches accumulated before an optimizer step."}
    )
    max_steps: int = field(
        default=100, metadata={"help": "Number of optimizer steps. -1 trains for `num_train_epochs` epochs."}
    )
