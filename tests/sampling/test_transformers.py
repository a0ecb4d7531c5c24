from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_tokenizer

from trl_opsd.sampling import Request, Sampling, end_token_ids
from trl_opsd.sampling.transformers import SeededSampling, TransformersBackend


TOKENIZER = make_tokenizer()
MODEL = make_model(TOKENIZER)
END = TOKENIZER.eos_token_id
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=24)
SAMPLED = Sampling(temperature=0.7, top_p=0.95, top_k=30, max_new_tokens=24)


def make_requests(count):
    prompts = [TOKENIZER("1" * (1 + 5 * (n % 3)) + "+2=", add_special_tokens=False)["input_ids"] for n in range(count)]
    return [Request(ids, seed) for seed, ids in enumerate(prompts)]


def generate(requests, sampling, batch_size=8, model=MODEL):
    completions = dict(TransformersBackend(model, [END], batch_size).generate(requests, sampling))
    return [completions[index] for index in range(len(requests))]


def plainly_greedy(prompt_ids, max_new_tokens):
    ids = list(prompt_ids)
    with torch.no_grad():
        while len(ids) < len(prompt_ids) + max_new_tokens and ids[-1] != END:
            ids.append(int(MODEL(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


def test_greedy_is_the_likeliest_token_at_each_step():
    requests = make_requests(6)

    completions = generate(requests, GREEDY, batch_size=4)

    assert [c.token_ids for c in completions] == [plainly_greedy(request.prompt_ids, 24) for request in requests]


@settings(max_examples=4, deadline=None)
@given(st.permutations(range(10)), st.integers(1, 10))
def test_a_completion_depends_on_its_own_request_alone(order, batch_size):
    requests = make_requests(10)
    together = generate(requests, SAMPLED, batch_size=10)

    assert generate([requests[n] for n in order], SAMPLED, batch_size) == [together[n] for n in order]


def test_other_seeds_are_other_completions():
    requests = [Request(make_requests(1)[0].prompt_ids, seed) for seed in range(8)]

    assert len({tuple(completion.token_ids) for completion in generate(requests, SAMPLED)}) > 4


def test_ends_are_counted_and_kept():
    requests = make_requests(60)
    completions = generate(requests, replace(SAMPLED, temperature=2.0, top_p=1.0, top_k=0), batch_size=60)

    ended = [completion for completion in completions if completion.terminated]
    assert 0 < len(ended) < 60
    for completion in completions:
        assert (completion.token_ids[-1] == END) == completion.terminated
        assert END not in completion.token_ids[:-1]
        assert completion.terminated or len(completion.token_ids) == 24


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=1),
        Sampling(temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=1),
    ],
)
def test_first_tokens_have_the_exact_distribution(sampling):
    """Pearson's test of 4,000 draws against the probabilities, worked out in another way."""
    prompt = make_requests(1)[0].prompt_ids
    with torch.no_grad():
        logits = MODEL(torch.tensor([prompt])).logits[0, -1].double().cpu().numpy() / sampling.temperature
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp(logits[order] - logits.max())
    if sampling.top_k:
        probabilities[sampling.top_k :] = 0
    probabilities /= probabilities.sum()
    # A token is kept as long as the likelier ones have not reached top_p
    probabilities[np.cumsum(probabilities) - probabilities >= sampling.top_p] = 0
    probabilities /= probabilities.sum()

    draws = generate([Request(prompt, seed) for seed in range(4000)], sampling, batch_size=4000)

    counts = np.bincount([completion.token_ids[0] for completion in draws], minlength=len(logits))[order]
    assert counts[probabilities == 0].sum() == 0
    expected = 4000 * probabilities
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    degrees = keep.sum() - 1
    # Four standard deviations of the chi-square distribution
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)
    assert degrees > 5


def test_random_numbers_are_never_reused():
    processor = SeededSampling([1, 2], prompt_length=3, max_new_tokens=500)
    scores = torch.zeros(2, 1000)
    drawn = torch.stack([processor(torch.zeros(2, 3 + n), scores).argmax(-1) for n in range(500)]).double().cpu()

    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 0.2
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.2
    assert drawn.mean() == pytest.approx(500, abs=40)


def test_what_is_left_open_does_not_come_from_the_models_own_configuration():
    model = make_model(TOKENIZER)
    requests = make_requests(2)
    expected = generate(requests, GREEDY)
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=0.1)
    own = model.generation_config

    assert generate(requests, GREEDY, model=model) == expected
    assert model.generation_config is own
    assert own.repetition_penalty == 5.0


def test_an_adapter_is_in_use_and_training_goes_on():
    model = get_peft_model(
        make_model(TOKENIZER), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    model.train()
    requests = make_requests(3)

    with_adapter = generate(requests, GREEDY, model=model)
    assert model.training
    with model.disable_adapter():
        without = generate(requests, GREEDY, model=model)

    assert without == generate(requests, GREEDY)
    assert with_adapter != without


def test_ends_of_the_configuration_and_of_the_tokenizer(tmp_path):
    model = make_model(TOKENIZER)
    model.generation_config.eos_token_id = [7, 8]
    model.save_pretrained(tmp_path)
    assert end_token_ids(TOKENIZER, str(tmp_path)) == sorted([7, 8, END])

    (tmp_path / "generation_config.json").unlink()
    assert end_token_ids(TOKENIZER, str(tmp_path)) == [END]


def test_a_model_that_never_ends(tmp_path):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    tokenizer.eos_token = model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="names an `eos_token`"):
        end_token_ids(tokenizer, str(tmp_path))
