import math

import pytest
import torch
from methods.stand_ins import begins_with_r, decisive
from three_tokens import make_batch
from tiny import make_model

from trl_opsd import SelfDistillationTrainer, TRACEConfig
from trl_opsd.methods import config_class
from trl_opsd.methods.trace import InSpans, OffSpans
from trl_opsd.serving import ServerError


def make_spans(key, error):
    return {"key": torch.tensor(key).bool(), "error": torch.tensor(error).bool()}


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()
SPANS = make_spans([[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])


def test_advantages_outside_of_spans_are_grpo_s():
    batch = make_batch(MASK, advantages=torch.tensor([2.0, -1.0, -1.0]), spans=SPANS)
    assert OffSpans(share=0.25)(batch, None).tolist() == [[2.0, 0.5, 0.5, 2.0], [-0.25, -1, -1, -1], [-1.0] * 4]
    assert OffSpans()(batch, None)[0].tolist() == [2.0, 0.0, 0.0, 2.0]
    assert not OffSpans().needs_scores


def test_off_it_is_grpo_and_asks_for_nothing():
    off, batch = OffSpans(share=1.0), make_batch(MASK, advantages=0.1, spans=SPANS)
    assert not off.needs_spans
    assert off(batch, None) is batch.advantages
    assert (
        OffSpans()(make_batch(MASK, advantages=0.1), None).tolist() == [[pytest.approx(0.1)]] * 3
    )  # nobody was asked


def test_divergence_is_a_mean_over_all_tokens_of_all_rollouts():
    """1/3 · 1/4 for each of the two tokens, where the loss itself takes the mean over two tokens of one rollout."""
    factors = InSpans()(make_batch(MASK, spans=SPANS), None)
    assert factors.tolist() == [[0.0, *[pytest.approx(2 * 1 / 3 * 1 / 4)] * 2, 0.0], [0.0] * 4, [0.0] * 4]
    factors = InSpans(kinds=["error"])(make_batch(MASK, spans=SPANS), None)
    assert factors[1].tolist() == [pytest.approx(1 / 3 * 1 / 3), 0.0, 0.0, 0.0]
    assert not InSpans()(make_batch(MASK, spans=SPANS, has_context=False), None).any()
    with pytest.raises(ValueError, match=r"kinds \['key', 'error'\], and none of \['keys'\]"):
        InSpans(kinds=["keys"])(make_batch(MASK, spans=SPANS), None)


def test_rollouts_are_those_of_all_processes():
    """On another process there are three more, and none of them has a span."""
    batch = make_batch(MASK, spans=SPANS, gather=lambda own: torch.cat([own, torch.zeros_like(own)]))
    assert InSpans()(batch, None)[0].tolist() == [0.0, *[pytest.approx(2 * 1 / 6 * 1 / 4)] * 2, 0.0]


# In a trainer


def nothing(row, rollout):
    return "I would rather not say."


def everything(row, rollout):
    return [{"start": 0, "end": len(rollout.text), "type": "insight" if rollout.correct else "sign_error"}]


class FailsLater:
    def __init__(self):
        self.calls = 0

    def __call__(self, asked):
        self.calls += 1
        if self.calls > 1:
            raise ServerError("The annotator does not answer.")
        return [decisive(row, rollout) for row, rollout, _ in asked]


@pytest.fixture
def make_trainer(tokenizer, dataset, training_args, sampler):
    def make(annotator="decisive", context=None, **settings):
        annotator = annotator if "." in annotator or annotator == "policy" else f"methods.stand_ins.{annotator}"
        settings = {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 8,
            "context_kwargs": {"annotator": annotator, **(context or {})},
            "optim": "sgd",
            "learning_rate": 0.1,
            "warmup_steps": 0,
            **settings,
        }
        return SelfDistillationTrainer(
            make_model(tokenizer),
            reward_funcs=begins_with_r,
            args=TRACEConfig(**{**training_args, **settings}),
            train_dataset=dataset,
            processing_class=tokenizer,
        )

    return make


def trained(trainer):
    torch.manual_seed(0)
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def batch_of(trainer, rows=(0, 2, 3)):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions([trainer.train_dataset[row] for row in rows for _ in range(4)])


@pytest.mark.parametrize(("step", "coefficient", "share"), [(0, 0.5, 0), (9, 0.5, 0), (10, 0.5, 0), (25, 0.25, 0.5)])
def test_schedule(make_trainer, step, coefficient, share):
    trainer = make_trainer()
    trainer.signals.begin_step(step)
    assert trainer.signals.coefficients["divergence_coef"] == pytest.approx(coefficient)
    assert trainer.signals.advantage.share == pytest.approx(share)


def test_in_the_end_it_is_grpo(make_trainer, monkeypatch):
    """Without an annotator, and without a pass of the teacher."""
    over = {"divergence_coef": {"start": 0.5, "end": 0.0, "num_steps": 1}}
    over["advantage.share"] = {"start": 0.0, "end": 1.0, "num_steps": 1}
    trainer, asked, read = make_trainer(schedules=over), [], []
    answers, targets = trainer.context.answers, trainer.loss.networks.targets
    monkeypatch.setattr(
        trainer.context, "answers", lambda rows: asked.append(trainer.state.global_step) or answers(rows)
    )
    trainer.loss.networks.targets = lambda *args: read.append(trainer.state.global_step) or targets(*args)
    trained(trainer)
    assert set(asked) == set(read) == {0}
    assert ["spans/token_rate" in entry for entry in logged(trainer)] == [True, False]

    trainer = make_trainer()
    for step in (40, 41):
        trainer.signals.begin_step(step)
        assert trainer.signals.coefficients["divergence_coef"] == 0.0
        assert trainer.signals.advantage.share == 1.0
        assert not trainer.signals.needs_context

    now = {
        name: {"start": end, "end": end, "num_steps": 1}
        for name, end in (("divergence_coef", 0.0), ("advantage.share", 1.0))
    }
    plain = {"advantage": "grpo", "token_weights": {}, "schedules": {}, "divergence_coef": 0.0}
    weights, grpo = trained(make_trainer(schedules=now)), trained(make_trainer(**plain))
    assert all(value.equal(grpo[name]) for name, value in weights.items())


@pytest.mark.parametrize("annotator", [f"{__name__}.nothing", "policy"])
def test_without_spans_it_is_grpo(make_trainer, annotator):
    """The policy's made-up answers are no JSON."""
    trainer = make_trainer(annotator)
    weights = trained(trainer)
    grpo = trained(make_trainer(advantage="grpo", token_weights={}, schedules={}, divergence_coef=0.0))
    for name, value in grpo.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-7, msg=name)
    for entry in logged(trainer):
        assert entry["spans/unreadable_rate"] == 1.0
        assert entry["spans/token_rate"] == entry["divergence_row_rate"] == entry["context_rate"] == 0.0
        assert "spans/dropped_rate" not in entry
        assert math.isfinite(entry["loss"])


def test_all_right_still_learns_at_key_steps(make_trainer, sampler):
    sampler.patterns = ("RRRR",)
    trainer = make_trainer()
    batch = batch_of(trainer)
    assert not batch["advantages"].any()
    trainer._compute_loss(trainer.model, batch).backward()
    assert max(value.grad.abs().max() for value in trainer.model.parameters()) > 1e-5


def test_no_more_than_a_quarter_is_marked(make_trainer):
    batch = batch_of(make_trainer(f"{__name__}.everything"))
    marked = (batch["spans/key"] | batch["spans/error"]).sum(dim=1)
    assert marked.tolist() == (batch["completion_mask"].sum(dim=1) // 4).tolist()
    assert (batch["spans/key"].any(dim=1) & (batch["correct"] == 0)).sum() == 0
    assert (batch["spans/error"].any(dim=1) & (batch["correct"] == 1)).sum() == 0
    assert batch["divergence_mask"].equal(batch["spans/key"])


def test_a_teacher_that_reads_the_same_teaches_nothing(make_trainer):
    trainer = make_trainer(
        context={"template": "{prompt}"}, teacher="live", teacher_update_steps=None, policy_loss_coef=0.0
    )
    batch = batch_of(trainer)
    assert batch["divergence_mask"].any()
    trainer._compute_loss(trainer.model, batch).backward()
    assert max(value.grad.abs().max() for value in trainer.model.parameters()) < 1e-6


def test_the_teacher_reads_nothing_of_the_rollout(make_trainer):
    trainer = make_trainer()
    batch = batch_of(trainer)
    decode = trainer.processing_class.batch_decode
    for read, written in zip(
        decode(batch["teacher_prompt_ids"]), decode(batch["completion_ids"], skip_special_tokens=True), strict=True
    ):
        if len(written) > 3:  # the others are words of every prompt
            assert written not in read


def test_what_is_of_no_use_is_counted(make_trainer):
    """Of a quarter right and three quarters wrong rollouts, whose second span is outside of the text."""
    trainer = make_trainer(context={"most_of_it": 1.0})
    batch_of(trainer)
    metrics = trainer.statistics["train"]
    metrics.reduce(lambda own: own)
    logs = metrics.take()
    assert logs["spans/unreadable_rate"] == 0.0
    assert 9 / 21 <= logs["spans/dropped_rate"] < 0.6
    assert 0.0 < logs["spans/token_rate"] < 1.0


def test_a_server_that_fails_ends_the_run_after_a_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(f"{__name__}.FailsLater", save_strategy="steps", save_steps=100, max_steps=3)
    with pytest.raises(ServerError, match=r"The annotator does not answer\..*checkpoint-1"):
        trainer.train()
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


def test_a_context_without_spans(make_trainer):
    with pytest.raises(ValueError, match=r"`privileged_context='solution'` marks none\. Set it to 'diagnosis'"):
        make_trainer(privileged_context="solution", context_kwargs=None)


BOTH = {
    "spans_divergence": {"error": {"divergence": "reverse_kl"}},
    "token_weights": {"trl_opsd.methods.trace.InSpans": {"kinds": ["key", "error"]}},
}


def test_each_kind_of_spans_has_a_divergence_of_its_own_in_the_log(make_trainer):
    trainers = [make_trainer(**settings) for settings in (BOTH, {})]
    for trainer in trainers:
        trained(trainer)
    both, one = map(logged, trainers)
    assert both[0]["distillation_loss"] == pytest.approx(one[0]["distillation_loss"])
    assert both[0]["spans/error_distillation_loss"] > 0
    assert "spans/error_distillation_loss" not in one[0]


def test_a_divergence_of_spans_that_nobody_marks(make_trainer):
    of_none = {**BOTH, "spans_divergence": {"erorr": {"divergence": "reverse_kl"}}}
    with pytest.raises(ValueError, match=r"kinds \['erorr'\], and the method reads spans of \['error', 'key'\]"):
        make_trainer(**of_none)
    with pytest.raises(ValueError, match=r"`spans_divergence=.* is no divergence: .*divergnce"):
        make_trainer(spans_divergence={"error": {"divergnce": "jsd"}})
    with pytest.raises(ValueError, match="the method reads spans of no kind"):
        make_trainer(spans_divergence=BOTH["spans_divergence"], token_weights={}, advantage="grpo", schedules={})


def test_another_mean_is_refused(tmp_path):
    with pytest.raises(ValueError, match="are made for `loss_type='grpo'`"):
        config_class("trace")(str(tmp_path), use_cpu=True, bf16=False, loss_type="dapo")
