"""`python -m tests.golden DIR`: run every case file of a folder through our functions; exit 1 if one fails."""

import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.golden.adapters import Skip, outputs_of
from tests.golden.cases_io import compare, load, tolerance_of


class Tally(NamedTuple):
    """Names of what passed, failures as lines, and how many were skipped by reason."""

    passed: list[str]
    failures: list[str]
    skipped: Counter[str]


def run_folder(folder: Path) -> Tally:
    """Run every variant of every case; a variant without numbers of ours is skipped, never passed."""
    passed, failures, skipped = [], [], Counter[str]()
    for path in sorted(folder.glob("*.json")):
        case = load(path)
        by_name = {variant["name"]: variant for variant in case["variants"]}
        for variant in case["variants"]:
            variant["all"] = by_name
            try:
                ours = outputs_of(path.stem, variant)
            except Skip as reason:
                skipped[str(reason)] += 1
                continue
            assert ours, f"{path.stem}/{variant['name']}: an adapter must return numbers"
            wrong = compare(variant["outputs"], ours, *tolerance_of(case, variant))
            if wrong:
                failures.append(f"{path.stem}/{variant['name']}: {wrong}")
            else:
                passed.append(f"{path.stem.split('_seed')[0]}/{variant['name']}")
    return Tally(passed, failures, skipped)


def main() -> None:
    """Print failures, then skips by reason, then the counts."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m tests.golden DIR (a folder of golden-v1 case files)")
    tally = run_folder(Path(sys.argv[1]))
    for line in tally.failures:
        print(f"failed  {line}")
    for reason, count in sorted(tally.skipped.items()):
        print(f"skipped {count:4d}  {reason}")
    print(f"{len(tally.passed)} passed, {len(tally.failures)} failed, {sum(tally.skipped.values())} skipped")
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
