"""Token pages: what they show is what `score` says, whatever the text is."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from trl_opsd import SelfDistillationConfig, SelfDistillationTrainer, score
from trl_opsd.report import InspectCallback
from trl_opsd.report.token_page import inspected_rollouts, token_page


COMPLETIONS = [[5, 6, 7, 40], [8, 9]]


@pytest.fixture
def make_trainer(tokenizer, model, dataset, training_args):
    def make(**settings):
        args = SelfDistillationConfig(**{**training_args, "divergence": "reverse_kl", **settings})
        return SelfDistillationTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)

    return make


def test_listed_tokens_and_streams_are_those_of_the_logits(make_trainer, dataset):
    trainer = make_trainer()
    scored = score(trainer, list(dataset.select(range(2))), COMPLETIONS, num_listed=3, with_streams=True)
    for index, ids in enumerate(COMPLETIONS):
        for side, prompts in enumerate((scored.student_prompts, scored.teacher_prompts)):
            given = torch.tensor([prompts[index] + ids], device=trainer.model.device)
            with torch.no_grad():
                logits = trainer.model.eval()(given).logits[0, len(prompts[index]) - 1 : -1]
            top = logits.log_softmax(-1).topk(3)
            assert scored.scores.listed_tokens[index, : len(ids), side].equal(top.indices)
            found = scored.scores.listed_log_probs[index, : len(ids), side]
            torch.testing.assert_close(found, top.values, rtol=1e-4, atol=1e-5)
    assert scored.streams["divergence_weights"].tolist() == [[1.0] * 4, [1.0, 1.0, 0.0, 0.0]]


def test_colours_and_tooltips_are_those_of_score(make_trainer, dataset, browser, tmp_path, tokenizer):
    trainer = make_trainer()
    scored = score(trainer, list(dataset.select(range(2))), COMPLETIONS, num_listed=3, with_streams=True)
    rollouts = inspected_rollouts(scored, COMPLETIONS, trainer.signals.coefficients, True, [{"reward": 1.0}, {}])
    file = tmp_path / "inspect.html"
    file.write_text(token_page("Tokens", rollouts, [("model", "tiny")], tokenizer), encoding="utf-8")
    scale = torch.quantile(scored.scores.delta[scored.scores.known].abs(), 0.98).item()
    for scheme in ("light", "dark"):
        browser.open(file, scheme)
        row = int(browser.run("return document.querySelector('#rollouts [aria-current]').dataset.number"))
        assert row == max(range(2), key=lambda index: rollouts[index].loss)
        for index in range(len(COMPLETIONS[row])):
            delta = scored.scores.delta[row, index].item()
            alpha = float(browser.run(f"return document.getElementById('t{index}').style.getPropertyValue('--a')"))
            assert math.isclose(alpha, min(1.0, abs(delta) / scale), abs_tol=1e-3)
            assert ("up" in browser.run(f"return document.getElementById('t{index}').className")) == (delta > 0)
            if index:
                browser.press("\ue014")  # arrow to the right
            shown = browser.run("return document.querySelector('[data-measure=delta] td').textContent")
            assert math.isclose(float(shown.replace("−", "-")), delta, rel_tol=5e-3)
            tokens = browser.run("return [...document.querySelectorAll('.teacher th')].map(its => its.title)")
            assert tokens[:3] == [f"id {it}" for it in scored.scores.listed_tokens[row, index, 1].tolist()]
        assert not browser.errors()


def test_training_goes_on_as_it_would_have(make_trainer, tmp_path):
    weights = []
    for inspects in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(output_dir=str(tmp_path / str(inspects)), max_steps=3)
        start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        if inspects:
            trainer.add_callback(InspectCallback(trainer, steps=2, rollouts=2))
        trainer.train()
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        trainer.model.load_state_dict(start)
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert [path.name for path in (tmp_path / "True" / "inspect").iterdir()] == ["step-000002.html"]


@pytest.mark.needs("tensorboard")
def test_tensorboard_is_told_where_the_page_is(make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    trainer = make_trainer(output_dir=str(out), report_to="tensorboard", max_steps=2)
    trainer.add_callback(InspectCallback(trainer, steps=2))
    trainer.train()
    [events] = {file.parent for file in out.rglob("events.out.tfevents.*")}
    logged = EventAccumulator(str(events)).Reload()
    [told] = logged.Tensors("inspect/text_summary")
    assert told.step == 2
    assert told.tensor_proto.string_val[0].decode() == f"`{out / 'inspect' / 'step-000002.html'}`"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_are_given_the_page(name, make_trainer, tmp_path, monkeypatch):
    """By their names for it, which are all that is known of them here."""
    logged = []

    def log_artifact(file, **kwargs):
        logged.append((file, kwargs))

    tracker = SimpleNamespace(log_artifact=log_artifact, run=SimpleNamespace(id="7", log_artifact=log_artifact))
    monkeypatch.setitem(sys.modules, name, tracker)
    trainer = make_trainer(output_dir=str(tmp_path), max_steps=2)
    # No other part of the trainer is to ask for the tracker
    trainer.observers.append(lambda *_: setattr(trainer.args, "report_to", [name]))
    trainer.add_callback(InspectCallback(trainer, steps=2))
    trainer.observers.append(lambda *_: setattr(trainer.args, "report_to", []))
    trainer.train()
    page, artefact = str(tmp_path / "inspect" / "step-000002.html"), {"wandb": "inspect-7", "trackio": "inspect"}[name]
    assert logged == [(page, {"name": artefact, "type": "inspect", "aliases": ["step-2"]})]
