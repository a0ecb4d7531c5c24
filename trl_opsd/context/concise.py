from .template import TemplateContext


_INSTRUCTIONS = {
    "uniform": (
        "Answer directly. Leave out needless elaboration and redundant steps, do not restate the problem, and keep "
        "the reasoning as short as a correct solution allows."
    ),
    "percent": "Use about {percent} % fewer tokens than you usually would for the problem below, and still solve it.",
    "difficulty": (
        "A correct answer comes first, brevity second. If the problem is easy, solve it directly. If it is hard, keep "
        "every step that correctness depends on, including case distinctions, edge cases and one short check, and "
        "leave out the rest."
    ),
}


class ConciseContext(TemplateContext):
    """
    The teacher reads an instruction to be concise in front of the question, as in
    [CRISP/OPSDC](https://huggingface.co/papers/2603.05433). It reads no dataset column.

    Args:
        mode (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"`: be direct, for all problems alike. `"percent"`: use `percent` % fewer tokens. `"difficulty"`:
            be brief where the problem is easy, and keep what correctness needs where it is hard.
        percent (`int`, *optional*, defaults to `50`):
            Reduction asked for in mode `"percent"`, between 1 and 99. The paper tries 20, 50 and 80.
        template (`str`, *optional*):
            Text of the teacher's last user turn, with the placeholder `{prompt}`, instead of the wording of `mode`.

    Raises:
        ValueError: If `mode` is unknown or `percent` is out of range.
    """

    def __init__(self, mode: str = "uniform", percent: int = 50, template: str | None = None):
        if mode not in _INSTRUCTIONS:
            raise ValueError(f"`mode` of the concise context must be one of {list(_INSTRUCTIONS)}, got {mode!r}.")
        if not 1 <= percent <= 99:
            raise ValueError(f"`percent` of the concise context must be between 1 and 99, got {percent}.")
        instruction = _INSTRUCTIONS[mode].replace("{percent}", str(percent))
        super().__init__(template if template is not None else instruction + "\n\n{prompt}")
