"""task=inspect: a doctor for data. What training would see, and what is wrong with it; no model is loaded.

Reads the rows as task=train does, with the model's tokenizer and limits. Writes

    inspect.html   findings, lengths, rows colored by what is learned; opens offline
    inspect.json   the same numbers
"""

import os
import sys

import models
from dataloader import drawn_rows, load_examples
from report.inspected import Reader, as_json, inspect
from report.inspection_page import inspection_page
from report.inspection_text import colored, in_terminal
from settings.artifacts import write_json, write_text
from settings.schema import Settings
from tokens.sources import open_rows


def asked_rows(settings: Settings, split: str) -> list[str]:
    """Return the places of the rows that a split takes, so that those which the loader drops can be named.

    Empty with a limit, which draws among them.
    """
    if settings.run.n_examples if split == "train" else settings.run.n_eval_examples:
        return []
    places: list[str] = []
    for name, config in settings.datasets.items():
        source = getattr(config, split)
        if source:
            count = open_rows(source, f"datasets.{name}.{split}").size()
            picked = drawn_rows(count, config, split, settings.run.seed, name)
            places += [f"{source}, row {i + 1}" for i in picked]
    return places


def run(settings: Settings) -> None:
    """Read both splits, print what was found and write the page."""
    run, tokenizer = settings.run, models.load_tokenizer(settings.model)
    examples = {
        split: load_examples(settings.datasets, split, tokenizer, settings.model, limit, run.seed)
        for split, limit in (("train", run.n_examples), ("test", run.n_eval_examples))
    }
    reader = Reader(tokenizer, settings.model, settings.datasets)
    wheres = {split: asked_rows(settings, split) for split in examples}
    seen = inspect(examples, reader, settings.inspect, wheres)
    print(in_terminal(seen, colored(sys.stdout, os.environ)))
    write_json(run.run_dir / "inspect.json", as_json(seen))
    path = run.run_dir / "inspect.html"
    write_text(path, inspection_page(f"Data of {', '.join(settings.datasets)}", seen))
    print(f"\n{path}", flush=True)
