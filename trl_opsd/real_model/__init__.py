"""A pretrained model gets better by its own reading: facts, brevity and a skill, beside SFT and GRPO."""
