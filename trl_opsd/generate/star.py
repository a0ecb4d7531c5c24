from ..sampling.sources import second_tries
from .base import Made, Problems


class STaRMaker:
    """
    A pass of [STaR](https://huggingface.co/papers/2203.14465): a row that the model answers wrong is tried once more,
    reading the privileged context. What is right, at the first or the second try, is a row with the bare prompt.

    Answers that were cut off at the token limit are left out even if they are right.
    """

    needs_rewards = True
    needs_context = True

    def __call__(self, problems: Problems) -> Made:
        rows = range(len(problems.rows))
        tries = problems.grade(problems.sample(rows, problems.prompt_ids, "first tries"))
        hinted = second_tries([attempt.correct for attempt in tries], problems.hinted_prompt_ids.__getitem__)
        retries = problems.grade(problems.sample(list(hinted), list(hinted.values()), "hinted retries"))
        for retry in retries:
            tries[retry.row] = retry
        made = Made()
        for row, attempt in enumerate(tries):
            reason = attempt.shortcoming(needs_correct=True)
            if reason is None:
                made.add(problems.rows[row], attempt, "hinted_retry" if row in hinted else "first_try")
            else:
                made.dropped[f"{reason}, also with the context" if row in hinted else reason] += 1
        return made
