"""A pretrained model learns what it reads: self-distillation beside SFT on facts that the model cannot know."""
