"""What a run will take, before it starts: memory by part, time by phase, and what to change where it does not fit."""
