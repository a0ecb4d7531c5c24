import re
import socket
from importlib import metadata

import pytest
from tiny import make_model, make_tokenizer

from trl_opsd.serving import check_holds_policy, check_tokenizer, check_vllm_installed, connect


@pytest.fixture
def quick(monkeypatch):
    """No pauses between attempts."""
    monkeypatch.setattr("urllib3.util.retry.Retry.sleep", lambda *args, **kwargs: None)


def scored(client):
    return client.get_sequence_logprobs([[1, 2, 3]], [1], top_logprobs=2)["actual_token_ids"]


@pytest.mark.parametrize("faults", [[503, 500, 502], [504, *["break"] * 3, "stall"]], ids=str)
def test_busy_and_late_servers_are_asked_again(faults, serve, model, tokenizer, quick):
    server = serve(model, tokenizer)
    client = connect(server.url, 60.0, request_timeout=10.0)  # in which a slow machine answers
    server.faults = list(faults)
    assert scored(client) == [[[2], [3]]]
    assert server.num_requests == len(faults) + 1


@pytest.mark.parametrize("faults", [[503] * 6, ["stall", "stall"], ["break"] * 6], ids=str)
def test_attempts_end(faults, serve, model, tokenizer, quick):
    server = serve(model, tokenizer)
    client = connect(server.url, 60.0, request_timeout=3.0)
    server.faults = list(faults)
    with pytest.raises(Exception, match=r"503|timed out|without response"):
        scored(client)
    assert server.num_requests == len(faults)


def test_pauses_grow_to_about_a_minute_in_all(serve, model, tokenizer, monkeypatch):
    pauses = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", pauses.append)
    server = serve(model, tokenizer)
    client = connect(server.url, 60.0, request_timeout=60.0)
    server.faults = [503] * 5
    scored(client)
    pauses = [pause for pause in pauses if pause > 0]
    assert pauses == sorted(pauses)
    assert 30 < sum(pauses) < 90


def test_request_the_server_refuses_is_not_repeated(serve, model, tokenizer):
    server = serve(model, tokenizer)
    client = connect(server.url, 60.0, request_timeout=60.0)
    server.faults = [400]
    with pytest.raises(Exception, match="400"):
        scored(client)
    assert server.num_requests == 1


def test_no_server():
    with socket.socket() as taken:  # a port on which nobody listens, nor any other test may
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"No vLLM server answers at {url} within 0.1 seconds"):
            connect(url, 0.1, request_timeout=1.0)


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_server_that_accepts_connections_and_never_answers(path, serve, model, tokenizer):
    server = serve(model, tokenizer)
    answer = server.get
    server.get = lambda asked: answer(asked) if asked != path else (None, server.closed.wait())
    with pytest.raises(ValueError, match=rf"No vLLM server answers at {server.url} within 0.5 seconds \(.*timed out"):
        connect(server.url, 0.5, request_timeout=60.0)


def test_starting_server_is_waited_for(serve, model, tokenizer, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server = serve(model, tokenizer)
    answer, faults = server.get, [(503, {}), (None, {})]
    server.get = lambda path: faults.pop() if faults else answer(path)
    assert connect(server.url, 60.0, request_timeout=60.0).model == "served"
    assert not faults


def test_other_tokenizer(serve, model, tokenizer):
    client = connect(serve(model, tokenizer).url, 60.0, 60.0)
    check_tokenizer(client, "some_field", tokenizer)
    other = make_tokenizer(bos_token="<s>")
    with pytest.raises(ValueError, match=r"\(`some_field`\) serves 'served', whose tokenizer is not the policy's"):
        check_tokenizer(client, "some_field", other)


def test_server_that_cannot_hold_the_policy(serve, model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    served = model.from_pretrained(tmp_path)
    client = connect(serve(served, tokenizer).url, 60.0, 60.0)
    check_holds_policy(client, served.config)
    check_holds_policy(client, model.config)  # another name, the same architecture
    wider = make_model(tokenizer, hidden_size=48)
    with pytest.raises(ValueError, match=r"its `hidden_size` is 32, not 48\. Serve the policy's model"):
        check_holds_policy(client, wider.config)

    server = serve(served, tokenizer)
    server.info["model"] = str(tmp_path / "elsewhere")  # a path on another machine
    client = connect(server.url, 60.0, 60.0)
    with pytest.warns(UserWarning, match="cannot be seen from here"):
        check_holds_policy(client, wider.config)


def test_server_that_reports_other_log_probabilities(serve, model, tokenizer):
    client = connect(serve(model, tokenizer, logprobs_mode="raw_logprobs").url, 60.0, 60.0)
    with pytest.raises(ValueError, match="--logprobs-mode processed_logprobs"):
        check_holds_policy(client, model.config)


@pytest.mark.parametrize(
    ("version", "fits"), [("0.31.0+cpu", True), ("0.22.0", True), ("0.21.0", False), ("9.0", False)]
)
def test_version_of_vllm(version, fits, monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "vllm" else real(name))
    if fits:
        check_vllm_installed()
    else:
        with pytest.raises(ValueError, match=rf"need vLLM.*>=0.22.0.* and {re.escape(version)} is installed"):
            check_vllm_installed()


def test_no_vllm(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ValueError, match=r"no vLLM is installed. Run `pip install trl-opsd\[vllm\]`"):
        check_vllm_installed()
