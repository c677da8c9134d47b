"""Which token dropped which, when, and what kinds of tokens live long: read off what each layer decides in a pass over a text.

A token that is dropped is dropped for good, so how many queries read it says all: with r of them, its own among them, token j was read by
queries j to j + r - 1, and query j + r, if the text goes on so far, is the one that dropped it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.context_pruning import Decided

CLASSES = ("word", "identifier", "number", "punctuation", "whitespace", "other")
POSITIONS = 32  # columns of the map over positions

# A run of letters and digits, with what holds parts of one name together; a call's parenthesis shows what stands before it to be a name.
_WORD = re.compile(r"\w+(?:[.:]{1,2}(?=\w)\w+|(?<=[^\W\d_])['’\-](?=[^\W\d_])\w+)*(\(?)")


class Reads:
    """An observer (`model.context_pruning.observing`) of one forward pass over whole texts: how many queries read each token."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.by_layer: dict[int, Tensor] = {}

    def __call__(self, decided: Decided) -> None:
        read = (decided.log_keep > -torch.inf).sum(1)  # (batch, tokens up to the last of these queries)
        if decided.layer not in self.by_layer:
            self.by_layer[decided.layer] = read.new_zeros(len(read), self.length)
        self.by_layer[decided.layer][:, : read.shape[1]] += read

    def counts(self) -> Tensor:
        """(layers, batch, length) int64, on the CPU."""
        return torch.stack([self.by_layer[layer] for layer in sorted(self.by_layer)]).cpu()


def token_classes(pieces: Sequence[str]) -> list[str]:
    """The class of each token of a text, from its pieces in order: one of `CLASSES`.

    A token belongs to the word that its first letter or digit is in. An identifier is a word with an underscore, a capital after a
    small letter, a digit beside a letter, a dot or colons within, or an opening parenthesis right after it.
    """
    text, starts = "".join(pieces), np.cumsum([0, *map(len, pieces)])
    kinds: dict[int, str] = {}
    for match in _WORD.finditer(text):
        word = match[0].removesuffix("(")
        letters, digits = any(c.isalpha() for c in word), any(c.isdigit() for c in word)
        if not letters:
            kind = "identifier" if "_" in word else "number"
        elif match[1] or "_" in word or digits or re.search(r"[a-z][A-Z]|[.:]", word):
            kind = "identifier"
        else:
            kind = "word"
        kinds.update(dict.fromkeys(range(match.start(), match.start() + len(word)), kind))
    found = []
    for piece, start in zip(pieces, starts, strict=False):
        places = [int(start) + i for i, c in enumerate(piece) if not c.isspace()]
        # a piece's own letters say what it is; with none, as ".." or "_", it is a part of a word only where that word goes on after it
        lettered = next((kinds[place] for place in places if place in kinds and (text[place].isalnum())), None)
        joined = next((kinds[place] for place in places if place in kinds), None)
        if not places:
            found.append("whitespace")
        elif "\ufffd" in piece:
            found.append("other")
        elif lettered or joined:
            found.append(lettered or joined)
        else:
            found.append("punctuation" if all(_is_punctuation(text[place]) for place in places) else "other")
    return found


def _is_punctuation(character: str) -> bool:
    import unicodedata

    return unicodedata.category(character)[0] in "PS"


def summarise(reads: Tensor, classes: Sequence[Sequence[str]], layers: Sequence[int]) -> dict[str, Any]:
    """Lifetimes by layer, by class and by position.

    Args:
        reads: (layers, texts, length), of `Reads`.
        classes: of each text, the class of each token.
    """
    length = reads.shape[2]
    horizon = length // 2
    early = reads[:, :, : length - horizon]  # each of these is followed by `horizon` tokens at least
    named = np.array([list(row)[: length - horizon] for row in classes])
    of_class = {name: torch.from_numpy(named == name) for name in CLASSES}
    places = torch.arange(length)
    later = (reads - 1).sum(1).float()[:, :-1] / (len(classes) * (length - 1 - places[:-1]))  # (layers, length - 1)
    columns = [chunk.mean(1) for chunk in later.tensor_split(min(POSITIONS, length - 1), dim=1)]
    edges = [int(chunk[0]) for chunk in places[:-1].tensor_split(min(POSITIONS, length - 1))]
    return {
        "horizon": horizon,
        "tokens": {name: int(chosen.sum()) for name, chosen in of_class.items()},
        "layers": [
            {
                "layer": layer,
                **_lifetime(early[i].flatten(), horizon),
                "classes": {name: _lifetime(early[i][chosen], horizon) for name, chosen in of_class.items() if chosen.any()},
                "read_by_later_tokens": [float(column[i]) for column in columns],
            }
            for i, layer in enumerate(layers)
        ],
        "positions": edges,
    }


def _lifetime(reads: Tensor, horizon: int) -> dict[str, float | None]:
    """Of some tokens: the share dropped within the horizon, and the median lifetime, None where that is beyond it."""
    dropped = reads <= horizon
    median = float((reads - 1).float().quantile(0.5, interpolation="lower"))
    return {"dropped_share": float(dropped.float().mean()), "median_lifetime": median if median < horizon else None}
