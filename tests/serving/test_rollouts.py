"""A failure of the server reaches every process. Here, the main process and one that only takes part."""

from types import SimpleNamespace

import pytest

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer
from trl_opsd.serving import ServerError, report_failures, rollouts, sampler


class Client:
    base_url = "http://server"

    def __init__(self):
        self.calls, self.fails, self.instance, self.num_replicas = [], set(), "first", 1

    def get_server_info(self):
        return {"instance_id": self.instance, "parallel_config": {"data_parallel_size": self.num_replicas}}

    def _call(self, name):
        self.calls.append(name)
        if name in self.fails:
            raise ConnectionError(f"{name} broke")

    def update_named_params(self, metadata, named_params):
        next(named_params)
        self._call("update_named_params")
        list(named_params)

    def reset_prefix_cache(self):
        self._call("reset_prefix_cache")

    def generate(self, prompts):
        self._call("generate")
        return {"prompt_ids": prompts, "completion_ids": [[7]] * len(prompts), "logprobs": None}


class Generation:
    """Does with its client what TRL's does."""

    def __init__(self):
        self.accelerator = SimpleNamespace(is_main_process=True)
        self.vllm_client = Client()
        self.gathered = []

    def sync_weights(self):
        def gather():
            for name in "abc":
                self.gathered.append(name)
                yield name, None

        self.vllm_client.update_named_params([], gather())
        self.vllm_client.reset_prefix_cache()

    def generate(self, prompts):
        output = self.vllm_client.generate(prompts=prompts)
        return output["prompt_ids"], output["completion_ids"], output["logprobs"], output.get("logprob_token_ids")


@pytest.fixture
def generation():
    generation = Generation()
    generation.client = generation.vllm_client
    report_failures(generation)
    return generation


def test_nothing_changes_while_nothing_fails(generation):
    generation.sync_weights()
    assert generation.generate([[1], [2]]) == ([[1], [2]], [[7], [7]], None, None)
    assert generation.client.calls == ["update_named_params", "reset_prefix_cache", "generate"]


@pytest.mark.parametrize("call", ["update_named_params", "reset_prefix_cache", "generate"])
def test_failure_is_raised_when_all_processes_meet(call, generation):
    generation.client.fails.add(call)
    generation.sync_weights()
    assert generation.gathered == ["a", "b", "c"]  # or the other processes would wait
    with pytest.raises(ServerError, match=f"http://server failed: {call} broke"):
        generation.generate([[1]])
    assert generation.client.calls[-1] == call  # nothing is asked of it any more


def test_restarted_server_is_noticed(generation):
    generation.sync_weights()
    generation.generate([[1]])
    generation.client.instance = "second"
    with pytest.raises(ServerError, match="was restarted, and has its first weights again"):
        generation.generate([[1]])


def test_restarted_server_is_not_sent_weights(generation):
    generation.client.instance = "second"
    generation.sync_weights()
    assert generation.gathered == ["a", "b", "c"]
    assert generation.client.calls == []
    with pytest.raises(ServerError, match="was restarted"):
        generation.generate([[1]])


def test_replicas_of_a_server_have_names_of_their_own():
    generation = Generation()
    client = generation.vllm_client
    client.num_replicas = 2
    report_failures(generation)
    client.instance = "second"
    assert generation.generate([[1]])[1] == [[7]]


def test_other_processes_raise_it_too(monkeypatch):
    other = Generation()
    other.accelerator.is_main_process = False
    report_failures(other)
    monkeypatch.setattr(rollouts, "broadcast_object_list", lambda objects: ["it broke"])
    with pytest.raises(ServerError, match="it broke"):
        other.generate([[1]])


@pytest.mark.parametrize("is_main_process", [True, False])
def test_server_that_does_not_answer_at_the_start_is_refused_on_every_process(
    is_main_process, serve, model, tokenizer, dataset, training_args, monkeypatch
):
    server = serve(model, tokenizer)
    server.get = lambda path: (None, server.closed.wait())
    settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
    args = SelfDistillationConfig(**training_args, **settings, vllm_server_timeout=0.5)
    if not is_main_process:
        monkeypatch.setattr(SelfDistillationConfig, "process_index", 1)
        monkeypatch.setattr(sampler, "wait_for_server", None)  # the main process asks
        told = [None, f"No vLLM server answers at {server.url}"]
        monkeypatch.setattr(sampler, "broadcast_object_list", lambda objects: told)
    with pytest.raises(ValueError, match=f"No vLLM server answers at {server.url}"):
        SelfDistillationTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
