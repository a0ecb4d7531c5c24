import pytest

from trl_opsd import SelfDistillationConfig
from trl_opsd.eval import in_training
from trl_opsd.scripts.benchmarks import BenchmarkArguments, callback_values
from trl_opsd.scripts.inputs import SelfDistillationScriptArguments


pytestmark = pytest.mark.needs("math_verify")


def test_values_of_the_callback(training_args):
    arguments = SelfDistillationScriptArguments(
        eval_benchmarks=["playground_opsd"],
        eval_benchmarks_steps=7,
        eval_benchmarks_num_samples=3,
        eval_benchmarks_limit=2,
        eval_benchmarks_sampling="{temperature: 0.5}",
    )
    values = callback_values(arguments, SelfDistillationConfig(**training_args), "Add.")
    assert [len(problems) for problems in values.pop("benchmarks").values()] == [2]
    assert values == {"steps": 7, "num_samples": 3, "sampling": {"temperature": 0.5}, "system_prompt": "Add."}

    arguments.eval_benchmarks_system_prompt = "Subtract."
    values = callback_values(arguments, SelfDistillationConfig(**training_args), "Add.")
    assert values["system_prompt"] == "Subtract."


def test_no_benchmarks(training_args):
    assert callback_values(BenchmarkArguments(), SelfDistillationConfig(**training_args), "Add.") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval_benchmarks_limit": 3}, "`eval_benchmarks_limit=3` has no effect without `eval_benchmarks`"),
        ({"eval_benchmarks_system_prompt": "Add."}, "has no effect without"),
        ({"eval_benchmarks": ["playground_opsd"], "eval_benchmarks_steps": 0}, "`eval_benchmarks_steps` must be at"),
        ({"eval_benchmarks_sampling": "[0.6]"}, "Expected `eval_benchmarks_sampling` to be a mapping"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SelfDistillationScriptArguments(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval_benchmarks": ["aime42"]}, "`eval_benchmarks`: There is no benchmark 'aime42'"),
        (
            {"eval_benchmarks": ["playground_opsd"], "eval_benchmarks_sampling": {"beams": 2}},
            "`eval_benchmarks`: .* unknown key 'beams'",
        ),
    ],
)
def test_benchmarks_that_cannot_be_asked(fields, message, training_args):
    arguments = BenchmarkArguments(**fields)
    with pytest.raises(ValueError, match=message):
        callback_values(arguments, SelfDistillationConfig(**training_args), None)


def test_math_verify_that_is_not_there(training_args, monkeypatch):
    monkeypatch.setattr(in_training, "find_spec", lambda name: None)
    arguments = BenchmarkArguments(eval_benchmarks=["playground_opsd"])
    with pytest.raises(ValueError, match=r"`eval_benchmarks`: .*pip install trl-opsd\[eval\]"):
        callback_values(arguments, SelfDistillationConfig(**training_args), None)
