import weakref

import pytest
import torch

from trl_opsd.bench import loss as bench
from trl_opsd.bench.channel import CannotRun
from trl_opsd.bench.loss import LOSSES, Floor, Loss, LossCase, LossInputs, missing_feature, serve


def make_case(**kwargs):
    sizes = {"num_tokens": 7, "hidden_size": 6, "vocab_size": 11}
    return LossCase(**{**sizes, "device": torch.empty(0).device.type, **kwargs})


def reference(case):
    """Loss and gradients by the plain formula in float64."""
    inputs = LossInputs.make(case).double()
    p_s = torch.softmax(inputs.hidden @ inputs.weight.t(), dim=-1)
    p_t = torch.softmax(inputs.teacher_hidden @ inputs.weight.detach().t(), dim=-1)
    m = (p_s + p_t) / 2
    entries = {
        "forward_kl": p_t * (p_t / p_s).log(),
        "reverse_kl": p_s * (p_s / p_t).log(),
        "jsd": (p_t * (p_t / m).log() + p_s * (p_s / m).log()) / 2,
    }[case.divergence]
    if case.clip is not None:
        entries = entries.clamp(max=case.clip)
    value = (entries.sum(dim=-1) * inputs.weights).sum()
    value.backward()
    return value.detach(), inputs.gradients()


def assert_as_reference(name, case):
    if name == "liger":
        pytest.importorskip("liger_kernel")
    inputs = LossInputs.make(case)
    value = LOSSES[name](inputs, case)
    value.backward()

    expected, gradients = reference(case)
    torch.testing.assert_close(value.detach().double(), expected, atol=1e-6, rtol=1e-4)
    assert len(inputs.gradients()) == len(gradients) == 2 - case.frozen_head
    for got, wanted in zip(inputs.gradients(), gradients, strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-3)


@pytest.fixture(autouse=True)
def no_compilation(monkeypatch):
    # It would take longer than all of these tests
    monkeypatch.setattr(torch, "compile", lambda function, *args, **kwargs: function)


class Commands:
    """Stands in for the channel of a contender's process."""

    def __init__(self, *commands):
        self.commands = list(commands)
        self.replies = []

    def receive(self):
        return self.commands.pop(0) if self.commands else None

    def send(self, reply):
        self.replies.append(reply)


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("name", LOSSES)
def test_contenders_compute_the_same(name, divergence, frozen_head):
    assert_as_reference(name, make_case(divergence=divergence, frozen_head=frozen_head))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("options", [{"clip": 0.01}, {"token_weights": True}, {"metrics": True}])
def test_options_are_honoured_or_refused(name, options):
    case = make_case(**options)
    if missing_feature(name, case) is None:
        assert_as_reference(name, case)
    else:
        assert name in ("trl-chunked", "liger")
        with pytest.raises(CannotRun, match=r"^(it|of) "):
            Loss(name, case)


@pytest.mark.parametrize("name", LOSSES)
def test_peers_refuse_a_support(name):
    reason = missing_feature(name, make_case(support="teacher_top_k"))
    assert reason == (None if name.startswith("ours") else "it sums over the whole vocabulary")


@pytest.mark.parametrize(
    ("name", "dtype", "kernel"),
    [
        ("ours", "float32", "compiled"),
        ("ours", "bfloat16", "compiled"),
        ("ours-eager", "float32", "eager"),
        ("ours-compiled", "float32", "compiled"),
        ("dense", "float32", None),
    ],
)
def test_which_kernel_runs_is_a_fact(name, dtype, kernel):
    case = make_case(vocab_size=8192, num_tokens=2, hidden_size=2, dtype=dtype)
    channel = Commands("warmup", "time", "memory", "check")
    serve(name, vars(case), channel)
    facts, warmup, timed, memory, checked = channel.replies
    assert facts.get("kernel") == kernel
    assert min(warmup["seconds"], timed["seconds"]) > 0
    assert memory["peak_extra_bytes"] >= 0
    assert checked["gradient_error"] < 0.1


def test_a_kernel_that_is_not_for_this_device_is_a_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert missing_feature("ours-triton", make_case()) == "Triton is for GPUs"
    assert missing_feature("ours-triton", make_case(device="cuda")) is None


def test_on_a_gpu_nobody_holds_memory_while_it_is_not_his_turn(monkeypatch):
    alive, released = weakref.WeakSet(), []
    real = bench.make_contender

    def make(name, case):
        contender = real(name, LossCase(**{**vars(case), "device": "cpu"}))
        alive.add(contender)
        return contender

    class Turns(Commands):
        def send(self, reply):
            assert not alive
            assert len(released) == len(self.replies) + 1
            super().send(reply)

    monkeypatch.setattr(bench, "make_contender", make)
    monkeypatch.setattr(bench, "synchronize", lambda device: None)
    monkeypatch.setattr(
        bench, "release_memory", lambda device: released.append(device) if device.type == "cuda" else None
    )
    monkeypatch.setattr(bench, "_GPU_WARMUP_SECONDS", 1e-9)
    channel = Turns("warmup", "time", "time")
    serve("dense", vars(make_case(device="cuda")), channel)
    assert len(channel.replies) == 4


def test_liger_runs_what_it_runs_in_training(monkeypatch):
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    pieces = []
    kernel = chunked_loss.LigerFusedLinearJSDLoss

    def make(**kwargs):
        pieces.append(kwargs)
        return kernel(**kwargs)

    monkeypatch.setattr(chunked_loss, "LigerFusedLinearJSDLoss", make)
    assert_as_reference("liger", make_case(divergence="reverse_kl"))
    assert pieces == [{"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 1.0}]


def test_a_support_is_honoured():
    cases = [make_case(support=support, vocab_size=64) for support in ("full", "teacher_top_k")]
    full, top_k = (LOSSES["ours-eager"](LossInputs.make(case), case).item() for case in cases)
    assert top_k < full


def test_the_clip_of_these_tests_bites():
    assert reference(make_case(clip=0.01))[0] < reference(make_case())[0]


def test_all_contenders_have_the_same_inputs():
    case = make_case(token_weights=True)
    first, second = LossInputs.make(case), LossInputs.make(case)
    for name, tensor in vars(first).items():
        assert torch.equal(tensor, vars(second)[name])
    assert first.weights.sum().item() == pytest.approx(1.0)
    assert not torch.equal(first.hidden, LossInputs.make(make_case(seed=1)).hidden)


def test_check_finds_a_wrong_gradient(monkeypatch):
    case = make_case(num_tokens=40)
    assert Loss("dense", case).check()["gradient_error"] < 1e-5
    monkeypatch.setitem(LOSSES, "dense", lambda inputs, case: 1.1 * bench.dense(inputs, case))
    assert Loss("dense", case).check()["gradient_error"] == pytest.approx(0.1, rel=1e-3)


def test_bfloat16_runs():
    assert Loss("dense", make_case(dtype="bfloat16", num_tokens=16)).check()["gradient_error"] < 0.1


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("rows", [3, 1024])
def test_floor_is_the_products(monkeypatch, rows, frozen_head):
    monkeypatch.setattr(bench, "_FLOOR_ROWS", rows)
    case = make_case(frozen_head=frozen_head)
    floor, inputs = Floor(case), LossInputs.make(case)
    floor.run()
    floor.run()

    weight, hidden = inputs.weight.detach(), inputs.hidden.detach()
    logits = hidden @ weight.t()
    torch.testing.assert_close(floor._grad_hidden, logits @ weight)
    if frozen_head:
        assert floor._grad_weight is None
    else:
        torch.testing.assert_close(floor._grad_weight, logits.t() @ hidden)
