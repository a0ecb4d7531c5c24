"""Completions each token of which is drawn after one of two prompts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import make_model, make_tokenizer

from trl_opsd.sampling import MixedRequest, Request, Sampling, generate_mixed, mixed
from trl_opsd.sampling.transformers import TransformersBackend


TOKENIZER = make_tokenizer()
MODEL = make_model(TOKENIZER)
END = TOKENIZER.eos_token_id
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=16)
SAMPLED = Sampling(temperature=1.5, top_p=0.95, top_k=30, max_new_tokens=16)


class OneByOne:
    """An engine that only knows plain requests."""

    def __init__(self, batch_size=8):
        self.own, self.asked = TransformersBackend(MODEL, [END], batch_size), []
        self.max_length = None

    def generate(self, requests, sampling):
        self.asked.append((len(requests), sampling.max_new_tokens))
        return reversed(list(self.own.generate(requests, sampling)))


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def make_requests(count, share=0.5, swapped=False):
    pairs = [(ids_of("1" * (1 + n % 3) + "+2="), ids_of("It is 3. " * (1 + n % 2) + "1+2=")) for n in range(count)]
    return [
        MixedRequest(*((other, seed, own) if swapped else (own, seed, other)), share)
        for seed, (own, other) in enumerate(pairs)
    ]


def complete(requests, sampling, backend=None):
    backend = backend or TransformersBackend(MODEL, [END], batch_size=8)
    completions = dict(generate_mixed(backend, requests, sampling))
    return [completions[index] for index in range(len(requests))]


def plain(requests, sampling, other=False):
    asked = [Request(one.other_prompt_ids if other else one.prompt_ids, one.seed) for one in requests]
    completions = dict(TransformersBackend(MODEL, [END], batch_size=3).generate(asked, sampling))
    return [completions[index].token_ids for index in range(len(asked))]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_side_alone_gives_what_its_prompt_gives(share, sampling):
    requests = make_requests(6, share)
    completions = complete(requests, sampling)
    assert [one.token_ids for one in completions] == plain(requests, sampling, other=share == 0.0)
    assert all(one.sides == [share == 1.0] * len(one.token_ids) for one in completions)


@pytest.mark.parametrize("engine", [None, OneByOne], ids=["together", "one token at a time"])
def test_each_token_is_the_likeliest_of_its_side_after_the_mixed_prefix(engine):
    requests = make_requests(70 if engine else 6)
    completions = complete(requests, GREEDY, engine and engine())
    for request, completion in list(zip(requests, completions, strict=True))[-6:]:
        ids = []
        for side in completion.sides:
            prompt = request.prompt_ids if side else request.other_prompt_ids
            with torch.no_grad():
                ids.append(int(MODEL(torch.tensor([prompt + ids])).logits[0, -1].argmax()))
        assert ids == completion.token_ids
        assert completion.terminated == (ids[-1] == END)
        assert completion.sides == mixed.sides_of(request, 16)[: len(ids)]
    assert {True, False} == {side for completion in completions for side in completion.sides}


def test_an_engine_has_a_bounded_number_under_way_and_gets_new_ones_as_they_end():
    engine = OneByOne(batch_size=64)
    completions = complete(make_requests(70), replace(SAMPLED, max_new_tokens=3), engine)
    assert len(completions) == 70
    assert [number for number, _ in engine.asked][:3] == [64, 64, 64] or engine.asked[0][0] == 64
    assert {longest for _, longest in engine.asked} == {1}
    assert sum(number for number, _ in engine.asked) == sum(len(one.token_ids) for one in completions)


def test_the_share_of_the_first_prompt_is_the_one_asked_for():
    sides = [side for request in make_requests(400, 0.3) for side in mixed.sides_of(request, 50)]
    assert np.mean(sides) == pytest.approx(0.3, abs=3 * (0.3 * 0.7 / len(sides)) ** 0.5)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_sides_are_alike(sampling, monkeypatch):
    """Both prompts swapped, with 1 − λ and the draws turned over, give the same text."""
    completions = complete(make_requests(6, 0.3), sampling)
    own = mixed.draws
    monkeypatch.setattr(mixed, "draws", lambda seed, number: 1.0 - own(seed, number))
    swapped = complete(make_requests(6, 0.7, swapped=True), sampling)
    assert [one.token_ids for one in swapped] == [one.token_ids for one in completions]
    assert all(one.sides == [not side for side in two.sides] for one, two in zip(swapped, completions, strict=True))


def test_a_completion_depends_on_its_own_request_alone():
    requests = make_requests(7)
    together = complete(requests, SAMPLED)
    alone = complete(requests[::-1], SAMPLED, TransformersBackend(MODEL, [END], batch_size=2))
    assert alone[::-1] == together


def test_tokens_one_at_a_time_are_drawn_with_numbers_of_their_own():
    """At a high temperature, equal draws at all positions would repeat the token."""
    [completion] = complete(make_requests(1), replace(SAMPLED, temperature=50.0, top_p=1.0, top_k=0), OneByOne())
    assert len(set(completion.token_ids)) > 4 or completion.terminated
