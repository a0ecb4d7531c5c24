from .base import Made, Problems


KEEPS = ("all", "finished", "correct")


class RolloutsMaker:
    """
    Completions of the bare prompts: rejection sampling, with `keep="correct"`.

    Args:
        num_samples (`int`, *optional*, defaults to `1`):
            Completions of each row.
        keep (`str`, *optional*, defaults to `"finished"`):
            Which of them become rows: `"finished"` leaves out those that are empty or were cut off at the token limit,
            since training would teach to stop there, `"correct"` also those that are wrong or without a reward.
            `"all"` keeps every one.

    Raises:
        ValueError: If a value is none of these.
    """

    needs_context = False

    def __init__(self, num_samples: int = 1, keep: str = "finished"):
        if num_samples < 1:
            raise ValueError(f"`num_samples` of the rollouts maker must be at least 1, got {num_samples}.")
        if keep not in KEEPS:
            raise ValueError(f"`keep` of the rollouts maker must be one of {', '.join(KEEPS)}, got {keep!r}.")
        self.num_samples = num_samples
        self.keep = keep
        self.needs_rewards = keep == "correct"

    def __call__(self, problems: Problems) -> Made:
        rows = [row for row in range(len(problems.rows)) for _ in range(self.num_samples)]
        prompts = [problems.prompt_ids[row] for row in rows]
        made = Made()
        for attempt in problems.grade(problems.sample(rows, prompts, "rollouts")):
            reason = None if self.keep == "all" else attempt.shortcoming(self.needs_rewards)
            if reason is None:
                made.add(problems.rows[attempt.row], attempt, "rollout")
            else:
                made.dropped[reason] += 1
        return made
