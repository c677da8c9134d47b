"""Sources give the texts that lie in the files, each once, in a fixed order, and name what is wrong."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from model.errors import InputError
from training import sources
from training.recipe import DataSection
from training.sources import FilesSource, HuggingFaceSource, PythonSource, ReadCounts, content_digest, open_source, read_documents


def read(source: sources.Source, max_megabytes: float | None = None) -> list[bytes]:
    return [document.text for document in read_documents(source, max_megabytes, ReadCounts())]


def files(*paths: Path | str) -> list[bytes]:
    return read(FilesSource([str(path) for path in paths], "text"))


def jsonl(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# ----------------------------------------------------------------------------------------------------------------- files


def test_every_format_gives_its_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("first\r\n\ttext é 🙂\n".encode())
    (tmp_path / "b.md").write_bytes(b"# second")
    (tmp_path / "c.unknown").write_bytes(b"third")
    (tmp_path / "d.jsonl").write_bytes(jsonl([{"text": "fourth\nline"}, {"text": "fifth", "other": 1}]))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["sixth", None, "seventh"], "n": [1, 2, 3]}), tmp_path / "e.parquet")
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"eighth"))
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress(jsonl([{"text": "ninth"}])))
    compressor = zstandard.ZstdCompressor()
    (tmp_path / "h.txt.zst").write_bytes(compressor.compress(b"ten") + compressor.compress(b"th"))  # two frames
    (tmp_path / "i.jsonl.zst").write_bytes(compressor.compress(jsonl([{"text": "eleventh"}])))
    (tmp_path / ".hidden").write_bytes(b"hidden")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "j.py").write_bytes(b"twelfth")
    expected = ["first\r\n\ttext é 🙂\n", "# second", "twelfth", "third", "fourth\nline", "fifth"]
    expected += ["sixth", "seventh", "eighth", "ninth", "tenth", "eleventh"]
    assert files(tmp_path) == [text.encode() for text in expected]


def test_globs_folders_and_repeated_names_give_each_file_once_in_path_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert files(tmp_path / "**" / "*.txt") == [b"a.txt", b"b.txt", b"deep/c.txt"]
    assert files(tmp_path / "deep", tmp_path / "b.txt", tmp_path / "*.txt") == [b"a.txt", b"b.txt", b"deep/c.txt", b"deep/d.md"]


@pytest.mark.parametrize("line", ["short line é\n", "x" * 3_000_000 + "\n", "é🙂" * 500_000], ids=["lines", "long lines", "one line"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_large_file_is_cut_without_loss(tmp_path: Path, line: str, suffix: str) -> None:
    text = (line * (4_000_000 // len(line) + 1)).encode()
    encode = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    (tmp_path / f"large.txt{suffix}").write_bytes(encode(text))
    pieces = list(FilesSource([str(tmp_path / f"large.txt{suffix}")], "text").texts(ReadCounts()))
    assert b"".join(pieces) == text
    assert max(map(len, pieces)) <= sources.PIECE_BYTES
    for piece in pieces:
        piece.decode()


def test_a_file_up_to_a_mebibyte_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(b"a line\n" * (sources.WHOLE_FILE_BYTES // 7))
    assert len(files(tmp_path / "book.txt")) == 1


def test_long_jsonl_lines_cross_blocks(tmp_path: Path) -> None:
    generator = random.Random(0)
    rows: list[dict[str, object]] = [{"text": chr(97 + n % 26) * generator.choice([1, 1000, 1_000_000, 1_500_000])} for n in range(26)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(rows).replace(b"\n", b"\n\n").rstrip(b"\n"))
    assert files(tmp_path / "a.jsonl") == [str(row["text"]).encode() for row in rows]


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_line_that_would_fill_the_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """A few kilobytes, compressed, that are one line of any length."""
    monkeypatch.setattr(sources, "LINE_BYTES", 3 << 20)
    largest = [{"text": "x" * 2_000_000}, {"text": "y" * 3_000_000}]
    bomb = jsonl(largest) + b'{"text": "' + b"z" * (16 << 20)
    packed = gzip.compress(bomb) if ending == "gz" else zstandard.ZstdCompressor().compress(bomb)
    assert len(packed) < 1 << 16
    (tmp_path / f"a.jsonl.{ending}").write_bytes(packed)
    found = FilesSource([str(tmp_path)], "text").texts(ReadCounts())
    assert [len(next(found)), len(next(found))] == [2_000_000, 3_000_000]
    with pytest.raises(InputError, match=rf"a\.jsonl\.{ending}:3: a line of more than 3 MiB; expected one JSON object: cut its text"):
        next(found)


def test_a_block_of_zstandard_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor(level=19).compress(bytes(300 << 20)))
    assert (tmp_path / "a.jsonl.zst").stat().st_size < 1 << 16
    assert max(map(len, sources._blocks(tmp_path / "a.jsonl.zst"))) <= sources.ZSTD_BLOCK_BYTES << 15


def test_duplicates_and_empty_texts_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": text} for text in ("x", "y", "x", "", None, "z", "y")]))
    counts = ReadCounts()
    documents = list(read_documents(FilesSource([str(tmp_path)], "text"), None, counts))
    assert [document.text for document in documents] == [b"x", b"y", b"z"]
    assert (counts.documents, counts.bytes, counts.duplicates, counts.empty) == (3, 3, 2, 2)


def test_max_megabytes_reads_a_prefix(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": f"{n:04d}"} for n in range(100)]))
    source = FilesSource([str(tmp_path)], "text")
    assert read(source, 40e-6) == [f"{n:04d}".encode() for n in range(10)]
    assert read(source, 43e-6) == [f"{n:04d}".encode() for n in range(10)]


NOISE = random.Random(0).randbytes(200_000).hex().encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"text\0more", r"a\.txt is a binary file: byte 4 is NUL"),
        ("a.txt", b"caf\xe9 text", r"a\.txt is not UTF-8 text: byte 3 is invalid"),
        ("a.txt", b"\xff\xfea\0", r"a\.txt is not UTF-8 text: byte 0 is invalid"),
        ("a.txt", "é\n".encode() * 1_000_000 + b"\xc3", r"a\.txt is not UTF-8 text: byte 3000000 is invalid"),
        ("a.txt", "é\n".encode() * 1_000_000 + b"\0" + b"x" * 10**6, r"a\.txt is a binary file: byte 3000000 is NUL"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "y", "id": 1}\n', r"a\.jsonl:3: no field 'text' \(found: body, id\)"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', r"a\.jsonl:2: no field 'text' \(found: a list\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not a JSON object"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: field 'text' is not text but int"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "a\\ud800"}\n', r"a\.jsonl:2: field 'text' is not valid text: character 1"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.txt.gz", gzip.compress(NOISE)[:1000], r"a\.txt\.gz is not a whole gzip file"),
        ("a.txt.gz", b"not gzip at all", r"a\.txt\.gz is not a whole gzip file"),
        ("a.txt.zst", zstandard.compress(NOISE)[:-1000], r"a\.txt\.zst is not a whole Zstandard file"),
        ("a.txt.zst", b"not zstd at all", r"a\.txt\.zst is not a Zstandard file"),
        ("a.parquet", b"not parquet at all", r"a\.parquet is not a whole parquet file"),
        ("a.txt", b"", r"the corpus is empty"),
        ("a.jsonl", b'\n{"text": ""}\n', r"the corpus is empty"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        files(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_bad_parquet_columns_are_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: no column 'text' \(found: body, n\)"):
        files(tmp_path)
    with pytest.raises(InputError, match=r"a\.parquet: row 1, column 'n' is not text but int"):
        read(FilesSource([str(tmp_path)], "n"))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.txt does not exist"):
        files(tmp_path / "absent.txt")
    with pytest.raises(InputError, match=r"no file in .*\*\.md"):
        files(tmp_path / "*.md")
    with pytest.raises(InputError, match="no file in"):
        files(tmp_path)
    with pytest.raises(InputError, match=r"data\.paths is empty"):
        open_source(DataSection.model_validate({"source": "files"}))


def test_a_first_document_above_the_limit_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 2000)
    with pytest.raises(InputError, match=r"max_megabytes = 0.001 is less than the first document \(0.002 MB\)"):
        read(FilesSource([str(tmp_path)], "text"), 0.001)


def test_identity_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one")
    first = FilesSource([str(tmp_path)], "text").identity()
    assert FilesSource([str(path)], "text").identity() == first
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert FilesSource([str(tmp_path)], "text").identity() != first


# --------------------------------------------------------------------------------------------------------- python_source


@pytest.fixture
def python_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    other = tmp_path / "lib" / "dist-packages"
    contents = {
        library / "one.py": b"one = 1\n",
        library / "deep" / "two.py": b"two = 2\n",
        library / "deep" / "copy.py": b"one = 1\n",
        library / "__pycache__" / "cached.py": b"cached = 1\n",
        library / "latin.py": b"# caf\xe9\n",
        library / "nul.py": b"\0",
        library / "notes.txt": b"not code",
        library / "empty.py": b"",
        packages / "three.py": b"three = 3\n",
        other / "foreign.py": b"foreign = 4\n",
    }
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (library / "link.py").symlink_to(tmp_path / "elsewhere.py")
    (tmp_path / "elsewhere.py").write_bytes(b"elsewhere = 5\n")
    (library / "linked").symlink_to(library / "deep")
    monkeypatch.setattr(sources, "python_roots", lambda: [library, packages])
    return tmp_path


def test_python_source_reads_each_text_once_in_hash_order(python_tree: Path) -> None:
    counts = ReadCounts()
    texts = [document.text for document in read_documents(PythonSource(), None, counts)]
    assert texts == sorted([b"one = 1\n", b"two = 2\n", b"three = 3\n"], key=content_digest)
    assert (counts.documents, counts.duplicates, counts.empty, counts.unreadable) == (3, 1, 1, 2)


def test_python_source_does_not_depend_on_where_it_is_installed(python_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = PythonSource().identity(), read(PythonSource())
    moved = python_tree.with_name("moved")
    python_tree.rename(moved)
    monkeypatch.setattr(sources, "python_roots", lambda: [moved / "lib", moved / "lib" / "site-packages"])
    assert (PythonSource().identity(), read(PythonSource())) == before


def test_python_source_that_changes_while_read_is_an_error(python_tree: Path) -> None:
    source = PythonSource()
    texts = source.texts(ReadCounts())
    next(texts)
    for path in python_tree.rglob("*.py"):
        path.write_bytes(b"changed\n")
    with pytest.raises(InputError, match="changed while the data was being prepared"):
        list(texts)


def test_this_interpreter_has_python_source() -> None:
    documents = list(read_documents(PythonSource(), 1.0, ReadCounts()))
    assert 0.5e6 < sum(len(document.text) for document in documents) <= 1e6
    assert [document.digest for document in documents] == sorted(document.digest for document in documents)


# ------------------------------------------------------------------------------------------------------- the split


def test_the_split_is_stable_and_has_its_share(tmp_path: Path) -> None:
    def split(count: int) -> dict[bytes, bool]:
        (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": f"document {n}"} for n in random.Random(count).sample(range(count), count)]))
        documents = read_documents(FilesSource([str(tmp_path)], "text"), None, ReadCounts())
        return {document.text: document.held_out(0.1) for document in documents}

    small, large = split(1000), split(4000)
    assert all(large[text] == side for text, side in small.items())
    # 4000 independent draws with probability 0.1: 400 with a standard deviation of 19.
    assert abs(sum(large.values()) - 400) < 5 * 19


def test_the_split_is_independent_of_the_order_by_hash() -> None:
    documents = [sources.Document(b"x", content_digest(str(n).encode())) for n in range(4000)]
    first = sorted(documents, key=lambda document: document.digest)[:1000]
    # 1000 independent draws with probability 0.2: 200 with a standard deviation of 12.6.
    assert abs(sum(document.held_out(0.2) for document in first) - 200) < 5 * 12.6


# ----------------------------------------------------------------------------------------------------------- huggingface


def hugging_face(dataset: Path | str, split: str = "train", field: str = "text") -> list[bytes]:
    data = {"source": "huggingface", "dataset": str(dataset), "split": split, "text_field": field}
    return read(open_source(DataSection.model_validate(data)))


def test_hugging_face_folders_of_each_kind(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [f"row {n}" for n in range(300)]
    expected = [text.encode() for text in texts]
    table = datasets.Dataset.from_dict({"text": texts, "body": [text.upper() for text in texts]})
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(tmp_path / "splits")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_bytes(jsonl([{"text": text} for text in texts]))
    (tmp_path / "parquet").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "parquet" / "train.parquet")
    assert hugging_face(tmp_path / "saved") == expected
    assert hugging_face(tmp_path / "saved", field="body") == [text.upper() for text in expected]
    assert hugging_face(tmp_path / "splits", split="test") == expected[:3]
    assert hugging_face(tmp_path / "lines") == expected
    assert hugging_face(tmp_path / "parquet") == expected
    for bad in ({"split": "absent"}, {"field": "absent"}):
        for folder in ("splits", "lines", "parquet"):
            with pytest.raises(InputError, match="absent") as raised:
                hugging_face(tmp_path / folder, **bad)
            assert "\n" not in str(raised.value)


def test_hugging_face_failures_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    with pytest.raises(InputError, match="does not exist"):
        hugging_face(tmp_path / "absent")
    with pytest.raises(InputError, match=r"data\.dataset is missing"):
        open_source(DataSection.model_validate({"source": "huggingface"}))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        hugging_face(tmp_path / "a.txt")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nwith a long explanation")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"owner/name: cannot read row 1 \(Couldn't reach the hub\)") as raised:
        hugging_face("owner/name")
    assert "\n" not in str(raised.value)


def test_hugging_face_identity_follows_the_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(jsonl([{"text": "x"}]))
    first = HuggingFaceSource(str(tmp_path), None, "train", "text").identity()
    (tmp_path / "train.jsonl").write_bytes(jsonl([{"text": "xy"}]))
    assert HuggingFaceSource(str(tmp_path), None, "train", "text").identity() != first
    assert HuggingFaceSource("owner/a", None, "train", "text").identity() != HuggingFaceSource("owner/b", None, "train", "text").identity()
