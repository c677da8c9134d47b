"""What the report found, for TensorBoard: a run's recipe beside its figures (HParams), and the pictures (Images)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import yaml

from analysis.outliers import largest_kurtosis

PICTURES = ("trajectory", "outliers", "weights", "step", "curvature", "quantization")


def write_tensorboard(run: dict[str, Any], report: Path, folder: Path) -> None:
    """Write one event file into `folder`, in place of what an earlier report wrote there.

    Args:
        run: as `report.gather` returns it.
        report: the folder of the run's pictures.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    shutil.rmtree(folder, ignore_errors=True)
    step, settings, found = run["checkpoint"]["step"], settings_of(run["recipe"]), figures_of(run)
    with SummaryWriter(str(folder)) as writer:
        if settings and found:
            for summary in hparams(settings, found):
                writer._get_file_writer().add_summary(summary)  # pyright: ignore[reportOptionalMemberAccess]
        for name, value in found.items():
            writer.add_scalar(name, value, step)
        for name in PICTURES:
            if (report / f"{name}.png").exists():
                pixels = (255 * matplotlib.image.imread(report / f"{name}.png")[..., :3]).round().astype(np.uint8)
                writer.add_image(f"report/{name}", pixels, step, dataformats="HWC")


def settings_of(recipe: str) -> dict[str, bool | int | float | str]:
    """The recipe's values by dotted key; nothing where there is no recipe."""
    settings: dict[str, bool | int | float | str] = {}

    def add(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                add(item, f"{key}.{name}" if key else str(name))
        elif value is not None:
            settings[key] = value if isinstance(value, bool | int | float | str) else str(value)

    try:
        add(yaml.safe_load(recipe), "")
    except yaml.YAMLError:
        return {}
    return settings


def figures_of(run: dict[str, Any]) -> dict[str, float]:
    """What a run came to, by the name that HParams lists it under."""
    network = run["trajectory"]["network"] if run["trajectory"] else {}
    losses = [record["validation_loss"] for record in run["metrics"] if "validation_loss" in record]
    figures = {
        "report/validation_loss": losses[-1] if losses else None,
        "report/largest_kurtosis": largest_kurtosis(run["outliers"])[0] if run["outliers"] else None,
        "report/omega": network.get("omega"),
        "report/omega_from_the_start": network.get("omega_relative"),
        "report/straightness": network.get("straightness"),
        "report/participation_ratio": network.get("participation_ratio"),
    }
    return {name: float(value) for name, value in figures.items() if value is not None}
