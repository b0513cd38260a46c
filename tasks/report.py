"""task=report sweep=DIR: compare the runs of a sweep, or show one run, finished or not.

task=summarize is another thing: it pools evaluations of the same models.
A finished evaluation (task=evaluate) gets its own pages anew, with what other tools put into its folder since.
Writes DIR/summary.md and DIR/report.html. Runs whose configurations differ in the seed alone are one row: mean and 95 %
interval over seeds. The best value of a column is marked only where its interval lies apart from every other one.
Losses are compared only between rows whose loss is the same: another method or another weight has another scale.
Runs of a task that neither trains nor evaluates, such as a teacher cache, are named and not compared.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from engine.samples import FILE as SAMPLES
from evaluation.intervals import Interval
from evaluation.metrics import MORE, NEITHER, TRAINING, Metric, interval_over_seeds, metric_of, values_in
from report.charts import Plotted, interval_chart, panel_of, read_curves
from report.evaluation_page import rewrite
from report.glossary import glossary_section
from report.markup import section, text
from report.page import curves_section, page
from report.run_page import facts_section, last_section, no_held_out
from report.running import STOPPED, line_of, now, running_section, samples_of_runs, state_of
from settings.artifacts import is_done, write_text
from settings.schema import Settings
from settings.tasks import counted

PLAN = "plan.json"  # what a pipeline writes into its folder at its start


class Job(NamedTuple):
    """A run of the sweep; values: {column: last value}, empty for an unfinished one."""

    folder: Path
    name: str
    config: dict[str, Any]
    done: bool
    values: dict[str, float]


class Row(NamedTuple):
    """Runs that differ in the seed alone; values: {column: {seed: value}}."""

    name: str
    loss: str
    jobs: list[Job]
    values: dict[str, dict[int, float]]


# ---- reading


def values_of(folder: Path) -> dict[str, float]:
    """Return what a finished run says of itself: the last of its metrics, and the scores of an evaluation."""
    curves = read_curves(folder / "metrics.jsonl").points
    values = {metric.key: curves[metric.key][-1][1] for metric in TRAINING if metric.key in curves}
    file = folder / "results.json"
    models = json.loads(file.read_text(encoding="utf-8"))["models"] if file.is_file() else {}
    for model, entry in models.items():
        for key, value in values_in(entry):
            values[key if len(models) == 1 else f"{key} {model}"] = value
    return values


def check_no_pipeline(sweep: Path) -> None:
    """Refuse the folder of a pipeline, or of several, with where its reports are."""
    plans = [plan.parent for plan in sorted(sweep.rglob(PLAN))]
    if not plans:
        return
    done = [str(folder / "report.html") for folder in plans if (folder / "report.html").is_file()]
    stages = sorted(entry.name for entry in plans[0].iterdir() if entry.is_symlink())
    raise ValueError(
        f"sweep={sweep} holds pipelines, which write their report themselves once they are done "
        f"({', '.join(done) or 'none is'}). For one stage: sweep={plans[0]}/STAGE, of {', '.join(stages)}"
    )


def read_jobs(sweep: Path) -> list[Job]:
    """Return every run below the sweep's folder, finished or not, by name; ValueError if there is none."""
    jobs = []
    for file in sorted(sweep.rglob("config.yaml")):
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(config, dict) and {"task", "seed", "loss"} <= config.keys():
            folder, done = file.parent, is_done(file.parent)
            name = sweep.name if folder == sweep else str(folder.relative_to(sweep))
            jobs.append(Job(folder, name, config, done, values_of(folder) if done else {}))
    if not jobs:
        check_no_pipeline(sweep)
        raise ValueError(
            f"sweep={sweep} holds no run (no config.yaml below it): give the folder of a sweep, cache_dir/exp_name"
        )
    return jobs


def is_compared(job: Job) -> bool:
    """Tell whether a run is a row of the table: a finished one that trained, or that has scores."""
    return job.done and (job.config["task"] == "train" or bool(job.values))


def others_of(jobs: list[Job]) -> list[Job]:
    """Return the finished runs of tasks with nothing to compare, such as task=cache."""
    return [job for job in jobs if job.done and not is_compared(job)]


def check_rows(sweep: Path, jobs: list[Job]) -> None:
    """Refuse runs of which none has anything to show, with how far each of them came."""
    shown_ones = [job for job in jobs if is_compared(job) and job.values]
    shown_ones += [job for job in jobs if read_curves(job.folder / "metrics.jsonl").points]
    if shown_ones or any((job.folder / SAMPLES).is_file() for job in jobs):
        return
    states = [line_of(state_of(job.folder, job.name, job.config, now())) for job in jobs if not job.done]
    states += [
        f"{job.name} (task={job.config['task']}): finished, and has no rows of training" for job in jobs if job.done
    ]
    raise ValueError(f"sweep={sweep} holds no run with a row to show:\n  " + "\n  ".join(states))


def compared_config(config: dict[str, Any]) -> str:
    """Return what has to be equal in the runs of a row."""
    return json.dumps({k: v for k, v in counted(config).items() if k != "seed"}, sort_keys=True, default=str)


def row_name(jobs: list[Job]) -> str:
    """Return what the names of a row's runs share, without the seed."""
    names = {re.sub(r"(^|,)seed=\d+", "", job.name).strip(",") for job in jobs}
    return (names.pop() if len(names) == 1 else os.path.commonprefix(sorted(names)).rstrip("_-/,=")) or "run"


def rows_of(jobs: list[Job]) -> list[Row]:
    """Pool the finished runs over seeds; ValueError if a seed stands twice in a row."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        if is_compared(job):
            groups.setdefault(compared_config(job.config), []).append(job)
    rows = []
    for group in groups.values():
        seeds = [job.config["seed"] for job in group]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"the same run stands twice: {', '.join(str(job.folder) for job in group)}. Remove one of them"
            )
        names = dict.fromkeys(name for job in group for name in job.values)
        values = {name: {j.config["seed"]: j.values[name] for j in group if name in j.values} for name in names}
        loss = json.dumps(group[0].config["loss"], sort_keys=True) if group[0].config["task"] == "train" else ""
        rows.append(Row(row_name(group), loss, group, values))
    return rows


# ---- comparing


def columns_of(rows: list[Row]) -> list[str]:
    """Return the columns that some row fills, training's first."""
    known = [metric.key for metric in TRAINING]
    found = dict.fromkeys(name for row in rows for name in row.values)
    return [name for name in known if name in found] + [name for name in found if name not in known]


def shown(column: str) -> Metric:
    """Return the metric that a column holds; a model's name may stand behind its key."""
    return metric_of(column.split(" ")[0])


def spread(row: Row, column: str) -> Interval | None:
    """Return a row's interval over seeds; None for one seed, or a row without this column."""
    return interval_over_seeds(shown(column).unit, list(row.values.get(column, {}).values()))


def mean(row: Row, column: str) -> float:
    """Return a row's mean over seeds."""
    values = row.values[column].values()
    return sum(values) / len(values)


def best_rows(rows: list[Row], column: str) -> list[Row]:
    """Return the rows whose interval lies on the better side of every other comparable one; at most one a loss."""
    if shown(column).better == NEITHER:
        return []
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if column in row.values:
            groups.setdefault(row.loss if column.startswith("loss/") else "", []).append(row)
    sign, found = 1.0 if shown(column).better == MORE else -1.0, []
    for group in groups.values():
        intervals = [spread(row, column) for row in group]
        signed = [sorted((sign * i[0], sign * i[1])) for i in intervals if i is not None]
        if len(group) < 2 or len(signed) < len(group):
            continue
        top = max(range(len(group)), key=lambda i: signed[i][0])
        if all(signed[top][0] > high for i, (_, high) in enumerate(signed) if i != top):
            found.append(group[top])
    return found


# ---- writing


def cell(row: Row, column: str) -> str:
    """Write mean and interval; a dash where the row says nothing."""
    if column not in row.values:
        return "-"
    interval = spread(row, column)
    return f"{mean(row, column):.4g}" + (f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "")


def table(rows: list[Row], unfinished: list[Job], others: Sequence[Job] = ()) -> str:
    """Return the sweep as Markdown: a row for each configuration, the separated best of a column in bold."""
    columns = columns_of(rows)
    best = {column: best_rows(rows, column) for column in columns}
    lines = [["run", "seeds", *columns], ["---"] * (len(columns) + 2)]
    for row in rows:
        cells = [f"**{cell(row, c)}**" if row in best[c] else cell(row, c) for c in columns]
        lines.append([row.name, " ".join(str(s) for s in sorted(j.config["seed"] for j in row.jobs)), *cells])
    written = (
        "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + words_below(rows, any(best.values()))
    )
    written = written if rows else ""
    states = [state_of(job.folder, str(job.folder), job.config, now()) for job in unfinished]
    written += "".join(f"Unfinished, left out of the table: {line_of(state)}\n" for state in states)
    written += f"{STOPPED}\n" if states else ""
    return written + others_said(others)


def words_below(rows: list[Row], marked: bool) -> str:
    """Say how to read the table; of one run that there is nothing to compare."""
    alone = len(rows) == 1 and len(rows[0].jobs) == 1
    said = ""
    if alone:
        said = "The last values of one run: there is nothing to compare them with.\n"
    elif any(spread(row, column) for row in rows for column in row.values):
        bold = "Bold: the interval lies apart from every other one."
        none = "No interval lies apart from all others: none is marked."
        said = (
            f"Mean [95 % interval over seeds]. {bold if marked else none}\n"
            if len(rows) > 1
            else "Mean [95 % interval over seeds].\n"
        )
    if any(len(row.jobs) < 2 for row in rows):
        said += "A run of one seed has no interval: with -m, seed=1,2,3 gives one.\n"
    hints = dict.fromkeys(no_held_out(job.config) for row in rows for job in row.jobs if row.loss)
    return said + "".join(f"{'N' + hint[1:]}.\n" for hint in hints if hint)


def others_said(others: Sequence[Job]) -> str:
    """Name the runs that have nothing to compare."""
    named = ", ".join(f"{job.name} (task={job.config['task']})" for job in others)
    return f"Finished, and no run of training: {named}.\n" if named else ""


def results_of(rows: list[Row]) -> str:
    """Return a chart and a table for each column."""
    body = ""
    many = any(len(row.jobs) > 1 for row in rows)
    for column in columns_of(rows):
        filled, best = [row for row in rows if column in row.values], best_rows(rows, column)
        plotted = [
            Plotted(text(r.name), mean(r, column), None, spread(r, column), None, list(r.values[column].values()))
            for r in filled
        ]
        lines = "".join(
            f'<tr{" class=best" if row in best else ""}><th scope="row">{text(row.name)}'
            f"{' <span class=badge>separated</span>' if row in best else ''}</th>"
            f"<td>{len(row.jobs)}</td><td>{text(cell(row, column))}</td></tr>"
            for row in filled
        )
        value = "mean [95 % over seeds]" if many else "value"
        head = f'<th scope="col">run</th><th scope="col">seeds</th><th scope="col">{value}</th>'
        body += (
            f"<h3>{text(column)} ({shown(column).better} is better)</h3>{interval_chart(plotted)}"
            f'<div class="scroll" tabindex="0" role="region" aria-label="{text(column)}"><table class="results">'
            f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
        )
    return body


def html(title: str, rows: list[Row], unfinished: list[Job], others: Sequence[Job] = ()) -> str:
    """Return the report: what one run was and its last values, or a chart and a table for each column of several; then
    the training curves.
    """
    jobs = [*(job for row in rows for job in row.jobs), *unfinished]
    alone = jobs[0] if len(jobs) == 1 and jobs[0].config["task"] == "train" else None
    if alone:
        results = facts_section(alone.folder, alone.config) + last_section(alone.folder)
    else:
        body = results_of(rows)
        if unfinished:
            body += '<p class="note">Unfinished runs are left out here; where they stand is said above.</p>'
        body += f'<p class="note">{text(others_said(others))}</p>' if others else ""
        results = section("results", "Runs of the sweep" if len(rows) > 1 else "The finished run", body) if rows else ""
    named = {f"seed_{j.config['seed']}/{r.name}": j.folder for r in rows for j in r.jobs}
    named |= {f"{job.name} (unfinished)": job.folder for job in unfinished}
    if alone:
        named = {alone.name: alone.folder}
    files = {name: folder / "metrics.jsonl" for name, folder in named.items()}
    files = {name: file for name, file in files.items() if file.is_file()}
    panels = {panel_of(name)[0] for file in files.values() for name in read_curves(file).points}
    running = running_section([state_of(job.folder, job.name, job.config, now()) for job in unfinished])
    words = glossary_section(panels)
    return page(title, running + results + curves_section(files) + words + samples_of_runs(named))


def run(settings: Settings) -> None:
    """Compare the runs of a sweep; print the table and write it, with the report, into the sweep's folder."""
    sweep = Path(settings.run.sweep or "").expanduser()
    jobs = read_jobs(sweep)
    if len(jobs) == 1 and jobs[0].folder == sweep and jobs[0].done and jobs[0].config["task"] == "evaluate":
        rewrite(sweep)
        print((sweep / "summary.md").read_text(encoding="utf-8"))
        print(f"{sweep / 'summary.md'}\n{sweep / 'report.html'}", flush=True)
        return
    check_rows(sweep, jobs)
    rows, unfinished, others = rows_of(jobs), [job for job in jobs if not job.done], others_of(jobs)
    written = table(rows, unfinished, others)
    print(written)
    title = f"{'Run' if len(jobs) == 1 else 'Sweep'} {sweep.name}"
    for name, content in (("summary.md", written), ("report.html", html(title, rows, unfinished, others))):
        write_text(sweep / name, content)
        print(sweep / name, flush=True)
