#!/usr/bin/env bash
# Look for known vulnerabilities of what the locks pin, with pip-audit: `scripts/audit_locks.sh [base dev ...]`.
# It fails where there are some, and where its database cannot be asked: a check that sees nothing is no check.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
uvx=(.venv/bin/uvx --quiet pip-audit==2.10.1 --no-deps --disable-pip --progress-spinner off)
locks=("${@:-base}")
code=0
for lock in "${locks[@]}"; do
    pinned="$(mktemp)"
    sed -n 's/^\([A-Za-z0-9._-]*==[A-Za-z0-9.]*\).*/\1/p' "requirements/$lock.lock" >"$pinned"
    found="$("${uvx[@]}" -r "$pinned" 2>&1)" || code=1
    rm -f "$pinned"
    unseen="$(grep -c 'not found on PyPI' <<<"$found")"
    grep -v -e "not found on PyPI" -e "^WARNING:pip_audit" <<<"$found"
    echo "$lock.lock: $(grep -c '==' "requirements/$lock.lock") packages, $unseen of them not in the database, $(date +%F)"
    if ((unseen)); then code=1; fi
done
exit $code
