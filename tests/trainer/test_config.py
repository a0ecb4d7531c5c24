import copy
import dataclasses
import inspect
import json
import pickle
import re

import pytest
from transformers import BitsAndBytesConfig
from trl import GRPOConfig

from trl_opsd import OPSDCConfig, OPSDConfig, SelfDistillationConfig
from trl_opsd.objective import Objective
from trl_opsd.trainer.checks import settings
from trl_opsd.trainer.checks.settings import RETIRED


CONFIGS = [SelfDistillationConfig, OPSDConfig, OPSDCConfig]


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_field_of_grpo_config_is_accepted(config_class, tmp_path):
    grpo = GRPOConfig(str(tmp_path), use_cpu=True, num_generations=4, per_device_train_batch_size=4)
    derived = {"generation_batch_size"}  # computed from steps_per_generation, and refused beside it
    values = {f.name: getattr(grpo, f.name) for f in dataclasses.fields(grpo) if f.init and f.name not in derived}
    config = config_class(**values)
    assert config.num_generations == 4
    assert config.loss_type == "dapo"


def test_opsd_defaults_are_the_papers_recipe(tmp_path):
    config = OPSDConfig(str(tmp_path), use_cpu=True)
    assert (config.privileged_context, config.teacher, config.divergence) == ("solution", "initial", "forward_kl")
    assert config.divergence_clip == 0.05
    assert (config.temperature, config.top_p, config.top_k) == (1.1, 0.95, 20)
    assert config.distillation_temperature == 1.1
    assert (config.num_generations, config.max_completion_length) == (1, 1024)
    assert (config.learning_rate, config.max_grad_norm) == (5e-6, 0.1)
    assert config.loss_type == "grpo"
    assert config.chat_template_kwargs == {"enable_thinking": False}
    assert config.teacher_chat_template_kwargs == {"enable_thinking": True}
    assert config.vllm_importance_sampling_correction is False
    assert (config.beta, config.policy_loss_coef, config.completions) == (0.0, 0.0, "on_policy")


def test_opsdc_defaults_are_the_papers_recipe(tmp_path):
    config = OPSDCConfig(str(tmp_path), use_cpu=True)
    assert (config.privileged_context, config.context_kwargs) == ("concise", None)
    assert (config.teacher, config.teacher_update_steps, config.divergence) == ("periodic", 50, "reverse_kl")
    assert config.divergence_clip is None
    assert (config.temperature, config.top_p, config.top_k) == (1.0, 1.0, 0)
    assert (config.num_generations, config.max_completion_length) == (1, 8192)
    assert (config.learning_rate, config.lr_scheduler_type) == (1e-6, "constant")
    assert config.max_grad_norm == 1.0


@pytest.mark.parametrize(
    ("settings", "name", "default"),
    [
        ({"teacher": "periodic"}, "teacher_update_steps", 50),
        ({"teacher": "ema"}, "teacher_update_rate", 0.05),
        ({"teacher": "external", "teacher_model_name_or_path": "model"}, "teacher_model_init_kwargs", None),
    ],
)
def test_settings_of_one_kind_of_teacher(settings, name, default, tmp_path):
    assert getattr(SelfDistillationConfig(str(tmp_path), use_cpu=True, **settings), name) == default
    value = {"dtype": "bfloat16"} if name == "teacher_model_init_kwargs" else 1
    message = rf"`{name}=.*has no effect with `teacher='live'`.*`teacher='{settings['teacher']}'`"
    with pytest.raises(ValueError, match=message):
        SelfDistillationConfig(str(tmp_path), use_cpu=True, teacher="live", **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jsd_weight": 1.5}, "`jsd_weight` must be in"),
        ({"jsd_weight": float("nan")}, "`jsd_weight` must be in"),
        ({"divergence_clip": -0.1}, "`divergence_clip` must be positive"),
        ({"divergence_ratio_low": 2.0}, "`divergence_ratio_low` must be in"),
        ({"divergence_ratio_high": 0.5}, "`divergence_ratio_high` must be at least 1"),
        ({"divergence": "kl"}, "`divergence` must be one of"),
        ({"teacher": "frozen"}, "`teacher` must be one of"),
        ({"overlong_teacher_prompt": "cut"}, "`overlong_teacher_prompt` must be one of"),
        ({"teacher": "ema", "teacher_update_rate": 0.0}, r"in \(0, 1\], got 0.0.*teacher='initial'"),
        ({"teacher": "ema", "teacher_update_rate": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"teacher": "external"}, "needs `teacher_model_name_or_path`"),
        ({"teacher": "periodic", "teacher_update_steps": 0}, "`teacher_update_steps` must be at least 1"),
        ({"max_teacher_prompt_length": 0}, "`max_teacher_prompt_length` must be at least 1"),
        ({"temperature": 0.0}, "`distillation_temperature` must be positive"),
        (
            {"use_vllm": True, "vllm_importance_sampling_correction": True, "top_p": 0.95},
            "contradicts truncated sampling",
        ),
        (
            {"use_vllm": True, "vllm_enable_sleep_mode": True, "skip_memory_metrics": False},
            r"`skip_memory_metrics=False` reports.*torch\.cuda\.mem_get_info",
        ),
        ({"success_threshold": float("nan")}, "`success_threshold` must be a finite number, got nan"),
        ({"policy_loss_coef": -1.0}, "`policy_loss_coef` must not be negative"),
        ({"likelihood_coef": -1.0}, "`likelihood_coef` must not be negative"),
        ({"loss_type": "mean"}, "`loss_type` must be one of"),
        ({"divergence_tail": "bucket"}, r"`divergence_tail='bucket'` has no effect with `divergence_support='full'`"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "divides by `max_completion_length`"),
        ({"teacher": "live", "teacher_offload": True}, "`teacher_offload=True` has no effect"),
        ({"vllm_server_request_timeout": 0.0}, "`vllm_server_request_timeout` must be positive"),
        ({"vllm_lora_sync": "lora"}, r"`vllm_lora_sync` must be one of \['auto', 'merged', 'adapter'\], got 'lora'"),
        ({"vllm_lora_sync": "merged"}, "`vllm_lora_sync='merged'` has no effect with `use_vllm=False`"),
    ],
)
def test_contradictory_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SelfDistillationConfig(str(tmp_path), use_cpu=True, **settings)


SERVER = {"teacher_server_base_url": "http://host:8000", "divergence_support": "teacher_top_k"}
SAMPLER = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://host:8000/"}


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher": "external"},
        {"teacher": "external", "divergence_support": "sampled_token", "num_iterations": 2},
        {"teacher": "live", **SAMPLER},
        {"teacher": "live", **SAMPLER, "vllm_server_base_url": None, "vllm_server_host": "host"},
    ],
)
def test_teacher_on_a_server(settings, tmp_path):
    config = SelfDistillationConfig(str(tmp_path), use_cpu=True, **{**SERVER, **settings})
    assert config.teacher_model_name_or_path is None


def test_addresses_of_servers_may_end_in_a_slash(tmp_path):
    settings = {**SERVER, **SAMPLER, "teacher_server_base_url": "http://host:8000//"}
    config = SelfDistillationConfig(str(tmp_path), use_cpu=True, teacher="live", **settings)
    assert config.vllm_server_base_url == config.teacher_server_base_url == "http://host:8000"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "initial"}, "cannot be combined with `teacher='initial'`"),
        ({"teacher": "ema"}, "cannot be combined with `teacher='ema'`"),
        ({"teacher_model_name_or_path": "model"}, "has no effect beside `teacher_server_base_url="),
        ({"teacher_model_init_kwargs": {}}, "has no effect beside `teacher_server_base_url="),
        ({"divergence_support": "full"}, "cannot be combined with `divergence_support='full'`"),
        ({"divergence_support": "union_top_k"}, "cannot be combined with `divergence_support='union_top_k'`"),
        ({"temperature": 1.1}, "cannot be combined with `distillation_temperature=1.1`"),
        ({"teacher_offload": True}, "`teacher_offload=True` has no effect"),
        ({"teacher": "live"}, "has to be the server that samples the rollouts"),
        ({"teacher": "live", **SAMPLER, "vllm_mode": "colocate"}, "has to be the server that samples the rollouts"),
        ({"teacher": "live", **SAMPLER, "vllm_server_base_url": "http://other"}, "has to be the server that samples"),
        ({"teacher": "live", **SAMPLER, "num_iterations": 2}, "the weights move before all of them are used"),
        ({"teacher": "live", **SAMPLER, "steps_per_generation": 8}, "the weights move before all of them are used"),
    ],
)
def test_teacher_that_a_server_cannot_be(settings, message, tmp_path):
    settings = {**SERVER, "teacher": "external", "gradient_accumulation_steps": 4, **settings}
    with pytest.raises(ValueError, match=message):
        SelfDistillationConfig(str(tmp_path), use_cpu=True, **settings)


def test_other_processes_wait_as_long_as_a_server_may_take(tmp_path):
    settings = {**SERVER, "teacher": "external"}
    assert SelfDistillationConfig(str(tmp_path), use_cpu=True, **settings).ddp_timeout == 2 * 1800 + 600
    assert SelfDistillationConfig(str(tmp_path), use_cpu=True, ddp_timeout=9000, **settings).ddp_timeout == 9000
    assert SelfDistillationConfig(str(tmp_path), use_cpu=True).ddp_timeout == 1800


def test_fields_that_are_no_fields(tmp_path):
    with pytest.raises(TypeError, match=r"OPSDConfig has no field `divergense`\. Did you mean `divergence`\?"):
        OPSDConfig(str(tmp_path), divergense="jsd")
    for name, instead in RETIRED.items():
        with pytest.raises(TypeError, match=re.escape(f"`{name}` is no field of OPSDConfig any more: {instead}.")):
            OPSDConfig(str(tmp_path), **{name: None})
    assert {"compile_divergence", "eval_benchmarks", "lmbda", "seq_kd"} <= {*RETIRED}
    assert not {*RETIRED} & {field.name for field in dataclasses.fields(SelfDistillationConfig)}

    @dataclasses.dataclass
    class Hints(SelfDistillationConfig):
        def __init__(self, *args, hint, **kwargs):
            super().__init__(*args, **kwargs)
            self.hint = hint

    assert Hints(str(tmp_path), use_cpu=True, hint=3, top_k=2).hint == 3


def test_a_configuration_can_be_copied(tmp_path):
    config = OPSDConfig(str(tmp_path), use_cpu=True)
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied.to_dict() == config.to_dict()


@pytest.mark.parametrize("values", [{"divergence_support": "most"}, {"divergence_tail": "cut"}, {"divergence": "kl"}])
def test_what_the_objective_refuses_is_told_by_the_names_of_the_fields(values, tmp_path):
    [(name, value)] = values.items()
    with pytest.raises(ValueError, match=rf"`{name}` must be one of .*, got '{value}'"):
        SelfDistillationConfig(str(tmp_path), use_cpu=True, **values)
    values = {"divergence_support": "teacher_top_k", "divergence_tail": "renormalize", "divergence_top_k": 1}
    with pytest.raises(ValueError, match=r"`divergence_top_k=1` with `divergence_tail='renormalize'` leaves one"):
        SelfDistillationConfig(str(tmp_path), use_cpu=True, **values)


def test_the_objective_is_that_of_the_fields(tmp_path):
    values = {"divergence": "jsd", "jsd_weight": 0.3, "divergence_top_k": 7, "divergence_clip": 0.2}
    values |= {"divergence_support": "student_top_k", "divergence_tail": "renormalize"}
    values |= {"divergence_ratio_low": 0.5, "divergence_ratio_high": 3.0}
    config = SelfDistillationConfig(str(tmp_path), use_cpu=True, distillation_temperature=2.0, **values)
    assert config.objective() == Objective("jsd", 0.3, "student_top_k", 7, "renormalize", 0.2, 2.0, 0.5, 3.0)


def test_every_refusal_is_in_order():
    """A function of the file that is in none of the tuples would never be called. Methods call one of them."""
    refusals = {
        name
        for name, value in vars(settings).items()
        if inspect.isfunction(value) and value.__module__ == settings.__name__ and not name.startswith("_")
    }
    listed = settings.CHECKS + settings.SERVED_TEACHER_CHECKS + settings.SERVED_LIVE_TEACHER_CHECKS
    assert sorted(check.__name__ for check in listed) == sorted(
        refusals - {"check_config", "check_mean_over_sequences"}
    )


def test_generation_batch_must_still_hold_whole_groups(tmp_path):
    with pytest.raises(ValueError, match="must be divisible by num_generations"):
        OPSDConfig(str(tmp_path), use_cpu=True, num_generations=5)


def test_a_quantised_teacher_can_be_told_to_trackers(training_args):
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    args = SelfDistillationConfig(
        **training_args,
        teacher="external",
        teacher_model_name_or_path="a/model",
        teacher_model_init_kwargs={"quantization_config": quantization},
    )
    assert json.loads(args.to_json_string())["teacher_model_init_kwargs"]["quantization_config"]["load_in_4bit"]
    assert args.teacher_model_init_kwargs["quantization_config"] is quantization
