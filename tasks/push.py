"""task=push: what a finished run made goes to the hub (docs/hub.md)."""

from pathlib import Path

from report.publishing import hand_on
from settings.schema import Settings


def run(settings: Settings) -> None:
    """Push a run's folder to hub.push; with dry_run=true only say what would be pushed, with the card."""
    hand_on(Path(settings.hub.folder or ""), settings.hub, bool(settings.raw.get("dry_run")))
