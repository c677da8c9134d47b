"""Tokenizers: a SentencePiece model trained on the data, or a pretrained model's own Hugging Face tokenizer.

`train_sentencepiece` and `pretrained_tokenizer` make one, `save` writes it to a folder, `load_tokenizer` reads it back.
`encode_in_parallel` encodes many batches with worker processes. A worker is this module run as a program: a fresh
interpreter that loads neither torch nor the caller's main module, so there is no fork among threads and it starts fast.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np

from model.errors import InputError, one_line
from model.hub import locate

END_OF_TEXT = "<|end_of_text|>"
SPACE_MARK = "\u2581".encode()  # how SentencePiece writes a space inside a piece
SEGMENT_BYTES = 1 << 14  # longer texts are encoded in segments: SentencePiece slows down with the length of a text
DESCRIPTION = "description.json"


class Tokenizer(Protocol):
    """Text to token ids and back."""

    kind: str
    vocab_size: int
    end_of_text: int

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids (int32) of a text; no end-of-text is added, and text that spells a special token is ordinary text."""
        ...

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]: ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD. End-of-text decodes to nothing."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer and its description into an existing folder."""
        ...


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"text is not valid Unicode: character {error.start} is half of a surrogate pair; give it as bytes") from error


# --------------------------------------------------------------------------------------------------------- SentencePiece


class SentencePieceTokenizer:
    """A SentencePiece BPE model, lossless for every text and, given as `bytes`, for every byte string.

    Two things are done here rather than by SentencePiece, which would lose them: U+2581, its own mark for a space, is
    encoded as three byte pieces, and so are bytes that are not UTF-8. Decoding joins the bytes of the pieces.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.vocab_size()
        self.end_of_text: int = self._processor.eos_id()
        self._byte_ids = np.array([self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)], dtype=np.int32)
        self._pieces = [self._piece_bytes(token) for token in range(self.vocab_size)]

    def _piece_bytes(self, token: int) -> bytes:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        piece: str = self._processor.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if self._processor.is_byte(token) else piece.encode().replace(SPACE_MARK, b" ")

    def encode(self, text: str | bytes) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        ordinary: list[bytes] = []  # all segments that SentencePiece encodes, over all texts, for one call
        parts: list[list[np.ndarray | None]] = []  # by text: None stands for the next ordinary segment
        for text in texts:
            row: list[np.ndarray | None] = []
            for segment, verbatim in _segments(_utf8(text) if isinstance(text, str) else text):
                if verbatim:
                    row.append(self._byte_ids[np.frombuffer(segment, dtype=np.uint8)])
                else:
                    row.append(None)
                    ordinary.append(segment)
            parts.append(row)
        encoded = iter(self._processor.encode(ordinary, return_type="numpy", num_threads=1) if ordinary else [])
        rows = [[next(encoded) if part is None else part for part in row] for row in parts]
        return [row[0] if len(row) == 1 else np.concatenate([np.empty(0, dtype=np.int32), *row]) for row in rows]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._pieces[token] for token in ids)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self.model)
        _write_description(folder, self)


def _segments(text: bytes) -> Iterator[tuple[bytes, bool]]:
    """Cut a text into (segment, verbatim): verbatim ones are written byte by byte, the others are valid UTF-8 for SentencePiece."""
    try:
        text.decode()
    except UnicodeDecodeError:
        for number, run in enumerate(re.split("([\udc80-\udcff]+)", text.decode(errors="surrogateescape"))):
            if number % 2:
                yield run.encode(errors="surrogateescape"), True
            elif run:
                yield from _segments(run.encode())
        return
    if SPACE_MARK in text:
        for number, run in enumerate(re.split(b"((?:" + SPACE_MARK + b")+)", text)):
            if number % 2:
                yield run, True
            elif run:
                yield from _segments(run)
        return
    start = 0
    while len(text) - start > SEGMENT_BYTES:
        window = text[start : start + SEGMENT_BYTES + 1]
        length = cut_position(window, SEGMENT_BYTES)
        yield window[:length], False
        start += length
    if start < len(text):
        yield text[start:], False


def cut_position(text: bytes, limit: int) -> int:
    """Where to cut a UTF-8 text longer than `limit`: after the last line end within `limit` bytes, else between two characters."""
    position = text.rfind(b"\n", 0, limit) + 1
    if position == 0:
        position = limit
        while position > limit - 3 and text[position] & 0xC0 == 0x80:
            position -= 1
    return position


def train_sentencepiece(texts: Iterable[bytes], vocab_size: int) -> SentencePieceTokenizer:
    """Train a BPE model with `vocab_size` pieces on UTF-8 texts: byte fallback, text as it is, digits apart, runs of spaces kept.

    The same texts give the same model. Raises InputError when the text is empty or does not support the vocabulary.
    """
    import sentencepiece

    # SentencePiece skips a sentence with a NUL or with one of its own marks (U+2581 and U+2585): cut there instead.
    sentences = (part for text in texts for part in re.split("[\0\u2581\u2585]+", text.decode()) if part.strip("\r\n"))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentencepiece_length=32,
            max_sentence_length=1 << 30,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_TEXT,
            num_threads=1,  # the model file records it
            minloglevel=3,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    return SentencePieceTokenizer(model.getvalue())


def _training_error(message: str, vocab_size: int) -> Exception:
    if largest := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        return InputError(
            f"data.tokenizer.vocab_size = {vocab_size} is more than the text supports: "
            f"the largest possible is {largest[1]}; lower it or give more text"
        )
    if smallest := re.search(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)", message):
        return InputError(
            f"data.tokenizer.vocab_size = {vocab_size} is too small for the characters of the text: give at least {int(smallest[1]) + 1}"
        )
    if "sentences_.empty()" in message:
        return InputError("there is no text to train the tokenizer on: the training split of the corpus is empty")
    return RuntimeError(f"SentencePiece training failed: {message}")


# ------------------------------------------------------------------------------------------------------------ pretrained


class PretrainedTokenizer:
    """A Hugging Face tokenizer; what it loses of a text is lost (SentencePieceTokenizer loses nothing)."""

    kind = "pretrained"

    def __init__(self, tokenizer: Any, name: str) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"tokenizer {name} has no end-of-sequence token, which ends documents: set one in it or use another")
        self._tokenizer = tokenizer
        self.end_of_text: int = int(tokenizer.eos_token_id)
        self.vocab_size: int = max(len(tokenizer), self.end_of_text + 1)

    def encode(self, text: str | bytes) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        if not texts:
            return []
        strings = [(_utf8(text) if isinstance(text, str) else text).decode(errors="replace") for text in texts]
        # split_special_tokens: a document that spells "</s>" must not end there. verbose: no warning about long texts.
        encoded = self._tokenizer(strings, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False)
        return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids if token != self.end_of_text], clean_up_tokenization_spaces=False)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode()

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)
        _write_description(folder, self)


def pretrained_tokenizer(path: str) -> PretrainedTokenizer:
    """The tokenizer of a folder, a hub name, a GGUF file or `package:NAME` (model/hub.py).

    Raises InputError when there is none or it has no end-of-sequence token.
    """
    import transformers

    local = Path(path).expanduser()
    if not local.exists() and path.startswith((".", "/", "~")):
        raise InputError(f"data.tokenizer.path: {path} does not exist: give a folder or a name on the Hugging Face hub")
    where, arguments = str(local) if local.exists() else path, {}
    if path.startswith("package:") or path.endswith(".gguf") or any(local.glob("*.gguf")):
        where, arguments = locate(path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False, **arguments)
    # Missing names, no connection, broken files and unknown classes raise exceptions of many libraries, which mean the same here.
    except Exception as error:
        raise InputError(f"data.tokenizer.path: no tokenizer can be loaded from {path} ({one_line(error)})") from error
    return PretrainedTokenizer(tokenizer, path)


# ------------------------------------------------------------------------------------------------------------ save, load


def _write_description(folder: Path, tokenizer: Tokenizer) -> None:
    description = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Read a tokenizer that `save` wrote. Raises InputError when the folder does not hold a whole one."""
    folder = Path(folder)
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        if description["kind"] == "pretrained":
            return pretrained_tokenizer(str(folder.resolve()))
        return SentencePieceTokenizer((folder / "tokenizer.model").read_bytes())
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{folder} does not hold a whole tokenizer ({error}): prepare the data again") from error


# -------------------------------------------------------------------------------------------------------------- workers


def encode_in_parallel(folder: Path, batches: Iterable[list[list[bytes]]], workers: int) -> Generator[list[np.ndarray]]:
    """Encode batches with worker processes, in order, a bounded number at a time.

    `folder` holds the tokenizer. A batch is a list of groups of UTF-8 documents; its result has an array for each group
    (uint16 when the vocabulary fits, else uint32): the documents' ids, each followed by end-of-text.
    """
    idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    def encode(batch: list[list[bytes]]) -> list[np.ndarray]:
        worker = idle.get()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            pickle.dump(batch, worker.stdin, protocol=5)
            worker.stdin.flush()
            result, failure = pickle.load(worker.stdout)
        except (EOFError, OSError) as error:
            raise RuntimeError(f"a tokenising process died (exit code {worker.poll()})") from error
        finally:
            idle.put(worker)
        if failure:
            raise RuntimeError(f"a tokenising process failed:\n{failure}")
        return result

    with contextlib.ExitStack() as stack:
        for _ in range(workers):
            idle.put(stack.enter_context(_worker(folder)))
        executor = ThreadPoolExecutor(workers)
        stack.callback(executor.shutdown, wait=True, cancel_futures=True)
        pending: deque[Future[list[np.ndarray]]] = deque()
        for batch in batches:
            pending.append(executor.submit(encode, batch))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextlib.contextmanager
def _worker(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", "training.tokenizer", str(folder.resolve())]  # -P: modules in the current folder do not count
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # a group of its own, since ctrl-C reaches the whole group: the parent decides, and closes the input
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, process_group=0)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        process.wait()


def _work(folder: str) -> None:
    """Answer each batch on standard input with (arrays, "") or (None, traceback) on standard output, until the input ends."""
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may mix with the answers
    tokenizer = load_tokenizer(folder)
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.end_of_text], dtype=dtype)
    while True:
        try:
            batch: list[list[bytes]] = pickle.load(requests)
        except (EOFError, pickle.UnpicklingError):  # the end, or the parent has ended in the middle of a batch
            return
        try:
            texts = [text for group in batch for text in group]
            encoded = iter(tokenizer.encode_batch(texts))
            result = [np.concatenate([end[:0], *(part for _ in group for part in (next(encoded), end))]).astype(dtype) for group in batch]
            answer = (result, "")
        except Exception:
            answer = (None, traceback.format_exc())
        try:
            pickle.dump(answer, answers, protocol=5)
            answers.flush()
        except BrokenPipeError:  # the parent has ended
            os._exit(1)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest little-endian dtype of token ids below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


if __name__ == "__main__":
    _work(sys.argv[1])
