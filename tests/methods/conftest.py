"""What the tests of methods share."""

import pytest
from methods.stand_ins import Sampler
from trl import GRPOTrainer


@pytest.fixture
def sampler(tokenizer, monkeypatch):
    """Completes all prompts, also those of TRL's trainer."""
    sampler = Sampler(tokenizer)
    monkeypatch.setattr(
        GRPOTrainer, "_generate_single_turn", lambda trainer, prompt_ids, *args, **kwargs: (sampler(prompt_ids), None)
    )
    return sampler
