import pytest
import torch
from methods.stand_ins import Sampler, begins_with_r
from tiny import make_model
from trl import GRPOTrainer

from trl_opsd import AtManRLConfig, SelfDistillationTrainer
from trl_opsd.methods.atmanrl import Faithfulness
from trl_opsd.scoring.saliency import AttentionSaliency, eager_attention


PROMPT, REASONING, ANSWER = [40, 12, 77], [9, 81, 33, 54], [20, 66, 3]
FAST = {"num_steps": 20, "learning_rate": 0.02}


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_without_a_step_all_of_it_is_suppressed(model, batch_size):
    rows = [(PROMPT, REASONING, ANSWER), (PROMPT[:1], REASONING[:2], ANSWER[:1])]
    (mask, is_there), (other, _) = AttentionSaliency(num_steps=0, batch_size=batch_size)(model, rows)
    assert mask.shape == is_there.shape == (4 + 3 - 1, 4)
    assert other.shape == (2 + 1 - 1, 2)
    assert mask.eq(1.0).all()
    assert other.eq(1.0).all()
    # A token attends to earlier ones of the reasoning, and its own entry is left alone
    assert is_there.equal(torch.ones(6, 4).bool().tril(-1))


def test_it_is_opened_where_the_answer_needs_it(model):
    """The mask is that of an optimisation written out, and nothing but its entries is added to the scores."""
    [(mask, is_there)] = AttentionSaliency(num_steps=3)(model, [(PROMPT, REASONING, ANSWER)])
    ids = torch.tensor([PROMPT + REASONING + ANSWER])
    added = torch.full((6, 4), -0.4, requires_grad=True)
    moments = [torch.zeros(6, 4), torch.zeros(6, 4)]
    model.set_attn_implementation("eager")
    for step in range(1, 4):
        scores = torch.zeros(10, 10).masked_fill(torch.ones(10, 10).triu(1).bool(), torch.finfo(torch.float32).min)
        scores[3:9, 3:7] = scores[3:9, 3:7] + 10 * torch.where(is_there, added, 0.0)
        logits = model(input_ids=ids, attention_mask=scores[None, None]).logits[0, 6:9]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ANSWER))
        (gradient,) = torch.autograd.grad(loss, added)
        with torch.no_grad():
            added *= 1 - 1e-3 * 0.05
            moments[0] = 0.6 * moments[0] + 0.4 * gradient
            moments[1] = 0.9999 * moments[1] + 0.0001 * gradient**2
            first, second = moments[0] / (1 - 0.6**step), moments[1] / (1 - 0.9999**step)
            added -= 1e-3 * first / (second.sqrt() + 1e-8)
            added.clamp_(max=0.0)
    expected = (added / -0.4).detach()
    torch.testing.assert_close(mask[is_there], expected[is_there], rtol=1e-4, atol=1e-5)
    # An entry that is not there moves by the decay alone
    decayed = torch.full_like(mask[~is_there], (1 - 5e-5) ** 3)
    torch.testing.assert_close(mask[~is_there], decayed)


class Forgetful(torch.nn.Module):
    """A model whose answer does not depend on one of the tokens."""

    def __init__(self, model, token):
        super().__init__()
        self.model, self.token, self.config = model, token, model.config

    def set_attn_implementation(self, name):
        self.model.set_attn_implementation(name)

    def forward(self, input_ids, attention_mask, **kwargs):
        attention_mask = attention_mask.clone()
        attention_mask[..., self.token + 1 :, self.token] = torch.finfo(torch.float32).min
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def test_a_token_that_the_answer_does_not_need_stays_suppressed(model, monkeypatch):
    monkeypatch.setattr("trl_opsd.scoring.saliency.causal_lm", lambda model: model)
    [(mask, is_there)] = AttentionSaliency(num_steps=200)(Forgetful(model, 4), [(PROMPT, REASONING, ANSWER)])
    column, others = mask[:, 1][is_there[:, 1]], mask[:, 0][is_there[:, 0]]
    torch.testing.assert_close(column, torch.full_like(column, (1 - 5e-5) ** 200))  # by the decay alone
    assert others.min() < 0.9


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.model.layers[0].eval()
    model.set_attn_implementation("sdpa")
    before = state_of(model)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    AttentionSaliency(**FAST)(model, [(PROMPT, REASONING, ANSWER)])
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model.lm_head.weight.grad.eq(1.0).all()
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert not model.model.layers[0].training


def test_rows_that_go_together_do_not_meet(model):
    rows = [(PROMPT, REASONING, ANSWER), (PROMPT[:1], REASONING[:2], ANSWER[:1]), (ANSWER, PROMPT, REASONING)]
    one, all_of_them = (AttentionSaliency(**FAST, batch_size=size)(model, rows) for size in (1, 3))
    for (mask, is_there), (other, _) in zip(one, all_of_them, strict=True):
        torch.testing.assert_close(mask[is_there], other[is_there], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_steps": -1}, "`num_steps` must not be negative"),
        ({"batch_size": 0}, "`batch_size` at least 1"),
        ({"start": 0.0}, "`start` must be negative"),
        ({"learning_rate": 0.0}, "`learning_rate` positive"),
    ],
)
def test_numbers_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Faithfulness(**kwargs)


def test_weights_of_which_a_process_holds_a_part_are_refused(model):
    next(model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="weights are spread over all of them"):
        AttentionSaliency()(model, [(PROMPT, REASONING, ANSWER)])


def test_a_model_without_eager_attention_is_refused(model, monkeypatch):
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(ValueError, match="cannot be told to compute its attention eagerly"), eager_attention(model):
        pass


@pytest.fixture
def reward(model, tokenizer):
    reward = Faithfulness(**FAST)
    seconds = reward.read_policy(model, tokenizer, lambda prompts: [PROMPT for _ in prompts], 12)
    assert seconds > 0
    return reward


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("3 + 4 is \\boxed{7}", "3 + 4 is "),
        ("It is \\boxed{6}, no: \\boxed{7}.", "It is \\boxed{6}, no: "),
        ("so 7</think>\n7", "so 7</think>"),
        ("\\boxed{7}", None),
        ("so 7</think>", None),
        ("It is 7.", None),
    ],
)
def test_where_the_answer_begins(reward, tokenizer, text, reasoning):
    found = reward.split(tokenizer(text)["input_ids"])
    if reasoning is None:
        assert found is None
    else:
        assert [tokenizer.decode(ids) for ids in found] == [reasoning, text[len(reasoning) :]]


def test_reward(reward, model, tokenizer):
    """It pays for what was opened again: the opposite of what the paper prints."""
    texts, logged = ["3 + 4 is \\boxed{7}", "seven"], {}
    ids = [tokenizer(text)["input_ids"] for text in texts]
    found = reward(["?"] * 2, ids, log_metric=logged.__setitem__)
    [(mask, is_there)] = AttentionSaliency(**FAST)(model, [(PROMPT, *reward.split(ids[0]))])
    assert found == [pytest.approx(1.0 - mask[is_there].mean().item(), abs=1e-4), None]
    assert 0.0 < found[0] < 1.0
    assert logged == {"faithfulness/unsplit_rate": 0.5}


def test_nothing_comes_between_a_token_and_the_answer(reward, tokenizer):
    """Of one token each, there is an entry that is not the token's own only with an answer of two."""
    assert reward(["?"], [tokenizer("</think>b")["input_ids"]]) == [0.0]
    assert reward(["?"], [tokenizer("</think>bc")["input_ids"]]) != [0.0]


def test_it_has_to_be_given_a_policy():
    with pytest.raises(ValueError, match="no trainer of this library has given it"):
        Faithfulness()(["?"], [[1, 2]])


class Boxed(Sampler):
    def __call__(self, prompt_ids):
        box = self.tokenizer("\\boxed{7}")["input_ids"]
        return [[*ids[:-1], *box, ids[-1]] for ids in super().__call__(prompt_ids)]


def test_trains_beside_a_reward_of_the_answer(tokenizer, dataset, training_args, monkeypatch, capsys):
    sampler = Boxed(tokenizer)
    monkeypatch.setattr(
        GRPOTrainer, "_generate_single_turn", lambda trainer, prompt_ids, *args: (sampler(prompt_ids), None)
    )
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 24}
    model = make_model(tokenizer)
    trainer = SelfDistillationTrainer(
        model,
        [begins_with_r, Faithfulness(**FAST)],
        args=AtManRLConfig(**{**training_args, **settings}),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    printed = capsys.readouterr().out
    assert "The reward `faithfulness` takes" in printed
    assert "for a rollout of 24 tokens" in printed
    assert "for the 8 of a generation" in printed
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step in steps:
        assert 0.0 < step["rewards/faithfulness/mean"] < 1.0
        assert step["reward"] == pytest.approx(
            step["rewards/faithfulness/mean"] + step["rewards/begins_with_r/mean"], abs=1e-5
        )
        assert step["faithfulness/unsplit_rate"] == 0.0
        assert step["grad_norm"] > 1e-5
