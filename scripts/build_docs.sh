#!/usr/bin/env bash
# Build docs/ into outputs/site, an offline site: `scripts/build_docs.sh`. Its packages (requirements/docs.lock) go into an
# environment of their own, outputs/docs_env; DOCS_ENV=FOLDER takes another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
env="${DOCS_ENV:-outputs/docs_env}"
if [[ ! -x "$env/bin/mkdocs" ]]; then
    "${PYTHON:-python3}" -m venv "$env"
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements/docs.lock
fi
"$env/bin/mkdocs" build --strict --quiet
echo "outputs/site/index.html"
