"""Tokenizers lose nothing, train the same way each time, and say what is wrong."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from model.errors import InputError
from tests.training.tiny_pretrained import tiny_tokenizer
from training.tokenizer import (
    END_OF_TEXT,
    SEGMENT_BYTES,
    SentencePieceTokenizer,
    encode_in_parallel,
    load_tokenizer,
    pretrained_tokenizer,
    token_dtype,
    train_sentencepiece,
)

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", END_OF_TEXT, "<0x0A>", "<0xFF>"]


def corpus() -> list[bytes]:
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [(library / name).read_bytes() for name in ("argparse.py", "ast.py", "inspect.py", "typing.py")]
    # Text that spells special pieces, and SentencePiece's own marks, often enough to become pieces if training let it.
    return [*texts, "".join(SPECIALS).encode() * 200, b"a\0b " * 200, "▁▁ x▁y ▅z\n".encode() * 200]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return train_sentencepiece(corpus(), 1200)


HOSTILE = {
    "empty": "",
    "latin-1": "".join(map(chr, range(256))),
    "each ASCII pair": "".join(chr(first) + chr(second) for first in range(128) for second in range(128)),
    "NUL": "\0a\0\0b\0",
    "space marks": "▁ ▁▁  ▁a▁ b▁",
    "reserved marks": "\u2585 \u2047 \ufffd \ufeff \ufffe \uffff",
    "emoji": "🙂👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈 e\u0301 é ﬁ Å \u212b",
    "other scripts": "漢字かな 한국어 العربية हिन्दी ไทย",
    "specials": "".join(SPECIALS) + " ".join(SPECIALS),
    "white space": " a  b   c \t\t d\r\n\r\n  \n\n\n e \u00a0\u2003\u3000\x0b\x0c\x85\u2028 ",
    "only spaces": " " * 1000,
    "digits": "0123456789 3.14159 1e-5 \uff14\uff12",
    "one line of 1 MB": "no end 🙂 ▁" * 60_000,
    "one word of 1 MB": "é" * 500_000,
    "one space run of 1 MB": " " * 1_000_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_comes_back(tokenizer: SentencePieceTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert np.array_equal(tokenizer.encode(text.encode()), ids)
    # Neither "unknown" (0) nor end-of-text can come from text.
    assert ids.dtype == np.int32
    assert len(ids) == 0 or (ids.min() > tokenizer.end_of_text and ids.max() < tokenizer.vocab_size)


def test_every_character_comes_back(tokenizer: SentencePieceTokenizer) -> None:
    characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert tokenizer.decode(tokenizer.encode(characters)) == characters


def test_every_byte_string_comes_back(tokenizer: SentencePieceTokenizer) -> None:
    generator = random.Random(0)
    samples = [bytes(range(256)), b"\xff", b"\xed\xa0\x80", b"ok \xe2\x96 \xe2\x96\x81 \xc3", b"\x80" * 20_000]
    samples += [generator.randbytes(generator.randrange(100)) for _ in range(200)]
    samples += [b"".join(generator.choices([b"def ", b"\xe2\x96\x81", b"\xe2", b"\x96", b" ", b"\n", b"\0"], k=30)) for _ in range(200)]
    for sample, ids in zip(samples, tokenizer.encode_batch(samples), strict=True):
        assert tokenizer.decode_bytes(ids) == sample


def test_half_a_surrogate_pair_is_an_error(tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(InputError, match="character 1 is half of a surrogate pair"):
        tokenizer.encode("a\ud83d")


def test_ordinary_text_is_encoded_as_sentencepiece_does(tokenizer: SentencePieceTokenizer) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    text = corpus()[0].decode()[: SEGMENT_BYTES // 2]
    assert tokenizer.encode(text).tolist() == processor.encode(text)
    assert processor.decode(tokenizer.encode(text).tolist()) == text


def test_a_batch_is_its_texts_one_by_one(tokenizer: SentencePieceTokenizer) -> None:
    texts = ["", "a", *HOSTILE.values(), corpus()[1].decode()]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert np.array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode_batch([]) == []


def test_long_texts_cost_next_to_nothing_in_tokens(tokenizer: SentencePieceTokenizer) -> None:
    text = corpus()[3].decode()
    whole = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model).encode(text)
    assert len(text) > 4 * SEGMENT_BYTES
    assert len(tokenizer.encode(text)) <= len(whole) * 1.001 + 1


def test_pieces_suit_code(tokenizer: SentencePieceTokenizer) -> None:
    indented = tokenizer.encode("        return self\n")
    assert len(indented) <= 5
    assert tokenizer.decode_bytes(indented[:1]).strip(b" ") == b""
    # Digits stand alone.
    assert len(tokenizer.encode("1234567")) == 7


def test_training_is_repeatable_and_quiet(tokenizer: SentencePieceTokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert train_sentencepiece(iter(corpus()), 1200).model == tokenizer.model
    assert capfd.readouterr() == ("", "")


def test_a_vocabulary_above_the_text_says_the_largest() -> None:
    texts = [b"the quick brown fox jumps over the lazy dog\n"] * 5
    with pytest.raises(InputError, match=r"vocab_size = 5000 is more than the text supports: the largest possible is (\d+)") as raised:
        train_sentencepiece(texts, 5000)
    assert "\n" not in str(raised.value)
    largest = int(str(raised.value).split("possible is ")[1].split(";")[0])
    assert train_sentencepiece(texts, largest).vocab_size == largest
    with pytest.raises(InputError, match="the largest possible"):
        train_sentencepiece(texts, largest + 1)


def test_a_vocabulary_below_the_characters_says_the_smallest() -> None:
    texts = ["".join(map(chr, range(0x4E00, 0x4F00))).encode()] * 5
    with pytest.raises(InputError, match="too small for the characters of the text: give at least") as raised:
        train_sentencepiece(texts, 300)
    smallest = int(str(raised.value).split("at least ")[1])
    assert train_sentencepiece(texts, smallest).vocab_size == smallest


@pytest.mark.parametrize("texts", [[], [b""], [b"\n\r\n"], [b"\0\0"]])
def test_no_text_is_an_error(texts: list[bytes]) -> None:
    with pytest.raises(InputError, match="no text to train the tokenizer on"):
        train_sentencepiece(texts, 300)


def test_save_and_load(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.kind, loaded.vocab_size, loaded.end_of_text) == ("sentencepiece", 1200, 1)
    assert np.array_equal(loaded.encode(HOSTILE["latin-1"]), tokenizer.encode(HOSTILE["latin-1"]))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model[:1000])
    with pytest.raises(InputError, match="does not hold a whole tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="does not hold a whole tokenizer"):
        load_tokenizer(tmp_path / "absent")


# ------------------------------------------------------------------------------------------------------------ pretrained


def test_a_pretrained_tokenizer(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "given")
    tokenizer = pretrained_tokenizer(str(tmp_path / "given"))
    text = "the <|endoftext|> fox <|endoftext|>\0 🙂\r\n  ▁ " + "long " * 5000
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids  # a document that spells the special token does not end there
    assert tokenizer.end_of_text == 0
    assert ids.max() < tokenizer.vocab_size <= 300
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.kind == "pretrained"
    assert np.array_equal(loaded.encode(text.encode()), ids)
    assert loaded.encode_batch([]) == []


def test_a_pretrained_tokenizer_without_an_end_is_an_error(tmp_path: Path) -> None:
    tiny_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no end-of-sequence token"):
        pretrained_tokenizer(str(tmp_path))


def test_a_missing_pretrained_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        pretrained_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(InputError, match="no tokenizer can be loaded from") as raised:
        pretrained_tokenizer(str(tmp_path))
    assert "\n" not in str(raised.value)


# --------------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_same_ids_in_the_same_order(tokenizer: SentencePieceTokenizer, tmp_path: Path, workers: int) -> None:
    tokenizer.save(tmp_path)
    texts = [text.encode() for text in HOSTILE.values() if len(text) < 100_000 and text]
    batches = [[texts[start : start + 2], texts[start + 2 : start + 3]] for start in range(0, len(texts), 3)] * 5
    batches.append([[], [b"last"]])
    results = list(encode_in_parallel(tmp_path, iter(batches), workers))
    assert len(results) == len(batches)
    for batch, result in zip(batches, results, strict=True):
        for group, ids in zip(batch, result, strict=True):
            assert ids.dtype == np.uint16
            assert ids.tolist() == [token for text in group for token in [*tokenizer.encode(text).tolist(), tokenizer.end_of_text]]


def test_workers_do_not_import_from_the_current_folder(
    tokenizer: SentencePieceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("raise RuntimeError('another project')")
    monkeypatch.chdir(tmp_path)
    assert len(list(encode_in_parallel(tmp_path, [[[b"x"]]], 1))) == 1


def test_a_failing_worker_is_reported(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    with pytest.raises(RuntimeError, match=r"a tokenising process failed:\n(.|\n)*AttributeError"):
        list(encode_in_parallel(tmp_path, [[[5]]], 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="a tokenising process died"):
        list(encode_in_parallel(tmp_path / "absent", [[[b"x"]]], 1))


@pytest.mark.parametrize(("vocab_size", "name"), [(300, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_token_dtype(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size).name == name
