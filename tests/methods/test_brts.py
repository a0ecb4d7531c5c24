import pytest
import torch
from datasets import Dataset
from methods.stand_ins import Sampler, begins_with_r
from plain_loop import Method, divergence_entries, plain, probabilities
from tiny import make_model
from trl import GRPOTrainer

from trl_opsd import BRTSConfig, SelfDistillationTrainer
from trl_opsd.methods.brts import BestOfTeacher
from trl_opsd.objective import Head, Objective, fused_divergence, tokens_in_top_k
from trl_opsd.sampling.sources import Completions, Prompts


class World:
    """Whose teacher writes given completions: those that begin with 1 are right, the last number is how near."""

    def __init__(self, candidates, guided=None, process_index=0, num_rows=2):
        self.candidates, self.guided, self.told, self.graded = candidates, guided, [], []
        self.prompts = Prompts(
            rows=[{}] * num_rows,
            step=0,
            seed=0,
            process_index=process_index,
            rollouts=None,
            some_rollouts=lambda rows: Completions([["own", row] for row in rows]),
            sample=None,
            sample_teacher=self.sample,
            teacher_prompt=lambda row: ["prompt", row],
            prompt_with=self.tell,
            share_in_top_k=lambda rows, completions, k: [ids[-1] for ids in completions],
            encode=None,
            grade=self.grade,
            group=None,
        )

    def sample(self, prompts):
        if prompts and prompts[0][0] == "told":
            return [list(self.guided) for _ in prompts]
        return [list(ids) for ids in self.candidates][: len(prompts)]

    def tell(self, row, context):
        self.told.append(context.teacher_messages({"prompt": [{"role": "user", "content": "?"}], "answer": "7"}, None))
        return ["told", row]

    def grade(self, rows, completions):
        self.graded += rows
        return [{1: True, 0: False, 9: None}[ids[0]] for ids in completions]


@pytest.mark.parametrize(
    ("candidates", "guided", "expected", "tier"),
    [
        ([[0, 9.0], [1, 0.1], [1, 0.8]], None, [1, 0.8], 1),
        ([[1, 0.5], [1, 0.5], [0, 1.0]], None, [1, 0.5], 1),
        ([[0, 0.2], [0, 0.9], [0, 0.1]], [1, 0.0], [1, 0.0], 2),
        ([[0, 0.2], [0, 0.9], [0, 0.1]], [0, 5.0], [0, 0.9], 3),
        ([[9, 0.2], [9, 0.3], [9, 0.1]], [9, 5.0], [9, 0.3], 3),
    ],
)
def test_tiers(candidates, guided, expected, tier):
    world = World(candidates, guided)
    completions = BestOfTeacher(num_candidates=3)(world.prompts)
    assert completions.ids == [["own", 0], expected]
    assert completions.replaced == {1}
    rates = completions.rates
    assert [rates[f"completions/tier_{number}_rate"] for number in (1, 2, 3)] == [
        (int(number == tier), 1) for number in (1, 2, 3)
    ]
    # The answer is told where nothing is right, and nowhere else
    assert len(world.told) == (tier > 1)
    assert all("7" in messages[-1]["content"] for messages in world.told)
    assert set(world.graded) == {1}


def test_without_the_second_tier():
    world = World([[0, 0.2], [0, 0.9]])
    source = BestOfTeacher(num_candidates=2, guided=False)
    assert source.columns == ()
    assert source(world.prompts).ids[1] == [0, 0.9]
    assert not world.told


def test_pairs_of_two_processes():
    """Of three rows each, the second process's first is the other half of the first's last pair."""
    for process_index, replaced in ((0, {1}), (1, {0, 2})):
        world = World([[1, 0.2]] * 2, process_index=process_index, num_rows=3)
        assert BestOfTeacher(num_candidates=1)(world.prompts).replaced == replaced


def test_what_is_asked_of_the_teacher():
    source = BestOfTeacher()
    assert (source.num_candidates, source.top_k, source.columns) == (4, 16, ("answer",))
    assert source.teacher_sampling == {"temperature": 0.7, "top_p": 0.95, "top_k": 0}
    assert BestOfTeacher(column="gold").columns == ("gold",)
    with pytest.raises(ValueError, match="at least 1, got 0 and 16"):
        BestOfTeacher(num_candidates=0)


def test_second_term_is_that_of_the_paper(tmp_path):
    """Over the whole vocabulary; its gradient has a teacher in it."""
    args = BRTSConfig(str(tmp_path), use_cpu=True, teacher="initial")
    [objective] = args.other_objectives().values()
    assert objective == Objective("forward_kl", support="teacher_top_k", top_k=16)
    p_s, eye = torch.tensor([[0.6, 0.3, 0.1]]), Head(torch.eye(3), None, 1.0, None)
    for p_t, expected in (((0.2, 0.3, 0.5), 0.584996), ((0.2, 0.5, 0.3), 0.365274)):
        hidden = p_s.log().requires_grad_()
        given = torch.tensor([p_t]).log(), eye, eye, torch.tensor([0]), torch.ones(1), objective
        output = fused_divergence(hidden, *given)
        output.loss.backward()
        assert output.loss.item() == pytest.approx(expected, abs=1e-6)
        torch.testing.assert_close(hidden.grad, p_s - torch.tensor([p_t]))


@pytest.mark.parametrize("memory_budget", [None, 0.1])
def test_tokens_among_the_most_probable(memory_budget):
    torch.manual_seed(0)
    hidden, head = torch.randn(40, 8), Head(torch.randn(500, 8), torch.randn(500), 1.0, None)
    token_ids = torch.randint(0, 500, (40,))
    token_ids[::2] = (hidden @ head.weight.T + head.bias).topk(9).indices[::2, 8]  # the ninth
    top = (hidden @ head.weight.T + head.bias).topk(9).indices
    for k in (8, 9):
        expected = (top[:, :k] == token_ids[:, None]).any(dim=1)
        assert tokens_in_top_k(hidden, head, token_ids, k, memory_budget).equal(expected)
        assert expected[::2].all() == (k == 9)


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args, monkeypatch):
    def make(model=None, **settings):
        sampler = Sampler(tokenizer)
        monkeypatch.setattr(
            GRPOTrainer, "_generate_single_turn", lambda trainer, prompt_ids, *args: (sampler(prompt_ids), None)
        )
        return SelfDistillationTrainer(
            make_model(tokenizer) if model is None else model,
            begins_with_r,
            args=BRTSConfig(**{**training_args, **settings}),
            train_dataset=dataset,
            processing_class=tokenizer,
        )

    return make


@pytest.fixture
def teacher_path(tokenizer, tmp_path):
    make_model(tokenizer, seed=1).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_divergence_of_each_token(make_trainer, tokenizer, teacher_path):
    """In their order, whichever of two divergences theirs is. What the teacher reads to score has no answer in it."""
    trainer = make_trainer(teacher_model_name_or_path=teacher_path)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions([trainer.train_dataset[index] for index in (0, 0, 2, 2)])
    assert batch["replaced"].tolist() == [False, True, False, True]
    assert batch["teacher_prompt_ids"].equal(batch["prompt_ids"])
    found = trainer.loss.scores(trainer.model, batch, 4, trainer.statistics["train"], [[]] * 4).divergence
    student, teacher = plain(trainer.model), plain(make_model(tokenizer, seed=1))
    divergences = [
        Method("reverse_kl", support="student_top_k", top_k=16),
        Method("forward_kl", support="teacher_top_k", top_k=16),
    ]
    total = [0.0, 0.0]
    for row in range(4):
        ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        p_s, p_t = (probabilities(model, prompt, ids, 1.0) for model in (student, teacher))
        expected = divergence_entries(p_s, p_t, torch.tensor(ids)[:, None], divergences[row % 2]).sum(dim=1)
        torch.testing.assert_close(found[row, : len(ids)].double(), expected, rtol=1e-4, atol=1e-5)
        total[row % 2] += expected.sum().item()

    trainer.statistics["train"].reduce(trainer.accelerator.gather)
    trainer.statistics["train"].take()
    trainer._compute_loss(trainer.model, batch)
    trainer.statistics["train"].reduce(trainer.accelerator.gather)
    logged = trainer.statistics["train"].take()
    numbers = [batch["completion_mask"][some].sum().item() for some in (slice(0, 4, 2), slice(1, 4, 2))]
    assert logged["distillation_loss"] == pytest.approx(total[0] / numbers[0], rel=1e-4)
    assert logged["replaced_distillation_loss"] == pytest.approx(total[1] / numbers[1], rel=1e-4)


def test_where_nothing_is_replaced_it_is_the_first_term(make_trainer, teacher_path):
    """As in evaluation."""
    trainer = make_trainer(teacher_model_name_or_path=teacher_path, per_device_eval_batch_size=2)
    found = trainer.evaluate(trainer.train_dataset.select(range(1)))
    assert found["eval_distillation_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)
    assert "eval_replaced_distillation_loss" not in found


def test_the_teacher_samples_by_its_own_settings(make_trainer, monkeypatch):
    trainer, seen = make_trainer(teacher="initial"), []
    own = trainer.generation_config

    def generate(trainer, prompt_ids, *args):
        seen.append((trainer.model_wrapped is trainer.model, trainer.generation_config))
        return [[5, 3] for _ in prompt_ids], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)
    trainer.model.train()
    trainer._generate_and_score_completions([trainer.train_dataset[0]] * 2)
    by_teacher = [config for is_policy, config in seen if not is_policy]
    assert by_teacher
    assert all((config.temperature, config.top_p, config.max_new_tokens) == (0.7, 0.95, 8) for config in by_teacher)
    assert [config for is_policy, config in seen if is_policy] == [own]
    assert trainer.generation_config is own


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"completions": "on_policy", "replaced_divergence": {"divergence": "jsd"}},
            "has no effect with `completions='on_policy'`",
        ),
        ({"replaced_divergence": {"divergnce": "jsd"}}, "is no divergence: .*divergnce"),
        ({"spans_divergence": {"error": {}}}, "A span of a completion that took a rollout's place"),
        ({"replaced_divergence": {"top_k": 0}}, "is no divergence: `top_k` must be at least 1"),
        ({"replaced_divergence": {"support": "sampled_token"}}, "cannot have the support 'sampled_token'"),
        ({"replaced_divergence": {"temperature": 2.0}}, "nor a temperature of its own"),
        ({"teacher": "external"}, "`teacher='external'` needs `teacher_model_name_or_path`"),
    ],
)
def test_contradictions_are_refused(training_args, settings, message):
    with pytest.raises(ValueError, match=message):
        BRTSConfig(**{**training_args, "teacher": "initial", "completions_kwargs": {}, **settings})


def test_it_needs_an_answer_and_a_reward(training_args, model_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *_, **__: pytest.fail("loaded"))
    args = BRTSConfig(**{**training_args, "teacher": "initial"})
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "What is 3 + 4?"}]}] * 4)
    with pytest.raises(ValueError, match=r"has to tell right from wrong\. Pass `reward_funcs`"):
        SelfDistillationTrainer(model_path, args=args, train_dataset=rows)
    with pytest.raises(ValueError, match="no column `answer`"):
        SelfDistillationTrainer(model_path, begins_with_r, args=args, train_dataset=rows)
