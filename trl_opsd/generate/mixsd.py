from .base import Made, Problems


class MixSDMaker:
    """
    Targets of [MixSD](https://huggingface.co/papers/2605.16865), for supervised training: each token ỹ_t is drawn
    from the model's p(· | x, ỹ₍<t₎) with probability λ = `share`, else from its p(· | x, c, ỹ₍<t₎), which reads the
    privileged context c. Both go on from the same mixed prefix. A completion that is wrong is made anew.

    The column `sides` says of each token whether the bare prompt gave it.

    Args:
        share (`float`, *optional*, defaults to `0.5`):
            λ. At 1 completions are those of the bare prompt, at 0 those of the prompt with the context.
        max_tries (`int`, *optional*, defaults to `10`):
            Tries of each row. At temperature 0 they differ by the draws of the sides alone.

    Raises:
        ValueError: If a value is out of its range.
    """

    needs_rewards = True
    needs_context = True

    def __init__(self, share: float = 0.5, max_tries: int = 10):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"`share` of the mixsd maker must be in [0, 1], got {share}.")
        if max_tries < 1:
            raise ValueError(f"`max_tries` of the mixsd maker must be at least 1, got {max_tries}.")
        self.share, self.max_tries = float(share), max_tries

    def __call__(self, problems: Problems) -> Made:
        if problems.sampling.temperature == 0.0 and self.share in (0.0, 1.0) and self.max_tries > 1:
            raise ValueError(
                f"With `temperature=0` and `share={self.share:g}` of the mixsd maker all tries of a row are the same. "
                "Set `max_tries: 1` in `maker_kwargs`, a `share` between 0 and 1, or a temperature."
            )
        found, reasons = {}, dict.fromkeys(range(len(problems.rows)), "without a context")
        left = {row: ids for row, ids in enumerate(problems.hinted_prompt_ids) if ids is not None}
        for number in range(1, self.max_tries + 1):
            bare = [problems.prompt_ids[row] for row in left]
            tries = problems.mix(list(left), bare, list(left.values()), self.share, f"mixed, try {number}")
            for attempt in problems.grade(tries):
                reason = attempt.shortcoming(needs_correct=True)
                if reason is None:
                    found[attempt.row] = attempt, number
                    del left[attempt.row]
                else:
                    reasons[attempt.row] = f"{reason} in the last of {self.max_tries} tries"
        made = Made()
        for row in range(len(problems.rows)):
            if row in found:
                attempt, number = found[row]
                made.add(problems.rows[row], attempt, "mixed", tries=number, sides=attempt.sides)
            else:
                made.dropped[reasons[row]] += 1
        return made
