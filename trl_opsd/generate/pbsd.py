from .base import Attempt, Made, Problems


class PBSDMaker:
    """
    The pairs of [PBSD](https://huggingface.co/papers/2605.05040), for preference training: y⁺ of the model reading the
    privileged context, the teacher, is preferred to y⁻ of the model reading the bare prompt, the student. Whether y⁺
    is the better one is not asked; with reward functions, the rewards of both are columns.

    Args:
        num_samples (`int`, *optional*, defaults to `1`):
            Pairs of each row.
        keep (`str`, *optional*, defaults to `"finished"`):
            `"finished"` leaves out pairs with a completion that is empty or was cut off at the token limit, since
            training would teach to stop there. `"all"` keeps every pair of two different completions, as the paper
            does.

    Raises:
        ValueError: If a value is none of these.
    """

    needs_rewards = False
    needs_context = True

    def __init__(self, num_samples: int = 1, keep: str = "finished"):
        if num_samples < 1:
            raise ValueError(f"`num_samples` of the pbsd maker must be at least 1, got {num_samples}.")
        if keep not in ("all", "finished"):
            raise ValueError(f"`keep` of the pbsd maker must be one of all, finished, got {keep!r}.")
        self.num_samples, self.keep = num_samples, keep

    def __call__(self, problems: Problems) -> Made:
        made = Made()
        hinted = {row: ids for row, ids in enumerate(problems.hinted_prompt_ids) if ids is not None}
        if len(hinted) < len(problems.rows):
            made.dropped["without a context"] = len(problems.rows) - len(hinted)
        rows = [row for row in hinted for _ in range(self.num_samples)]
        students = problems.sample(rows, [problems.prompt_ids[row] for row in rows], "the student's")
        teachers = problems.sample(rows, [hinted[row] for row in rows], "the teacher's")
        for chosen, rejected in zip(problems.grade(teachers), problems.grade(students), strict=True):
            reason = self._shortcoming(chosen, rejected)
            if reason is None:
                made.records.append(_pair(problems.rows[chosen.row]["prompt"], chosen, rejected))
            else:
                made.dropped[reason] += 1
        return made

    def _shortcoming(self, chosen: Attempt, rejected: Attempt) -> str | None:
        if chosen.completion == rejected.completion:
            return "twice the same"
        for whose, attempt in (("teacher's", chosen), ("student's", rejected)):
            reason = None if self.keep == "all" else attempt.shortcoming(needs_correct=False)
            if reason is not None:
                return f"{whose} {reason}"
        return None


def _pair(prompt: object, chosen: Attempt, rejected: Attempt) -> dict[str, object]:
    record = {"prompt": prompt, "chosen": chosen.completion, "rejected": rejected.completion}
    record |= {"source": "teacher_over_student", "row": chosen.row}
    for name, its in (("chosen", chosen), ("rejected", rejected)):
        record |= {f"{name}_{what}": getattr(its, what) for what in ("seed", "truncated", "reward", "correct")}
    return record
