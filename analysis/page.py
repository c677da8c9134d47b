"""The shell of an HTML page that needs nothing but itself: style, frame, tables, script. Every text passed in is escaped here."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")

# Colour-blind-safe run colours (Okabe and Ito), a shade lighter on a dark page.
_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --panel: #ffffff; --ink: #1d2126; --soft: #5d6670; --line: #e3e5e8; --accent: #0072b2;
  --run-0: #0072b2; --run-1: #d55e00; --run-2: #009e73; --run-3: #b5598a; --run-4: #b07d00; --run-5: #2a8fc7; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171a; --panel: #1b1f24; --ink: #e6e8ea; --soft: #9aa4ae; --line: #2e343b; --accent: #5db4e8;
  --run-0: #4fa8de; --run-1: #f08a45; --run-2: #35c39a; --run-3: #dd8fb9; --run-4: #e6b84a; --run-5: #8accf0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { overflow-wrap: anywhere; font-size: 1.9rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 52px 0 4px; letter-spacing: -.005em; }
h3 { font-size: 1rem; margin: 0 0 8px; overflow-wrap: anywhere; }
p { margin: 6px 0 14px; max-width: 75ch; overflow-wrap: anywhere; }
.lead, .note, figcaption { color: var(--soft); }
.note, figcaption { font-size: .88rem; }
figcaption { margin-top: 6px; }
.grid { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); margin: 14px 0; }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 0; min-width: 0; }
.maps { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg text.axis { font-size: 12.5px; }
svg.map text, svg.map text.axis { font-size: 15px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .level { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 6 4; }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 4px 0 0 11%; font-size: .85rem; color: var(--soft); }
.legend i { background: currentColor; display: inline-block; width: 16px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
.legend i.dashed { width: 7px; margin-right: 15px; box-shadow: 9px 0 0 0 currentColor; }
.scroll { overflow-x: auto; margin: 14px 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: .82rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: nowrap; }
table + h3, .grid + h3 { margin-top: 26px; }
svg.map { shape-rendering: crispEdges; }
svg.map, svg.lines { cursor: crosshair; touch-action: pan-y; }
svg .mark { fill: none; stroke: #ffffff; stroke-width: 2; paint-order: stroke; pointer-events: none; }
svg .ruler { stroke: var(--soft); stroke-width: 1; pointer-events: none; }
svg:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
#tip { position: fixed; z-index: 9; pointer-events: none;
  max-width: min(340px, 90vw); padding: 7px 10px; border-radius: 7px;
  font-size: .85rem; line-height: 1.4; background: var(--ink); color: var(--page); font-variant-numeric: tabular-nums;
  white-space: pre-line; }
.sortable button { all: unset; cursor: pointer; } .sortable button:focus-visible { outline: 2px solid var(--accent); }
.sortable th[aria-sort="ascending"] button::after { content: " \\2191"; }
.sortable th[aria-sort="descending"] button::after { content: " \\2193"; }
td.text, th.text { text-align: left; }
td b { font-weight: 650; }
td.text { color: var(--soft); font-size: .86rem; min-width: 16em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 0; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre, code { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; overflow-x: auto; }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 60px; padding-top: 16px; border-top: 1px solid var(--line); color: var(--soft); font-size: .85rem; }
@media (max-width: 640px) { main { padding: 24px 16px 60px; } td.text, th.text { display: none; } th { overflow-wrap: anywhere; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; } }
@media print { body { background: #fff; } .panel { break-inside: avoid; } }
"""


def page(title: str, body: str, script: str = SCRIPT, style: str = "") -> str:
    """A whole document. The security policy lets the page load nothing, and run its own script alone, whatever text it shows.

    style: CSS beside what all pages have.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f'<div id="tip" role="status" hidden></div>\n<script>{script}</script>\n</body>\n</html>\n'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = (), sortable: bool = False) -> str:
    """A table that scrolls sideways on a narrow screen. Cells are HTML already; heads are text, and sort the rows when pressed."""

    def cell(tag: str, i: int, content: str) -> str:
        return f"<{tag}{' class=text' if i in text_columns else ''}>{content}</{tag}>"

    heads = [f'<button type="button">{escape(text)}</button>' if sortable else escape(text) for text in head]
    header = "".join(cell("th", i, text) for i, text in enumerate(heads))
    body = "".join("<tr>" + "".join(cell("td", i, content) for i, content in enumerate(row)) + "</tr>" for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of named facts, as text."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs if value) + "</dl>"


def panel(title: str, content: str, colour: str | None = None, caption: str = "") -> str:
    """A framed part with a heading, a colour dot where it stands for a run, and a caption. `content` is HTML."""
    dot = f'<span class="swatch" style="background:{colour}"></span>' if colour else ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="panel"><h3>{dot}{escape(title)}</h3>{content}{below}</figure>'


def section(title: str, explanation: str, *content: str) -> str:
    """A heading, a sentence or two on how to read what follows, and the content (HTML)."""
    paragraph = f"<p>{escape(explanation)}</p>" if explanation else ""
    return f"<section><h2>{escape(title)}</h2>{paragraph}{''.join(content)}</section>"


def grid(*panels: str) -> str:
    return f'<div class="grid">{"".join(panels)}</div>'


def folded(title: str, text: str) -> str:
    """Text that a reader may unfold."""
    return folded_html(title, f"<pre>{escape(text)}</pre>")


def folded_html(title: str, content: str) -> str:
    """HTML that a reader may unfold."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"
