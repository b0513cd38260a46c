"""The scores of a report: interval plot, table, differences, and what may be concluded from them."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.comparisons import all_pairs, best_model, interval_of
from evaluation.metrics import is_number
from report.charts import Plotted, interval_chart
from report.markup import number, section, text

MOST_OPEN = 15  # differences that stand open: more are folded away


def plotted(models: Mapping[str, Mapping[str, Any]]) -> list[Plotted]:
    """Return what the interval plot shows of every model that has a score."""
    return [
        Plotted(
            text(name),
            entry["score"],
            interval_of(entry),
            interval_of(entry, "ci95_over_seeds"),
            (entry.get("greedy") or {}).get("score"),
            list(seed_scores(entry).values()),
        )
        for name, entry in models.items()
        if is_number(entry.get("score"))
    ]


NOBODY_SCORED = (
    "Nobody scored single responses here: evaluation.verifier=module:function does. Win rates of a judge or a reward "
    "model stand in their own table."
)


def legend(seeds: bool) -> str:
    """Explain the marks of the interval plot; `seeds` tells whether it shows several."""
    over_seeds = '<span><i class="key thin"></i>95 % over seeds</span><span><i class="key tick"></i>one seed</span>'
    return (
        '<p class="legend"><span><i class="key dot"></i>sampled score, 95 % over prompts</span>'
        f'{over_seeds if seeds else ""}<span><i class="key diamond"></i>greedy</span></p>'
    )


def marking_note(best: str | None, corrected: bool, seeds: bool) -> str:
    """Say why a model is marked best, or why none is."""
    if corrected:
        reason = "its score is above every other one" if best else "no score is above all the others"
        reason += " on the same prompts, after Holm’s correction for all pairs"
    elif best:
        reason = f"its interval {'' if seeds else 'over prompts '}lies above every other one"
    else:
        reason = "no interval lies above all the others"
    return f"<b>{text(best)}</b> is marked: {reason}." if best else f"No model is marked best: {reason}."


def results_section(results: Mapping[str, Any]) -> str:
    """Draw the interval plot and the table."""
    models = results.get("models") or {}
    if not models:
        return section("results", "Scores", '<p class="empty">No scores in this run.</p>')
    if not plotted(models):
        return section("results", "Scores", f'<p class="empty">{NOBODY_SCORED}</p>')
    best = best_model(models, results.get("comparisons"))
    seeds = any(interval_of(entry, "ci95_over_seeds") for entry in models.values())
    rows = "".join(result_row(name, entry, name == best, seeds) for name, entry in models.items())
    columns = [
        "model",
        "score",
        "95 % over prompts",
        *(["95 % over seeds"] if seeds else []),
        "greedy",
        "95 % over prompts",
        "n",
        "per seed",
    ]
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    table = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Scores of every model"><table class="results">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    notes = [marking_note(best, all_pairs(results.get("comparisons")), seeds)]
    if not seeds:
        notes.append(
            "No interval over seeds: these say what other prompts would change, not what training again would."
        )
    notes += [greedy_note(models)] if greedy_note(models) else []
    body = (
        legend(seeds)
        + interval_chart(plotted(models))
        + table
        + "".join(f'<p class="note">{note}</p>' for note in notes)
    )
    body += differences(results.get("comparisons") or [], "sampled") + differences(
        results.get("greedy_comparisons") or [], "greedy"
    )
    return section("results", "Scores", body)


def seed_scores(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores by seed, in order; a seed's entry is a number or has a `score`."""
    per_seed = entry.get("per_seed") or {}
    pairs = per_seed.items() if isinstance(per_seed, Mapping) else enumerate(per_seed, start=1)
    return {str(seed): value.get("score") if isinstance(value, Mapping) else value for seed, value in pairs}


def differences(rows: Sequence[Mapping[str, Any]], how: str) -> str:
    """Write paired differences; a sign says on which side of 0 the whole interval lies."""
    if not rows:
        return ""
    written, seeds, corrected = "", any(interval_of(row, "ci95_over_seeds") for row in rows), all_pairs(rows)
    for row in rows:
        interval = interval_of(row, "ci95_over_seeds") or interval_of(row)
        mark = (
            ("▲ separate" if row["separate"] else "not separate")
            if corrected
            else ""
            if interval is None
            else "▲ above 0"
            if interval[0] > 0
            else "▼ below 0"
            if interval[1] < 0
            else "holds 0"
        )
        spans = "".join(
            f"<td>{signed_interval(row, key)}</td>" for key in ("ci95", *(["ci95_over_seeds"] if seeds else []))
        )
        tests = f"<td>{number(row['p'], 4)}</td><td>{number(row['p_holm'], 4)}</td>" if corrected else ""
        written += (
            f'<tr><th scope="row">{text(row["first"])} − {text(row["second"])}</th><td>{signed(row["difference"])}</td>'
            f"{spans}{tests}<td>{mark}</td></tr>"
        )
    last = ("p", "p, Holm", "all pairs") if corrected else ("interval",)
    columns = (f"models, {how}", "difference", "95 % over prompts", *(["95 % over seeds"] if seeds else []), *last)
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return (
        f"<details{' open' if how == 'sampled' and len(rows) <= MOST_OPEN else ''}><summary>Differences on the same "
        f'prompts, {how}</summary><div class="scroll" tabindex="0" '
        f'role="region" aria-label="Differences, {how}"><table '
        f'class="differences"><thead><tr>{head}</tr></thead><tbody>{written}</tbody></table></div></details>'
    )


def signed(value: Any) -> str:
    """Write a number with its sign."""
    return f"{value:+.3f}".replace("-", "−") if is_number(value) else "–"


def signed_interval(entry: Mapping[str, Any], key: str) -> str:
    """Write [low, high] with signs."""
    interval = interval_of(entry, key)
    return f"[{signed(interval[0])}, {signed(interval[1])}]" if interval else "–"


def result_row(name: str, entry: Mapping[str, Any], best: bool, over_seeds: bool) -> str:
    """Write one row of the table."""
    seeds = entry.get("seeds")
    count = len(seeds) if isinstance(seeds, Sequence) and not isinstance(seeds, str) else seeds
    per_seed = " ".join(
        f'<span class="seed"><small>{text(seed)}</small> {number(value)}</span>'
        for seed, value in seed_scores(entry).items()
    )
    per_seed = per_seed or (f"{text(count)} seed(s)" if count is not None else "–")
    mark = ' <span class="badge">▲ separated</span>' if best else ""
    greedy = entry.get("greedy") or {}
    return (
        f'<tr{" class=best" if best else ""}><th scope="row">{text(name)}{mark}</th>'
        f"<td>{number(entry.get('score'))}</td><td>{written_interval(entry)}</td>"
        + (f"<td>{written_interval(entry, 'ci95_over_seeds')}</td>" if over_seeds else "")
        + f"<td>{number(greedy.get('score'))}</td><td>{written_interval(greedy)}</td>"
        f'<td>{text(entry.get("n", "–"))}</td><td class="left">{per_seed}</td></tr>'
    )


def written_interval(entry: Mapping[str, Any], key: str = "ci95") -> str:
    """Write [low, high]."""
    interval = interval_of(entry, key)
    return f"[{number(interval[0])}, {number(interval[1])}]" if interval else "–"


def greedy_note(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Say where greedy decoding puts another model first."""
    sampled = {n: e["score"] for n, e in models.items() if is_number(e.get("score"))}
    greedy = {n: e["greedy"]["score"] for n, e in models.items() if is_number((e.get("greedy") or {}).get("score"))}
    if not sampled or len(greedy) < 2:
        return ""
    first, first_greedy = max(sampled, key=sampled.__getitem__), max(greedy, key=greedy.__getitem__)
    if first == first_greedy:
        return ""
    scores = f"the highest score is {text(first)} sampled, {text(first_greedy)} greedy"
    return f"Sampling and greedy decoding disagree: {scores}."
