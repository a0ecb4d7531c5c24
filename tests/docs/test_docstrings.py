"""Docstrings in TRL's form become Markdown, and formulas are set."""

import pytest


DOCSTRING = """
    Scores tokens with [`Objective`], see [`~transformers.Trainer`] and [a paper](https://huggingface.co/papers/1).

    L = mean over t < T of Σ_v min(p_T,v, τ) · w^½,

    with p_T = p(· | x, ŷ₍<t₎).

    Args:
        one, other (`torch.Tensor` of shape `(B, T)`):
            Of type [`Objective`]:

            - first.
            - second, which
              goes on.

            The end.
        > Parameters of the rest
        name (`str`, *optional*, defaults to `"a: b"`):
            A name.
        **kwargs:
            The rest.
        short (`int`): On its line.

    Returns:
        `tuple[str, int]`:
            Both.

    Raises:
        ValueError: If it is out of range, or
            not a number.
        `OSError`: If not.

    Example:
    ```python
    x = "[`Nothing`]"

    y = p_T
    ```
"""

MARKDOWN = """Scores tokens with [`Objective`][a.b.Objective], see `Trainer` and [a paper](https://huggingface.co/papers/1).

<div class="formula">L = mean over t &lt; T of Σ<sub>v</sub> min(p<sub>T,v</sub>, τ) · w<sup>½</sup>,</div>

with p<sub>T</sub> = p(· | x, ŷ<sub>&lt;t</sub>).

**Parameters**

`one`, `other` (`torch.Tensor` of shape `(B, T)`)
:   Of type [`Objective`][a.b.Objective]:

    - first.
    - second, which
      goes on.

    The end.

**Parameters of the rest**

`name` (`str`, *optional*, defaults to `"a: b"`)
:   A name.

`**kwargs`
:   The rest.

`short` (`int`)
:   On its line.

**Returns**

`tuple[str, int]`:
    Both.

**Raises**

`ValueError`
:   If it is out of range, or
    not a number.

`OSError`
:   If not.

**Example**

```python
x = "[`Nothing`]"

y = p_T
```"""


def test_docstring(site):
    known = {"Objective": "a.b.Objective", "transformers.Trainer": None}
    assert site("docstrings").markdown(DOCSTRING, known.__getitem__) == MARKDOWN


def test_groups_of_parameters(site):
    docstring = """
    Parameters:
        > Of one

        one (`int`):
            A one.

        > Of two

        two (`int`):
            A two.
    """
    groups = ["**Parameters**", "**Of one**", "`one` (`int`)\n:   A one.", "**Of two**", "`two` (`int`)\n:   A two."]
    assert site("docstrings").markdown(docstring, {}.__getitem__) == "\n\n".join(groups)


@pytest.mark.parametrize(
    ("text", "typeset"),
    [
        ("p_S and p_old, KL_x, Σ_{t ≤ K}", "p<sub>S</sub> and p<sub>old</sub>, KL_x, Σ<sub>t ≤ K</sub>"),
        ("w̃_t·JSD_½, π_θ", "w̃<sub>t</sub>·JSD<sub>½</sub>, π<sub>θ</sub>"),
        ("p_S(y*_t | y*₍<t₎)", "p<sub>S</sub>(y&#42;<sub>t</sub> | y&#42;<sub>&lt;t</sub>)"),
        ("*optional* and **bold**", "*optional* and **bold**"),
        ("`p_T` in trl_opsd.methods.u_opsd, [x](a/b_c.md)", "`p_T` in trl_opsd.methods.u_opsd, [x](a/b_c.md)"),
        ("https://x.org/p_T", "https://x.org/p_T"),
        ("| u_opsd | u_t |", "| u_opsd | u<sub>t</sub> |"),
        ("for t <eos>", "for t &lt;eos>"),
    ],
)
def test_typeset(site, text, typeset):
    assert site("docstrings").typeset(text) == typeset


def test_pages_keep_their_html(site):
    text = '<img src="p_T.png"> p_T(ŷ₍<t₎), p_S <br>'
    expected = '<img src="p_T.png"> p<sub>T</sub>(ŷ<sub>&lt;t</sub>), p<sub>S</sub> <br>'
    assert site("docstrings").typeset(text, has_html=True) == expected
