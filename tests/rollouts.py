"""Rollouts of one prompt, made up."""

from trl_opsd.context import Rollout


def make_rollouts(rewards, texts=None, feedback=None, token_ids=None, replaced=()):
    """Rollouts with the texts `y0`, `y1`, ... of which those with a reward of 1 are correct."""
    texts = texts or [f"y{index}" for index in range(len(rewards))]
    feedback = feedback or [None] * len(rewards)
    token_ids = token_ids or [[index + 1] for index in range(len(rewards))]
    return [
        Rollout(
            text,
            ids,
            reward,
            None if reward is None else reward >= 1.0,
            told,
            False,
            index,
            replaced=index in replaced,
        )
        for index, (text, ids, reward, told) in enumerate(zip(texts, token_ids, rewards, feedback, strict=True))
    ]
