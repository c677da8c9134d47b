"""Write recipes/recipe.schema.json, which gives an editor completion and checks: `python -m scripts.recipe_schema`.

A recipe points to it in its first line: `# yaml-language-server: $schema=recipe.schema.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from training.recipe import Recipe

SCHEMA_PATH = Path(__file__).resolve().parent.parent / "recipes" / "recipe.schema.json"


def schema_text() -> str:
    """The JSON schema (draft 2020-12) of a recipe, as the file's text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    temporary = SCHEMA_PATH.with_name(f".{SCHEMA_PATH.name}.{os.getpid()}")
    temporary.write_text(schema_text(), encoding="utf-8")
    temporary.replace(SCHEMA_PATH)
    print(SCHEMA_PATH)
    return 0


if __name__ == "__main__":
    sys.exit(main())
