"""Settings of evaluations on the shop's held-out rows."""

from pathlib import Path
from typing import Any

from settings.schema import Settings, settings_from
from tests.support.helpers import composed


def shop_evaluation(folder: Path, *overrides: str, **evaluation: Any) -> Settings:
    """Return the settings of an evaluation of folder/test.jsonl; `evaluation` is laid over its section."""
    raw = composed(
        "task=evaluate",
        "model=quickstart_student",
        "datasets=[local]",
        f"cache_dir={folder}",
        f"datasets.local.test={folder / 'test.jsonl'}",
        *overrides,
    )
    raw["evaluation"] |= evaluation
    return settings_from(raw)
