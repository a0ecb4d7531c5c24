"""A teacher on a server trains the student as the same teacher in this process does."""

import pytest
import torch
from datasets import Dataset
from placement import place
from tiny import make_model

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer
from trl_opsd.serving import ServerError, TeacherServer, connect


# What a server does not tell
ENTROPIES = ("teacher_entropy", "entropy_gap")


def letter_reward(completions, **kwargs):
    return [float(completion[0]["content"].count("e")) for completion in completions]


@pytest.fixture
def teacher(tokenizer, tmp_path):
    """A wider model with the same vocabulary, and its folder."""
    path = str(tmp_path / "external")
    make_model(tokenizer, seed=5, hidden_size=48).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return place(type(make_model(tokenizer)).from_pretrained(path)), path


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args):
    def make(**settings):
        settings = {"divergence_support": "teacher_top_k", "divergence_top_k": 4, "teacher": "external", **settings}
        args = SelfDistillationConfig(**{**training_args, "max_steps": 3, **settings})
        names = ["a", "b", "own"]
        rows = Dataset.from_list([{**row, "teacher": names[index % 3]} for index, row in enumerate(list(dataset) * 4)])
        return SelfDistillationTrainer(
            make_model(tokenizer),
            reward_funcs=letter_reward if args.policy_loss_coef else None,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
        )

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence_tail": "renormalize", "divergence": "jsd"},
        {"divergence_support": "sampled_token", "divergence": "reverse_kl"},
        {"divergence_support": "sampled_token", "divergence_top_k": 1},
        {"gradient_accumulation_steps": 2},
        {"num_generations": 2},
        {"num_generations": 4, "policy_loss_coef": 1.0, "loss_type": "cispo"},
        {"max_tokens_per_microbatch": 1024, "mask_truncated_completions": True},
        {"num_iterations": 2, "steps_per_generation": 2},
    ],
    ids=str,
)
def test_trains_as_with_the_teacher_here(settings, make_trainer, teacher, serve, tokenizer):
    model, path = teacher
    local = make_trainer(teacher_model_name_or_path=path, **settings)
    served = make_trainer(teacher_server_base_url=serve(model, tokenizer).url, **settings)
    for trainer in (local, served):
        torch.manual_seed(0)
        trainer.train()

    for expected, found in zip(local.state.log_history[:-1], served.state.log_history[:-1], strict=True):
        assert found.keys() == expected.keys() - {*ENTROPIES}
        for name in found.keys() - {"step_time", "sampling/step_time", "memory/peak"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    for name, value in local.model.state_dict().items():
        torch.testing.assert_close(served.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_some_rows_by_servers_and_others_here(make_trainer, teacher, serve, tokenizer):
    """Two of three teachers are on servers, each of which is asked about its own rows alone."""
    model, path = teacher
    servers = [serve(one, tokenizer) for one in (model, make_model(tokenizer, seed=7))]
    asked = [{"teacher": "external", "teacher_server_base_url": f"{server.url}/"} for server in servers]
    make_model(tokenizer, seed=7).save_pretrained(f"{path}-7")
    tokenizer.save_pretrained(f"{path}-7")
    loaded = [{"teacher": "external", "teacher_model_name_or_path": name} for name in (path, f"{path}-7")]
    trainers = []
    for a, b in (loaded, asked):
        teachers = {"a": a, "b": b, "own": {"teacher": "initial"}}
        trainers.append(make_trainer(teacher="several", teachers=teachers))
        torch.manual_seed(0)
        trainers[-1].train()
    local, served = trainers
    assert all(server.num_requests > 1 for server in servers)
    assert sum(server.num_requests for server in servers) < 2 + 3 * 4  # a probe each, and of four rows some
    for expected, found in zip(local.state.log_history[:-1], served.state.log_history[:-1], strict=True):
        missing = {f"{prefix}{name}" for prefix in ("", "teachers/a/", "teachers/b/") for name in ENTROPIES}
        assert found.keys() == expected.keys() - missing
        for name in found.keys() - {"step_time", "sampling/step_time", "memory/peak"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    # In the second step all three have rows
    assert {f"teachers/{name}/distillation_loss" for name in ("a", "b", "own")} <= served.state.log_history[1].keys()
    for name, value in local.model.state_dict().items():
        torch.testing.assert_close(served.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_completions_of_any_length(serve, model, tokenizer):
    fake = serve(model, tokenizer)
    server = TeacherServer(connect(fake.url, 60.0, 60.0), top_k=3, vocab_size=len(tokenizer))
    prompt, completion = [5, 6, 7], [8, 9]
    scores = server.score([prompt, prompt, None], [completion, [], completion], width=4)
    assert fake.num_requests == 2  # the probe, and the one row to score

    with torch.no_grad():
        log_p = model(torch.tensor([prompt + completion])).logits[0, 2:4].log_softmax(-1).cpu()
    torch.testing.assert_close(scores.top_log_probs[0, :2], log_p.topk(3).values)
    assert torch.equal(scores.top_tokens[0, :2].long(), log_p.topk(3).indices)
    torch.testing.assert_close(scores.log_probs[0, :2], log_p[range(2), completion])
    assert scores.top_log_probs.shape == scores.top_tokens.shape == (3, 4, 3)
    assert not scores.top_log_probs[0, 2:].any()
    assert not scores.log_probs[1:].any()


def test_many_rows_are_asked_in_turns(serve, model, tokenizer):
    fake = serve(model, tokenizer)
    server = TeacherServer(connect(fake.url, 60.0, 60.0), top_k=3, vocab_size=len(tokenizer))
    fake.faults = [400]
    with pytest.raises(ServerError):
        server.score([[1, 2]] * 200, [[3]] * 200, width=1)
    assert fake.num_requests <= 1 + 64

    scores = server.score([[1, 2]] * 70, [[3]] * 69 + [[4]], width=1)
    assert len(scores.log_probs.unique()) == 2
    assert scores.log_probs[69] != scores.log_probs[68]


def test_failure_is_raised_after_a_checkpoint(make_trainer, serve, model, tokenizer, training_args):
    server = serve(model, tokenizer)
    trainer = make_trainer(teacher_server_base_url=server.url, save_strategy="steps", save_steps=100)
    steps = []

    def fail_in_the_third(*args, **kwargs):
        steps.append(trainer.state.global_step)
        if len(steps) == 3:
            server.faults = [400] * 4
        return score(*args, **kwargs)

    score = trainer.teacher.server.score
    trainer.teacher.server.score = fail_in_the_third
    with pytest.raises(ServerError, match=rf"{server.url} failed.*The run is saved in .*checkpoint-2"):
        trainer.train()

    server.faults.clear()  # requests that had not started when the first one failed are never sent
    resumed = make_trainer(teacher_server_base_url=server.url)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"max_logprobs": 3}, r"does not report the 4 most probable tokens.*--max-logprobs -1"),
        ({"logprobs_mode": "raw_logits"}, "reports logits"),
        ({"max_model_len": 400}, "more than the budget of 391"),
        ({"max_model_len": 9}, "teacher's context of 8 tokens leaves 0"),
    ],
)
def test_server_that_will_not_do(server, message, make_trainer, serve, model, tokenizer):
    with pytest.raises(ValueError, match=message):
        make_trainer(teacher_server_base_url=serve(model, tokenizer, **server).url)


def test_model_of_another_vocabulary(make_trainer, serve, model, tokenizer):
    model.resize_token_embeddings(400)
    with torch.no_grad():
        model.lm_head.weight[300:].normal_(std=10.0)
    with pytest.raises(ValueError, match=r"predicts token [1-3]\d\d, and the policy has 106"):
        make_trainer(teacher_server_base_url=serve(model, tokenizer).url)


def test_resuming_with_another_model_on_the_server(make_trainer, serve, model, tokenizer):
    server = serve(model, tokenizer)
    trainer = make_trainer(teacher_server_base_url=server.url, save_strategy="steps", save_steps=2)
    trainer.train()
    server.get = lambda path: (200, {"data": [{"id": "another", "max_model_len": 4096}]})
    resumed = make_trainer(teacher_server_base_url=server.url)
    with pytest.raises(ValueError, match=r"external teacher is not the one .* it was 'served' and is 'another'"):
        resumed.train(resume_from_checkpoint=True)
