"""What a finished run hands to the hub: which files, whose card stands beside them, and the upload itself.

A model's folder, a teacher cache, preference data and reports, each with a card that says what made it. A repository is
private unless hub.private=false; nothing is uploaded that holds a key or a token.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from assets.hub import hub_reachable
from evaluation.metrics import at, is_number, present
from report.model_card import block, code, plain
from report.parents import Parent, config_of, digest_of, front_matter, parents_of, scores_of
from settings.artifacts import is_done
from settings.schema import HubConfig
from settings.secrets import is_secret, secrets_of

REPORTS = ("report.html", "results.json", "results.md", "summary.md", "scores.json", "samples.jsonl", "latency.json")
OF_A_RUN = ("config.yaml", "command.txt", "versions.json", "digest.txt", "resources.json", "learning_rate.json")
DATA = (".json", ".jsonl", ".html")  # rows of the web hold addresses with keys: only our own secrets count there
TEXTS = (".yaml", ".txt", ".md")
DATA_FILES = {"LABEL": ("labeled.jsonl",), "SELECT": ("*.jsonl",)}


class Upload(NamedTuple):
    """What would be pushed. files: name in the repository -> file here."""

    kind: str  # model | exported model | teacher cache | preference data | responses | report
    repo_type: str  # of the hub: model | dataset
    folder: Path  # whose digest names it
    files: dict[str, Path]
    card: str


def upload_of(run: Path, hub: HubConfig) -> Upload:
    """Find what a run's folder (or the FINAL, CACHE in it) holds, and write its card; ValueError where there is nothing
    to push, or where a file holds a secret.
    """
    run = run.expanduser()
    run = run.parent if run.name in ("FINAL", "EXPORT", "CACHE", *DATA_FILES) else run
    if not is_done(run) and ((run / "config.yaml").is_file() or not (run / "report.html").is_file()):
        raise ValueError(f"hub.push: {run} is no finished run (it has no DONE): give the folder of one")
    kind, repo_type, folder, files = _found(run)
    files |= {f"run/{name}": run / name for name in OF_A_RUN if (run / name).is_file()}
    card = _card(kind, folder, run, files, hub)
    _check_secrets(files, card)
    return Upload(kind, repo_type, folder, files, card)


def _found(run: Path) -> tuple[str, str, Path, dict[str, Path]]:
    if (run / "FINAL").is_dir():
        return "model", "model", run / "FINAL", _inside(run / "FINAL", "README.md")
    if (run / "EXPORT").is_dir():
        return "exported model", "model", run / "EXPORT", _inside(run / "EXPORT", "README.md")
    if (run / "CACHE").is_dir():
        return "teacher cache", "dataset", run / "CACHE", _inside(run / "CACHE", "README.md")
    for name, patterns in DATA_FILES.items():
        found = {f.name: f for pattern in patterns for f in sorted((run / name).glob(pattern))}
        if found:
            return "preference data", "dataset", run / name, found
    if (run / "generations.jsonl").is_file():
        return "responses", "dataset", run, {"generations.jsonl": run / "generations.jsonl"}
    found = {name: run / name for name in REPORTS if (run / name).is_file()}
    if "report.html" in found or "results.json" in found:
        return "report", "dataset", run, found
    raise ValueError(
        f"hub.push: {run} holds no FINAL (model), EXPORT, CACHE, LABEL or SELECT (labeled data), generations.jsonl or "
        "report"
    )


def _inside(folder: Path, left_out: str) -> dict[str, Path]:
    files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
    return {name: file for name, file in files.items() if name != left_out}


def _check_secrets(files: Mapping[str, Path], card: str) -> None:
    secrets = secrets_of(os.environ)
    places = [name for name, file in files.items() if _holds(name, file, secrets)]
    places += ["its card"] if is_secret(card, secrets) else []
    if places:
        raise ValueError(f"hub.push: {places[0]} holds what looks like a key, token or password: nothing was pushed")


def _holds(name: str, file: Path, secrets: list[str]) -> bool:
    if file.suffix not in (*TEXTS, *DATA):
        return False
    ours_alone = file.suffix in DATA and not name.startswith("run/")
    with file.open(encoding="utf-8", errors="replace") as lines:
        if ours_alone:
            return any(secret in line for line in lines for secret in secrets)
        return any(is_secret(line, secrets) for line in lines)


# ---- the card


def _card(kind: str, folder: Path, run: Path, files: Mapping[str, Path], hub: HubConfig) -> str:
    config = config_of(run)
    parents = parents_of(run, license_on_hub)
    own = folder / "README.md"
    front = front_matter(own)
    licenses = {license for parent in parents for license in parent.licenses}
    if parents and len(licenses) == 1 and all(parent.licenses for parent in parents):
        front["license"] = licenses.pop()
    front["tags"] = list(dict.fromkeys([*front.get("tags", []), "prefdistill"]))
    if kind in ("preference data", "responses"):
        front["configs"] = [{"config_name": "default", "data_files": [n for n in files if n.endswith(".jsonl")]}]
    body = own.read_text(encoding="utf-8").partition("\n---\n")[2].strip() if own.is_file() else ""
    # A model's card says its own command; other kinds have none yet.
    task = code(f"task={config.get('task')}")
    said = body or f"# {plain(run.name)}\n\n{kind.capitalize()} of {task}.\n\n{_command(run)}"
    parts = [said, _parents(parents), _scores(folder, hub), _digests(folder, files)]
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n".join(part for part in parts if part) + "\n"


def _command(run: Path) -> str:
    file = run / "command.txt"
    return f"## Made with\n\n{block('bash', file.read_text(encoding='utf-8'))}\n" if file.is_file() else ""


def _parents(parents: list[Parent]) -> str:
    if not parents:
        return ""
    rows = "\n".join(
        f"| {plain(parent.role)} | {code(parent.name)} | {code(parent.digest) if parent.digest else '-'} | "
        f"{', '.join(map(plain, parent.licenses)) or 'not known'} |"
        for parent in parents
    )
    open_ones = [parent for parent in parents if not parent.licenses]
    note = "\n\nOf some the license is not known: find out before this is made public." if open_ones else ""
    return f"\n## Parents\n\n| read as | what | digest | license |\n|---|---|---|---|\n{rows}{note}\n"


def _scores(folder: Path, hub: HubConfig) -> str:
    if hub.results is None:
        return ""
    results = Path(hub.results).expanduser()
    name, entry = scores_of(results, folder)
    rows = []
    for metric in present([entry]):
        interval = at(entry, metric.interval)
        bounds = f"[{interval[0]:.3f}, {interval[1]:.3f}]" if isinstance(interval, list) else "-"
        value = at(entry, metric.key)
        if metric.headline and is_number(value):
            rows.append(f"| {plain(metric.label)} | {value:.4g} | {bounds} |")
    head = (
        f"Judged as {code(name)} by `task=evaluate`, run digest {code(digest_of(results))}; intervals are over prompts."
    )
    return f"\n## Scores\n\n{head}\n\n| metric | value | 95 % |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _digests(folder: Path, files: Mapping[str, Path]) -> str:
    rows = "\n".join(f"{_sha256(file)}  {name}" for name, file in files.items())
    return f"\n## Digests\n\nRun digest {code(digest_of(folder))}. SHA-256 of the files:\n\n{block('text', rows)}\n"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def license_on_hub(name: str, kind: str) -> str | None:
    """Return the license that a card on the hub names, from the hub's folder on this machine or the hub itself."""
    kept = try_to_load_from_cache(name, "README.md", repo_type=kind)
    if isinstance(kept, str):
        return front_matter(Path(kept)).get("license")
    if not hub_reachable():
        return None
    try:
        info: Any = HfApi().repo_info(name, repo_type=kind, timeout=10)
    except (HfHubHTTPError, OSError, ValueError):
        return None
    data = getattr(info, "card_data", None)
    return getattr(data, "license", None) if data is not None else None


# ---- the upload


def told(upload: Upload, hub: HubConfig) -> str:
    """Say what a push uploads."""
    size = sum(file.stat().st_size for file in upload.files.values())
    names = "\n".join(f"  {name}" for name in ("README.md", *upload.files))
    public = "private" if hub.private else "PUBLIC"
    return (
        f"{upload.kind} of {upload.folder}: {len(upload.files) + 1} files, {size / 1e6:,.2f} MB, "
        f"as the {public} {upload.repo_type} {hub.push}\n{names}"
    )


def push(upload: Upload, hub: HubConfig) -> str:
    """Upload in one commit and return the address; ValueError for a public repository where private ones are asked for,
    and for what the hub refuses.
    """
    name = str(hub.push)
    if not hub_reachable():
        raise ValueError(
            f"hub.push={name}: the hub cannot be reached from here. Push later: task=push hub.folder=FOLDER"
        )
    api = HfApi()
    try:
        api.create_repo(name, repo_type=upload.repo_type, private=hub.private, exist_ok=True)
        if hub.private and not api.repo_info(name, repo_type=upload.repo_type).private:
            raise ValueError(f"hub.push={name} is there and public: choose another name, or say hub.private=false")
        with tempfile.TemporaryDirectory() as folder:
            _lay(upload, Path(folder))
            message = f"{upload.kind} by prefdistill"
            done = api.upload_folder(
                folder_path=folder, repo_id=name, repo_type=upload.repo_type, commit_message=message
            )
    except (HfHubHTTPError, RepositoryNotFoundError, OSError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"hub.push={name}: {why[0]} (the token comes from HF_TOKEN or `hf auth login`; it must be allowed to write)"
        ) from error
    return str(done.commit_url)


def _lay(upload: Upload, folder: Path) -> None:
    """Lay links to the files, and the card, as they will lie in the repository."""
    for name, file in upload.files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file.resolve())
    (folder / "README.md").write_text(upload.card, encoding="utf-8")


def hand_on(run: Path, hub: HubConfig, dry: bool) -> None:
    """Push what a run holds, or say what would be pushed."""
    upload = upload_of(run, hub)
    if dry:
        print(f"would push the {told(upload, hub)}\n\n{upload.card}", flush=True)
        return
    print(f"pushing the {told(upload, hub)}", flush=True)
    print(f"pushed: {push(upload, hub)}", flush=True)
