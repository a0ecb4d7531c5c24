from dataclasses import dataclass


_STATUSES = ("seen-paper", "seen-code", "notes")


@dataclass(frozen=True)
class Method:
    """
    A published method, as model cards, tags of the Hub and the documentation name it.

    Args:
        name (`str`):
            Name, as the paper writes it.
        paper (`str`):
            Id of the paper on arXiv.
        title (`str`):
            Title of the paper.
        citation (`str`):
            BibTeX entry of the paper.
        status (`str`):
            What the implementation was written from: `"seen-paper"`, `"seen-code"` (the authors' released code) or
            `"notes"` (what others say of it); several are separated by a comma.

    Raises:
        ValueError: If the status is another.
    """

    name: str
    paper: str
    title: str
    citation: str
    status: str

    def __post_init__(self) -> None:
        if wrong := set(self.status.split(", ")) - set(_STATUSES):
            raise ValueError(
                f"`status` of {self.name} must be of {', '.join(_STATUSES)}, separated by ', ', got "
                f"{sorted(wrong)[0]!r}."
            )


def presented(method: Method | None) -> tuple[str, dict[str, str], list[str]]:
    """Name, paper and tags, as TRL's trainers hold them for model cards and the Hub."""
    if method is None:
        return "Self-Distillation", {}, ["trl", "trl-opsd", "self-distillation"]
    paper = {"title": method.title, "id": method.paper, "citation": method.citation}
    return method.name, paper, ["trl", "trl-opsd", method.name.lower().replace(" ", "-")]
