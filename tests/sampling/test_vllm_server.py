"""The client against a real HTTP server that speaks vLLM's protocol. Against vLLM itself: tests/sampler."""

import json
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Barrier, Lock, Thread

import pytest

from trl_opsd.sampling import Completion, Request, Sampling
from trl_opsd.sampling.vllm_server import VLLMServerBackend


SAMPLING = Sampling(temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=9)
MODELS = [
    {"id": "math", "root": "org/math-1b", "max_model_len": 512},
    {"id": "math-lora", "root": "runs/adapter", "parent": "math", "max_model_len": None},
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(200, {"data": self.server.models})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.calls[body["seed"]] += 1
            call = self.server.calls[body["seed"]]
        self.server.reply(self, body, call)

    def answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def complete(self, body):
        ids = [body["seed"], *body["prompt"]]
        choice = {"token_ids": ids, "finish_reason": "stop"}
        if body["seed"] % 2 == 0:
            choice = {"token_ids": (ids * 9)[: body["max_tokens"]], "finish_reason": "length"}
        self.answer(200, {"choices": [choice]})

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.models, server.bodies, server.calls, server.lock = MODELS, [], Counter(), Lock()
    server.reply = lambda handler, body, call: handler.complete(body)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def backend(server, model="math", num_concurrent=4, **kwargs):
    url = f"http://127.0.0.1:{server.server_port}"
    return VLLMServerBackend(url, model, [5, 6], num_concurrent, backoff=0.001, **kwargs)


def test_requests_hold_everything_that_matters(server):
    requests = [Request([10, 11], seed) for seed in range(9)]

    completions = dict(backend(server).generate(requests, SAMPLING))

    ids = {seed: [seed, 10, 11] for seed in range(9)}
    assert completions == {
        seed: Completion(ids[seed], terminated=True) if seed % 2 else Completion(ids[seed] * 3, terminated=False)
        for seed in range(9)
    }
    body = min(server.bodies, key=lambda body: body["seed"])
    assert body == {
        "model": "math",
        "prompt": [10, 11],
        "n": 1,
        "seed": 0,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "max_tokens": 9,
        "stop_token_ids": [5, 6],
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "return_token_ids": True,
    }


def test_requests_are_under_way_together(server):
    everyone = Barrier(4, timeout=300)

    def wait_for_the_others(handler, body, call):
        everyone.wait()
        handler.complete(body)

    server.reply = wait_for_the_others

    assert len(list(backend(server).generate([Request([1], seed) for seed in range(8)], SAMPLING))) == 8


@pytest.mark.parametrize("status", [429, 500, 503, None])
def test_passing_faults_are_repeated(status, server):
    def fail_twice(handler, body, call):
        if call > 2:
            handler.complete(body)
        elif status is None:
            handler.close_connection = True  # no answer at all
        else:
            handler.answer(status, {"error": "not now"})

    server.reply = fail_twice
    requests = [Request([1], seed) for seed in range(3)]

    assert len(list(backend(server).generate(requests, SAMPLING))) == 3
    assert set(server.calls.values()) == {3}


def test_lasting_faults_are_reported_and_completions_kept(server):
    def fail_one(handler, body, call):
        if body["seed"] == 2:
            handler.answer(500, {"error": "out of memory"})
        else:
            handler.complete(body)

    server.reply = fail_one
    finished = []

    with pytest.raises(ValueError, match=r"refused `completions` \(500\).*out of memory"):
        finished.extend(
            index
            for index, _ in backend(server, num_concurrent=1, num_retries=2).generate(
                [Request([1], seed) for seed in range(4)], SAMPLING
            )
        )
    assert server.calls == {0: 1, 1: 1, 2: 3}


def test_a_completion_that_was_given_up_is_none(server):
    def abort(handler, body, call):
        handler.answer(200, {"choices": [{"token_ids": [5], "finish_reason": "abort"}]})

    server.reply = abort
    with pytest.raises(ValueError, match=r"gave up a completion \(abort\)"):
        list(backend(server).generate([Request([1], 0)], SAMPLING))


def test_a_server_that_cuts_completions_short(server):
    def cut(handler, body, call):
        handler.answer(200, {"choices": [{"token_ids": [1] * 8, "finish_reason": "length"}]})

    server.reply = cut
    with pytest.raises(ValueError, match=r"cut a completion off at 8 tokens, and `max_new_tokens` is 9\..*generation"):
        list(backend(server).generate([Request([1], 0)], SAMPLING))


def test_refusals_are_not_repeated(server):
    server.reply = lambda handler, body, call: handler.answer(400, {"error": "prompt too long"})

    with pytest.raises(ValueError, match=r"refused `completions` \(400\).*prompt too long"):
        list(backend(server).generate([Request([1], 0)], SAMPLING))
    assert server.calls[0] == 1


@pytest.mark.parametrize(("model", "name"), [("math", "math"), ("org/math-1b", "math"), ("math-lora", "math-lora")])
def test_models_by_name_and_by_path(model, name, server):
    client = backend(server, model)
    list(client.generate([Request([1], 0)], SAMPLING))

    assert server.bodies[0]["model"] == name
    assert client.max_length == 512


def test_another_model(server):
    with pytest.raises(ValueError, match="answers for math, math-lora, not for physics"):
        backend(server, "physics")


def test_another_folder(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "math").mkdir()
    with pytest.raises(ValueError, match="loaded what it calls math from org/math-1b, not from the folder math"):
        backend(server)
    server.models = [{"id": "math", "root": str(tmp_path / "math")}]
    assert backend(server).root == str(tmp_path / "math")


def test_no_server():
    with pytest.raises(ValueError, match=r"Cannot reach the server at http://127.0.0.1:9/v1.*`base_url`"):
        VLLMServerBackend("http://127.0.0.1:9/v1/", "math", [5], 1, num_retries=1, backoff=0.001)


def test_a_server_without_token_ids(server):
    server.reply = lambda handler, body, call: handler.answer(200, {"choices": [{"text": "2"}]})

    with pytest.raises(ValueError, match="returns no token ids"):
        list(backend(server).generate([Request([1], 0)], SAMPLING))
