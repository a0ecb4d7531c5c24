"""One run at a time in an `output_dir`."""

import subprocess
import sys

import pytest
from tiny import make_model, make_tokenizer
from transformers import TrainerCallback

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.files import locked


@pytest.fixture
def make_trainer(training_args, dataset):
    def make(**settings):
        tokenizer = make_tokenizer()
        callbacks = settings.pop("callbacks", None)
        args = OPSDConfig(**{**training_args, "save_strategy": "steps", "save_steps": 1, **settings})
        return OPSDTrainer(
            make_model(tokenizer), args=args, processing_class=tokenizer, train_dataset=dataset, callbacks=callbacks
        )

    return make


def test_a_second_run_is_refused_while_the_first_one_trains(make_trainer, tmp_path):
    class Meanwhile(TrainerCallback):
        met = 0

        def on_step_end(self, *args, **kwargs):
            second = make_trainer()
            with pytest.raises(ValueError, match=r"Another run works in .*run\. .*choose another `output_dir`"):
                second.train()
            make_trainer(output_dir=str(tmp_path / "elsewhere")).train()
            self.met += 1

    meanwhile = Meanwhile()
    trainer = make_trainer(callbacks=[meanwhile])
    trainer.train()
    assert meanwhile.met == 2
    assert trainer.state.global_step == 2


def test_the_folder_is_free_after_a_run_that_failed(make_trainer):
    class Failure(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(callbacks=[Failure()]).train()
    trainer = make_trainer()
    trainer.train()
    trainer.train()


def test_another_process_is_kept_out_until_it_dies(tmp_path):
    code = f"""
import sys
from pathlib import Path
from trl_opsd.files import locked
with locked(Path({str(tmp_path)!r}), "_lock"):
    print("in", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match="Another run works in"), locked(tmp_path, "_lock"):
            pass
    finally:
        other.kill()
        other.wait()
    with locked(tmp_path, "_lock"):
        pass
