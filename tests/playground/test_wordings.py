import pytest

from trl_opsd.eval.scorer import Verdict
from trl_opsd.playground import wordings
from trl_opsd.playground.facts import make_world
from trl_opsd.playground.smollm2 import recipes_folder
from trl_opsd.real_model.arms import PARTS


@pytest.mark.parametrize("name", wordings.WORDINGS)
def test_a_wording_shows_what_it_is_called_after(name):
    row = make_world(2).rows()["new"][0]
    messages = wordings.WORDINGS[name].teacher_messages(row, None)
    assert [message["role"] for message in messages][:2] == ["system", "user"]
    assert messages[-1]["role"] == "user"
    text = "\n".join(message["content"] for message in messages)
    assert row["prompt"][-1]["content"] in messages[-1]["content"]
    assert (row["fact"] in text) == (name != "nothing")
    assert (row["sheet"] in text) == ("sheet" in name)


def test_the_model_itself_reads_what_is_trained_on():
    row = make_world(2).rows()["new"][0]
    assert wordings.WORDINGS["nothing"].teacher_messages(row, None) == row["prompt"]


@pytest.mark.parametrize("recipe", ["opsd", "sdft"])
def test_recipes_and_runs_read_one_of_the_wordings(recipe):
    import yaml

    from trl_opsd.context import TemplateContext

    fields = yaml.safe_load((recipes_folder() / "smollm2" / f"{recipe}.yaml").read_text())
    row = make_world(2).rows()["two"][0]
    reads = PARTS["facts"].reads
    made = [TemplateContext(**its["context_kwargs"]).teacher_messages(row, None) for its in (fields, reads)]
    chosen = wordings.WORDINGS["all about the thing, the question, named so"].teacher_messages(row, None)
    assert made == [chosen, chosen]


@pytest.mark.cpu("so is the command")
def test_the_command_says_what_is_answered(model_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_opsd.eval.scorer.score_named", lambda *args: Verdict(True, None, None))
    wordings.main(["--model", model_path, "--size", "1", "--questions", "2"])
    told = " ".join(capsys.readouterr().out.split())
    assert "2 questions in new wordings, world" in told
    assert told.count(" 100 ") == len(wordings.WORDINGS)


@pytest.mark.parametrize(("flag", "said"), [("--size", "from 1 to 16"), ("--questions", "must be at least 1")])
def test_what_cannot_be_asked_is_refused(flag, said):
    with pytest.raises(SystemExit, match=said):
        wordings.main([flag, "0"])
