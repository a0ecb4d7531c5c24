import pytest
import torch
from placement import place
from transformers import Qwen3ForCausalLM

from trl_opsd.playground.evaluate import evaluate
from trl_opsd.playground.world import make_config, make_tokenizer


class Scripted(torch.nn.Module):
    """A model that answers every prompt with a given text and checks what it is asked."""

    def __init__(self, tokenizer, answers):
        super().__init__()
        self.device = torch.empty(0).device
        self.tokenizer = tokenizer
        self.answers = iter(answers)

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample):
        assert not do_sample
        assert not self.training
        assert attention_mask[:, -1].all()  # padded on the left
        new = self.tokenizer(
            [next(self.answers) for _ in input_ids],
            padding="max_length",
            max_length=max_new_tokens,
            padding_side="right",
        )["input_ids"]
        return torch.cat([input_ids, torch.tensor(new)], dim=1)


def questions(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def test_accuracy_length_and_truncation():
    tokenizer = make_tokenizer()
    model = Scripted(
        tokenizer, ["\\boxed{3}<|im_end|>", "\\boxed{5}<|im_end|>", "1" * 16, "1+2=3\n\\boxed{3}<|im_end|>"]
    ).train()
    prompts = questions("1+2=?", "10+20=?", "1+2=?", "2+1=?")
    result = evaluate(model, tokenizer, prompts, ["3", "3", "3", "3"], max_new_tokens=16, batch_size=3)
    assert result.correct == [True, False, False, True]
    assert result.accuracy == 0.5
    assert result.mean_tokens == (10 + 10 + 16 + 16) / 4
    assert result.truncated == 0.25
    assert result.responses == ["\\boxed{3}", "\\boxed{5}", "1" * 16, "1+2=3\n\\boxed{3}"]
    assert model.training


def test_the_batch_size_changes_nothing():
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = make_config(tokenizer)
    config.initializer_range = 0.2  # distinct answers to distinct prompts
    model = place(Qwen3ForCausalLM(config))
    prompts = questions("1+2=?", "1000+2000=?", "what is 7 plus 8, please?")
    together, alone = (
        evaluate(model, tokenizer, prompts, ["3", "3000", "15"], max_new_tokens=6, batch_size=size) for size in (3, 1)
    )
    assert together == alone
    assert len(set(together.responses)) == 3


def test_every_prompt_needs_an_answer():
    with pytest.raises(ValueError, match="shorter"):
        evaluate(
            Scripted(make_tokenizer(), ["1", "2"]), make_tokenizer(), questions("1", "2"), ["1"], max_new_tokens=4
        )


def test_samples_are_a_function_of_their_seed_and_leave_the_random_state_alone():
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = place(Qwen3ForCausalLM(make_config(tokenizer)))
    prompts, answers = questions("1+2=?", "1+2=?", "1+2=?"), ["3"] * 3

    def responses(seed):
        return evaluate(model, tokenizer, prompts, answers, 6, sampling_seed=seed).responses

    state = torch.get_rng_state()
    first = responses(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert responses(0) == first
    assert responses(1) != first
    assert len(set(first)) > 1
