"""Train a recipe.

deepspeed train.py recipes/X.yaml [section.key=value ...]      also: torchrun, srun, or plain python
python train.py recipes/X.yaml --dry-run [--ranks N]           check, and print the plan
python train.py --resume runs/X                                go on from the newest checkpoint
"""

import argparse
import json
from pathlib import Path

from training.early_stop import answer_at_once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="a file of recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    parser.add_argument("--dry-run", action="store_true", help="validate, print the plan and stop")
    parser.add_argument("--ranks", type=int, default=1, help="how many ranks the plan of --dry-run is for")
    parser.add_argument("--resume", metavar="RUN", help="a run folder to go on with; it has its own recipe")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; the environment says the same
    arguments = parser.parse_intermixed_args()

    from model.errors import InputError  # what is imported from here on takes seconds
    from training.distributed import leave, one_clear_line
    from training.recipe_file import load_recipe

    with one_clear_line():
        path, overrides = arguments.recipe, arguments.overrides
        if arguments.resume:
            run = Path(arguments.resume).resolve()
            if path and "=" not in path:
                raise InputError(f"{path}: --resume brings its own recipe, {run / 'recipe.yaml'}; leave {path} out")
            here = {"folder": str(run.parent), "name": run.name}  # in quotes, since the name 2024 is no number
            overrides = [*([path] if path else []), *overrides]
            overrides += [f"run.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in here.items()]
            path = run / "recipe.yaml"
            if not path.exists():
                raise InputError(f"{run}: not a run folder: it has no recipe.yaml")
        if path is None:
            raise InputError("give a recipe (recipes/*.yaml), or --resume with a run folder")
        loaded = load_recipe(path, overrides)
        if arguments.dry_run:
            from training.plan import print_plan

            print_plan(loaded, arguments.ranks)
            return
        from training.loop import train

        leave(train(loaded))
    leave(0)


if __name__ == "__main__":
    answer_at_once()
    main()
