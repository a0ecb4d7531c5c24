"""Rows that choose their teacher are trained as each would be by its teacher alone."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from plain_loop import Method, Row, loss_and_gradient, plain, probabilities
from tiny import make_model

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer, score


COMPLETIONS = [[40, 12, 77, 3], [9, 81, 33, 54, 20, 66, 3], [25, 3], [17, 92, 45, 60, 31]]
NAMES = ["maths", "code", "chat", "maths"]


def rollout(prompts, trainer):
    ids = trainer._tokenize_prompts(prompts)[0]
    return {"prompt_ids": ids, "completion_ids": COMPLETIONS[: len(ids)], "logprobs": None}


def reward(completions, **kwargs):
    return [float(index % 3) for index in range(len(completions))]


@pytest.fixture
def external(tokenizer, tmp_path):
    """Folder of a wider model with the same tokenizer and a padded vocabulary."""
    path = str(tmp_path / "external")
    model = make_model(tokenizer, seed=5, hidden_size=48)
    model.resize_token_embeddings(128, mean_resizing=False)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def teachers(external):
    return {
        "maths": {"teacher": "external", "teacher_model_name_or_path": external},
        "code": {"teacher": "initial"},
        "chat": {"teacher": "ema", "teacher_update_rate": 0.3},
    }


@pytest.fixture
def rows(dataset):
    return [{**dataset[index // 2], "teacher": name} for index, name in enumerate(NAMES)]


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args, teachers, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def make(lora=False, rollout_func=None, data=None, reward_funcs=None, environment_factory=None, **settings):
        if settings.get("teacher", "several") == "several":
            settings = {"teacher": "several", "teachers": teachers, **settings}
        names = [NAMES[index % 4] for index in range(len(dataset))]
        return SelfDistillationTrainer(
            make_model(tokenizer),
            reward_funcs=reward_funcs or (reward if settings.get("policy_loss_coef") else None),
            args=SelfDistillationConfig(**{**training_args, **settings}),
            train_dataset=dataset.add_column("teacher", names) if data is None else data,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if lora else None,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )

    return make


def move_apart(trainer):
    """Such that the policy, the initial one and the moving average differ."""
    trainer.model.train()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    trainer.teacher.on_step_end(1)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)


def plain_rows(trainer, rows, method, **given):
    """The rollouts, with the distributions of each row's own teacher."""
    made = []
    for index, row in enumerate(rows):
        prompt = trainer.tokenize_prompts([row["prompt"]])[0]
        teacher_prompt, completion = trainer.teacher_prompt.token_ids(row, None), COMPLETIONS[index]
        with trainer.teacher.members[row["teacher"]].weights(trainer.model) as module, torch.no_grad():
            target = probabilities(plain(module), teacher_prompt, completion, method.temperature)
        target = target[:, : len(trainer.processing_class)]  # the external one is padded, and these are the first
        target = target / target.sum(dim=-1, keepdim=True)
        made.append(Row(prompt, teacher_prompt, completion, target=target, **{k: v[index] for k, v in given.items()}))
    return made


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({}, Method()),
        ({"max_tokens_per_microbatch": 200, "divergence": "reverse_kl"}, Method("reverse_kl")),
        (
            {"divergence": "jsd", "divergence_support": "union_top_k", "divergence_top_k": 6, "loss_type": "bnpo"},
            Method("jsd", support="union_top_k", top_k=6, tail="bucket", loss_type="bnpo"),
        ),
        (
            {"policy_loss_coef": 0.7, "num_generations": 2, "scale_rewards": "none", "likelihood_coef": 0.2},
            Method(policy_loss_coef=0.7, likelihood_coef=0.2),
        ),
        ({"pad_to_multiple_of": 8, "temperature": 0.8}, Method(temperature=0.8)),
    ],
    ids=["full", "cut", "top_k", "three_terms", "padded"],
)
@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
def test_loss_and_gradient(make_trainer, rows, lora, settings, method):
    trainer = make_trainer(lora, rollout, **settings)
    trainer.current_gradient_accumulation_steps = 1
    move_apart(trainer)
    given = {"advantage": [-0.5, 0.5, 1.0, -1.0]} if method.policy_loss_coef else {}
    expected_loss, expected = loss_and_gradient(
        trainer.model, trainer.model, plain_rows(trainer, rows, method, **given), method
    )
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows)
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    gradient = {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}
    expected = {name: value for name, value in expected.items() if name in gradient}
    largest = max(value.abs().max() for value in expected.values()).item()
    assert largest > 1e-4
    assert loss.item() == pytest.approx(expected_loss, rel=1e-4)
    for name, value in gradient.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize(
    ("lora", "single"),
    [
        (False, {"teacher": "initial"}),
        (False, {"teacher": "external"}),
        (True, {"teacher": "ema", "teacher_update_rate": 0.3}),
    ],
    ids=lambda value: value["teacher"] if isinstance(value, dict) else "",
)
def test_one_of_several_is_that_one(make_trainer, dataset, external, lora, single, deterministic):
    """Bit for bit: a run whose rows all name one teacher is the run with that teacher."""
    if single["teacher"] == "external":
        single = {**single, "teacher_model_name_or_path": external}
    trained, data = [], dataset.add_column("teacher", ["maths"] * len(dataset))
    for settings in (single, {"teachers": dict.fromkeys(["maths", "code"], single)}):
        trainer = make_trainer(lora, data=data, **settings)
        torch.manual_seed(0)
        trainer.train()
        trained.append(trainer)
    one, several = trained
    for name, value in one.model.state_dict().items():
        twin = name.replace(".teacher.", ".teacher_maths.")
        assert torch.equal(several.model.state_dict()[twin], value), name
    logged, also = (trainer.state.log_history[0] for trainer in trained)
    skipped = {"step_time", "sampling/step_time", "memory/peak"}
    assert {name: also[name] for name in logged if name not in skipped} == {
        name: value for name, value in logged.items() if name not in skipped
    }
    assert also["teachers/maths/distillation_loss"] == logged["distillation_loss"]
    assert also["teachers/maths/token_rate"] == 1.0
    assert "teachers/code/distillation_loss" not in also  # nothing was counted


def test_advantages_that_are_shaped_in_the_loss(make_trainer, rows, teachers):
    """Of tokens whose teachers are two, and the same model."""
    settings = {
        "advantage": "trl_opsd.methods.rlrt.ReversedTeacher",
        "policy_loss_coef": 1.0,
        "divergence_coef": 0.0,
        "num_generations": 2,
        "rollout_func": rollout,
        "reward_funcs": reward,
    }
    rows = [{**row, "teacher": name} for row, name in zip(rows, ("maths", "code", "code", "maths"), strict=True)]
    gradients = []
    for given in (teachers["maths"], {"teachers": dict.fromkeys(["maths", "code"], teachers["maths"])}):
        data = Dataset.from_list(rows * 4)
        trainer = make_trainer(data=data, **settings, **given)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        trainer._compute_loss(trainer.model, trainer._generate_and_score_completions(rows)).backward()
        gradients.append({name: value.grad for name, value in trainer.model.named_parameters()})
    assert gradients[0]["lm_head.weight"].abs().max() > 1e-4
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_metrics_of_each_teacher(make_trainer, rows):
    trainer = make_trainer(rollout_func=rollout)
    trainer.current_gradient_accumulation_steps = 1
    move_apart(trainer)
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows)
    trainer._compute_loss(trainer.model, batch)
    found = trainer.statistics["train"].latest
    scored = score(trainer, rows, COMPLETIONS).scores
    numbers = {name: [index for index, its in enumerate(NAMES) if its == name] for name in set(NAMES)}
    total = sum(map(len, COMPLETIONS))
    for name, indices in numbers.items():
        known = scored.known[indices]
        assert found[f"teachers/{name}/token_rate"] == pytest.approx(int(known.sum()) / total)
        for metric, values in (
            ("distillation_loss", scored.divergence),
            ("entropy", scored.student_entropy),
            ("teacher_entropy", scored.teacher_entropy),
            ("teacher_advantage", scored.teacher_log_prob - scored.student_log_prob),
        ):
            assert found[f"teachers/{name}/{metric}"] == pytest.approx(values[indices][known].mean().item(), rel=1e-4)
    assert len({found[f"teachers/{name}/distillation_loss"] for name in numbers}) == 3
    of_all = {name for name in found if "/" not in name} & {"distillation_loss", "top_k_overlap", "skipped_token_rate"}
    assert all(f"teachers/maths/{name}" in found for name in of_all)


def test_scores_are_those_of_each_rows_teacher(make_trainer, rows):
    trainer = make_trainer()
    move_apart(trainer)
    together = score(trainer, rows, COMPLETIONS).scores
    for index, row in enumerate(rows):
        member = trainer.teacher.members[row["teacher"]]
        with member.weights(trainer.model) as module:
            prompt, completion = trainer.teacher_prompt.token_ids(row, None), COMPLETIONS[index]
            expected = probabilities(plain(module), prompt, completion, 1.0)[:, : len(trainer.processing_class)]
        expected = (expected / expected.sum(dim=-1, keepdim=True)).log()[range(len(completion)), completion]
        torch.testing.assert_close(
            together.teacher_log_prob[index, : len(completion)], expected.float(), rtol=1e-4, atol=1e-4
        )
    with pytest.raises(ValueError, match=r"`teacher` of a row is 'physics', and `teachers` has \['maths', 'code', "):
        score(trainer, [{**rows[0], "teacher": "physics"}], COMPLETIONS[:1])


@pytest.mark.parametrize(
    "settings",
    [
        {"token_weights": {"trl_opsd.methods.msd.DualPerspective": {"top_k": 8}}},
        {
            "privileged_context": "trl_opsd.methods.purified_opsd.ReferenceAlone",
            "target": "trl_opsd.methods.purified_opsd.Purified",
        },
        {
            "privileged_context": "peers",
            "context_kwargs": {"correct": 1, "contrast": 2},
            "advantage": "trl_opsd.methods.rlcsd.Contrast",
            "policy_loss_coef": 1.0,
            "divergence_coef": 0.0,
            "num_generations": 4,
        },
    ],
    ids=["weights", "target", "contrast"],
)
def test_what_parts_read_is_of_each_rows_teacher(make_trainer, dataset, teachers, settings):
    rows = [{**dataset[0], "teacher": name} for name in ("maths", "code", "code", "maths")]
    rewards = torch.tensor([[1.0], [0.0], [1.0], [0.0]])[:, : "policy_loss_coef" in settings]
    given = [[*COMPLETIONS], rewards if rewards.numel() else None, 4, 3]
    together = score(make_trainer(**settings), rows, *given).scores
    for name in ("maths", "code"):
        alone = score(make_trainer(**settings, **teachers[name]), rows, *given).scores
        own = [index for index, row in enumerate(rows) if row["teacher"] == name]
        assert alone.known[own].all(dim=0).any()
        for field, values in vars(alone).items():
            found = getattr(together, field)
            assert (found is None) == (values is None)
            if values is not None:
                torch.testing.assert_close(found[own], values[own], rtol=1e-4, atol=1e-5, msg=field)


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
def test_resumed_equals_uninterrupted(make_trainer, teachers, lora, tmp_path, deterministic):
    teachers |= {"late": {"teacher": "periodic", "teacher_update_steps": 2}}
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2, "teachers": teachers}

    def make(rate=0.3):
        teachers["chat"]["teacher_update_rate"] = rate
        return make_trainer(lora, **settings)

    whole = make()
    with pytest.warns(UserWarning, match="No row of `train_dataset` has the teacher 'late'"):
        resumed = make()
    torch.manual_seed(0)
    whole.train()
    checkpoint = Path(whole.args.output_dir) / "checkpoint-2"
    saved = sorted(path.parent.name for path in checkpoint.glob("teachers/*/teacher.safetensors"))
    assert saved == ["chat", "late"]
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    for name, member in whole.teacher.members.items():
        other = resumed.teacher.members[name]
        with member.weights(whole.model) as one, other.weights(resumed.model) as two:
            for (key, value), twin in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
                assert torch.equal(value, twin), (name, key)

    with pytest.raises(ValueError, match=r"was written with `teachers=.*and cannot be resumed with `teachers="):
        make_trainer(lora, **{**settings, "teachers": {**teachers, "late": {"teacher": "live"}}}).train(
            str(checkpoint)
        )


def test_evaluation(make_trainer, dataset):
    names = [NAMES[index % 4] for index in range(len(dataset))]
    trainer = make_trainer()
    logged = trainer.evaluate(dataset.add_column("teacher", names))
    assert {f"eval_teachers/{name}/distillation_loss" for name in NAMES} < logged.keys()
    with pytest.raises(ValueError, match="eval_dataset, row 0: `teacher` is 'physics'"):
        trainer.evaluate(dataset.add_column("teacher", ["physics"] * len(dataset)))


def test_column_of_another_name(make_trainer, dataset):
    data = dataset.add_column("domain", [NAMES[index % 4] for index in range(len(dataset))])
    trainer = make_trainer(data=data, teacher_column="domain")
    trainer.train()
    assert "teachers/maths/distillation_loss" in trainer.state.log_history[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_name_in_a_row(make_trainer, dataset, streaming):
    data = dataset.add_column("teacher", ["math"] * 16)
    data = data.to_iterable_dataset() if streaming else data
    with pytest.raises(ValueError, match="row 0: `teacher` is 'math', and none of `maths`, `code`, `chat`"):
        make_trainer(data=data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": [{"prompt": "?", "solution": "!"}]}, "train_dataset has no column `teacher`.*`teacher_column`"),
        ({"data": [{"prompt": "?", "solution": "!", "teacher": None}]}, "row 0: `teacher` is null"),
        ({"teachers": None}, "`teacher='several'` needs `teachers`, a mapping from names"),
        ({"teachers": {}}, "`teacher='several'` needs `teachers`"),
        ({"teacher": "initial", "teachers": {"a": {}}}, "`teachers=.* has no effect with `teacher='initial'`"),
        ({"teacher": "live", "teacher_column": "domain"}, "`teacher_column='domain'` has no effect with"),
        ({"teachers": {"a/b": {"teacher": "live"}}}, "`teachers` has the name 'a/b', and metrics and files"),
        ({"teachers": {"C++": {"teacher": "live"}}}, "has the name 'C\\+\\+'"),
        ({"teachers": {"": {"teacher": "live"}}}, "has the name ''"),
        ({"teachers": {1: {"teacher": "live"}}}, "has the name 1"),
        ({"teachers": {"a": "live"}}, r"`teachers\['a'\]`: a mapping with a `teacher` is needed"),
        ({"teachers": {"a": {"teacher": "several"}}}, "which is a single one"),
        ({"teachers": {"a": {"teacher": "frozen"}}}, r"`teachers\['a'\]`: `teacher` must be one of"),
        ({"teachers": {"a": {"teacher": "ema", "teacher_rate": 0.1}}}, r"`teacher_rate` is no field .*Did you mean"),
        (
            {"teachers": {"a": {"teacher": "ema", "teacher_update_rate": "0.1"}}},
            "`teacher_update_rate` cannot be a str",
        ),
        (
            {"teachers": {"a": {"teacher": "ema", "teacher_update_rate": 2}}},
            r"\['a'\]`: `teacher_update_rate` must be",
        ),
        ({"teachers": {"a": {"teacher": "live", "teacher_update_rate": 0.1}}}, r"\['a'\]`: .*has no effect"),
        ({"teachers": {"a": {"teacher": "external"}}}, r"\['a'\]`: `teacher='external'` needs"),
        (
            {"teachers": {"a": {"teacher": "live"}}, "teacher_offload": True},
            "`teacher_offload=True` is of one teacher",
        ),
        (
            {"teachers": {"a": {"teacher": "external", "teacher_server_base_url": "http://localhost:1"}}},
            r"`teachers\['a'\]`: .*cannot be combined with `divergence_support='full'`",
        ),
        ({"completions": "teacher"}, "samples from the teacher, and `teacher='several'` has one for some rows"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_input(make_trainer, change, message):
    if "data" in change:
        change = {**change, "data": Dataset.from_list(change["data"] * 16)}
    with pytest.raises(ValueError, match=message):
        make_trainer(**change)


def test_teacher_of_another_vocabulary(make_trainer, teachers, external):
    file = Path(external) / "tokenizer.json"
    file.write_text(re.sub(r'"q": (\d+)', r'"ä": \1', file.read_text()))
    with pytest.raises(ValueError, match=r"`teachers\['maths'\]`: .*has another vocabulary than the policy: 'q' is"):
        make_trainer()


def test_teachers_from_the_command_line(training_args, teachers):
    args = SelfDistillationConfig(**training_args, teacher="several", teachers=json.dumps(teachers))
    assert args.teachers == teachers
    assert args.teacher_column == "teacher"


def test_environments_are_refused(make_trainer, dataset):
    class Environment:
        def reset(self, **kwargs):
            return None

    settings = {"environment_factory": Environment}
    with pytest.raises(ValueError, match="reads the column 'teacher' of each row, and environments make their own"):
        make_trainer(**settings)
