"""Finding one sentence again: a code is told once within filler text, at several depths, and asked for at the end.

Scored by teacher forcing: how likely each token of the code is, given those before it. That needs one pass a text, and says more than right
or wrong.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from analysis.tokens import Tokenizer
from model.errors import InputError

DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)
TOLD, AFTER, ASKED = "\nThe secret code is", ". Remember it.\n", "\nThe secret code is"
DIGITS = 6


@dataclass
class Needles:
    """tokens (texts, length + 1), the last `answer` of them the code; depths (texts,): where in the filler the code was told."""

    tokens: Tensor
    answer: int
    depths: list[float]


def make_needles(tokenizer: Tokenizer, fillers: Tensor, each: int, seed: int = 0) -> Needles:
    """`each` needles at every depth, in the filler texts (texts, length + 1) in turn.

    Raises:
        InputError: the texts are too short for the sentence.
    """
    chosen, length = random.Random(seed), fillers.shape[1]
    before, after, asked = (tokenizer.encode(text) for text in (TOLD, AFTER, ASKED))
    rows, depths, answer = [], [], None
    while len(rows) < each * len(DEPTHS):
        code = tokenizer.encode(" " + "".join(chosen.choices("0123456789", k=DIGITS)))
        if answer is not None and len(code) != answer:  # a tokenizer that cuts numbers unevenly
            continue
        answer = len(code)
        room = length - len(before) - len(after) - len(asked) - 2 * answer
        if room < length // 4:
            raise InputError(f"--needle: texts of {length - 1} tokens have no room for the sentence and the question; raise --length")
        filler = fillers[len(rows) % len(fillers)].tolist()[:room]
        depth = DEPTHS[len(rows) // each]
        place = round(depth * room)
        rows.append([*filler[:place], *before, *code, *after, *filler[place:], *asked, *code])
        depths.append(depth)
    assert answer is not None
    return Needles(torch.tensor(rows, dtype=torch.int64), answer, depths)


def score_needles(needles: Needles, nll: Tensor, correct: Tensor) -> dict[str, Any]:
    """Of nll and correct (texts, length): exact matches and the mean log-probability, over all and by depth."""
    log_probability = -nll[:, -needles.answer :].double().mean(1)
    exact = correct[:, -needles.answer :].all(1).double()
    by_depth = []
    for depth in dict.fromkeys(needles.depths):
        chosen = torch.tensor([found == depth for found in needles.depths])
        by_depth.append({"depth": depth, "exact": float(exact[chosen].mean()), "log_probability": float(log_probability[chosen].mean())})
    return {
        "needles": len(exact),
        "code_tokens": needles.answer,
        "exact": float(exact.mean()),
        "log_probability": float(log_probability.mean()),
        "by_depth": by_depth,
    }
