"""`uv sync` and the container install what install.sh installs: the same locks, the same two lines."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_uv_sync_reads_the_locks_that_install_sh_reads() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    dynamic = found["tool"]["setuptools"]["dynamic"]
    assert dynamic["dependencies"] == {"file": ["requirements/base.lock"]}
    assert dynamic["optional-dependencies"] == {"dev": {"file": ["requirements/dev.lock"]}}
    assert found["tool"]["uv"] == {"package": False} and found["tool"]["setuptools"]["py-modules"] == []
    script = (ROOT / "install.sh").read_text(encoding="utf-8")
    assert "-r requirements/base.lock" in script and "-r requirements/dev.lock" in script


def test_the_container_runs_the_two_lines_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.search(r"^    (\./install\.sh) && (\.venv/bin/python launch\.py pipeline=quickstart)$", readme, re.M)
    assert first
    lines = (ROOT / "Containerfile").read_text(encoding="utf-8").splitlines()
    steps = [line for line in lines if line and not line.startswith("#")]
    assert f"RUN {first[1]} $FLAGS" in steps
    assert steps[-1] == "CMD [" + ", ".join(f'"{word}"' for word in first[2].split()) + "]"
    ignored = (ROOT / ".containerignore").read_text(encoding="utf-8")
    assert ignored == (ROOT / ".dockerignore").read_text(encoding="utf-8") and ".venv\n" in ignored
