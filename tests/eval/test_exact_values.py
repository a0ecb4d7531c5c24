r"""Exact values are told apart wherever they stand, and what is equal stays equal."""

import pytest

from trl_opsd.eval.scorer import score


pytestmark = pytest.mark.needs("math_verify")


@pytest.mark.parametrize(
    ("reference", "wrong"),
    [
        (r"k=\frac{2023}{2^{2023}}", r"k=\frac{2024}{2^{2023}}"),
        (r"2^{64}x", r"(2^{64}-1)x"),
        ("x=1-2^{-60}", "x=1-2^{-61}"),
        (r"x\ge 1-2^{-60}", r"x\ge 1-2^{-61}"),
        (r"0\le x\le 1-2^{-60}", r"0\le x\le 1-2^{-61}"),
        ("f(n)=n", r"f(n)=n-\frac{1}{999!}"),
        ("x^2+10^{-20}", "x^2"),
        ("x^2", "x^2+10^{-20}"),
        ("x+y=1", "x+y=1+2^{-70}"),
        ("2y=2x", "y=x+2^{-70}"),
        (r"\{x, 1-2^{-60}\}", r"\{x, 1-2^{-61}\}"),
        (r"\begin{pmatrix}1-2^{-60}\\x\end{pmatrix}", r"\begin{pmatrix}1-2^{-61}\\x\end{pmatrix}"),
        (r"A=\begin{pmatrix}1-2^{-60}\\x\end{pmatrix}", r"A=\begin{pmatrix}1-2^{-61}\\x\end{pmatrix}"),
        (r"[2^{-60},\infty)", r"x\ge 2^{-61}"),
    ],
)
def test_values_that_differ_in_no_float(reference, wrong):
    verdict = score(rf"\boxed{{{wrong}}}", reference)
    assert (verdict.correct, verdict.error) == (False, None)


@pytest.mark.parametrize(
    ("reference", "same"),
    [
        ("x=2y", "2x=4y"),
        ("y=x+1", "x+1=y"),
        ("y=x+1", "2y-2x=2"),
        ("0=x-1", "x-1=0"),
        ("2x>4", "4<2x"),
        ("xy=1", r"y=\frac1x"),
        (r"x\ge 2", r"[2,\infty)"),
        ("-1<x<3", "(-1,3)"),
        (r"(-\infty,-1)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,-1)"),
        (r"(-\infty,2]", r"x\le 2"),
        ("x^2+y^2=1", "y^2=1-x^2"),
        ("f(n)=n(n+2)", "f(n)=n^2+2n"),
        ("(n+1)!", "(n+1)n!"),
        (r"\log_4 x", r"\frac12\log_2 x"),
        (r"\frac{n(n+1)}{2}", r"\sum_{k=1}^{n}k"),
        (r"\sin^2 x+\cos^2 x", "1"),
        ("X+1", "x+1"),
        (r"\{x, \sqrt{8}\}", r"\{2\sqrt{2}, x\}"),
        (r"y=\frac{x}{2}", "y=0.5x"),
        ("a=b=1", "a=b=1"),
        ("x+1", "y=x+1"),
    ],
)
def test_what_is_equal_stays_equal(reference, same):
    verdict = score(rf"\boxed{{{same}}}", reference)
    assert (verdict.correct, verdict.error) == (True, None)


@pytest.mark.parametrize(
    "between",
    [
        r"\enspace", r"\thinspace", r"\medspace", r"\thickspace", r"\space", r"\>", r"\hspace{1cm}", r"\hspace*{2em}",
        r"\hfill", r"\\", r"\\ &", r"\&", r"\quad\textnormal{and}\quad", r"\ \mathrm{or}\ ", r"~\textrm{and}~",
        r"\textbf{ and }", r"~\mbox{ and }~", r"\quad\text{, }\quad",
    ],
)  # fmt: skip
def test_boxes_with_only_spacing_or_a_word_between_are_one_answer(between):
    completion = rf"\[\boxed{{2}} {between} \boxed{{6}}\]"
    assert score(completion, "2, 6").correct is True
    assert score(completion, "6").correct is False


@pytest.mark.parametrize(
    ("reference", "same"),
    [
        ("2, 3", r"x_1=2~\text{and}~x_2=3"),
        ("2, 3", r"2\hspace{1cm}\textnormal{and}\hspace{1cm}3"),
        ("2, 3", r"x=2,\hspace{1cm}x=3"),
        ("2, 3", r"2\enspace\mathrm{or}\enspace 3"),
        ("2, 3", r"2\text{, }3"),
        ("f(x)=x+c", r"f(x)=x+c,\ c\in\mathbb{R}"),
        (r"f(x)=x+c, c\in\mathbb{R}", "f(x)=x+c"),
        (r"\frac{\pi}{2}+k\pi", r"x=\frac{\pi}{2}+k\pi, k\in\mathbb{Z}_{+}"),
        (r"x\in\mathbb{R}", r"x\in\mathbb{R}"),
        (r"\frac13", r"0.\dot{3}"),
        (r"\frac16", r"0.1\dot 6"),
    ],
)
def test_forms_of_one_answer(reference, same):
    verdict = score(rf"\boxed{{{same}}}", reference)
    assert (verdict.correct, verdict.error) == (True, None)
