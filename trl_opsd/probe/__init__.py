"""Evidence about a model before it is trained: does its self-teacher know more, and what of that can be learnt."""
