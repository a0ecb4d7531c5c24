import pytest
from serving.fake_server import FakeServer


@pytest.fixture
def serve(monkeypatch):
    """Start servers. TRL's client wants vLLM to be installed, although it only talks to one."""
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda *args: True)
    monkeypatch.setattr("trl_opsd.trainer.preparation.check_vllm_installed", lambda: None)
    servers = []

    def start(*args, **kwargs):
        servers.append(FakeServer(*args, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
