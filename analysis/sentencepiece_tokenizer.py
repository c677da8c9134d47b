"""A SentencePiece BPE model as a transformers tokenizer, and whether it cuts text the same way.

SentencePiece always joins the two neighbours whose union has the best score; transformers joins by a list of pairs in order. The
list here has every pair of pieces that makes a piece, in the order of the pieces' scores, which is the order in which they were
learned. `first_difference` tries samples that differ where the two could: it is a test, not a proof.
"""

from __future__ import annotations

import random
from typing import Any

from transformers import PreTrainedTokenizerFast

SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside a piece


def as_transformers(processor: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a BPE `SentencePieceProcessor` that takes text as it is, byte fallback included (Burnish trains no other)."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    special = {i for i in range(processor.vocab_size()) if processor.is_control(i) or processor.is_unknown(i)}
    joined = [i for i in range(processor.vocab_size()) if i not in special and not processor.is_byte(i)]
    merges = []
    for i in sorted(joined, key=processor.get_score, reverse=True):
        piece = processor.id_to_piece(i)
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in pieces and right in pieces]
        merges += sorted(known, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
    unknown = processor.id_to_piece(processor.unk_id())
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE_MARK)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    end = processor.id_to_piece(processor.eos_id()) if processor.eos_id() >= 0 else None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, eos_token=end, pad_token=end, clean_up_tokenization_spaces=False
    )


def first_difference(tokenizer: PreTrainedTokenizerFast, processor: Any, samples: int = 400) -> str | None:
    """A text that the two encode differently, or that comes back altered; None when there is none among the samples."""
    generator = random.Random(0)
    texts = [
        "",
        " ",
        "  two  spaces ",
        "\n\n\tdef f(x):\n        return x + 12345\n",
        "naïve café, 東京, 🙂🙃",
        "a\u0301 \u00a0 \ufeff",
        "\x00\x01",
    ]
    reserved = (processor.is_control, processor.is_unknown, processor.is_byte)
    ordinary = [i for i in range(processor.vocab_size()) if not any(is_reserved(i) for is_reserved in reserved)]
    for _ in range(samples):
        chosen = generator.choices(ordinary, k=generator.randint(1, 40))
        texts.append("".join(processor.id_to_piece(i) for i in chosen).replace(SPACE_MARK, " "))
    for text in texts:
        ids = processor.encode(text)
        if tokenizer.encode(text, add_special_tokens=False) != ids or tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            return text
    return None
