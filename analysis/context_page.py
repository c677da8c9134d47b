"""One page that shows which token dropped which: the text coloured by how long each token was read, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from analysis.page import folded_html, page, section, table

SCRIPT = Path(__file__).with_name("context_page.js").read_text(encoding="utf-8")

_STYLE = """
.layers { position: sticky; top: 0; z-index: 5; background: var(--page); padding: 10px 0; display: flex; flex-wrap: wrap; gap: 6px 14px;
  align-items: center; border-bottom: 1px solid var(--line); }
.layers input { flex: 1 1 220px; min-width: 0; accent-color: var(--accent); height: 28px; }
.layers output { min-width: 16ch; font-variant-numeric: tabular-nums; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: .92rem/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; margin: 14px 0; cursor: crosshair; }
.token { border-radius: 3px; padding: 1px 0; }
.token.here { outline: 2px solid var(--ink); }
.token.dropper { outline: 2px solid var(--run-1); }
.token.dropped { outline: 2px dashed var(--run-2); }
.scale { display: flex; flex-wrap: wrap; gap: 4px 10px; font-size: .85rem; color: var(--soft); align-items: center; }
.scale span { padding: 1px 8px; border-radius: 3px; color: var(--ink); }
.life-0 { color: var(--soft); } .life-1 { background: rgb(0 114 178 / 12%); } .life-2 { background: rgb(0 114 178 / 26%); }
.life-3 { background: rgb(0 114 178 / 44%); } .life-4 { background: rgb(230 159 0 / 45%); }
@media (prefers-color-scheme: dark) { .life-1 { background: rgb(86 180 233 / 14%); } .life-2 { background: rgb(86 180 233 / 28%); }
  .life-3 { background: rgb(86 180 233 / 46%); } .life-4 { background: rgb(230 159 0 / 42%); } }
"""
LEVELS = (16, 64, 256)  # a colour for tokens that fewer later ones read, one for those that more did, and one for those never dropped


def context_page(entry: dict[str, Any], pieces: Sequence[Sequence[str]], reads: Tensor) -> str:
    """A whole document.

    Args:
        entry: the checkpoint's, of context.json, with `lifetimes`.
        pieces: of each text, the text of each token.
        reads: (layers, texts, length): how many queries read each token, of `analysis.lifetimes.Reads`.
    """
    layers = [layer["layer"] for layer in entry["lifetimes"]["layers"]]
    names = [f"layer {layer}" for layer in layers]
    data = f'data-names="{escape(json.dumps(names))}" data-levels="{escape(json.dumps(LEVELS))}"'
    slider = (
        '<div class="layers"><label for="layer">layer</label>'
        f'<input type="range" id="layer" min="0" max="{len(layers) - 1}" value="0" {data}><output id="shown" for="layer"></output></div>'
    )
    limits = [f"read by under {LEVELS[0]} later tokens", *(f"under {limit}" for limit in LEVELS[1:]), "more", "never dropped"]
    scale = "".join(f'<span class="life-{level}">{escape(text)}</span>' for level, text in enumerate(limits))
    texts = [_text(number, row, reads[:, number]) for number, row in enumerate(pieces)]
    body = (
        f'<h1>Which token dropped which</h1><p class="lead">{escape(entry["name"])}: {len(layers)} layers, '
        f"threshold {entry['threshold']:.3g}, texts of {reads.shape[2]} tokens</p>"
        + section(
            "The text",
            "Each layer drops for itself. Point at a token, or tap it, or walk with the arrow keys: outlined in orange is the token that "
            "dropped it, dashed in green are those that it dropped. A token that the text ends after is not said to be dropped.",
            slider,
            f'<div class="scale">{scale}</div>',
            *texts,
        )
        + section(
            "By class of token",
            f"Of the tokens that {entry['lifetimes']['horizon']} others follow: the share dropped within so many, and the median number of "
            "later tokens that still read one.",
            _classes(entry["lifetimes"]),
        )
    )
    return page(f"{entry['name']}: which token dropped which", body, SCRIPT, _STYLE)


def _text(number: int, pieces: Sequence[str], reads: Tensor) -> str:
    """One text: a span a token, and in data-reads how many queries read each, a list a layer."""
    spans = "".join(f'<span class="token">{escape(piece) or "&#8203;"}</span>' for piece in pieces)
    data = escape(json.dumps(reads.tolist(), separators=(",", ":")))
    return f'<div class="tokens" tabindex="0" aria-label="text {number + 1}" data-reads="{data}">{spans}</div>'


def _classes(lifetimes: dict[str, Any]) -> str:
    names = [name for name, count in lifetimes["tokens"].items() if count]

    def cell(values: dict[str, Any]) -> str:
        median = values["median_lifetime"]
        return f"{values['dropped_share']:.0%}, {'longer' if median is None else f'{median:.0f}'}"

    rows = [[str(layer["layer"]), cell(layer), *(cell(layer["classes"][name]) for name in names)] for layer in lifetimes["layers"]]
    counts = [f"{name} ({lifetimes['tokens'][name]:,})" for name in names]
    return folded_html("share dropped, median lifetime", table(["layer", "all", *counts], rows))
