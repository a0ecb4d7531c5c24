"""Evaluation on benchmarks while a model trains."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOTrainer

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer, cli
from trl_opsd.eval import in_training
from trl_opsd.eval.benchmark import Problem
from trl_opsd.eval.in_training import BenchmarkCallback, RolloutBackend
from trl_opsd.eval.run_folder import read_samples
from trl_opsd.sampling import Request, Sampling
from trl_opsd.serving import ServerError


pytestmark = pytest.mark.needs("math_verify")


@pytest.fixture
def benchmark(tmp_path):
    """A file that describes five problems, and asks them without a word more."""
    rows = [{"question": f"What is {a} + 4?", "answer": str(a + 4)} for a in range(5)]
    Dataset.from_list(rows).to_json(tmp_path / "problems.jsonl")
    path = tmp_path / "sums.yaml"
    description = {"dataset_name": str(tmp_path / "problems.jsonl"), "prompt_template": "{{ question }}"}
    path.write_text(yaml.safe_dump(description))
    return str(path)


@pytest.fixture
def make_trainer(model, dataset, tokenizer, training_args):
    def make(evaluation=None, **settings):
        args = {**training_args, "max_steps": 5, "per_device_eval_batch_size": 2, **settings}
        trainer = SelfDistillationTrainer(
            model, args=SelfDistillationConfig(**args), train_dataset=dataset, processing_class=tokenizer
        )
        if evaluation is not None:
            trainer.add_callback(BenchmarkCallback(trainer, **evaluation))
        return trainer

    return make


def evaluations(trainer):
    found = [entry for entry in trainer.state.log_history if "eval_sums/mean_tokens" in entry]
    assert len({entry["step"] for entry in found}) == len(found)  # never twice
    return {entry["step"]: entry for entry in found}


def test_evaluates_before_while_and_after_training(
    make_trainer, benchmark, training_args, tokenizer, monkeypatch, capsys
):
    sampling = {"temperature": 0.6, "max_new_tokens": 5}
    trainer = make_trainer(
        {
            "benchmarks": [benchmark],
            "steps": 2,
            "num_samples": 3,
            "limit": 3,
            "sampling": sampling,
            "system_prompt": "Add.",
        }
    )
    asked = []
    generate = RolloutBackend.generate

    def record(backend, requests, sampling):
        asked.extend(tokenizer.decode(request.prompt_ids) for request in requests)
        return generate(backend, requests, sampling)

    monkeypatch.setattr(RolloutBackend, "generate", record)
    trainer.train()
    assert asked
    assert all("Add." in prompt for prompt in asked)

    logged = evaluations(trainer)
    assert list(logged) == [0, 2, 4, 5]
    for step, entry in logged.items():
        folder = trainer.args.output_dir + f"/eval/step-{step}"
        samples = read_samples(in_training.Path(folder) / "sums" / "samples.jsonl")
        assert sorted((s.problem_id, s.sample_index) for s in samples) == sorted(
            (problem, index) for problem in {s.problem_id for s in samples} for index in range(3)
        )
        assert len(samples) == 9
        assert {sample.seed for sample in samples} == {None}
        assert max(sample.num_tokens for sample in samples) <= 5
        assert entry["eval_sums/mean_tokens"] == pytest.approx(sum(s.num_tokens for s in samples) / 9)
        assert entry["eval_sums/avg@3"] == pytest.approx(sum(s.correct for s in samples) / 9)
        assert 0 <= entry["eval_sums/avg@3_low"] <= entry["eval_sums/avg@3_high"] <= 1
        assert "loss" not in entry
        assert "distillation_loss" not in entry
        settings = json.loads((in_training.Path(folder) / "run.json").read_text())["settings"]
        assert settings["temperature"] == 0.6
        assert settings["top_p"] == trainer.args.top_p
        assert settings["system_prompt"] == "Add."
    assert cli.main(["compare", *(f"{training_args['output_dir']}/eval/step-{step}" for step in (0, 5))]) == 0
    assert "sums" in capsys.readouterr().out


def draw_from_all_generators():
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [random.random(), np.random.rand(), *(torch.rand((), device=device).item() for device in devices)]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_training_is_what_it_would_have_been(temperature, make_trainer, benchmark, model, monkeypatch):
    """Whatever generator the engine draws from: on a GPU, vLLM takes the seeds of requests from NumPy's."""
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    generate = GRPOTrainer._generate_single_turn
    drawn = []

    def drawing(trainer, prompt_ids, images, *args):
        if not trainer.model.training:
            drawn.append(draw_from_all_generators())
        return generate(trainer, prompt_ids, images, *args)

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", drawing)
    runs = []
    for evaluation in (None, {"benchmarks": [benchmark], "steps": 1, "sampling": {"temperature": temperature}}):
        model.load_state_dict(initial)
        trainer = make_trainer(evaluation)
        config = trainer.generation_config.to_dict()
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        timed = {"step_time", "sampling/step_time", "memory/peak"}
        steps = [{k: v for k, v in entry.items() if k not in timed} for entry in steps]
        runs.append((steps, draw_from_all_generators()))
        assert trainer.generation_config.to_dict() == config
    assert runs[0] == runs[1]
    assert len(drawn) == len({tuple(numbers) for numbers in drawn}) > 6
    assert len(evaluations(trainer)) == 6


def failing_at(step):
    """The engine of the rollouts, whose server fails in an evaluation of that step."""
    generate = GRPOTrainer._generate_single_turn

    def generate_or_fail(trainer, *args):
        if not trainer.model.training and trainer.state.global_step == step:
            torch.rand(())  # a saved run begins with other random numbers
            raise ServerError("The server failed.")
        return generate(trainer, *args)

    return generate_or_fail


@pytest.mark.usefixtures("deterministic")
def test_server_that_fails_in_an_evaluation(make_trainer, benchmark, model, monkeypatch):
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    evaluation = {"benchmarks": [benchmark], "steps": 2}
    whole = make_trainer(evaluation)
    whole.train()
    expected = {entry["step"]: entry["loss"] for entry in whole.state.log_history if "loss" in entry}

    model.load_state_dict(initial)
    failed = make_trainer(evaluation)
    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "_generate_single_turn", failing_at(4))
        with pytest.raises(ServerError, match=r"The server failed\. The run is saved in .*checkpoint-4"):
            failed.train()

    model.load_state_dict(initial)
    resumed = make_trainer(evaluation)
    resumed.train(resume_from_checkpoint=True)
    found = {entry["step"]: entry["loss"] for entry in resumed.state.log_history if "loss" in entry}
    assert found == {step: loss for step, loss in expected.items() if step != 4}  # it had not been logged yet
    assert [step for step in evaluations(resumed) if step >= 4] == [4, 5]


def test_an_evaluation_that_failed_at_the_end_is_made_up_for(make_trainer, benchmark, model, monkeypatch):
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    evaluation = {"benchmarks": [benchmark], "steps": 2}
    failed = make_trainer(evaluation)
    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "_generate_single_turn", failing_at(5))
        with pytest.raises(ServerError, match=r"checkpoint-5"):
            failed.train()

    model.load_state_dict(initial)
    resumed = make_trainer(evaluation)
    resumed.train(resume_from_checkpoint=True)
    assert list(evaluations(resumed)) == [0, 2, 4, 5]


def test_samples_that_cannot_be_kept_end_all_processes(make_trainer, tmp_path, monkeypatch):
    (tmp_path / "eval").touch()  # no folder can be made there
    sent = []
    monkeypatch.setattr(
        in_training, "broadcast_object_list", lambda objects: sent or sent.extend(objects) or list(objects)
    )
    args = SimpleNamespace(device=torch.device("cpu"), seed=0, output_dir=str(tmp_path), disable_tqdm=True)
    args.chat_template_kwargs = None
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "log", pytest.fail)
    callback = BenchmarkCallback(trainer, {})
    for is_first in (True, False):
        state = SimpleNamespace(global_step=2, is_world_process_zero=is_first, is_local_process_zero=True)
        with pytest.raises(ValueError, match=r"benchmarks cannot be kept in .*step-2: .*Not a directory"):
            callback._evaluate(args, state, None)


def test_training_that_is_stopped_is_evaluated_at_its_end(make_trainer, benchmark):
    class Stop(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer({"benchmarks": [benchmark], "steps": 2}, logging_steps=1)
    trainer.add_callback(Stop())
    trainer.train()
    assert list(evaluations(trainer)) == [0, 2, 3]


def test_greedy_evaluation_gives_what_the_model_says(make_trainer, benchmark, tokenizer, model, device):
    model.generation_config.repetition_penalty = 5.0
    trainer = make_trainer(
        {"benchmarks": [benchmark], "sampling": {"temperature": 0.0, "max_new_tokens": 6}},
        chat_template_kwargs={"enable_thinking": False},
        max_steps=1,
    )
    trainer.train()
    found = read_samples(in_training.Path(trainer.args.output_dir) / "eval/step-1/sums/samples.jsonl")
    assert len(found) == 5
    for number, sample in enumerate(sorted(found, key=lambda sample: int(sample.reference))):
        message = [{"role": "user", "content": f"What is {number} + 4?"}]
        prompt = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True
        )
        output = trainer.model.generate(**prompt.to(device), max_new_tokens=6, do_sample=False, repetition_penalty=1.0)
        said = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample.completion == said


def test_batches_of_a_process():
    requests = [Request([7, index], 0) for index in range(5)]
    batches = []

    def sample(prompts, sampling):
        batches.append(len(prompts))
        return [[prompt[1], 3] if prompt[1] != 2 else [2, 9] for prompt in prompts]

    for batch_size in (2, None):
        accelerator = SimpleNamespace(num_processes=1, process_index=0)
        backend = RolloutBackend(sample, accelerator, end_token_ids=[3], batch_size=batch_size, max_length=None)
        found = list(backend.generate(requests, Sampling(1.0, 1.0, 0, 4)))
        assert [(index, completion.token_ids[0]) for index, completion in found] == [(i, i) for i in range(5)]
        assert [completion.terminated for _, completion in found] == [True, True, False, True, True]
    assert batches == [2, 2, 1, 5]

    for lossy in (lambda prompts, sampling: [[1]], lambda prompts, sampling: [[] for _ in prompts]):
        backend = RolloutBackend(lossy, accelerator, end_token_ids=[3], batch_size=None, max_length=None)
        with pytest.raises(ValueError, match=r"completions to 5 prompts of benchmarks"):
            list(backend.generate(requests, Sampling(1.0, 1.0, 0, 4)))


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"benchmarks": ["no_such"]}, "There is no benchmark 'no_such'"),
        ({"benchmarks": ["sums", "sums"]}, "benchmark sums is named twice"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"limit": 0}, "`limit` must be at least 1"),
        ({"sampling": {"beams": 2}}, "unknown key 'beams'"),
        ({"sampling": {"top_p": 0}}, "The sampling of benchmarks: `top_p`"),
        ({"num_samples": 2, "sampling": {"temperature": 0.0}}, "At temperature 0 all 2 completions"),
        ({"sampling": {"max_new_tokens": None}}, "Benchmarks need a limit"),
    ],
)
def test_bad_values(evaluation, message, make_trainer, benchmark):
    names = [benchmark if name == "sums" else name for name in evaluation.get("benchmarks", ["sums"])]
    with pytest.raises(ValueError, match=message):
        make_trainer({**evaluation, "benchmarks": names})


def test_math_verify_that_is_not_there(make_trainer, benchmark, monkeypatch):
    monkeypatch.setattr(in_training, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install trl-opsd\[eval\]"):
        make_trainer({"benchmarks": [benchmark]})


def test_problems_of_ones_own(make_trainer):
    problems = {"sums": [Problem("", str(a), f"{a}+4?", str(a + 4)) for a in range(3)]}
    trainer = make_trainer({"benchmarks": problems, "steps": 5}, max_steps=1)
    trainer.train()
    assert list(evaluations(trainer)) == [0, 1]
    samples = read_samples(in_training.Path(trainer.args.output_dir) / "eval/step-1/sums/samples.jsonl")
    assert [sample.problem_id for sample in samples] == ["0", "1", "2"]


def test_prompts_that_do_not_fit_are_refused_before_the_first_step(make_trainer, benchmark):
    trainer = make_trainer({"benchmarks": [benchmark], "sampling": {"max_new_tokens": 4090}})
    with pytest.raises(ValueError, match="more than the 4096 of the model"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert torch.is_grad_enabled()
