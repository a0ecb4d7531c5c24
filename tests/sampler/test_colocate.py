"""vLLM beside the trainer, in its process: a real engine on the CPU. `make test-vllm` runs these."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sampler.environment import ENVIRONMENT


pytest.importorskip("vllm", reason="`make test-vllm` runs these in an environment with vLLM")

MEAN, MAX = "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"


def train(folder, weights, dtype, **settings):
    arguments = [str(folder), weights, dtype, json.dumps(settings)]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("train.py")), *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "settings"),
    [
        ("lora", {"teacher": "ema"}),
        ("full", {"teacher": "periodic", "teacher_update_steps": 2}),
        ("full", {"vllm_importance_sampling_correction": True}),
    ],
    ids=["lora-ema", "full-periodic", "full-corrected"],
)
def test_sampler_has_the_trainers_weights(weights, settings, tmp_path):
    result = train(tmp_path, weights, "float32", **settings)

    assert len(result[MAX]) == 4
    # vLLM computes in bf16 what the trainer does in fp32. With the weights of a step ago, the mean would be above 1
    assert max(result[MEAN]) < 0.05
    assert 0 < max(result[MAX]) < 0.3
    for ratio in result["ratios"] if "vllm_importance_sampling_correction" in settings else []:
        assert ratio == pytest.approx(1.0, abs=0.2)
    assert result["changed"] == []


@pytest.mark.slow
def test_base_stays_bit_identical_in_bf16_over_300_syncs(tmp_path):
    result = train(tmp_path, "lora", "bfloat16")

    assert result["frozen"] > 10
    assert result["changed"] == []
    assert max(result[MEAN]) < 0.05
