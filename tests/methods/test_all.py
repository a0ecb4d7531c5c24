"""Every method, on a tiny model whose rollouts are made up: that it trains, by its formula, and resumes."""

import math
from collections import Counter

import plain_loop
import pytest
import torch
from methods.stand_ins import GROUPS, STAND_INS, VARIANTS, Generated, Seen, begins_with_r, feedback_on
from plain_loop import Row, loss_and_gradient, plain, probabilities
from rollouts import make_rollouts
from tiny import make_model
from trl import GRPOConfig, GRPOTrainer

from trl_opsd import SelfDistillationTrainer, cli
from trl_opsd.context import AnsweredContext, Memory, Rollouts
from trl_opsd.methods import METHODS, config_class
from trl_opsd.scoring.passes import rows_of
from trl_opsd.trainer.signals import may_shape_in_loss


SMALL = {
    "per_device_train_batch_size": 8,
    "max_completion_length": 8,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
}
WITHOUT_A_CONTEXT = {"teacher": "live", "privileged_context": "none", "context_kwargs": None}
WITHOUT_A_CONTEXT |= dict.fromkeys(["teacher_update_steps", "teacher_update_rate", "teacher_chat_template_kwargs"])
PLAIN = {"schedules": {}, "advantage": "grpo", "advantage_kwargs": None}
SGD = {"optim": "sgd", "learning_rate": 0.1}  # Adam would blow up the rounding of gradients that are almost zero
SHAPES = ["rlsd", "rlrt", "rlcsd", "dasd", "antisd", "sdpg"]  # GRPO's advantages, or adds to its loss
HAS_ITS_OWN = ["egrsd", "cl_egrsd", "atmanrl"]  # advantages, which are there without a teacher
ADDS = ["ssopd", "drift"]  # a divergence to GRPO's loss
ALL = STAND_INS | VARIANTS
REWARDED = [name for name, stand_in in STAND_INS.items() if stand_in.has_reward]


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args, sampler):
    def make(name, **settings):
        stand_in = ALL[name]
        return SelfDistillationTrainer(
            make_model(tokenizer),
            reward_funcs=begins_with_r if stand_in.has_reward else None,
            args=config_class(name.partition(":")[0])(**{**training_args, **SMALL, **stand_in.settings, **settings}),
            train_dataset=dataset,
            processing_class=tokenizer,
        )

    return make


def trained(trainer):
    torch.manual_seed(0)
    trainer.train()
    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def are_equal(one, other):
    assert one.keys() == other.keys()
    return all(value.equal(other[name]) for name, value in one.items())


def logged(trainer):
    """What each step logged, without what depends on the machine."""
    return [
        {name: value for name, value in entry.items() if "time" not in name and name != "memory/peak"}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def rows_for(trainer):
    """A generation batch. Among groups, there is one with two right rollouts, one with one and one with none."""
    if trainer.args.num_generations == 1:
        return [trainer.train_dataset[index] for index in range(8)]
    return [trainer.train_dataset[index] for index in (0, 2, 3) for _ in range(4)]


def prompt_of(trainer, row):
    templated = {"add_generation_prompt": True, "return_dict": False, **(trainer.args.chat_template_kwargs or {})}
    return trainer.processing_class.apply_chat_template(row["prompt"], **templated)


def batch_of(trainer, rows):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions(rows)


def gradient_of(trainer, batch):
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: value.grad for name, value in trainer.model.named_parameters()}


def size(gradient):
    return max(0.0 if value is None else value.abs().max().item() for value in gradient.values())


def count_teacher_passes(trainer):
    networks, passes = trainer.loss.networks, []
    targets = networks.targets
    networks.targets = lambda *args: passes.append(trainer.state.global_step) or targets(*args)
    return passes


def test_there_is_a_stand_in_for_every_method():
    assert STAND_INS.keys() == METHODS.keys()


# That it trains


@pytest.mark.parametrize("name", METHODS)
def test_trains(make_trainer, name, tmp_path):
    trainer, method = make_trainer(name), config_class(name).method
    before = weights(trainer)
    steps = logged(trained(trainer))
    assert len(steps) == 2
    for entry in steps:
        assert math.isfinite(entry["loss"])
        assert entry["grad_norm"] > 1e-5
        assert entry.keys() >= set(STAND_INS[name].metrics)
        assert ("reward" in entry) == STAND_INS[name].has_reward
    assert all(not value.equal(before[key]) for key, value in weights(trainer).items())

    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"trained with {method.name}, a method introduced in [{method.title}]" in card
    assert f"https://huggingface.co/papers/{method.paper}" in card
    assert method.citation.splitlines()[0] in card
    assert trainer.model.model_tags[:2] == ["trl", "trl-opsd"]
    assert method.name.lower() in trainer.model.model_tags


@pytest.mark.parametrize("name", METHODS)
def test_has_a_command(name, monkeypatch, capsys):
    monkeypatch.setattr("accelerate.commands.launch.launch_command", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert not stopped.value.code
    assert capsys.readouterr().out.startswith(f"usage: trl-opsd {name} ")


# That its loss is the formula's


def shifted(model, seed):
    """The model after some training, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device)


def grpo_advantages(rewards, num_generations):
    if num_generations == 1:
        return [0.0] * len(rewards)
    groups = torch.tensor(rewards).view(-1, num_generations)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten().tolist()


def read_by_the_teacher(trainer, sampler, rows, completions, texts, rewards, replaced):
    """Prompts that are made from rollouts that this file knows, and those that are there for contrast."""
    size, feedback = trainer.args.num_generations, list(map(feedback_on, texts))
    prompts, contrasts = [], []
    for index, row in enumerate(rows):
        start = index - index % size
        group = make_rollouts(
            *(values[start : start + size] for values in (rewards, texts, feedback, completions)),
            {at - start for at in replaced},
        )
        rollouts = Rollouts(group, index % size)
        asked = trainer.teacher_prompt.sample_ids(row, rollouts)
        told = (
            None if asked is None else trainer.processing_class.decode(sampler([asked])[0], skip_special_tokens=True)
        )
        if isinstance(trainer.context, AnsweredContext):
            [told] = trainer.teacher_prompt.answers([(row, rollouts)])
        prompts.append(trainer.teacher_prompt.token_ids(row, rollouts, None, told))
        contrasts_prompts = trainer.signals.needs_contrast or trainer.signals.target is not None
        is_contrasted = contrasts_prompts and prompts[-1] is not None
        contrasts.append(trainer.teacher_prompt.contrast_ids(row, rollouts) if is_contrasted else [])
        if trainer.args.privileged_context == "peers":
            shows_feedback = "feedback" in trainer.args.context_kwargs and feedback[index] is not None
            kwargs = trainer.args.context_kwargs
            shows_right = any(peer.correct for peer in rollouts.others()) or "fallback" in kwargs
            shows_wrong = "wrong" in kwargs and not all(peer.correct for peer in rollouts.others())
            assert (prompts[-1] is not None) == (shows_right or shows_wrong or shows_feedback)
    return prompts, contrasts


def plain_rows(trainer, name, rows, sampler, sampled_by, read_by):
    """What a method trains on, made here. The models are those that sampled, and that the teacher had at that time."""
    tokenizer, stand_in, made = trainer.processing_class, ALL[name], []
    prompts = [prompt_of(trainer, row) for row in rows]
    completions = sampler(prompts)
    if name == "star":
        completions = [again(trainer, sampler, *pair) for pair in zip(rows, completions, strict=True)]
    if name == "pbsd":
        by_teacher = sampler([trainer.teacher_prompt.token_ids(row, None) for row in rows[1::2]])
        completions = [ids for pair in zip(sampler(prompts[::2]), by_teacher, strict=True) for ids in pair]
    if name == "brts":
        by_teacher = best_of_two(trainer, sampler, rows[1::2], prompts[1::2], sampled_by)
        completions = [ids for pair in zip(sampler(prompts[::2]), by_teacher, strict=True) for ids in pair]
    if name == "stable_opd":
        for index, row in list(enumerate(rows))[3::4]:
            completions[index] = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
    replaced = {}
    if name == "sort":
        solutions = [[*tokenizer(row["solution"])["input_ids"], tokenizer.eos_token_id] for row in rows]
        replaced = {at: solutions[at] for at in range(3, len(rows), 4) if sampler.pattern(prompts[at]) == "WWWW"}
        completions = [replaced.get(at, ids) for at, ids in enumerate(completions)]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
    rewards = [float(text.startswith("R")) for text in texts]
    advantages = grpo_advantages(rewards, trainer.args.num_generations)
    read, contrasted = read_by_the_teacher(trainer, sampler, rows, completions, texts, rewards, replaced)
    generated = Generated(trainer.args.num_generations, rewards, [prompt is not None for prompt in read])
    batch: list[Seen] = []
    for index, (prompt, teacher_prompt, contrasts, ids, reward, advantage) in enumerate(
        zip(prompts, read, contrasted, completions, rewards, advantages, strict=True)
    ):
        token_ids, temperature = torch.tensor(ids)[:, None], stand_in.loss.temperature
        then, now = (probabilities(plain(model), prompt, ids, temperature) for model in (sampled_by, trainer.model))
        p_t = None if teacher_prompt is None else probabilities(read_by, teacher_prompt, ids, temperature)
        old, new = (p.gather(1, token_ids)[:, 0].log() for p in (then, now))
        others = [probabilities(read_by, its, ids, temperature) for its in contrasts]
        told = (others, probabilities(read_by, prompt, ids, temperature), now, batch, index, generated)
        seen = Seen(token_ids, reward == 1.0, advantage, (new - old).exp(), then, p_t, *told)
        batch.append(seen)
        made.append(Row(prompt, teacher_prompt, ids, old_log_probs=old.tolist()))
    for row, seen in zip(made, batch, strict=True):
        vars(row).update({"advantage": seen.advantage, **stand_in.formula(seen)})
    return made


def again(trainer, sampler, row, ids):
    """What STaR makes of a rollout that is wrong: a right retry, if there is one."""
    if sampler.tokenizer.decode(ids).startswith("R"):
        return ids
    [retry] = sampler([trainer.teacher_prompt.token_ids(row, None)])
    return retry if sampler.tokenizer.decode(retry).startswith("R") else ids


def best_of_two(trainer, sampler, rows, prompts, student):
    """What the teacher writes for some rows, by tier."""

    def is_right(ids):
        return sampler.tokenizer.decode(ids).startswith("R")

    written = sampler([trainer.teacher_prompt.token_ids(row, None) for row in rows for _ in range(2)])
    chosen = []
    for prompt, *pair in zip(prompts, written[::2], written[1::2], strict=True):
        near = []
        for ids in pair:
            likely = plain_loop.top_k_mask(probabilities(student, prompt, ids, 1.0), 16)
            near.append(likely.gather(1, torch.tensor(ids)[:, None]).float().mean().item())
        one, other = ((is_right(ids), share) for ids, share in zip(pair, near, strict=True))
        chosen.append(pair[1] if other > one else pair[0])
    wrong = [index for index, ids in enumerate(chosen) if not is_right(ids)]
    told = trainer.completion_source.context
    guided = sampler([trainer.teacher_prompt.before_rollouts(rows[index], told) for index in wrong])
    for index, ids in zip(wrong, guided, strict=True):
        chosen[index] = ids if is_right(ids) else chosen[index]
    return chosen


@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradient_are_those_of_the_formula(make_trainer, sampler, name):
    """The policy has moved since the beginning when it samples, and once more before the loss."""
    trainer = make_trainer(name, num_iterations=2)
    initial, rows = plain(trainer.model), rows_for(trainer)
    shifted(trainer.model, 1)
    sampled_by = plain(trainer.model)
    read_by = sampled_by if ALL[name].has_live_teacher else initial
    remembered = trainer.context.state_dict() if isinstance(trainer.context, Memory) else None
    batch = batch_of(trainer, rows)
    if remembered is not None:
        trainer.context.load_state_dict(remembered)  # what the teacher had read
    shifted(trainer.model, 2)
    with torch.no_grad():
        made = plain_rows(trainer, name, rows, sampler, sampled_by, read_by)
    teacher = trainer.model if ALL[name].has_live_teacher else initial  # a live one moves along
    expected_loss, expected = loss_and_gradient(trainer.model, teacher, made, ALL[name].loss)
    loss, gradient = gradient_of(trainer, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-4, abs=1e-6)
    assert gradient.keys() == expected.keys()
    assert size(expected) > 1e-3
    for key, value in expected.items():
        torch.testing.assert_close(gradient[key].double(), value, rtol=1e-3, atol=1e-5 * size(expected), msg=key)


# That it is its parent algorithm where its own part is off


OFF = {
    "schedule": {"schedules": {"advantage.mix": {"start": 0.0, "end": 0.0, "num_steps": 1}}},
    "argument": {"schedules": {}, "advantage_kwargs": {"mix": 0.0}},
}


@pytest.mark.parametrize(
    ("name", "off"),
    [*((name, off) for name in ("rlsd", "rlrt") for off in OFF.values()), ("sdpg", {"divergence_coef": 0.0})],
    ids=str,
)
def test_without_its_teacher_it_is_grpo(make_trainer, tokenizer, dataset, training_args, name, off):
    without = {"schedules": {}, "advantage": "grpo", "token_weights": {}, "divergence_coef": 0.0}
    trainer, parent = make_trainer(name, **SGD, **off), make_trainer(name, **{**SGD, **without})
    passes = count_teacher_passes(trainer)
    for one in (trainer, parent):
        trained(one)
    assert not passes
    assert are_equal(weights(trainer), weights(parent))
    for own, parents in zip(logged(trainer), logged(parent), strict=True):
        assert own.keys() >= parents.keys()
        assert {key: own[key] for key in parents} == parents

    # TRL's takes logits from a product over the whole vocabulary, which rounds in another way
    args = {"loss_type": "dapo", "epsilon_high": 0.28, "temperature": 1.0, **SGD}
    grpo = GRPOTrainer(
        make_model(tokenizer),
        reward_funcs=begins_with_r,
        args=GRPOConfig(**{**training_args, **SMALL, **GROUPS, **args}),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    assert_close(trained(grpo), trainer)
    assert [entry["loss"] for entry in logged(trainer)] == pytest.approx(
        [entry["loss"] for entry in logged(grpo)], rel=1e-5, abs=1e-7
    )


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("dasd", {"advantage_kwargs": {"strength": 0.0}}),
        ("antisd", {"advantage_kwargs": {"strength": 0.0}}),
        ("antisd_code", {"advantage_kwargs": {"strength": 0.0}}),
        ("rlcsd", {"advantage_kwargs": {"strength": 0.0}}),
        ("ssopd", {"divergence_coef": 0.0}),
        ("sort", {"likelihood_coef": 0.0, "completions": "on_policy", "token_weights": {}}),
    ],
    ids=str,
)
def test_without_its_part_it_is_grpo(make_trainer, name, off):
    without = {"token_weights": {}, "divergence_coef": 0.0, "likelihood_coef": 0.0, "completions": "on_policy"}
    trainer, parent = make_trainer(name, **off), make_trainer(name, **PLAIN, **without)
    passes = count_teacher_passes(trainer)
    for one in (trainer, parent):
        trained(one)
    assert not passes
    assert are_equal(weights(trainer), weights(parent))


def assert_close(one, other):
    for name, value in weights(one).items():
        torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


# RLCSD's teacher has to read something, see test_rlcsd.py
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "rlcsd"])
def test_a_teacher_that_is_the_student_leaves_grpo(make_trainer, name, recwarn):
    same, parent = {**SGD, **WITHOUT_A_CONTEXT}, {**SGD, "divergence_coef": 0.0, **PLAIN}
    assert_close(*(trained(make_trainer(name, **settings)) for settings in (same, parent)))
    # A divergence of 0 is sometimes rounded to less, for which no clip is to blame
    assert not [warning for warning in recwarn if "divergence_clip" in str(warning.message)]


@pytest.mark.parametrize("name", ADDS)
def test_a_teacher_that_is_the_student_adds_nothing_to_grpo(make_trainer, name):
    same, parent = {**SGD, **WITHOUT_A_CONTEXT}, {**SGD, "divergence_coef": 0.0}
    assert_close(*(trained(make_trainer(name, **settings)) for settings in (same, parent)))


def test_without_gold_stable_opd_is_the_policy_gradient_of_the_reverse_kl(make_trainer):
    off = {"completions": "on_policy", "completions_kwargs": None, "likelihood_coef": 0.0, "token_weights": {}}
    parent = {"teacher": "initial", "teacher_update_steps": None, "privileged_context": "solution"}
    parent |= {"divergence": "reverse_kl", "divergence_support": "sampled_token", "num_generations": 4}
    assert_close(
        trained(make_trainer("stable_opd", **SGD, **off)),
        trained(make_trainer("opsdc", **{**SGD, **parent, "max_grad_norm": 1.0})),
    )


def test_without_a_second_success_and_a_failure_mopd_is_sdpo(make_trainer):
    shows_one = {"context_kwargs": {"correct": 1}}
    off, parent = make_trainer("mopd", **shows_one), make_trainer("sdpo", **shows_one)
    assert are_equal(weights(trained(off)), weights(trained(parent)))


def test_without_an_exponent_sc_sdpo_is_sdpo(make_trainer):
    weights_of = {"importance_clip": {"most": 2.0}, "trl_opsd.methods.sc_sdpo.SweetSpot": {"exponent": 0.0}}
    off, parent = make_trainer("sc_sdpo", token_weights=weights_of), make_trainer("sdpo")
    assert are_equal(weights(trained(off)), weights(trained(parent)))


OF_LIKELIHOOD = ["star", "pbsd", "sort", "vpd", "stable_opd"]
STANDARDISES = ["antisd_code"]  # what is left of rounding too
READS_SPANS = ["trace"]  # whose teacher has to read something, see test_trace.py
CONTRASTS = ["purified_opsd"]  # what its teacher reads, see test_purified_opsd.py
ROUTES = ["drift_code"]  # by whether there is a teacher
NO_TEACHER = ["cipo"]
OTHERS = [*SHAPES, *HAS_ITS_OWN, *ADDS, *OF_LIKELIHOOD, *STANDARDISES, *READS_SPANS, *CONTRASTS, *ROUTES, *NO_TEACHER]


@pytest.mark.parametrize("name", sorted({*METHODS} - {*OTHERS}))
def test_a_teacher_that_is_the_student_teaches_nothing(make_trainer, name):
    trainer = make_trainer(name, **WITHOUT_A_CONTEXT)
    _, gradient = gradient_of(trainer, batch_of(trainer, rows_for(trainer)))
    assert size(gradient) < 1e-6


# They learn from what is wrong
LEARN_FROM_WRONG = ["mopd", "resd", "dasd", "antisd", "sort", "brts", *HAS_ITS_OWN]


@pytest.mark.parametrize("name", [name for name in REWARDED if name not in LEARN_FROM_WRONG])
def test_nothing_right_teaches_nothing(make_trainer, sampler, name):
    sampler.patterns = ("WWWW",)
    sampler.num_letters = lambda number: 1  # about which there is no feedback
    trainer = make_trainer(name)
    before = weights(trainer)
    for entry in logged(trained(trainer)):
        assert all(math.isfinite(value) for value in entry.values())
        assert (entry["loss"], entry["grad_norm"], entry["skipped_steps/total"]) == (0.0, 0.0, 0.0)
        rates = [value for key, value in entry.items() if key.endswith("_row_rate")]
        of_none = {name: [] for name in ("rlsd", "rlrt", "rlcsd", "antisd_code", "cipo")}
        assert rates == {**of_none, "sdpg": [1.0], "vpd": [0.0, 0.0]}.get(name, [0.0])
    assert are_equal(weights(trainer), before)


@pytest.mark.parametrize("name", LEARN_FROM_WRONG)
def test_nothing_right_is_no_obstacle(make_trainer, sampler, name):
    sampler.patterns = ("WWWW",)
    assert moves(make_trainer(name)) == (name != "atmanrl")  # whose rewards are all the same


def moves(trainer):
    """Whether training changes anything. What it logs is finite."""
    before = weights(trainer)
    for entry in logged(trained(trainer)):
        assert all(math.isfinite(value) for value in entry.values())
        assert entry["skipped_steps/total"] == 0.0
    return not are_equal(weights(trainer), before)


# They compare right rollouts with wrong ones, or learn from the right about the wrong
COMPARE = ["rlsd", "rlrt", "rlcsd", "sdpg", "atmanrl", "cipo", "sort", "ssopd", "sc_sdpo", "drift", "drift_code"]


@pytest.mark.parametrize("name", REWARDED)
def test_all_right_is_no_obstacle(make_trainer, sampler, name):
    sampler.patterns = ("RRRR",)
    assert moves(make_trainer(name)) == (name not in COMPARE)


# Where the teacher has read nothing: their advantages, or what takes the place of a rollout
LEARN_ALONE = [*SHAPES, "egrsd", "cl_egrsd", "antisd_code", *ADDS, "drift_code", "trace", "star", "stable_opd", "sort"]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("cipo", "atmanrl")])  # no teacher
def test_no_context_is_no_obstacle(make_trainer, name):
    skipped = {"max_teacher_prompt_length": 1, "overlong_teacher_prompt": "skip", "max_steps": 1}
    trainer = make_trainer(name, **skipped)
    assert moves(trainer) == (name in LEARN_ALONE)
    assert {entry.get("context_rate", 0.0) for entry in logged(trainer)} == {0.0}


@pytest.mark.parametrize("name", ["correct_only", "star"])
def test_if_all_is_right_nothing_is_left_out(make_trainer, sampler, name):
    sampler.patterns = ("RRRR",)
    filtered, unfiltered = make_trainer(name), make_trainer(name, token_weights={})
    assert are_equal(weights(trained(filtered)), weights(trained(unfiltered)))
    assert logged(filtered) == logged(unfiltered)


def test_sdpo_counts_no_rollout_that_nothing_can_be_said_about(make_trainer, sampler):
    """One more of them, or none, does not change the loss."""
    sampler.num_letters = lambda number: 1
    trainer = make_trainer("sdpo")
    by_pattern = {sampler.pattern(prompt_of(trainer, row)): row for row in rows_for(trainer)}
    right, wrong = by_pattern["RWRW"], by_pattern["WWWW"]
    found = []
    for rows in ([right] * 4, [right] * 4 + [wrong] * 4, [right] * 4 + [wrong] * 8):
        batch = batch_of(trainer, rows)
        assert batch["divergence_mask"].any(dim=1).tolist() == [row is right for row in rows]
        trainer.model.zero_grad()
        loss, gradient = gradient_of(trainer, batch)
        found.append((loss, {name: value.clone() for name, value in gradient.items()}))
    (expected_loss, expected), *others = found
    assert size(expected) > 1e-3
    for loss, gradient in others:
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        for name, value in gradient.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_sdft_says_nothing_about_the_beginning(make_trainer, sampler):
    sampler.num_letters = lambda number: number % 2  # and two more tokens
    trainer = make_trainer("sdft")
    before = weights(trainer)
    for entry in logged(trained(trainer)):
        assert (entry["loss"], entry["grad_norm"], entry["divergence_row_rate"]) == (0.0, 0.0, 0.0)
    assert are_equal(weights(trainer), before)


def test_star_learns_right_retries_as_answers_to_the_bare_prompt(make_trainer, sampler):
    trainer = make_trainer("star")
    rows = rows_for(trainer)
    batch = batch_of(trainer, rows)
    first = sampler([prompt_of(trainer, row) for row in rows])
    kinds = set()
    for index, row in enumerate(rows):
        assert batch["prompt_ids"][index][batch["prompt_mask"][index].bool()].tolist() == prompt_of(trainer, row)
        ids = batch["completion_ids"][index][batch["completion_mask"][index].bool()].tolist()
        assert ids == again(trainer, sampler, row, first[index])
        is_right = sampler.tokenizer.decode(ids).startswith("R")
        assert batch["likelihood_mask"][index].any() == is_right
        kinds.add((is_right, ids == first[index]))
    assert kinds == {(True, True), (True, False), (False, True)}  # right, right at the second try, wrong


def test_rlsd_takes_no_pass_of_the_teacher_in_the_end(make_trainer):
    trainer = make_trainer("rlsd")
    passes = count_teacher_passes(trainer)
    for step, is_read in ((49, True), (50, False), (51, False)):
        passes.clear()
        trainer.signals.begin_step(step)
        gradient_of(trainer, batch_of(trainer, rows_for(trainer)))
        assert bool(passes) == is_read

    trainer = make_trainer("rlsd", schedules={"advantage.mix": {"start": 0.5, "end": 0.0, "num_steps": 1}})
    passes = count_teacher_passes(trainer)
    steps = logged(trained(trainer))
    assert set(passes) == {0}
    assert ["teacher_entropy" in entry for entry in steps] == [True, False]


@pytest.mark.parametrize("name", ["rlsd", "rlrt", "dasd", "antisd", "vopd", "stable_opd"])
def test_advantages_are_shaped_where_the_student_reads_anyway(make_trainer, name, monkeypatch):
    """As they would be before it, and without one more pass of the student's, unless it is another by then."""

    def run(**settings):
        trainer = make_trainer(name, per_device_train_batch_size=4, gradient_accumulation_steps=2, **SGD, **settings)
        networks, reads = trainer.loss.networks, Counter()
        states = networks.states

        def counting(model, *args):
            reads[model is trainer.model and not model.training] += 1
            return states(model, *args)

        networks.states = counting
        return weights(trained(trainer)), logged(trainer), reads[True]

    inside, entries, num_scoring = run()
    with monkeypatch.context() as patch:
        patch.setattr("trl_opsd.trainer.trainer.may_shape_in_loss", lambda *args: False)
        before, expected, most = run()
    assert most - num_scoring >= 4  # of a live teacher, the policy's are counted too
    for key, value in before.items():
        torch.testing.assert_close(inside[key], value, rtol=1e-5, atol=1e-6)
    for own, others in zip(entries, expected, strict=True):
        assert own == pytest.approx(others, rel=1e-4, abs=1e-6)


def test_a_student_that_changes_before_the_loss_is_scored_before_it(make_trainer):
    def may(trainer, shares_pass=True):
        return may_shape_in_loss(trainer.args, shares_pass, trainer.model)

    trainer = make_trainer("rlsd", gradient_accumulation_steps=2)
    trainer.model.train()
    assert may(trainer)
    assert not may(trainer, shares_pass=False)
    trainer.model.model.layers[0].self_attn.attention_dropout = 0.1
    assert not may(trainer)
    trainer.model.model.layers[0].self_attn.attention_dropout = 0.0
    trainer.model.lora = torch.nn.Dropout(0.1)
    assert not may(trainer)
    for accumulated, per_generation, num_iterations in ((1, 1, 2), (2, 4, 1), (4, 3, 1)):
        lengths = {"gradient_accumulation_steps": accumulated, "steps_per_generation": per_generation}
        other = make_trainer("rlsd", **lengths, num_iterations=num_iterations)
        other.model.train()
        assert not may(other)
    assert not may_shape_in_loss(make_trainer("rlsd").args, True, trainer.model.eval())


def test_the_teacher_reads_nothing_that_no_term_uses(make_trainer):
    """Neither gold completions, whose likelihood counts, nor any row of a micro-batch without a pair."""
    trainer = make_trainer("stable_opd")
    batch = batch_of(trainer, rows_for(trainer))
    assert batch["has_context"].tolist() == (~batch["replaced"]).tolist() == [True, True, True, False] * 3

    trainer = make_trainer("ssopd")
    passes = count_teacher_passes(trainer)
    batch = batch_of(trainer, rows_for(trainer))
    pairs = batch["has_context"].view(3, 4).any(dim=1).tolist()
    assert sorted(pairs) == [False, True, True]
    for number, is_read in enumerate(pairs):
        passes.clear()
        gradient_of(trainer, rows_of(batch, list(range(4 * number, 4 * number + 4))))
        assert bool(passes) == is_read


def test_networks_are_checked_before_they_score(make_trainer):
    trainer = make_trainer("egrsd")
    trainer.loss.networks.has_checked_logits = False  # as it is where weights are sharded
    batch_of(trainer, rows_for(trainer))
    assert trainer.loss.networks.has_checked_logits


# That a run may be cut: in time, and into micro-batches


HYSTERESIS = {"divergence_coef": {"kind": "hysteresis", "value": 2.0, "metric": "entropy", "warmup_steps": 1}}


@pytest.mark.parametrize(
    ("name", "settings"), [*((name, {}) for name in METHODS), ("opsdc", {"schedules": HYSTERESIS})], ids=str
)
def test_resumed_equals_uninterrupted(make_trainer, tmp_path, name, settings):
    settings = {"save_strategy": "steps", "save_steps": 1, **settings}
    whole = trained(make_trainer(name, **settings))
    resumed = make_trainer(name, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert logged(resumed) == logged(whole)
    assert are_equal(weights(resumed), weights(whole))
    if "schedules" in settings:
        assert [entry["grad_norm"] > 0 for entry in logged(whole)] == [False, True]
        assert resumed.signals.state_dict() == whole.signals.state_dict()


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_change_nothing(make_trainer, name):
    whole, split, cut = (
        make_trainer(name, **SGD, **more)
        for more in (
            {},
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            {"max_tokens_per_microbatch": 300},
        )
    )
    passes, networks = [], cut.loss.networks
    cut_into_passes, networks.passes = networks.passes, lambda rows: passes.append(cut_into_passes(rows)) or passes[-1]
    for trainer in (whole, split, cut):
        trained(trainer)
    assert any(len(parts) > 1 for parts in passes)
    for other in (split, cut):
        assert_close(whole, other)
        for one, another in zip(logged(whole), logged(other), strict=True):
            assert one.keys() == another.keys()
            for key in {"loss", *STAND_INS[name].metrics} & one.keys():
                assert another[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key
