import math

import pytest
import torch
from datasets import Dataset
from methods.stand_ins import Sampler
from three_tokens import make_batch
from tiny import make_model
from trl import GRPOTrainer

from trl_opsd import PBSDConfig, SelfDistillationTrainer
from trl_opsd.methods.pbsd import Preference, TeacherSecond
from trl_opsd.sampling.sources import Completions, Prompts
from trl_opsd.signal import TokenScores


def scores_of(log_probs, known=None):
    """Of completions of one token, from the log-probability by the student and by the teacher."""
    student, teacher = torch.tensor(log_probs).T.unsqueeze(2)
    nothing = torch.zeros_like(student)
    known = torch.ones_like(student).bool() if known is None else torch.tensor(known).unsqueeze(1)
    return TokenScores(known, student, teacher, nothing, nothing, nothing)


def pairs_of(number, replaced=None, **given):
    """Completions of one token, every second of which is the teacher's."""
    given.setdefault("mask", torch.ones(2 * number, 1).bool())
    return make_batch(**given, replaced=[False, True] * number if replaced is None else replaced)


def logged():
    found = {}

    def log(name, numerator, denominator):
        found[name] = (numerator.item() / denominator.item(), denominator.item())

    return found, log


# log p_S and log p_T of what the student wrote, and of what the teacher wrote
KNOWN = [(-4.0, -7.0), (-10.0, -6.0)]


def test_exact_values():
    found, log = logged()
    factors = Preference(beta=0.1)(pairs_of(1, log=log), scores_of(KNOWN))
    assert factors.flatten().tolist() == pytest.approx([-0.2 * 0.668188, 0.2 * 0.668188], abs=1e-6)
    assert found["preference/loss"] == pytest.approx((1.103186, 1), abs=1e-6)
    assert found["preference/margin"] == pytest.approx((-0.7, 1))
    assert found["preference/accuracy"] == (0.0, 1)
    assert found["preference/pair_rate"] == (1.0, 1)


def test_slopes_are_the_gradient_of_the_loss():
    log_probs = torch.tensor([[-4.0, -10.0], [-3.0, -1.0]], requires_grad=True)  # of two pairs
    teacher = torch.tensor([[-7.0, -6.0], [-2.0, -2.5]])
    margins = 0.3 * ((log_probs - teacher)[:, 1] - (log_probs - teacher)[:, 0])
    torch.nn.functional.softplus(-margins).mean().backward()
    both = torch.stack([log_probs.detach().flatten(), teacher.flatten()], dim=1)
    factors = Preference(beta=0.3)(pairs_of(2), scores_of(both.tolist()))
    # Each is the weight of −log p_S in a mean over four rows
    torch.testing.assert_close(-factors.flatten() / 4, log_probs.grad.flatten())


def test_sums_over_tokens_and_not_their_means():
    long = TokenScores(
        torch.ones(2, 4).bool(), torch.tensor([[-1.0] * 4, [-2.5] * 4]), torch.tensor([[-1.75] * 4, [-1.5] * 4]),
        *torch.zeros(3, 2, 4),
    )  # fmt: skip
    batch = pairs_of(1, mask=torch.ones(2, 4).bool())
    factors, short = Preference()(batch, long), Preference()(pairs_of(1), scores_of(KNOWN))
    torch.testing.assert_close(factors.expand(2, 4), short.expand(2, 4))


def test_margin_before_training_is_minus_the_divergences():
    """With a context-free reference it would be 0."""
    p_s, p_t = (0.6, 0.3, 0.1), (0.2, 0.3, 0.5)
    expected = 0.0
    for own, p_own in zip(range(3), p_s, strict=True):
        for other, p_other in zip(range(3), p_t, strict=True):
            found, log = logged()
            log_probs = [(math.log(p_s[token]), math.log(p_t[token])) for token in (own, other)]
            Preference(beta=0.5)(pairs_of(1, log=log), scores_of(log_probs))
            expected += p_own * p_other * found["preference/margin"][0]
    assert expected == pytest.approx(-1.083220 * 0.5, abs=1e-6)


def test_a_pair_that_is_certain_is_counted():
    factors = Preference(beta=1.0)(pairs_of(1), scores_of([(-1e4, 0.0), (0.0, -1e4)]))
    assert (factors != 0).all()
    assert factors.abs().max() < 1e-30


@pytest.mark.parametrize(
    "broken",
    [
        {"replaced": [False, False, False, True]},
        {"replaced": [True, True, False, True]},
        {"mask": torch.tensor([[False], [True], [True], [True]])},
        {"mask": torch.tensor([[True], [False], [True], [True]])},
        {"known": [True, False, True, True]},
    ],
    ids=str,
)
def test_half_a_pair_counts_nowhere(broken):
    found, log = logged()
    known = broken.pop("known", None)
    factors = Preference(beta=0.1)(pairs_of(2, log=log, **broken), scores_of(KNOWN * 2, known))
    assert factors.flatten().tolist()[:2] == [0.0, 0.0]
    assert factors.flatten().tolist()[2:] == pytest.approx([-0.2 * 0.668188, 0.2 * 0.668188], abs=1e-6)
    assert found["preference/pair_rate"] == (0.5, 2)
    assert found["preference/loss"] == pytest.approx((1.103186, 1), abs=1e-6)


def test_no_pair_at_all():
    assert not Preference()(pairs_of(1, replaced=[False, False]), scores_of(KNOWN)).any()
    assert not Preference()(pairs_of(1, replaced=[False, False], is_training=False), scores_of(KNOWN)).any()
    assert not Preference()(make_batch(torch.ones(3, 1).bool(), is_training=False), scores_of(KNOWN[:1] * 3)).any()


def test_pairs_of_two_processes():
    """Of two pairs, the first process has three rows, and the second one; each knows what the other does."""
    whole = pairs_of(2)
    expected = Preference()(whole, scores_of([*KNOWN, (-2.0, -1.0), (-3.0, -5.0)]))
    rows = []
    Preference()(
        pairs_of(2, gather=lambda own: rows.append(own) or own), scores_of([*KNOWN, (-2.0, -1.0), (-3.0, -5.0)])
    )
    some = pairs_of(1, replaced=[True, False], first=1, gather=lambda own: rows[0])
    assert Preference()(some, scores_of([KNOWN[1], (-2.0, -1.0)])).equal(expected[1:3])


def prompts_of(number, process_index, without=()):
    asked = {}

    def sample(kind, prompts):
        asked[kind] = [list(ids) for ids in prompts]
        return [[100 + ids[0]] for ids in prompts]

    def teacher_prompt(row):
        return None if row in without else [row]

    prompts = Prompts(
        rows=[{}] * number,
        step=0,
        seed=0,
        process_index=process_index,
        rollouts=None,
        some_rollouts=lambda rows: Completions([[row] for row in rows]),
        sample=None,
        sample_teacher=lambda prompts: sample("teacher", prompts),
        teacher_prompt=teacher_prompt,
        prompt_with=None,
        share_in_top_k=None,
        encode=None,
        grade=None,
        group=None,
    )
    return prompts, asked


@pytest.mark.parametrize(("process_index", "expected"), [(0, [[0], [101], [2]]), (1, [[100], [1], [102]])])
def test_every_second_completion_of_all_is_the_teachers(process_index, expected):
    prompts, _ = prompts_of(3, process_index)
    completions = TeacherSecond()(prompts)
    assert completions.ids == expected
    assert completions.replaced == {row for row, ids in enumerate(expected) if ids[0] >= 100}


def test_without_a_context_the_rollout_stays():
    prompts, asked = prompts_of(4, 0, without=(1,))
    completions = TeacherSecond()(prompts)
    assert completions.ids == [[0], [1], [2], [103]]
    assert completions.replaced == {3}
    assert asked == {"teacher": [[3]]}


def test_beta_has_to_be_positive():
    with pytest.raises(ValueError, match="`beta` must be positive, got 0"):
        Preference(beta=0.0)


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args, monkeypatch):
    sampler = Sampler(tokenizer)

    def make(data=dataset, says=sampler, **settings):
        monkeypatch.setattr(
            GRPOTrainer, "_generate_single_turn", lambda trainer, prompt_ids, *args: (says(prompt_ids), None)
        )
        args = PBSDConfig(**{**training_args, **settings})
        return SelfDistillationTrainer(
            make_model(tokenizer), args=args, train_dataset=data, processing_class=tokenizer
        )

    return make


def first_step(trainer):
    trainer.train()
    return trainer.state.log_history[0]


def test_the_same_completion_twice_teaches_nothing(make_trainer, tokenizer):
    answer = [*tokenizer("It is 7.")["input_ids"][:7], tokenizer.eos_token_id]
    step = first_step(make_trainer(says=lambda prompts: [list(answer)] * len(prompts), max_steps=1))
    assert step["preference/loss"] == pytest.approx(math.log(2.0), abs=1e-6)
    assert step["preference/margin"] == 0.0
    assert step["grad_norm"] < 1e-6


def test_the_context_changes_the_loss_and_not_what_the_student_reads(make_trainer, dataset):
    others = dataset.map(lambda row: {"solution": f"{row['solution']}, they say"})
    trainers = [make_trainer(data) for data in (dataset, others)]
    rows = [[trainer.train_dataset[index] for index in (0, 0, 1, 1)] for trainer in trainers]
    for trainer in trainers:
        trainer.model.train()
    batches = [trainer._generate_and_score_completions(some) for trainer, some in zip(trainers, rows, strict=True)]
    assert batches[0]["prompt_ids"].equal(batches[1]["prompt_ids"])
    assert not batches[0]["teacher_prompt_ids"].equal(batches[1]["teacher_prompt_ids"])
    assert batches[0]["replaced"].tolist() == [False, True, False, True]
    losses = []
    for trainer in trainers:
        trainer.statistics["train"].reduce(trainer.accelerator.gather)
        losses.append(trainer.statistics["train"].take()["preference/loss"])
    assert losses[0] != pytest.approx(losses[1], abs=1e-4)


def test_evaluation_has_no_pairs(make_trainer):
    trainer = make_trainer(per_device_eval_batch_size=3, num_generations_eval=1)
    found = trainer.evaluate(trainer.train_dataset.select(range(3)))
    assert math.isfinite(found["eval_loss"])
    assert not [name for name in found if "preference" in name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "needs `num_generations` to be a multiple of 2, got 1"),
        ({"completions": "on_policy"}, "has Preference, which compares rollouts with completions that took the place"),
        ({"privileged_context": "none"}, "reads the privileged context, and .* is none"),
        ({"privileged_context": "reflection"}, "neither reads rollouts nor samples"),
    ],
)
def test_what_has_no_pairs_is_refused(training_args, model_path, settings, message, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *_, **__: pytest.fail("loaded"))
    row = {"prompt": [{"role": "user", "content": "What is 3 + 4?"}], "solution": "It is 7.", "answer": "7"}
    with pytest.raises(ValueError, match=message):
        SelfDistillationTrainer(
            model_path, args=PBSDConfig(**{**training_args, **settings}), train_dataset=Dataset.from_list([row] * 4)
        )
