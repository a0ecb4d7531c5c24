"""The engine of the rollouts is asked on one process, and all of them hear what came of it."""

from types import SimpleNamespace

import pytest
from tiny import make_model, make_tokenizer

from trl_opsd.serving import check_engine_context, connect, prepare_sampler, sampler


@pytest.mark.parametrize(
    ("prompt", "completion", "fits"), [(60, 40, True), (61, 40, False), (99, None, True), (100, None, False)]
)
def test_rollouts_have_to_fit_in_full(prompt, completion, fits):
    if fits:
        check_engine_context(100, prompt, completion, "some_field")
        return
    message = rf"context of 100 tokens is too short for prompts of up to {prompt} and .*={completion}`\. Raise `some_f"
    with pytest.raises(ValueError, match=message):
        check_engine_context(100, prompt, completion, "some_field")


@pytest.fixture
def generation(serve, model, tokenizer):
    client = connect(serve(model, tokenizer, max_model_len=512).url, 60.0, 60.0)
    return SimpleNamespace(mode="server", vllm_client=client, accelerator=SimpleNamespace(is_main_process=True))


def test_server_is_asked_by_the_main_process(generation, model, tokenizer, monkeypatch):
    assert prepare_sampler(generation, model, tokenizer, request_timeout=7.0) == (512, "all weights")
    session = generation.vllm_client.session
    assert session.get_adapter(generation.vllm_client.base_url)._timeout == 7.0

    generation.accelerator.is_main_process, generation.vllm_client = False, None
    monkeypatch.setattr(sampler, "broadcast_object_list", lambda objects: [256, None])
    assert prepare_sampler(generation, model, tokenizer, request_timeout=7.0) == (256, "all weights")
    monkeypatch.setattr(sampler, "broadcast_object_list", lambda objects: [None, "it will not do"])
    with pytest.raises(ValueError, match="it will not do"):
        prepare_sampler(generation, model, tokenizer, request_timeout=7.0)


def test_server_of_another_model_is_refused(generation, model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    served = {"logprobs_mode": "processed_logprobs", "model": str(tmp_path), "revision": None}
    generation.vllm_client.get_server_info = lambda: {"model_config": served}
    with pytest.raises(ValueError, match=r"`vllm_server_base_url`\) serves .* tokenizer is not the policy's"):
        prepare_sampler(generation, model, make_tokenizer(bos_token="<s>"), 60.0)
    with pytest.raises(ValueError, match="its `hidden_size` is 32, not 48"):
        prepare_sampler(generation, make_model(tokenizer, hidden_size=48), tokenizer, 60.0)
