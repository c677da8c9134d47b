"""The page that shows which token dropped which: its script in Node and in a real Chromium, as tests/analysis/test_page.py does it."""

from __future__ import annotations

import re
from typing import Any

import torch

from analysis.context_page import LEVELS, SCRIPT, context_page
from analysis.lifetimes import summarise, token_classes
from tests.analysis.test_page import box, browser, in_node  # noqa: F401  # browser: a fixture

HOSTILE = '</span><script>alert("x")</script>&amp;'
PIECES = [["A", " <b>", "\n", HOSTILE, " cat", ".", " x", "1"], ["other", " text", ",", " of", " as", " many", " tok", "ens"]]
# how many queries read each token: layer 0 drops tokens 1 and 3 at token 4, and 2 at 6; layer 3 nothing of the first text
READS = torch.tensor(
    [[[8, 3, 4, 1, 4, 3, 2, 1], [8, 7, 6, 5, 4, 3, 2, 1]], [[8, 7, 6, 5, 4, 3, 2, 1], [1, 1, 1, 1, 1, 1, 1, 1]]], dtype=torch.int64
)


def the_page() -> str:
    classes = [token_classes(row) for row in PIECES]
    entry = {"name": "run <one>", "threshold": 0.25, "lifetimes": summarise(READS, classes, [0, 3])}
    return context_page(entry, PIECES, READS)


def at(token: int, kind: str = "pointerenter", **more: Any) -> dict[str, Any]:
    return {"selector": "span.token", "index": token, "kind": kind, **more}


SAID_OF_1 = "layer 0: “ <b>” (1)\ndropped by “ cat” (4), 3 tokens later; read by 2\ndrops none"
SAID_OF_4 = f"layer 0: “ cat” (4)\ndropped by none: read by all 3 later tokens\ndrops “ <b>” (1), “{HOSTILE}” (3)"
LAYER = {"selector": "input.", "index": 0, "kind": "input"}


def test_a_token_says_who_dropped_it_and_whom_it_dropped():
    said = in_node(the_page(), [at(1), at(4), at(2), at(0, "pointerdown")], SCRIPT)
    assert said[:2] == [SAID_OF_1, SAID_OF_4]
    assert said[2] == "layer 0: “⏎” (2)\ndropped by “ x” (6), 4 tokens later; read by 3\ndrops none"
    assert said[3] == "layer 0: “A” (0)\ndropped by none: read by all 7 later tokens\ndrops none"


def test_colours_marks_and_layers():
    shown = {"selector": "output", "index": 0, "kind": "text"}
    classes = [at(token, "class") for token in range(8)]
    later = [{**LAYER, "value": "1"}, shown, *classes, at(12, "class")]
    found = in_node(the_page(), [shown, *classes, at(4), *classes, {"selector": "div.tokens", "index": 0, "kind": "blur"}, *later], SCRIPT)
    never, short = f"token life-{len(LEVELS) + 1}", "token life-0"
    kept = READS.sum((1, 2)) / (2 * 36)
    assert found[0] == f"layer 0, {100 * kept[0]:.1f}% of the context kept"
    assert found[1:9] == [never, short, short, short, never, never, never, never]
    assert found[10:18] == [never, short + " dropped", short, short + " dropped", never + " here", never, never, never]
    assert found[18] is None and found[20] == f"layer 3, {100 * kept[1]:.1f}% of the context kept"
    assert found[21:29] == [never] * 8 and found[29] == short
    found = in_node(the_page(), [at(1), *classes], SCRIPT)
    assert found[5] == never + " dropper"


def test_arrow_keys_walk_and_a_layer_changes_under_the_pointer():
    pressed = ("ArrowRight", "ArrowRight", "ArrowLeft", "Escape")
    keys = [{"selector": "div.tokens", "index": 0, "kind": "keydown", "key": key} for key in pressed]
    said = in_node(the_page(), [*keys, at(1), {**LAYER, "value": "1"}], SCRIPT)
    assert [text and text.split("\n")[0] for text in said[:4]] == ["layer 0: “A” (0)", "layer 0: “ <b>” (1)", "layer 0: “A” (0)", None]
    assert said[5] == "layer 3: “ <b>” (1)\ndropped by none: read by all 6 later tokens\ndrops none"


def test_nothing_of_the_text_is_markup():
    html = the_page()
    assert html.count("<script>") == 1 and "alert(&quot;x&quot;)" in html and HOSTILE not in html
    assert "run &lt;one&gt;" in html and "run <one>" not in html
    assert not re.search(r"eval|Function|innerHTML|outerHTML|document\.write|fetch|XMLHttp|import\(", SCRIPT)


def test_in_a_real_browser(browser, tmp_path):  # noqa: F811
    """Values under the pointer, light and dark, no wider than a phone, and no complaint."""
    (tmp_path / "page.html").write_text(the_page())
    browser.events.clear()
    browser.open(tmp_path / "page.html")
    shown = "(() => { const t = document.getElementById('tip'); return t.hidden ? null : t.textContent; })()"
    place = box(browser, "span.token:nth-child(5)")
    browser.mouse("mouseMoved", place["left"] + place["width"] / 2, place["top"] + place["height"] / 2)
    assert browser.run(shown) == SAID_OF_4
    colours = "[...document.querySelectorAll('span.token')].slice(0, 5).map(e => getComputedStyle(e).backgroundColor)"
    paper, found = "getComputedStyle(document.body).backgroundColor", []
    for scheme in ("light", "dark"):
        browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        found.append((browser.run(paper), browser.run(colours)))
    assert found[0][0] != found[1][0] and found[0][1][0] != found[1][1][0]
    for _, colour in found:
        assert colour[0] == colour[4] != colour[1] == colour[3]
    assert browser.run("document.querySelectorAll('span.token')[3].textContent") == HOSTILE
    browser.run("(() => { const s = document.getElementById('layer'); s.value = '1'; s.dispatchEvent(new Event('input')); })()")
    assert browser.run("document.getElementById('shown').textContent").startswith("layer 3, ")
    browser.send("Emulation.setDeviceMetricsOverride", width=375, height=800, deviceScaleFactor=2, mobile=True)
    assert browser.run("document.documentElement.scrollWidth") <= 375
    browser.send("Emulation.clearDeviceMetricsOverride")
    assert browser.complaints() == []
