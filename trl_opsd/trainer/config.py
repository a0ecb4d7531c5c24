from collections.abc import Mapping
from copy import deepcopy
from dataclasses import Field, dataclass, field, fields
from functools import partial
from inspect import cleandoc, signature
from typing import Any, ClassVar, Self, cast, get_args, get_type_hints

from trl import GRPOConfig

from ..help import did_you_mean, help_from_docstring
from ..objective import Bounded, Divergence, Objective, Support, Tail
from ..objective.kernels import KERNELS
from .checks.settings import RETIRED, check_config
from .defaults import default_of, leave_out_defaults_of_other_choices
from .method import Method
from .several import complete_teacher


class _DefaultLength(int):
    """A length that nobody has set."""


class _SingleRollout(int):
    # GRPOConfig refuses one rollout per prompt because a group of one has no advantage. A divergence needs no group,
    # so while GRPOConfig runs its other checks, this 1 answers "no" to "less than 2".
    def __lt__(self, other: Any) -> bool:
        return False


@help_from_docstring
@dataclass
class SelfDistillationConfig(GRPOConfig):
    r"""
    On-policy self-distillation with every part chosen by fields.

    Configuration class for the [`SelfDistillationTrainer`], and parent of those of the published methods. Every field
    of [`~trl.GRPOConfig`] is accepted and keeps its meaning: `beta` is still the KL coefficient to a reference model,
    and `loss_type` still selects how token losses are aggregated. This class adds the parameters of on-policy
    self-distillation.

    Parameters:
        > Parameters that control the privileged context

        privileged_context (`str`, *optional*, defaults to `"solution"`):
            What the teacher reads beyond the student's prompt: `"solution"`, `"answer"`, `"hint"`, `"concise"`,
            `"peers"`, `"feedback"`, `"reflection"`, `"plan"`, `"diagnosis"`, `"playbook"`, `"template"`, the
            controls `"none"`, `"other_solution"`, `"partial_solution"` and `"shuffled_solution"`, or the import path
            of a class that implements [`PrivilegedContext`], such as `"my_project.contexts.Hint"`.
        context_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments of that class, for example `{"column": "reference_solution"}` or `{"template": "..."}`.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            Least reward, summed over the weighted reward functions, of a rollout that counts as correct.
        teacher_chat_template_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments for the chat template when it renders the teacher's prompt. `chat_template_kwargs` is the
            student's. `None` uses the student's.
        teacher_generation_prefix (`str`, *optional*):
            Text appended to the teacher's rendered prompt, right before the completion. With `None`, it is
            `"<think>\n"` if the student's template closes an empty think block and the teacher's leaves the block for
            the model to open (Qwen3 with `enable_thinking` off for the student and on for the teacher), so that the
            teacher reads the completion as its reasoning instead of expecting `<think>` as the first token; otherwise
            nothing.
        max_teacher_prompt_length (`int`, *optional*):
            Longest teacher prompt, in tokens. `None` allows what the model's context leaves beside the completion. A
            teacher prompt is never truncated.
        overlong_teacher_prompt (`str`, *optional*, defaults to `"error"`):
            What happens to a row whose teacher prompt is too long: `"error"` stops before training, `"skip"` masks the
            row from the loss, where `context_rate` counts it.

        > Parameters that control the completions

        completions (`str`, *optional*, defaults to `"on_policy"`):
            Which completions are trained on. Evaluation is always on the student's own rollouts. Possible values are:

            - `"on_policy"`: the student's own rollouts.
            - `"dataset"`: the dataset's `completion` column, for all but a share `lmbda` of the sequences (0 by
              default), as in [`~trl.experimental.gkd.GKDConfig`].
            - `"teacher"`: samples of the privileged teacher, GKD's `seq_kd`, with the same `lmbda`.
            - `"hinted_retry"`: what the student gets wrong, it tries again reading the privileged context. A right
              retry takes the place of the rollout, as an answer to the bare prompt. Needs reward functions.
            - the import path of a [`~trl_opsd.sampling.sources.CompletionSource`].
        completions_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments of that source, for example `{"lmbda": 0.5}`.
        curriculum (`str`, *optional*):
            Which prompts are drawn. `None` draws each once an epoch, `"pass_rate"` (`exponent`, `floor`, `share`) most
            often those of which about half of the rollouts are correct. An epoch has as many steps as before, in which
            some prompts come more than once and others not at all. Or the import path of a subclass of [`Curriculum`].
        curriculum_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments of that class.
        prompts (`str`, *optional*):
            Import path of a [`~trl_opsd.sampling.prompts.PromptSource`], which exchanges prompts of a batch before
            they are sampled from, such as `"trl_opsd.methods.cipo.Corrections"`. `None` exchanges none. Evaluation is
            always on the prompts of the dataset.
        prompts_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments of that class.

        > Parameters that control the teacher

        teacher (`str`, *optional*, defaults to `"initial"`):
            Whose weights read the privileged prompt. Possible values are:

            - `"initial"`: the policy as training started. With LoRA, the adapter is switched off (no copy); with full
              fine-tuning, a frozen copy.
            - `"live"`: the current policy.
            - `"periodic"`: a copy of the policy, refreshed every `teacher_update_steps` optimizer steps.
            - `"ema"`: an exponential moving average of the policy, kept in fp32.
            - `"external"`: another model, `teacher_model_name_or_path`.
            - `"several"`: `teachers`, of which each row names its own.
        teacher_update_steps (`int`, *optional*):
            Optimizer steps between two refreshes of a `"periodic"` teacher. `None` stands for 50 there, and must be
            left for the other kinds.
        teacher_update_rate (`float`, *optional*):
            Share r of the policy in each update of an `"ema"` teacher, θ_T ← (1 − r)·θ_T + r·θ after every optimizer
            step. `None` stands for 0.05 there, and must be left for the other kinds.
        teacher_model_name_or_path (`str`, *optional*):
            Id or folder of the `"external"` teacher, a causal language model with the policy's vocabulary.
        teacher_model_init_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments of its `from_pretrained`, such as `dtype`, `revision` or `quantization_config`. Its dtype
            defaults to fp32, like the policy's.
        teacher_offload (`bool`, *optional*, defaults to `False`):
            Whether the weights of a teacher that is a whole model are kept in CPU memory and come to the accelerator
            module by module, for the teacher's forward pass. It saves the memory of one model and costs its transfer.
        teacher_server_base_url (`str`, *optional*):
            Address of a vLLM server that scores the rollouts in the teacher's place, as soon as they are sampled. With
            `teacher="external"`, it serves another model, and `teacher_model_name_or_path` is left unset; with
            `teacher="live"`, it is the server of the rollouts. A server reports log-probabilities of a few tokens, at
            temperature 1: `divergence_support` has to be `"teacher_top_k"` or `"sampled_token"`.
        teachers (`dict[str, dict]` or `str`, *optional*):
            The teachers of `teacher="several"`, by the names that rows give them: letters, digits, `_` and `-`. Each
            has a `teacher` of another kind and that kind's fields, such as `{"maths": {"teacher": "external",
            "teacher_model_name_or_path": "..."}, "chat": {"teacher": "initial"}}`.
        teacher_column (`str`, *optional*):
            Column in which each row names one of `teachers`. `None` stands for `"teacher"` there, and must be left for
            the other kinds.
        vllm_server_request_timeout (`float`, *optional*, defaults to `1800.0`):
            Seconds a vLLM server may take for an answer, such as all rollouts of a batch. One that takes longer is
            asked once more; then the run ends after a checkpoint. The other processes wait meanwhile: a `ddp_timeout`
            that is too short for that is raised.
        vllm_lora_sync (`str`, *optional*, defaults to `"auto"`):
            What vLLM is sent of a LoRA policy: `"merged"` weights; `"adapter"`, the base once and then the adapter
            alone; `"auto"`, the adapter alone where the base has 4 bits, into which nothing is merged, and
            merged weights elsewhere.

        > Parameters that control the objective

        divergence (`str`, *optional*, defaults to `"forward_kl"`):
            Divergence between the teacher and the student at each completion token, over the whole vocabulary:
            `"forward_kl"` is KL(teacher ‖ student), `"reverse_kl"` is KL(student ‖ teacher), `"jsd"` is the
            generalized Jensen-Shannon divergence of [GKD](https://huggingface.co/papers/2306.13649).
            `"student_rewards"`, `"teacher_rewards"` and `"even_rewards"` are policy gradients over a top-k support,
            see [`~trl_opsd.objective.divergence.rewards`].
        jsd_weight (`float`, *optional*, defaults to `0.5`):
            Weight β in [0, 1] of `divergence="jsd"`, β·KL(teacher ‖ m) + (1−β)·KL(student ‖ m) with m = β·teacher +
            (1−β)·student. As in GKD, 0 stands for the forward and 1 for the reverse KL.
        divergence_support (`str`, *optional*, defaults to `"full"`):
            Tokens of the vocabulary the divergence is summed over. Possible values are:

            - `"full"`: all of them.
            - `"teacher_top_k"`, `"student_top_k"`, `"union_top_k"`, `"intersection_top_k"`: the `divergence_top_k`
              most probable ones under the teacher, the student, either, or both. The last needs
              `divergence_tail="renormalize"`.
            - `"sampled_token"`: the sampled token alone, an unbiased estimate for on-policy rollouts. With
              `divergence="reverse_kl"` it is the policy gradient whose advantage is log p_teacher − log p_student.
        divergence_top_k (`int`, *optional*, defaults to `16`):
            Size of the top-k sets: those of `divergence_support`, and those compared in the logged `top_k_overlap`
            and `student_mass_on_teacher_top_k`.
        divergence_tail (`str`, *optional*):
            What becomes of the probability outside a top-k support: `"bucket"` makes it one more entry,
            `"renormalize"` divides by the probability inside. `None` stands for `"bucket"` there, and must be left
            for the other supports.
        divergence_clip (`float`, *optional*):
            Upper bound on every vocabulary entry of the divergence, applied before the sum over the vocabulary. `None`
            does not clip.
        divergence_ratio_low (`float`, *optional*):
            Least ratio of the teacher's probability to the student's: where it is smaller, the divergence is that from
            a teacher whose probability is this share of the student's. `None` does not bound it.
        divergence_ratio_high (`float`, *optional*):
            Largest ratio, likewise.
        divergence_bounded (`str`, *optional*, defaults to `"teacher"`):
            What has no gradient where the ratio is out of bounds: `"teacher"`, or `"ratio"`. The value is the same.
        target (`str`, *optional*):
            What the divergence pulls to. `None` is the teacher; or the import path of a subclass of [`Target`], such
            as `"trl_opsd.methods.purified_opsd.Purified"`, which makes it of what the teacher says after its prompt,
            after the student's, and after one that the context gives for contrast.
        target_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments of that class.
        replaced_divergence (`dict[str, Any]` or `str`, *optional*):
            Divergence for completions that took the place of rollouts, if it is another, as fields of [`Objective`]:
            `{"divergence": "forward_kl", "support": "teacher_top_k", "top_k": 16}`. What is left out is that class's
            default, and not the above; the temperature is the same.
        spans_divergence (`dict[str, Any]` or `str`, *optional*):
            Divergence for the spans that the context marks, if it is another: such fields by the kind of the spans,
            `{"error": {"divergence": "reverse_kl"}}`.
        distillation_temperature (`float`, *optional*):
            Temperature both sets of logits are divided by inside the loss. `None` uses the sampling `temperature`.

        > Parameters that control the terms of the loss

        divergence_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the divergence. At `0.0`, the teacher does not take part in the loss, and reads rollouts only if
            a part of the method asks for its scores.
        policy_loss_coef (`float`, *optional*, defaults to `0.0`):
            Weight of GRPO's own policy loss. It needs a reward and more than one rollout per prompt (unless
            `advantage` needs neither), and no forward pass of its own unless `distillation_temperature` is another
            than `temperature`. At `0.0`, reward functions are evaluated and logged only.
        likelihood_coef (`float`, *optional*, defaults to `0.0`):
            Weight of −log p_student of the sampled tokens, at `distillation_temperature`, aggregated as `loss_type`
            says. It takes no forward pass of its own.
        token_weights (`dict[str, dict]` or `str`, *optional*):
            Factors of each token in the divergence and the likelihood, multiplied, as name and keyword arguments:
            `"correct_only"` keeps rollouts whose reward reaches `success_threshold`, `"skip_first"` (`num_tokens`)
            leaves out the first tokens, `"keep_first"` (`num_tokens`) all others, `"replaced"` (`weight`) weighs
            completions that took the place of rollouts, `"importance_clip"` (`most`) corrects for a policy that has
            moved since it sampled; or the import path of a subclass of
            [`TokenWeighting`], or of [`TeacherWeighting`], such as `"trl_opsd.methods.msd.DualPerspective"`. What the
            first three leave out counts in no mean.
        advantage (`str`, *optional*, defaults to `"grpo"`):
            What makes GRPO's advantage of a rollout one of each token: `"grpo"` leaves it as it is; or the import path
            of a subclass of [`Advantage`], such as `"trl_opsd.methods.rlrt.ReversedTeacher"`.
        advantage_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments of that class.
        schedules (`dict[str, dict]` or `str`, *optional*):
            Coefficients that change with the optimizer steps, by name: `"divergence_coef"`, `"policy_loss_coef"`,
            `"likelihood_coef"`, or the field of a part, such as `"advantage.mix"`. `{"start": 0.5, "end": 0.0,
            "num_steps": 50}` is linear (`"delay"`: steps before it begins); `{"kind": "hysteresis", "value": 0.5}` is
            a gate (see [`Hysteresis`]); `"kind"` may be the import path of a subclass of [`Schedule`].

        > Parameters that control what ends a run

        guards (`dict[str, dict]` or `str`, *optional*):
            What watches the run, by name and keyword arguments: `"non_finite"`, `"entropy"`, `"length"`,
            `"truncation"`, `"repetition"`, `"divergence"`, `"teacher_gap"`, `"clipped"`, `"masked"`, `"benchmark"`, or
            the import path of a subclass of [`Guard`]. `{"entropy": {"action": "stop"}}` changes one of them: its
            `action` is `"warn"` by default, or `"ignore"`, `"stop"`, or `"rollback"`, which ends the run with the best
            checkpoint from before the trouble. All that ship are on, those that are not named with their defaults.

        > Parameters that control the cost of a step

        divergence_memory (`int`, *optional*):
            MiB the divergence may take beyond hidden states, head and their gradients. It sets how many tokens are
            processed at once, and changes nothing else. `None` chooses by the device: 256 on a CPU; on a GPU 1024, or
            somewhat more than the head's fp32 gradient if the head is trained and larger, and at most a quarter of
            the memory that is free.
        divergence_kernel (`str`, *optional*):
            What does the elementwise work of the divergence: `"triton"` (GPUs), `"compiled"` (torch.compile, CPUs) or
            `"eager"`. `None` takes Triton's on a GPU, and on a CPU the compiled one for vocabularies of 8,192 tokens
            or more. Where one of them does not work, a warning says so and plain PyTorch does the work.
        max_tokens_per_microbatch (`int`, *optional*):
            Most tokens, padding included, that go through the network at once. The `per_device_train_batch_size` rows
            of a micro-batch are sorted by length and cut into forward-backward passes of at most this many: rows ×
            (longest prompt of student and teacher + longest completion), or with flash attention, under which rows are
            not padded, the tokens they hold. Gradients and metrics remain those of the whole micro-batch, while memory
            is bounded and one long row no longer pads all others. A single row that is longer than this gets a pass of
            its own; it is never truncated. `None` makes one pass.

        > Parameters whose defaults differ from those of [`~trl.GRPOConfig`]

        max_completion_length (`int`, *optional*, defaults to `512`):
            Longest completion, in tokens. Where the default does not fit the model's context, completions get what
            the prompts leave of it (half of it, if these are not known before training), which a warning says. A
            length that is set has to fit. `None`, for a `rollout_func`, sets no limit.
        num_generations (`int`, *optional*, defaults to `1`):
            Rollouts of each prompt, a divisor of the effective batch size. One is enough, where GRPO has 8: the
            divergence needs no group.
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            Aggregation of the token losses, where GRPO has `"dapo"`: `"grpo"` (mean of per-sequence means), `"dapo"`
            (global token mean), `"bnpo"` (token mean of the micro-batch), `"dr_grpo"` (constant normaliser), `"luspo"`
            (mean of per-sequence sums); `"cispo"` and `"vespo"` aggregate as `"dapo"`, `"sapo"` as `"grpo"`.
        vllm_importance_sampling_correction (`bool`, *optional*, defaults to `False`):
            Whether to weight the divergence by the importance ratio between the trainer's and vLLM's
            log-probabilities, as GRPO weights its loss (its default is `True`). It needs sampling from the whole
            distribution. The papers do not correct the divergence, and a ratio of whole sequences would all but erase
            it over thousands of tokens.
    """

    method: ClassVar[Method | None] = None

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *GRPOConfig._VALID_DICT_FIELDS,
        "context_kwargs",
        "token_weights",
        "advantage_kwargs",
        "schedules",
        "target_kwargs",
        "guards",
        "replaced_divergence",
        "spans_divergence",
        "teacher_chat_template_kwargs",
        "teacher_model_init_kwargs",
        "teachers",
        "completions_kwargs",
        "curriculum_kwargs",
        "prompts_kwargs",
    ]

    max_completion_length: int | None = _DefaultLength(512)
    num_generations: int | None = 1
    loss_type: str = field(
        default="grpo",
        metadata={"choices": ["grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo", "vespo", "sapo"]},
    )
    vllm_importance_sampling_correction: bool = False

    privileged_context: str = "solution"
    context_kwargs: dict[str, Any] | str | None = None
    success_threshold: float = 1.0
    teacher_chat_template_kwargs: dict[str, Any] | str | None = None
    teacher_generation_prefix: str | None = None
    max_teacher_prompt_length: int | None = None
    overlong_teacher_prompt: str = field(default="error", metadata={"choices": ["error", "skip"]})

    completions: str = "on_policy"
    completions_kwargs: dict[str, Any] | str | None = None

    curriculum: str | None = None
    curriculum_kwargs: dict[str, Any] | str | None = None
    prompts: str | None = None
    prompts_kwargs: dict[str, Any] | str | None = None

    teacher: str = field(
        default="initial", metadata={"choices": ["initial", "live", "periodic", "ema", "external", "several"]}
    )
    teacher_update_steps: int | None = None
    teacher_update_rate: float | None = None
    teacher_model_name_or_path: str | None = None
    teacher_model_init_kwargs: dict[str, Any] | str | None = None
    teacher_offload: bool = False
    teacher_server_base_url: str | None = None
    teachers: dict[str, Any] | str | None = None
    teacher_column: str | None = None
    vllm_server_request_timeout: float = 1800.0
    vllm_lora_sync: str = field(default="auto", metadata={"choices": ["auto", "merged", "adapter"]})

    divergence: str = field(default="forward_kl", metadata={"choices": list(get_args(Divergence))})
    jsd_weight: float = 0.5
    divergence_support: str = field(default="full", metadata={"choices": list(get_args(Support))})
    divergence_top_k: int = 16
    divergence_tail: str | None = field(default=None, metadata={"choices": list(get_args(Tail))})
    divergence_clip: float | None = None
    divergence_ratio_low: float | None = None
    divergence_ratio_high: float | None = None
    divergence_bounded: str = field(default="teacher", metadata={"choices": list(get_args(Bounded))})
    target: str | None = None
    target_kwargs: dict[str, Any] | str | None = None
    replaced_divergence: dict[str, Any] | str | None = None
    spans_divergence: dict[str, Any] | str | None = None
    distillation_temperature: float | None = None

    divergence_coef: float = 1.0
    policy_loss_coef: float = 0.0
    likelihood_coef: float = 0.0
    token_weights: dict[str, Any] | str | None = None
    advantage: str = "grpo"
    advantage_kwargs: dict[str, Any] | str | None = None
    schedules: dict[str, Any] | str | None = None
    guards: dict[str, Any] | str | None = None

    divergence_memory: int | None = None
    divergence_kernel: str | None = field(default=None, metadata={"choices": list(KERNELS)})
    max_tokens_per_microbatch: int | None = None

    def __init_subclass__(cls, defaults: Mapping[str, Any] | None = None, **kwargs: Any):
        """
        Gives a subclass other defaults: `@dataclass class HintConfig(SelfDistillationConfig, defaults={...})`. Types,
        choices and help stay, and the docstring lists the defaults.

        Args:
            defaults (`Mapping[str, Any]`, *optional*):
                Values by the names of fields.

        Raises:
            ValueError: If there is no such field, naming the one that comes closest.
        """
        super().__init_subclass__(**kwargs)
        if defaults is None:
            return
        parent = cast(Any, cls.__mro__[1])
        fields, types = parent.__dataclass_fields__, get_type_hints(parent)  # parsers change the types in the fields
        for name, value in defaults.items():
            if name not in fields:
                raise ValueError(
                    f"{cls.__name__} has a default for `{name}`, which is no field. "
                    f"{did_you_mean(name, fields, f'`{parent.__name__}` lists the fields.')}"
                )
            if isinstance(fields[name].default, _DefaultLength):
                value = _DefaultLength(value)
            settings: dict[str, Any] = {"metadata": fields[name].metadata}
            settings |= (
                {"default_factory": partial(deepcopy, value)} if isinstance(value, dict | list) else {"default": value}
            )
            setattr(cls, name, field(**settings))
        cls.__annotations__ = vars(cls).get("__annotations__", {}) | {name: types[name] for name in defaults}
        if cls.__doc__:
            listed = "".join(f"> - `{name}`: `{value!r}`\n" for name, value in defaults.items())
            cls.__doc__ = f"{cleandoc(cls.__doc__)}\n\n> [!NOTE]\n> Defaults of this class:\n{listed}"

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        parameters = signature(cls.__init__).parameters
        takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        for name in kwargs.keys() - parameters.keys():
            if name in RETIRED:
                raise TypeError(f"`{name}` is no field of {cls.__name__} any more: {RETIRED[name]}.")
            if not takes_any:
                hint = did_you_mean(name, parameters, "`--help` lists every field.")
                raise TypeError(f"{cls.__name__} has no field `{name}`. {hint}")
        return super().__new__(cls)

    def __post_init__(self):
        if any(isinstance(value, Field) for value in vars(type(self)).values()):
            raise TypeError(f"{type(self).__name__} states defaults, and needs `@dataclass` to have them.")
        # Before any is derived from others
        names = [one.name for one in fields(self) if one.init]
        self.chosen = {name for name in names if getattr(self, name) != default_of(type(self), name)}
        self.has_default_completion_length = isinstance(self.max_completion_length, _DefaultLength)
        if self.has_default_completion_length:
            self.max_completion_length = int(cast(int, self.max_completion_length))
        # As text, since `teachers` may be JSON yet
        asks_teacher = self.teacher_server_base_url is not None or "teacher_server_base_url" in str(self.teachers)
        if (self.use_vllm and self.vllm_mode == "server") or asks_teacher:
            longest_wait = int(2 * self.vllm_server_request_timeout) + 600
            self.ddp_timeout: int = max(self.ddp_timeout, longest_wait)
        single_rollout = self.num_generations == 1
        if single_rollout:
            self.num_generations = _SingleRollout(1)
        super().__post_init__()
        if single_rollout:
            self.num_generations = 1

        leave_out_defaults_of_other_choices(self)
        complete_teacher(self)
        if self.distillation_temperature is None:
            self.distillation_temperature = self.temperature
        for name in ("vllm_server_base_url", "teacher_server_base_url"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).rstrip("/"))  # paths are appended with a slash of their own
        check_config(self)

    @property
    def truncates_sampling(self) -> bool:
        """Whether rollouts are sampled from a part of the student's distribution."""
        return self.top_p < 1.0 or self.top_k > 0 or (self.min_p or 0.0) > 0.0

    @property
    def sampler_url(self) -> str:
        """Address of the vLLM server that samples the rollouts."""
        return self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"

    @property
    def sampler_is_comparable(self) -> bool:
        """
        Whether vLLM's log-probabilities, which are those of what it samples from, are of the distribution that the
        loss computes. With the importance correction, GRPO compares them itself.
        """
        return (
            self.use_vllm
            and not self.vllm_importance_sampling_correction
            and not self.truncates_sampling
            and self.distillation_temperature == self.temperature
            and self.repetition_penalty == 1.0
        )

    def to_dict(self) -> dict[str, Any]:
        """What experiment trackers are told. See [`~transformers.TrainingArguments.to_dict`]."""
        values: dict[str, Any] = super().to_dict()
        values["teachers"] = values["teachers"] and {name: {**its} for name, its in values["teachers"].items()}
        for teacher in (values, *(values["teachers"] or {}).values()):
            kwargs = teacher.get("teacher_model_init_kwargs") or {}
            config: Any = kwargs.get("quantization_config")
            if hasattr(config, "to_dict"):
                teacher["teacher_model_init_kwargs"] = {**kwargs, "quantization_config": config.to_dict()}
        return values

    def objective(self) -> Objective:
        """The divergence that the fields describe."""
        return Objective(
            divergence=cast(Divergence, self.divergence),
            jsd_weight=self.jsd_weight,
            support=cast(Support, self.divergence_support),
            top_k=self.divergence_top_k,
            tail=cast(Tail, self.divergence_tail or "bucket"),
            clip=self.divergence_clip,
            ratio_low=self.divergence_ratio_low,
            ratio_high=self.divergence_ratio_high,
            bounded=cast(Bounded, self.divergence_bounded),
            temperature=cast(float, self.distillation_temperature),
        )

    def other_objectives(self) -> dict[str, Objective]:
        """Those of some tokens, if they are others, by the name that these have in a batch."""
        given = {} if self.replaced_divergence is None else {"replaced": self.replaced_divergence}
        of_spans = cast(dict[str, Any], self.spans_divergence or {})
        given |= {f"spans/{kind}": fields for kind, fields in of_spans.items()}
        temperature = {"temperature": cast(float, self.distillation_temperature)}
        return {name: Objective(**temperature | cast(dict[str, Any], fields)) for name, fields in given.items()}
