"""The comparison: all methods, TRL's GRPO and SFT, and controls on the same work, with as many generated tokens."""
