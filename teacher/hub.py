"""A cache on the Hugging Face hub, read by its name: loss.teacher_cache=hub:NAME or hf://datasets/NAME[@REVISION].

report/publishing.py pushes one there.
"""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from models import hub_reachable

NAME = re.compile(r"(?:hub:|hf://datasets/)(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?/?")


def is_hub_name(place: str) -> bool:
    """Tell whether a place is written as a name on the hub."""
    return place.startswith(("hub:", "hf://"))


def cache_folder(place: str) -> Path:
    """Return the folder of a cache: the place itself, or what `hub:NAME` names, downloaded once.

    ValueError for a name that cannot be read, or that is neither here nor to be reached.
    """
    if not is_hub_name(place):
        return Path(place).expanduser()
    found = NAME.fullmatch(place)
    if not found:
        raise ValueError(
            f"{place!r} names no data set of the hub: write hub:OWNER/NAME or hf://datasets/OWNER/NAME[@REVISION]"
        )
    name, revision = found["name"], found["revision"]
    offline = not hub_reachable()
    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=offline)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if offline:
            reason = "it is not in the hub's cache on this machine, and the hub cannot be reached"
        raise ValueError(f"cannot read the cache {place}: {reason}") from error
    return Path(folder)
