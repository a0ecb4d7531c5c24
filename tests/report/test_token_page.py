"""Token pages in a browser: text of any kind is shown as text, and what the page offers works."""

import re
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trl_opsd.report.token_page import InspectedRollout, token_page


SCRIPT = "</script><script>document.title = 'taken'</script>"
IMAGE = "</title><img src=x onerror=\"document.title='taken'\">"
HEBREW = "שלום"
SMILE = "\U0001f600".encode()
# Each is a token, to the byte
TOKENS = [
    *(text.encode() for text in ("<!-- ", SCRIPT, IMAGE, HEBREW, "\u202eright to left", " & &amp;", "\n", "x")),
    *(SMILE[:2], SMILE[2:], "\ud83d".encode("utf-8", "surrogatepass"), b"\xff", "\x00\u2028\ufeff".encode()),
]
# What is seen of them, bytes of characters that are not complete in small print
SHOWN = [
    *("<!--·", SCRIPT.replace(" ", "·"), IMAGE.replace(" ", "·"), HEBREW, "⟨U+202E⟩right·to·left", "·&·&amp;", "↵"),
    *("x", "F0 9F", "98 80\U0001f600", "ED A0 BD", "FF", "␀⟨U+2028⟩⟨U+FEFF⟩"),
]
END, HOME, ESCAPE, ENTER, LEFT, RIGHT = "\ue010", "\ue011", "\ue00c", "\ue007", "\ue012", "\ue014"


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A byte-level tokenizer with just these tokens."""
    signs = bytes_to_unicode()
    names = ["".join(signs[byte] for byte in token) for token in TOKENS]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token=names[0]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def rollout(completion, loss=0.0, prompt=(7,), teacher_prompt=(7, 7), facts=None, delta=None):
    number = len(completion)
    delta = np.linspace(-1, 1, number) if delta is None else np.array(delta)
    values = {"student_log_prob": np.full(number, -2.0), "teacher_log_prob": delta - 2.0}
    values |= {"divergence": np.abs(delta), "w": np.ones(number)}
    listed = np.tile(np.arange(2, dtype=np.uint32) + 1, (number, 2, 1))
    return InspectedRollout(
        list(prompt),
        None if teacher_prompt is None else list(teacher_prompt),
        list(completion),
        {name: value.astype(np.float32) for name, value in values.items()},
        np.full(number, 7, dtype=np.uint8),
        listed,
        np.log(np.full((number, 2, 2), 0.25, dtype=np.float32)),
        loss,
        facts or {},
    )


@pytest.fixture
def opened(browser, tmp_path, byte_tokenizer):
    def open_page(*rollouts, scheme="light", title="Tokens", about=()):
        file = tmp_path / "page.html"
        file.write_text(token_page(title, rollouts, about, byte_tokenizer), encoding="utf-8")
        browser.open(file, scheme)
        return browser

    yield open_page
    assert not browser.errors()


def texts(browser, selector):
    return browser.run("return [...document.querySelectorAll(arguments[0])].map(it => it.textContent)", selector)


def choose(browser, name, value):
    """Write into a field, or choose of a list."""
    browser.run(
        "const it = document.getElementById(arguments[0]); it.value = arguments[1];"
        "it.dispatchEvent(new Event(it.tagName === 'SELECT' ? 'change' : 'input'))",
        *(name, value),
    )


def current(browser):
    """The rollout and the token that are looked at."""
    return browser.run(
        "return [Number(document.querySelector('#rollouts [aria-current]').dataset.number),"
        " Number(document.querySelector('.t.current').dataset.i)]"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hostile_text_is_shown_and_not_run(opened, scheme):
    every = range(len(TOKENS))
    feedback = f"{SCRIPT} {IMAGE} \ud83d \u202e{HEBREW}"
    hostile = rollout(every, prompt=every, teacher_prompt=[0, *every], facts={"feedback": feedback, IMAGE: SCRIPT})
    page = opened(hostile, scheme=scheme, title=SCRIPT, about=[(IMAGE, SCRIPT)])
    assert texts(page, "#tokens .t") == SHOWN
    assert texts(page, "title, h1") == [SCRIPT] * 2
    assert texts(page, "details:first-of-type :is(td, th[scope=row])") == [IMAGE, SCRIPT]
    assert texts(page, "#facts b")[2:] == [f"{SCRIPT} {IMAGE} ⟨U+D83D⟩ ⟨U+202E⟩{HEBREW}", SCRIPT]
    assert "".join(SHOWN[:8]) in texts(page, "#rollouts .text")[0]
    for side in ("student", "teacher"):
        page.run("document.querySelector(arguments[0]).open = true", f"#{side}")
        page.run("return new Promise(done => setTimeout(done, 50))")
        [read] = texts(page, f"#{side} pre")
        assert read.count(SCRIPT) == read.count(IMAGE) == 1
        assert "\u202e" not in read
    for index, shown in enumerate(SHOWN[:8]):
        page.run("document.getElementById(arguments[0]).click()", f"t{index}")
        assert texts(page, "#token h2") == [shown]
        assert texts(page, "#token .student th")[:2] == SHOWN[1:3]
    # Text from right to left turns nothing around
    places = [
        page.run("return document.getElementById(arguments[0]).getBoundingClientRect().toJSON()", f"t{it}")
        for it in (3, 4)
    ]
    assert places[0]["top"] < places[1]["top"] or places[0]["right"] <= places[1]["left"]
    assert page.run("return document.querySelectorAll('img').length") == 0
    assert page.run("return [...document.scripts].filter(it => !it.type).length") == 2  # its own
    assert page.run("return document.title") == SCRIPT


def test_a_hundred_thousand_tokens(opened):
    number = 100_000
    completion = np.random.default_rng(0).integers(0, 8, number)
    page = opened(rollout(completion, delta=np.zeros(number)))
    assert page.run("return document.querySelectorAll('#tokens .t').length") < 20_000  # what is near the screen
    assert texts(page, "#facts b")[1] == f"{number}"
    for keys, index in (([END], number - 1), ([LEFT], number - 2), ([HOME], 0)):
        page.press(*keys)
        assert current(page) == [0, index]
        place = page.run("return document.querySelector('.t.current').getBoundingClientRect().toJSON()")
        assert 0 <= place["top"] <= 900
        assert texts(page, ".t.current") == [SHOWN[completion[index]]]
    # The strip leads to any place, and what is far from it is let go
    laid_out = page.run(
        "const strip = document.getElementById('strip'), box = strip.getBoundingClientRect(); let most = 0;"
        "strip.setPointerCapture = () => {};"
        "return (async () => { for (let turn = 0; turn < 80; turn += 1) {"
        "  const clientX = box.left + (box.width * (turn + 0.5)) / 80;"
        "  strip.dispatchEvent(new PointerEvent('pointerdown', {clientX, pointerId: 1}));"
        "  await new Promise((done) => setTimeout(done, 30));"
        "  most = Math.max(most, document.querySelectorAll('#tokens .t').length);"
        "} return most; })()"
    )
    assert laid_out < 20_000
    assert abs(current(page)[1] - number * 79.5 / 80) < number / 500
    assert page.run("return document.getElementById('strip').getAttribute('aria-valuemax')") == f"{number}"


def test_fifty_rollouts_of_two_thousand_tokens_stay_below_20_mb(byte_tokenizer):
    draw = np.random.default_rng(0)

    def large():
        its = rollout(draw.integers(0, 8, 2000), delta=draw.normal(size=2000))
        names = ("student_entropy", "teacher_entropy", "A", "v")  # with the others, all there are
        values = {name: draw.normal(size=2000).astype(np.float32) for name in names}
        tokens, costs = draw.integers(0, 8, (2000, 2, 8)), draw.exponential(size=(2000, 2, 8))
        listed = {"listed_tokens": tokens.astype(np.uint32), "listed_log_probs": -costs.astype(np.float32)}
        return replace(its, values=its.values | values, **listed)

    page = token_page("Tokens", [large() for _ in range(50)], (), byte_tokenizer)
    assert 10e6 < len(page.encode()) < 20e6


def test_search(opened):
    # x, and <!-- with it where it is to be found
    page = opened(
        rollout([7, 7, 0, 7, 0, 7, 8, 9], loss=3.0),
        rollout([7] * 4, loss=2.0, teacher_prompt=[7, 1]),
        rollout([7] * 4, loss=1.0, teacher_prompt=None),
    )
    assert texts(page, "#found") == ["3 rollouts"]
    page.press("/", "<", "!", "-", "-")
    assert texts(page, "#found") == ["1 of 3 rollouts"]
    found = "return [...document.querySelectorAll('.t.found')].map(it => Number(it.dataset.i))"
    assert page.run(found) == [2, 4]
    for key, index in ((ENTER, 2), (ENTER, 4), (ENTER, 4)):
        page.press(key)
        assert current(page) == [0, index]
    choose(page, "search", "<SCRIPT>")
    assert texts(page, "#found") == ["1 of 3 rollouts"]  # of its teacher's prompt
    assert current(page)[0] == 1
    assert page.run(found) == []
    choose(page, "search", "\U0001f600")
    assert current(page)[0] == 0
    assert page.run(found) == [7]
    choose(page, "search", "nowhere")
    assert texts(page, "#found") == ["0 of 3 rollouts"]
    choose(page, "search", "")
    assert texts(page, "#found") == ["3 rollouts"]
    page.press(ESCAPE, RIGHT)
    assert current(page) == [0, 1]


def test_sorting(opened):
    page = opened(
        rollout([7] * 4, loss=-1.0, facts={"reward": 0.0}),
        rollout([7] * 2, loss=3.0, facts={"reward": None}, delta=[1.0, 1.0]),
        rollout([7] * 3, loss=2.0, facts={"reward": 1.0}, delta=[-2.0] * 3),
    )
    orders = {
        "loss": [1, 2, 0],
        "reward": [2, 0, 1],
        "length": [0, 2, 1],
        "mean log-ratio": [1, 0, 2],
        "mean divergence": [2, 1, 0],
        "as sampled": [0, 1, 2],
    }
    order = "return [...document.querySelectorAll('#rollouts button')].map(it => Number(it.dataset.number))"
    assert texts(page, "#sort option") == list(orders)
    assert page.run(order) == orders["loss"]
    assert current(page)[0] == 1
    lines = texts(page, "#rollouts button span:first-child")
    assert lines == [
        "loss 3.00 · 2 tokens",
        "loss 2.00 · reward 1.00 · 3 tokens",
        "loss −1.00 · reward 0.00 · 4 tokens",
    ]
    for name, expected in orders.items():
        choose(page, "sort", name)
        assert page.run(order) == expected
        assert current(page)[0] == 1  # what is looked at stays


def test_keys(opened):
    delta = [0.0, 0.1, 2.0, 0.0, -2.0, 0.1]
    page = opened(rollout([7] * 6, loss=3.0, delta=delta), rollout([7] * 2, loss=2.0, delta=[0.0, 0.0]))
    for key, expected in (
        (RIGHT, [0, 1]),
        (LEFT, [0, 0]),
        (LEFT, [0, 0]),
        ("n", [0, 2]),
        ("n", [0, 4]),
        ("n", [0, 4]),
        ("p", [0, 2]),
        (END, [0, 5]),
        (HOME, [0, 0]),
        ("k", [0, 0]),
        ("j", [1, 0]),
        ("j", [1, 0]),
        ("k", [0, 0]),
    ):
        page.press(key)
        assert current(page) == expected, key
    # On the strip the arrows go by fiftieths of the rollout, and the tab key leads to all there is
    page.run("document.getElementById('search').focus()")
    names = []
    for _ in range(7):
        page.press("\ue004")
        names.append(page.run("const it = document.activeElement; return it.id || it.tagName"))
    assert names == ["sort", "BUTTON", "BUTTON", "SUMMARY", "SUMMARY", "measure", "strip"]


def contrast(one, other):
    """Of two colours, by WCAG 2."""

    def luminance(color):
        linear = [its / 12.92 if its <= 0.04045 else ((its + 0.055) / 1.055) ** 2.4 for its in color]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def color(text, behind=(0.0, 0.0, 0.0)):
    """Of CSS, on what is behind it."""
    numbers = [float(its) for its in re.findall(r"[\d.]+", text.replace("srgb", ""))]
    rgb = np.array(numbers[:3]) / (255 if text.startswith("rgb") else 1)
    alpha = numbers[3] if len(numbers) > 3 else 1.0
    return alpha * rgb + (1 - alpha) * np.array(behind)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour(opened, scheme):
    page = opened(rollout([7] * 4, delta=[-1.0, -0.5, 0.5, 1.0]), scheme=scheme)
    behind = color(page.style("body", "background-color"))
    backgrounds = []
    for index in range(4):
        text = color(page.style(f"#t{index}", "color"))
        backgrounds.append(color(page.style(f"#t{index}", "background-color"), behind))
        assert contrast(text, backgrounds[-1]) > 4.5
    assert backgrounds[0][0] > backgrounds[0][2]  # down is orange
    assert backgrounds[3][0] < backgrounds[3][2]  # up is blue
    assert (behind.mean() > 0.5) == (scheme == "light")
    # The half colour is nearer to the page
    for half, full in ((1, 0), (2, 3)):
        assert np.abs(backgrounds[half] - behind).sum() < np.abs(backgrounds[full] - behind).sum()
