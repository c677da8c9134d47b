"""Prepared data is what a plain reading of the documents gives, is built once and whole, and is read in an order that
depends on the seed and the position alone."""

from __future__ import annotations

import collections
import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from model.errors import InputError
from scripts import prepare_data
from training import data as data_module
from training import token_shards
from training.data import Feed, PreparedData, Sequences, open_prepared, permutation, prepare, require_step, step_rows, verify_checksums
from training.distributed import Ranks
from training.recipe import DataSection
from training.sources import FilesSource, ReadCounts, read_documents
from training.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 340


def write_corpus(folder: Path, documents: int = 300) -> None:
    generator = np.random.default_rng(0)
    words = ["def", "return", "value", "self", "for", "in", "range", "x", "y", "count", "=", "+", "(", ")", ":\n", "\n    "]
    folder.mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w") as file:
        for number in range(documents):
            text = " ".join(generator.choice(words, size=generator.integers(1, 60)))
            file.write(json.dumps({"text": f"document {number} {text}"}) + "\n")


def section(folder: Path, **changes: Any) -> DataSection:
    values: dict[str, Any] = {
        "source": "files",
        "paths": [str(folder / "corpus")],
        "prepared": str(folder / "prepared"),
        "validation_fraction": 0.2,
        "tokenizer": {"vocab_size": VOCABULARY},
        "workers": 1,
    }
    return DataSection.model_validate(values | changes)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSection, PreparedData]:
    """Prepared once for the tests that only read."""
    folder = tmp_path_factory.mktemp("shared")
    write_corpus(folder / "corpus")
    data = section(folder)
    return data, prepare(data)


def tokens_of(prepared: PreparedData, split: Literal["train", "validation"]) -> np.ndarray:
    return np.concatenate([np.fromfile(path, dtype=prepared.manifest["dtype"]) for path, _ in prepared.shards(split)])


def shard_bytes(prepared: PreparedData) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(prepared.folder.glob("*.bin"))}


# -------------------------------------------------------------------------------------------------------------- preparing


def test_shards_are_the_documents_one_after_the_other(shared: tuple[DataSection, PreparedData]) -> None:
    data, prepared = shared
    tokenizer = load_tokenizer(prepared.folder / "tokenizer")
    documents = list(read_documents(FilesSource(data.paths, "text"), None, ReadCounts()))
    expected: dict[str, list[int]] = {"train": [], "validation": []}
    for document in documents:
        split = "validation" if int.from_bytes(document.digest[8:], "big") / 2**64 < 0.2 else "train"
        expected[split] += [*tokenizer.encode(document.text).tolist(), tokenizer.end_of_text]
    assert tokens_of(prepared, "train").tolist() == expected["train"]
    assert tokens_of(prepared, "validation").tolist() == expected["validation"]
    assert (prepared.train_tokens, prepared.validation_tokens) == (len(expected["train"]), len(expected["validation"]))
    assert prepared.vocab_size == VOCABULARY
    assert prepared.end_of_text == tokenizer.end_of_text
    manifest = prepared.manifest
    assert manifest["dtype"] == "uint16"
    assert manifest["documents"] == len(documents) == manifest["train"]["documents"] + manifest["validation"]["documents"]
    assert manifest["bytes"] == sum(len(document.text) for document in documents)
    for shard in (*manifest["train"]["shards"], *manifest["validation"]["shards"]):
        assert shard["sha256"] == hashlib.sha256((prepared.folder / shard["file"]).read_bytes()).hexdigest()


def test_unigram_loss_is_that_of_counting(shared: tuple[DataSection, PreparedData]) -> None:
    _, prepared = shared
    train = collections.Counter(tokens_of(prepared, "train").tolist())
    validation = tokens_of(prepared, "validation").tolist()
    losses = [-math.log((train[token] + 1) / (train.total() + VOCABULARY)) for token in validation]
    assert prepared.validation_unigram_loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-12)
    assert math.isfinite(token_shards.unigram_loss(np.array([0, 5]), np.array([3, 0])) or math.nan)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_nothing(
    shared: tuple[DataSection, PreparedData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    data, prepared = shared
    monkeypatch.setattr(token_shards, "BATCH_BYTES", 300)  # many batches
    again = prepare(data.model_copy(update={"prepared": str(tmp_path), "workers": workers}))
    assert again.folder.name == prepared.folder.name
    assert again.manifest == prepared.manifest
    assert shard_bytes(again) == shard_bytes(prepared)


def test_small_shards_hold_the_same_tokens(
    shared: tuple[DataSection, PreparedData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, prepared = shared
    monkeypatch.setattr(token_shards, "SHARD_BYTES", 500)
    small = prepare(data.model_copy(update={"prepared": str(tmp_path)}))
    sizes = [tokens for _, tokens in small.shards("train")]
    assert len(sizes) > 10
    assert set(sizes[:-1]) == {250}
    for split in token_shards.SPLITS:
        assert np.array_equal(tokens_of(small, split), tokens_of(prepared, split))
        # Windows longer than a shard cross several.
        one, other = (Sequences(each, split, 600, seed=3, shuffle=True) for each in (small, prepared))
        assert torch.equal(one.batch(0, len(one)).tokens, other.batch(0, len(other)).tokens)
        assert torch.equal(one.batch(0, len(one)).targets, other.batch(0, len(other)).targets)


def test_prepared_data_is_found_again(shared: tuple[DataSection, PreparedData], monkeypatch: pytest.MonkeyPatch) -> None:
    data, prepared = shared

    def build(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(data_module, "build", build)
    again = prepare(data.model_copy(update={"workers": 7, "document_masks": True}), sequence_length=32)
    assert again == prepared
    assert open_prepared(prepared.folder) == prepared
    assert [path.name for path in prepared.folder.parent.iterdir() if not path.name.startswith(".")] == [prepared.folder.name]


@pytest.mark.parametrize(
    "changes",
    [
        {"validation_fraction": 0.21},
        {"max_megabytes": 1.0},
        {"text_field": "body"},
        {"tokenizer": {"vocab_size": VOCABULARY + 1}},
        {"tokenizer": {"vocab_size": VOCABULARY, "sample_megabytes": 31}},
        {"tokenizer": {"kind": "pretrained", "path": "owner/name"}},
    ],
)
def test_the_fingerprint_follows_what_changes_the_tokens(shared: tuple[DataSection, PreparedData], changes: dict[str, Any]) -> None:
    data, prepared = shared
    changed = DataSection.model_validate(data.model_dump() | changes)
    assert data_module.fingerprint(data, FilesSource(data.paths, "text")) == prepared.folder.name
    assert data_module.fingerprint(changed, FilesSource(data.paths, changed.text_field)) != prepared.folder.name


def test_a_changed_file_is_prepared_anew_and_moves_no_document(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    first = prepare(section(tmp_path, max_megabytes=1))
    (tmp_path / "corpus" / "zzz.txt").write_text("one more document, with the same words: return value in range")
    second = prepare(section(tmp_path, max_megabytes=1))
    assert first.folder != second.folder
    for split in token_shards.SPLITS:
        assert 0 <= second.manifest[split]["documents"] - first.manifest[split]["documents"] <= 1


def test_a_sample_is_spread_and_repeatable(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    data = section(tmp_path, tokenizer={"sample_megabytes": 0.01})
    source = FilesSource(data.paths, "text")
    sample = token_shards.sample_text(data, source, ReadCounts())
    assert sample == token_shards.sample_text(data, source, ReadCounts())
    documents = list(read_documents(source, None, ReadCounts()))
    held_out = {document.text for document in documents if document.held_out(0.2)}
    assert not held_out & set(sample)
    assert 0.009e6 < sum(map(len, sample)) <= 0.01e6
    positions = [number for number, document in enumerate(documents) if document.text in set(sample)]
    # A uniform sample's mean position, to five standard deviations.
    assert abs(np.mean(positions) - len(documents) / 2) < 5 * len(documents) / math.sqrt(12 * len(positions))


def test_a_pretrained_tokenizer_with_a_large_vocabulary(tmp_path: Path) -> None:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    vocabulary = {"<end>": 0, "<other>": 1, **{f"word{number}": number for number in range(2, 70_000)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<other>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text("".join(json.dumps({"text": f"word{69_999 - n} word2"}) + "\n" for n in range(50)))
    prepared = prepare(section(tmp_path, tokenizer={"kind": "pretrained", "path": str(tmp_path / "tokenizer")}))
    assert (prepared.vocab_size, prepared.manifest["dtype"]) == (70_000, "uint32")
    rows = [tokens_of(prepared, split).reshape(-1, 3) for split in token_shards.SPLITS]
    assert sorted(np.concatenate(rows).tolist(), reverse=True) == [[69_999 - n, 2, 0] for n in range(50)]


# --------------------------------------------------------------------------------------------------- races, kills, full disk

PREPARE = """
import resource, sys
from model.errors import InputError
from training.data import prepare
from training.recipe import DataSection
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    prepared = prepare(DataSection.model_validate_json(sys.argv[1]))
    print(prepared.folder, prepared.train_tokens)
except InputError as error:
    print(error)
    sys.exit(2)
"""


def start(data: DataSection, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, data.model_dump_json(), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_racing_processes_build_once_and_agree(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", documents=20_000)
    processes = [start(section(tmp_path, workers=2)) for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({printed for printed, _ in outputs}) == 1
    assert sum(errors.count("training a SentencePiece model") for _, errors in outputs) == 1
    assert len(visible(tmp_path / "prepared")) == 1


def test_a_killed_builder_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", documents=50_000)
    data = section(tmp_path)
    process = start(data)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "prepared").glob(".*.building.*/*.bin")):  # until it is writing shards
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert all(".building." in name for name in visible(tmp_path / "prepared"))
    prepared = prepare(data)
    assert visible(tmp_path / "prepared") == [prepared.folder.name]
    verify_checksums(prepared)


def test_without_locks_the_first_builder_wins_and_the_other_takes_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without flock, and another host that finishes while this one builds."""

    def no_locks(*arguments: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(data_module.fcntl, "flock", no_locks)
    write_corpus(tmp_path / "corpus")
    data, build, built = section(tmp_path), data_module.build, []

    def build_beside_another_host(*arguments: Any) -> dict[str, Any]:
        if not built:
            built.append("this one")
            with monkeypatch.context() as elsewhere:
                elsewhere.setattr(data_module.socket, "gethostname", lambda: "elsewhere")
                built.append(prepare(data))
                built.append({path.name: path.stat().st_ino for path in built[1].folder.iterdir()})
        return build(*arguments)

    monkeypatch.setattr(data_module, "build", build_beside_another_host)
    prepared = prepare(data)
    assert prepared == built[1] and {path.name: path.stat().st_ino for path in prepared.folder.iterdir()} == built[2]
    assert visible(tmp_path / "prepared") == [prepared.folder.name]


@pytest.mark.parametrize("limit", [1_000, 300_000], ids=["in the tokenizer", "in a shard"])
def test_no_room_is_one_line_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    write_corpus(tmp_path / "corpus", documents=20_000)
    process = start(section(tmp_path), str(limit))  # the kernel refuses to let a file grow beyond the limit
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert printed.count("\n") == 1
    assert f"no room to prepare data in {tmp_path / 'prepared'}" in printed
    assert visible(tmp_path / "prepared") == []


def test_a_fault_while_building_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(token_shards, "unigram_loss", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(section(tmp_path))
    assert visible(tmp_path / "prepared") == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    (tmp_path / "file").write_text("")
    for prepared in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot prepare data in"):
            prepare(section(tmp_path, prepared=str(prepared)))


# ----------------------------------------------------------------------------------------------------- whole or not whole


@pytest.fixture
def fresh(tmp_path: Path) -> tuple[DataSection, PreparedData]:
    write_corpus(tmp_path / "corpus")
    data = section(tmp_path)
    return data, prepare(data)


@pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.bin"])
def test_a_bad_shard_is_named(fresh: tuple[DataSection, PreparedData], name: str) -> None:
    data, prepared = fresh
    path = prepared.folder / name
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"shard .*{name} is altered"):
        open_prepared(prepared.folder)
    with pytest.raises(InputError, match=rf"shard .*{name} is altered"):
        prepare(data)
    path.write_bytes(content[:-2])
    with pytest.raises(InputError, match=rf"shard .*{name} is truncated or altered: {len(content) - 2} bytes, .* says {len(content)}"):
        prepare(data)
    path.unlink()
    with pytest.raises(InputError, match=rf"shard .*{name} is missing"):
        prepare(data)


def test_checksums_are_taken_once(fresh: tuple[DataSection, PreparedData], monkeypatch: pytest.MonkeyPatch) -> None:
    _, prepared = fresh
    verified: list[PreparedData] = []

    def verify(prepared: PreparedData) -> None:
        verified.append(prepared)
        verify_checksums(prepared)

    monkeypatch.setattr(data_module, "verify_checksums", verify)
    open_prepared(prepared.folder)
    assert verified == []
    os.utime(prepared.folder / "train-00000.bin", ns=(0, 0))  # copied, perhaps
    open_prepared(prepared.folder)
    open_prepared(prepared.folder)
    (prepared.folder / ".verified.json").unlink()
    open_prepared(prepared.folder)
    open_prepared(prepared.folder)
    assert len(verified) == 2


@pytest.mark.parametrize(
    ("manifest", "message"),
    [("{", "manifest.json cannot be read"), ('{"format": 1}', "cannot be read"), ('{"format": 99}', "format 99, this version reads 1")],
)
def test_a_bad_manifest_is_said(fresh: tuple[DataSection, PreparedData], manifest: str, message: str) -> None:
    data, prepared = fresh
    (prepared.folder / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match=message):
        prepare(data)


def test_a_folder_that_is_not_prepared_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a prepared data folder"):
        open_prepared(tmp_path)
    with pytest.raises(InputError, match="not a prepared data folder"):
        open_prepared(tmp_path / "absent")


def test_the_tokenizer_is_copied_to_a_run(shared: tuple[DataSection, PreparedData], tmp_path: Path) -> None:
    _, prepared = shared
    prepared.copy_tokenizer(tmp_path / "tokenizer")
    prepared.copy_tokenizer(tmp_path / "tokenizer")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    assert load_tokenizer(tmp_path / "tokenizer").decode(tokens_of(prepared, "train")[:3]).startswith("doc")


# -------------------------------------------------------------------------------------------------------------- bad input


def test_a_corpus_smaller_than_one_batch_is_said(shared: tuple[DataSection, PreparedData], tmp_path: Path) -> None:
    data, prepared = shared
    tokens = (prepared.train_tokens - 1) // 32 * 32
    require_step(prepared, tokens, 32)
    with pytest.raises(InputError, match=f"smaller than one batch: {prepared.train_tokens} training tokens, a step of {tokens + 32} needs"):
        require_step(prepared, tokens + 32, 32)
    require_step(prepared, 32, prepared.validation_tokens - 1)
    with pytest.raises(InputError, match=rf"validation split has {prepared.validation_tokens} tokens .* raise data.validation_fraction"):
        require_step(prepared, prepared.validation_tokens, prepared.validation_tokens)
    with pytest.raises(InputError, match="validation split"):
        prepare(data, sequence_length=prepared.validation_tokens)
    with pytest.raises(InputError, match="the validation split has"):
        Sequences(prepared, "validation", prepared.validation_tokens, seed=0, shuffle=False)
    assert len(Sequences(prepared, "validation", prepared.validation_tokens - 1, seed=0, shuffle=False)) == 1


def test_an_empty_validation_split_is_said(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", documents=30)
    prepared = prepare(section(tmp_path, validation_fraction=1e-9))
    assert (prepared.validation_tokens, prepared.manifest["validation"]["shards"]) == (0, [])
    assert math.isnan(prepared.validation_unigram_loss)
    with pytest.raises(InputError, match="validation split has 0 tokens of 0 documents"):
        require_step(prepared, 32, 32)
    with pytest.raises(InputError, match="the validation split has 0 tokens"):
        Sequences(prepared, "validation", 32, seed=0, shuffle=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": ["absent.txt"]}, r"absent\.txt does not exist"),
        ({"tokenizer": {"vocab_size": 100_000}}, "the largest possible is"),
        ({"validation_fraction": 1 - 1e-12}, "no text to train the tokenizer on"),
        ({"text_field": "body"}, r"corpus\.jsonl:1: no field 'body'"),
        ({"tokenizer": {"kind": "pretrained"}}, r"data\.tokenizer\.path is missing"),
        ({"tokenizer": {"kind": "pretrained", "path": "/absent"}}, "/absent does not exist"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_corpus(tmp_path / "corpus")
    with pytest.raises(InputError, match=message) as raised:
        prepare(section(tmp_path, **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "prepared").exists() or visible(tmp_path / "prepared") == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus")
    recipe = tmp_path / "recipe.yaml"
    training = {"tokens": 6400, "tokens_per_step": 640, "micro_batch_size": 2, "sequence_length": 32}
    model = {"width": 32, "depth": 2, "heads": 2}
    recipe.write_text(json.dumps({"model": model, "data": json.loads(section(tmp_path).model_dump_json()), "training": training}))
    monkeypatch.setattr(sys, "argv", ["prepare_data", str(recipe)])
    assert prepare_data.main() == 0
    assert "documents   300 (0 duplicates" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["prepare_data", str(recipe), "data.paths=[absent.txt]"])
    assert prepare_data.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "absent.txt does not exist" in captured.err


# ---------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 1000, 1023, 1024, 1025, 65_537])
def test_permutation_is_one(size: int) -> None:
    images = permutation(np.arange(size), size, seed=1, epoch=0)
    assert np.array_equal(np.sort(images), np.arange(size))
    # Each image depends on its own position alone.
    some = np.random.default_rng(0).integers(0, size, 20)
    assert np.array_equal(permutation(some, size, seed=1, epoch=0), images[some])


def test_permutations_differ_by_seed_and_epoch_and_look_random() -> None:
    size = 1000
    orders = [permutation(np.arange(size), size, seed, epoch) for seed in range(20) for epoch in range(20)]
    assert len({order.tobytes() for order in orders}) == 400
    # Fixed points of a random permutation: one on average, variance one; 400 permutations.
    fixed = np.mean([(order == np.arange(size)).sum() for order in orders])
    assert abs(fixed - 1) < 5 / math.sqrt(400)
    # Where the first window goes: uniform, mean 499.5 with a standard deviation of 289.
    assert abs(np.mean([order[0] for order in orders]) - 499.5) < 5 * 289 / math.sqrt(400)
    # Neighbours do not stay together: 2 of 1000 adjacent pairs on average.
    adjacent = np.mean([(np.abs(np.diff(order)) == 1).sum() for order in orders])
    assert abs(adjacent - 2) < 5 * math.sqrt(2 / 400)


def test_permutation_of_small_sizes_reaches_every_order() -> None:
    counts = collections.Counter(tuple(permutation(np.arange(3), 3, seed, 0)) for seed in range(600))
    assert len(counts) == 6
    assert max(counts.values()) < 200


def test_windows_are_consecutive_and_predict_every_token_once(shared: tuple[DataSection, PreparedData]) -> None:
    _, prepared = shared
    tokens = tokens_of(prepared, "validation").astype(np.int64)
    sequences = Sequences(prepared, "validation", 32, seed=0, shuffle=False)
    assert len(sequences) == (len(tokens) - 1) // 32
    batch = sequences.batch(0, len(sequences))
    assert batch.document_ids is None
    assert (batch.tokens.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
    covered = len(sequences) * 32
    assert np.array_equal(batch.tokens.numpy().ravel(), tokens[:covered])
    assert np.array_equal(batch.targets.numpy().ravel(), tokens[1 : covered + 1])
    assert torch.equal(sequences.batch(len(sequences) + 2, 3).tokens, sequences.batch(2, 3).tokens)


def test_every_window_comes_once_in_each_epoch(shared: tuple[DataSection, PreparedData]) -> None:
    _, prepared = shared
    sequences = Sequences(prepared, "train", 32, seed=5, shuffle=True)
    size = len(sequences)
    numbers = sequences.windows(np.arange(3 * size))
    for epoch in range(3):
        assert np.array_equal(np.sort(numbers[epoch * size : (epoch + 1) * size]), np.arange(size))
    assert len({numbers[epoch * size : (epoch + 1) * size].tobytes() for epoch in range(3)}) == 3
    # A batch that crosses the end of an epoch.
    assert np.array_equal(sequences.windows(np.arange(size - 3, size + 3)), numbers[size - 3 : size + 3])


@pytest.mark.parametrize("masks", [False, True])
def test_document_masks_are_those_of_a_plain_loop(shared: tuple[DataSection, PreparedData], masks: bool) -> None:
    _, prepared = shared
    length = 150
    tokens = tokens_of(prepared, "train").tolist()
    sequences = Sequences(prepared, "train", length, seed=2, shuffle=True, document_masks=masks)
    numbers = np.array([0, 7, 3, 7, 1000])
    batch = sequences.rows(numbers)
    most_documents = 0
    for row, window in enumerate(sequences.windows(numbers)):
        document = 0
        for position in range(length):
            token, target = tokens[window * length + position], tokens[window * length + position + 1]
            assert batch.tokens[row, position] == token
            assert batch.targets[row, position] == (-100 if masks and token == prepared.end_of_text else target)
            if masks:
                assert batch.document_ids is not None
                assert batch.document_ids[row, position] == document
            document += token == prepared.end_of_text
        most_documents = max(most_documents, document)
    assert most_documents >= 2
    if masks:
        assert batch.document_ids is not None
        assert (batch.document_ids.dtype, batch.document_ids.shape) == (torch.int32, batch.tokens.shape)
    else:
        assert batch.document_ids is None


def stream(prepared: PreparedData, steps: range, world_size: int, micro_batch_size: int) -> list[list[tuple[int, ...]]]:
    """The windows of each step, gathered over ranks and micro-batches, sorted by position in the step."""
    result = []
    for step in steps:
        rows: dict[int, tuple[int, ...]] = {}
        for rank in range(world_size):
            sequences = Sequences(prepared, "train", 32, seed=9, shuffle=True)  # nothing is kept from step to step
            for numbers in step_rows(step, 12, rank, world_size, micro_batch_size):
                assert len(numbers) == micro_batch_size
                for number, tokens in zip(numbers.tolist(), sequences.rows(numbers).tokens.tolist(), strict=True):
                    assert number not in rows
                    rows[number] = tuple(tokens)
        assert sorted(rows) == list(range(step * 12, (step + 1) * 12))
        result.append([rows[number] for number in sorted(rows)])
    return result


def test_the_stream_is_the_same_at_any_number_of_ranks_and_across_resumes(shared: tuple[DataSection, PreparedData]) -> None:
    _, prepared = shared
    windows = len(Sequences(prepared, "train", 32, seed=9, shuffle=True))
    steps = 2 * windows // 12 + 1  # beyond the second epoch
    whole = stream(prepared, range(steps), world_size=1, micro_batch_size=12)
    assert stream(prepared, range(steps), world_size=2, micro_batch_size=3) == whole
    assert stream(prepared, range(steps), world_size=3, micro_batch_size=2) == whole
    first, second = steps // 3, 2 * steps // 3
    resumed = (
        stream(prepared, range(first), 1, 4) + stream(prepared, range(first, second), 3, 4) + stream(prepared, range(second, steps), 2, 6)
    )
    assert resumed == whole
    consumed = [window for step in whole for window in step]
    expected = Sequences(prepared, "train", 32, seed=9, shuffle=False).batch(0, windows).tokens.tolist()
    for epoch in range(2):
        assert sorted(consumed[epoch * windows : (epoch + 1) * windows]) == sorted(map(tuple, expected))


def test_a_step_that_does_not_divide_is_said() -> None:
    with pytest.raises(InputError, match="10 sequences a step do not divide by 2 ranks x 3 sequences"):
        step_rows(0, 10, 0, 2, 3)


def test_a_prepared_corpus_can_be_named_itself(tmp_path: Path) -> None:
    """It is read whatever the source says, and even when the source is gone."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} of a text that is long enough to be cut in two" for i in range(3000)))
    section = {"source": "files", "paths": [str(text)], "validation_fraction": 0.5, "tokenizer": {"vocab_size": 300}}
    (tmp_path / "more.txt").write_text("another document. " * 500)
    section["paths"].append(str(tmp_path / "more.txt"))
    first = prepare(DataSection(**section, prepared=str(tmp_path / "prepared")))
    text.unlink()
    assert prepare(DataSection(**section, prepared=str(first.folder))).manifest == first.manifest


@pytest.mark.parametrize("masks", [False, True])
def test_the_feed_gives_each_step_its_own_rows_also_after_a_jump(shared: tuple[DataSection, PreparedData], masks: bool) -> None:
    """Rows and counted targets of every rank's micro-batches, in order, out of order, and when the same step is asked for again."""
    _, prepared = shared
    sequences = Sequences(prepared, "train", 150, seed=2, shuffle=True, document_masks=masks)
    feeds = [Feed(sequences, 12, Ranks(rank, 2, rank, 2), micro_batch_size=3, pinned=False) for rank in range(2)]
    for step in (0, 1, 2, 1, 2, 9):
        counted = 0
        for rank, feed in enumerate(feeds):
            batches, valid = feed.step(step)
            for batch, numbers in zip(batches, step_rows(step, 12, rank, 2, 3), strict=True):
                expected = sequences.rows(numbers)
                assert torch.equal(batch.tokens, expected.tokens) and torch.equal(batch.targets, expected.targets)
                counted += batch.valid_tokens
        assert counted == valid
    for feed in feeds:
        assert feed.waited > 0
        feed.close()
