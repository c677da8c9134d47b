"""What lies in a run's folder when a launch comes to it, read as if a stranger had written it."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.errors import InputError
from training.loop import corpus_of
from training.recipe_file import LoadedRecipe, dump_recipe, load_recipe
from training.run_folder import check_run_folder

RECIPE = """
model: {size: nano}
training: {tokens: 1e6, tokens_per_step: 4096, micro_batch_size: 8, sequence_length: 256}
"""


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedRecipe:
    """Of a run whose folder has its recipe."""
    return begun(tmp_path)


def begun(place: Path, *overrides: str) -> LoadedRecipe:
    recipe = place / "small.yaml"
    recipe.write_text(RECIPE)
    loaded = load_recipe(recipe, [f"run.folder={place}/runs", *overrides])
    if not loaded.run_folder.exists():
        loaded.run_folder.mkdir(parents=True)
        (loaded.run_folder / "recipe.yaml").write_text(dump_recipe(loaded))
    return loaded


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"prepared": 5, "content_hash": "x"}', '{"prepared": "x"}', "7"])
def test_a_damaged_note_of_the_corpus_is_named(text: str, loaded: LoadedRecipe) -> None:
    (loaded.run_folder / "data.json").write_text(text)
    with pytest.raises(InputError, match=r"data\.json: damaged: .*bring the file back, or delete it") as refused:
        corpus_of(loaded)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("evaluation:", "evaluations:", "evaluations: unknown key; did you mean evaluation"),
        ("precision: bf16", "precision: fp16", "training.precision: 'fp16' is not one of"),
        ("training:", "training: [", "not valid YAML"),
    ],
)
def test_a_saved_recipe_that_is_none_any_more_is_named(old: str, new: str, expected: str, loaded: LoadedRecipe) -> None:
    saved = loaded.run_folder / "recipe.yaml"
    text = saved.read_text()
    assert old in text
    saved.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError) as refused:
        check_run_folder(loaded)
    said = str(refused.value)
    assert said.startswith(f"{saved}: made by another version of Burnish, or damaged: ") and expected in said
    assert "another run.name for a new run" in said and "\n" not in said


def test_a_saved_recipe_that_was_cut_off_is_named(loaded: LoadedRecipe) -> None:
    saved = loaded.run_folder / "recipe.yaml"
    text = saved.read_text()
    for length in (0, 20, text.index("  size"), text.index("training:")):
        saved.write_text(text[:length])
        with pytest.raises(InputError, match="made by another version of Burnish, or damaged"):
            check_run_folder(loaded)


def test_a_folder_that_no_disk_can_have_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE)
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match=r"run\.name 'nnn.*': no folder can have this name: File name too long; give another one"):
        check_run_folder(load_recipe(recipe, [f"run.folder={tmp_path}/runs", f"run.name={'n' * 300}"]))


def test_a_folder_in_the_place_of_the_metrics_is_refused(loaded: LoadedRecipe) -> None:
    check_run_folder(loaded)
    (loaded.run_folder / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"metrics\.jsonl: expected a file"):
        check_run_folder(loaded)


def test_other_tokens_are_refused_with_what_to_do_instead(loaded: LoadedRecipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training\.tokens: 1000000 there, 2000000 here.*given all its tokens from the start"):
        check_run_folder(begun(tmp_path, "training.tokens=2e6"))
    with pytest.raises(InputError, match=r"optimizer\.learning_rate: 0\.001 there") as refused:
        check_run_folder(begun(tmp_path, "optimizer.learning_rate=0.5"))
    assert "stop_at_step" not in str(refused.value)
