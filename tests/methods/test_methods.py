"""What every method states of itself, and where that is read."""

import re
from dataclasses import MISSING, dataclass, fields

import pytest
from tiny import make_model, make_tokenizer
from trl import TrlParser

from trl_opsd import (
    OPSDCConfig,
    OPSDConfig,
    OPSDCTrainer,
    OPSDTrainer,
    SelfDistillationConfig,
    SelfDistillationTrainer,
)
from trl_opsd.methods import METHODS, TRAINABLE, config_class, summary
from trl_opsd.trainer.method import Method


@pytest.mark.parametrize("name", METHODS)
def test_a_method_states_what_it_is(name):
    config = config_class(name)
    method = config.method
    assert config.__module__ == f"trl_opsd.methods.{name}"
    assert config.__name__.lower() == f"{name.replace('_', '')}config"
    assert re.fullmatch(r"\d{4}\.\d{5}", method.paper)
    assert method.paper in method.citation
    assert method.title in " ".join(method.citation.split())
    assert f"https://huggingface.co/papers/{method.paper}" in config.__doc__


@pytest.mark.parametrize("name", TRAINABLE)
def test_summary_is_the_first_line_of_the_docstring(name):
    first = config_class(name).__doc__.strip().splitlines()[0]
    assert summary(name) == first
    assert first.endswith(".")
    assert len(first) < 110


def test_status_of_a_method():
    with pytest.raises(ValueError, match=r"`status` of X must be of seen-paper, seen-code, notes.*got 'guessed'"):
        Method("X", paper="2601.00001", title="X", citation="", status="seen-paper, guessed")


@dataclass
class HintConfig(SelfDistillationConfig, defaults={"teacher": "live", "context_kwargs": {"a": [1]}, "top_k": 5}):
    """Hints."""


@dataclass
class OtherHintConfig(HintConfig, defaults={"top_k": 6}):
    """Other hints."""


def test_defaults_of_a_subclass(tmp_path):
    TrlParser([SelfDistillationConfig])  # which changes the types that fields hold
    config, other = HintConfig(str(tmp_path), use_cpu=True), OtherHintConfig(str(tmp_path), use_cpu=True)
    assert (config.teacher, config.context_kwargs, config.top_k) == ("live", {"a": [1]}, 5)
    assert (other.teacher, other.context_kwargs, other.top_k) == ("live", {"a": [1]}, 6)
    config.context_kwargs["a"].append(2)
    assert other.context_kwargs == HintConfig(str(tmp_path), use_cpu=True).context_kwargs == {"a": [1]}
    assert HintConfig(str(tmp_path), use_cpu=True, teacher="initial").teacher == "initial"

    by_name = {field.name: field for field in fields(HintConfig)}
    for field in fields(SelfDistillationConfig):
        assert by_name[field.name].metadata == field.metadata
        if field.name not in ("teacher", "context_kwargs", "top_k"):
            assert by_name[field.name].default in (field.default, MISSING) or field.default != field.default
    [parsed] = TrlParser([HintConfig]).parse_args_and_config(
        ["--output_dir", str(tmp_path), "--use_cpu", "--context_kwargs", '{"a": 3}']
    )
    assert (parsed.teacher, parsed.context_kwargs, parsed.top_k) == ("live", {"a": 3}, 5)
    with pytest.raises(SystemExit):
        TrlParser([HintConfig]).parse_args_and_config(["--teacher", "nobody"])
    assert "> - `top_k`: `5`" in HintConfig.__doc__


def test_default_of_an_unknown_field():
    with pytest.raises(ValueError, match=r"Hints has a default for `temprature`.*Did you mean `temperature`\?"):

        class Hints(SelfDistillationConfig, defaults={"temprature": 1.0}):
            pass


def test_defaults_without_the_decorator(tmp_path):
    class Hints(SelfDistillationConfig, defaults={"top_k": 1}):
        pass

    with pytest.raises(TypeError, match="Hints states defaults, and needs `@dataclass`"):
        Hints(str(tmp_path), use_cpu=True)


@pytest.mark.parametrize("trainer_class", [SelfDistillationTrainer, OPSDTrainer])
def test_the_trainer_cites_the_method_of_its_configuration(trainer_class, training_args, dataset, tmp_path):
    tokenizer = make_tokenizer()
    trainer = trainer_class(
        make_model(tokenizer), args=OPSDConfig(**training_args), train_dataset=dataset, processing_class=tokenizer
    )
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "trained with OPSD, a method introduced in [Self-Distilled Reasoner" in card
    assert "zhao2026selfdistilled" in card
    assert trainer.model.model_tags == ["trl", "trl-opsd", "opsd"]


def test_without_a_method_nothing_is_cited(training_args, dataset, tmp_path):
    tokenizer = make_tokenizer()
    args = SelfDistillationConfig(**training_args)
    trainer = SelfDistillationTrainer(
        make_model(tokenizer), args=args, train_dataset=dataset, processing_class=tokenizer
    )
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "trained with Self-Distillation." in card
    assert "huggingface.co/papers" not in card
    assert trainer.model.model_tags == ["trl", "trl-opsd", "self-distillation"]


@pytest.mark.parametrize(("trainer_class", "config"), [(OPSDTrainer, OPSDConfig), (OPSDCTrainer, OPSDCConfig)])
def test_trainers_of_a_method_have_its_configuration(trainer_class, config):
    assert trainer_class.config_class is config


@pytest.mark.parametrize(
    ("name", "changes", "left_out"),
    [
        ("sdft", {"teacher": "live"}, "teacher_update_rate"),
        ("rlsd", {"teacher": "initial"}, "teacher_update_steps"),
        ("rlrt", {"privileged_context": "solution"}, "context_kwargs"),
        ("rlrt", {"advantage": "grpo"}, "schedules"),
        ("vopd", {"divergence_support": "full"}, "divergence_tail"),
    ],
)
def test_what_belongs_to_a_choice_goes_with_it(name, changes, left_out, tmp_path):
    config = config_class(name)
    assert getattr(config(str(tmp_path), use_cpu=True), left_out) is not None
    assert getattr(config(str(tmp_path), use_cpu=True, **changes), left_out) is None


def test_what_is_set_stays_or_is_refused(tmp_path):
    sdft, vopd, rlrt = map(config_class, ("sdft", "vopd", "rlrt"))
    with pytest.raises(ValueError, match=r"`teacher_update_rate=0\.5` has no effect with `teacher='live'`"):
        sdft(str(tmp_path), use_cpu=True, teacher="live", teacher_update_rate=0.5)
    assert vopd(str(tmp_path), use_cpu=True, divergence_support="teacher_top_k").divergence_tail == "renormalize"
    schedules = {"divergence_coef": {"start": 1.0, "end": 0.0, "num_steps": 3}}
    assert rlrt(str(tmp_path), use_cpu=True, advantage="grpo", schedules=schedules).schedules == schedules
