import json

import pytest
from markupsafe import Markup

from trl_opsd.report.page import figure, page, table


HOSTILE = [
    "</script><script>document.title = 'taken'</script>",
    "</title><img src=x onerror=\"document.title='taken'\">",
    "<!-- <script>",
    "\u2028 \u2029 \ud83d \U0001f600 \u202eright to left \x00 \\ud83d",
]


def plot(text="loss"):
    drawn = pytest.importorskip("matplotlib.figure").Figure(figsize=(4, 2))
    axes = drawn.subplots()
    axes.plot([1, 2, 3], color="#0072b2")
    axes.bar([1], [2], color="white")
    axes.set_xlabel(text)
    return drawn


def written(folder, *args, **kwargs):
    file = folder / "page.html"
    file.write_text(page(*args, **kwargs), encoding="utf-8")
    return file


def test_hostile_text_is_shown_and_not_run(browser, tmp_path):
    body = [table(["name", *HOSTILE], [HOSTILE[:1] * 5], HOSTILE[1]), Markup("<pre>{}</pre>").format(HOSTILE[3])]
    body.append(figure(plot("<script>"), HOSTILE[1]))
    browser.open(written(tmp_path, HOSTILE[0], body, data={"given": HOSTILE}))
    assert browser.run("return document.title") == HOSTILE[0]
    assert browser.run("return document.querySelector('h1').textContent") == HOSTILE[0]
    assert browser.run("return document.querySelector('td').textContent") == HOSTILE[0]
    assert browser.run("return document.querySelector('figcaption').textContent") == HOSTILE[1]
    assert browser.run("return document.querySelector('svg').getAttribute('aria-label')") == HOSTILE[1]
    assert "\\ud83d" in browser.run("return document.querySelector('pre').textContent")
    assert browser.run("return document.querySelectorAll('img').length") == 0
    same = "return JSON.stringify(JSON.parse(document.getElementById('given').textContent)) === arguments[0]"
    dumped = json.dumps(HOSTILE, separators=(",", ":"), ensure_ascii=False).replace("\ud83d", "\\ud83d")
    assert browser.run(same, dumped)
    assert not browser.errors()


def test_script_finds_its_data_and_no_other_script_runs(browser, tmp_path):
    script = "document.body.dataset.sum = JSON.parse(document.getElementById('numbers').textContent)[1]"
    body = [Markup("<button id='b' onclick='document.title = 1'>x</button><script>document.title = 2</script>")]
    browser.open(written(tmp_path, "Its own", body, script=script, data={"numbers": [1, 2.5]}))
    browser.run("document.getElementById('b').click()")
    assert browser.run("return document.body.dataset.sum") == "2.5"
    assert browser.run("return document.title") == "Its own"
    assert all("Content Security Policy" in error for error in browser.errors())


def test_scheme_follows_the_system_until_it_is_switched(browser, tmp_path):
    file = written(tmp_path, "Schemes", [figure(plot(), "Loss")])
    colors = {}
    for scheme in ("light", "dark"):
        browser.open(file, scheme)
        colors[scheme] = browser.style("body", "background-color"), browser.style("svg text", "fill")
        assert browser.style("svg path[style*='--page']", "fill") == colors[scheme][0]
    (light_page, light_text), (dark_page, dark_text) = colors.values()
    assert light_page == "rgb(255, 255, 255)" != dark_page
    assert light_text != dark_text
    browser.run("document.addEventListener('scheme', () => { document.title = 'told' })")
    browser.press("\ue004", "\ue007")  # tab, enter
    assert browser.style("body", "background-color") == light_page
    assert browser.run("return document.title") == "told"
    assert browser.run("return document.getElementById('scheme').textContent") == "Dark"
    assert not browser.errors()


def test_plots_of_one_page_share_no_name():
    text = figure(plot(), "One") + figure(plot("other"), "Two")
    assert 'id="axes_1"' not in text
    assert "<metadata>" not in text
    assert figure(plot(), "One") == figure(plot(), "One")


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(TypeError, match="made of Markup, and this is str"):
        page("Title", ["<b>text</b>"])
    with pytest.raises(ValueError, match="not JSON compliant"):
        page("Title", [], data={"loss": float("nan")})
    with pytest.raises(ValueError, match="2 cells, and the table 3 columns"):
        table(["a", "b", "c"], [["x", 1]])
