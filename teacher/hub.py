"""A cache on the Hugging Face hub: read by its name, and pushed to one, only where the config says so.

loss.teacher_cache=hub:NAME  or  hf://datasets/NAME[@REVISION]
cache.push_to_hub=NAME
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

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


def check_push(name: str) -> None:
    """Refuse, before a teacher is asked, a push that cannot work."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"cache.push_to_hub={name!r} must be OWNER/NAME of a data set")
    if not hub_reachable():
        raise ValueError(f"cache.push_to_hub={name}: the hub cannot be reached from here. Leave it out, and push later")


def push(folder: Path, name: str, card: str, api: Any = None) -> str:
    """Upload a finished cache, as it lies here, with a dataset card; the data set is made private where it is new."""
    api = api or HfApi()
    api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
    api.upload_folder(folder_path=str(folder), repo_id=name, repo_type="dataset", commit_message="teacher cache")
    api.upload_file(path_or_fileobj=card.encode("utf-8"), path_in_repo="README.md", repo_id=name, repo_type="dataset")
    return f"https://huggingface.co/datasets/{name}"
