import trl_opsd
from trl_opsd.scripts import env


def test_env_names_our_version(monkeypatch, capsys):
    monkeypatch.setitem(vars(trl_opsd), "__version__", "1.2.3")

    env.print_env()

    output = capsys.readouterr().out
    assert "- trl-opsd version: 1.2.3\n" in output
    assert "- Divergence kernel: compiled on cpu\n" in output or "- Divergence kernel: triton on cuda:0" in output
    for name in ("Python", "TRL", "PyTorch", "Transformers", "Accelerate", "DeepSpeed", "PEFT", "vLLM"):
        assert f"- {name} version: " in output
