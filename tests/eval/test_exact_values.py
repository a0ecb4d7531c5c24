r"""Exact values are told apart wherever they stand, and what is equal stays equal."""

import pytest

from trl_opsd.eval.scorer import Verdict, score


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
    ("reference", "same", "other"),
    [
        (r"k=\frac{2023}{2^{2023}}", r"\frac{2023}{2^{2023}}=k", r"k=\frac{2024}{2^{2023}}"),
        ("2^{64}x", "4^{32}x", "(2^{64}-1)x"),
        ("x=1-2^{-60}", "1-x=2^{-60}", "x=1-2^{-61}"),
        ("x=1-2^{-60}, y=2", "y=2, x=1-4^{-30}", "x=1-2^{-61}, y=2"),
        (r"x\ge 1-2^{-60}", r"1-4^{-30}\le x", r"x\ge 1-2^{-61}"),
        ("x>1-2^{-60}", r"(1-4^{-30},\infty)", r"(1-2^{-61},\infty)"),
        ("1-2^{-60}<x<2", "1-4^{-30}<x<2", "1-2^{-61}<x<2"),
        ("f(n)=n", "n=f(n)", r"f(n)=n-\frac1{999!}"),
        ("x^2", r"x \cdot x", "x^2+10^{-20}"),
        ("2^{64}x=y", r"x=\frac{y}{2^{64}}", "(2^{64}-1)x=y"),
        (r"y=\frac{1-2^{-60}}{x}", "xy=1-4^{-30}", "xy=1-2^{-61}"),
        (r"x^2+y^2=1", r"\frac{1-x^2}{y^2}=1", r"x^2+y^2=1+10^{-30}"),
        *[tuple(rf"\begin{{pmatrix}}{value}\\1\end{{pmatrix}}" for value in ("2^{64}x", "4^{32}x", "(2^{64}-1)x"))],
        (r"a=\frac62=3", "a=3", "a=3+10^{-30}"),
        (r"\binom{n}{k}", r"\frac{n!}{k!(n-k)!}", r"\frac{n!}{k!(n-k)!}+10^{-30}"),
        (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}", r"\frac{n(n+1)}{2}+10^{-30}"),
        (r"\sin 2x", r"2\sin x\cos x", r"2\sin x\cos x+10^{-30}"),
        ("0.5x^2", r"\frac{x^2}{2}", "0.51x^2"),
        ("xy=2", r"y=\frac{2.0}{x}", r"y=\frac{2.1}{x}"),
        (r"1.6 \cdot 10^{-19}x^2", r"1.60 \cdot 10^{-19}x^2", r"1.7 \cdot 10^{-19}x^2"),
        ("2x=4y", "x=2y", "x=3y"),
        ("x-y=0", "y=x", "y=-x"),
        ("a_{n+1}=2a_n", "2a_n=a_{n+1}", "a_{n+1}=(2+10^{-30})a_n"),
        (r"x\in[1,2]", r"x \in [1, 2]", r"x\in[1,2+10^{-30}]"),
    ],
)  # fmt: skip
def test_formulas_and_relations_are_compared_exactly(reference, same, other):
    assert score(rf"\boxed{{{same}}}", reference).correct is True
    assert score(rf"\boxed{{{other}}}", reference) == Verdict(False, other, "boxed")
    if "." not in other:
        assert score(rf"\boxed{{{reference}}}", other) == Verdict(False, reference, "boxed")


@pytest.mark.parametrize(
    ("reference", "same"),
    [
        (r"\text{Yes}", "yes"),
        (r"\int_0^x e^{-t^2}dt", r"\int_0^x e^{-s^2}ds"),
        (r"\Gamma(x+1)", "x!"),
        ("x^5+x=y", "y-x-x^5=0"),
        (r"e^y+y=\cos x", r"\cos x-y=e^y"),
        (r"\frac{x^2-1}{x-1}", "x+1"),
        ("n^{n^n}", r"n^{(n^n)}"),
        ("x>1, y>2", "y>2, x>1"),
        ("(x-1)(x-2)=0", "x^2-3x+2=0"),
    ],
)
def test_what_cannot_be_shown_to_be_different_stays_the_same(reference, same):
    assert score(rf"\boxed{{{same}}}", reference).correct is True


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
        (r"f(x)=x+c \quad (c \in \R)", "f(x)=x+c"),
        ("2, 3", r"2\ \&\ 3"),
        (r"\frac13", r"0.\dot{3}"),
        (r"\frac16", r"0.1\dot 6"),
    ],
)
def test_forms_of_one_answer(reference, same):
    verdict = score(rf"\boxed{{{same}}}", reference)
    assert (verdict.correct, verdict.error) == (True, None)


def test_the_domain_of_another_variable_is_no_qualifier():
    assert score(r"\boxed{x=1, y\in\mathbb{R}}", "x=1").correct is False
