"""The tokenizer that comes with a checkpoint."""

from shutil import copytree

import pytest
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerBase

from trl_opsd import OPSDConfig, OPSDTrainer


def test_a_processor_beside_the_weights_is_not_asked(tmp_path, model_path, training_args, dataset):
    """As beside those of Gemma 3 or Mistral Small, which can be trained on text."""
    pytest.importorskip("PIL")
    model, tokenizer = copytree(model_path, tmp_path / "model"), AutoTokenizer.from_pretrained(model_path)
    LlavaProcessor(CLIPImageProcessor(), tokenizer, patch_size=8).save_pretrained(model)
    assert not isinstance(AutoProcessor.from_pretrained(model), PreTrainedTokenizerBase)

    trainer = OPSDTrainer(str(model), args=OPSDConfig(**training_args), train_dataset=dataset)

    assert trainer.processing_class.get_vocab() == tokenizer.get_vocab()
    trainer.train()
    assert trainer.state.global_step == 2
