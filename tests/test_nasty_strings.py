"""What strangers send runs nowhere: pages and cards in a real browser, messages on a terminal."""

import json
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from report.evaluation_page import held_out_section
from report.inspection_page import inspection_page
from report.inspection_text import in_terminal
from report.model_card import Source, card
from report.page import page, write_report
from report.running import samples_of_runs
from settings.artifacts import write_jsonl
from settings.terminal import clean
from tests.support.helpers import launch, write_pairs
from tests.test_evaluation_report import rendered
from tests.test_inspect import SHORT, looked_at
from tests.test_model_card import FACTS
from tests.test_report import written

HIT = "document.documentElement.setAttribute('data-hit', 'yes')"
# Each would run or reach out if it stood in a page as it is; the last ones lie about the order of what is read.
NASTY = [
    f"<script>{HIT}</script>",
    f"</script><script>{HIT}</script>",
    f'<img src=x onerror="{HIT}">',
    f'" onmouseover="{HIT}" autofocus onfocus="{HIT}" x="',
    f"' onfocus='{HIT}' autofocus tabindex='0",
    f'<svg onload="{HIT}"></svg>',
    f'<iframe srcdoc="<script>parent.{HIT}</script>"></iframe>',
    f"<!--<script>{HIT}",
    f']]></style></title></textarea><svg/onload="{HIT}">',
    "[go](javascript:alert(1)) ![x](http://127.0.0.1:9/x) <http://127.0.0.1:9>",
    "\x1b[31mred\x1b[0m \x1b]8;;http://127.0.0.1:9\x07link\x1b]8;;\x07 \x1b[2J \x9b31m",
    "abc\u202egnp.exe\u202c \u2066x\u2069 \u200f \u2028 \x00 \x08 \r",
    "```\n</code></pre>" + f"<script>{HIT}</script>",
]
ALL = " ".join(NASTY)
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def harmless(page: Path, profile: Path) -> str:
    """Open a page in a browser; nothing of the data has run, no element or handler is the data's; return its DOM."""
    dom, log = rendered(page, profile)
    assert 'data-hit="yes"' not in dom.partition("<body")[0], "a script of the data ran"
    tags = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", dom, flags=re.S)  # ours, whose words are not data
    found = [name.lower() for name in re.findall(r"<([a-zA-Z][\w-]*)", tags)]
    assert not set(found) & {"img", "iframe", "object", "embed", "form", "base", "audio", "video"}
    for tag in re.findall(r"<[a-zA-Z][^>]*>", tags):
        names = re.findall(r"""\s([^\s"'>/=]+)(?:=(?:"[^"]*"|'[^']*'|[^\s"'>]+))?""", tag)
        assert not [name for name in names if name.lower().startswith("on") or name.lower() == "autofocus"], tag
    for trouble in ("Content Security Policy", "Uncaught", "ERR_", "127.0.0.1:9/"):
        assert trouble not in log, f"the browser said: {trouble}"
    assert not HIDDEN.search(dom), f"hidden in the page: {HIDDEN.findall(dom)[:5]!r}"
    return dom


@pytest.mark.slow
def test_pages_show_what_strangers_wrote_and_run_none_of_it(tmp_path: Path) -> None:
    written(tmp_path, ALL)
    dom = harmless(tmp_path / "report.html", tmp_path / "profile")
    assert "&lt;script&gt;document" in dom and 'id="read"' in dom  # shown as text, by a page whose own script ran
    data = re.search(r'<script type="application/json">(.*?)</script>', dom, re.S)
    assert data and json.loads(data[1])
    rows = [{"prompt": f"{i} {text}", "chosen": text, "rejected": f"no {text}"} for i, text in enumerate(NASTY)]
    seen = looked_at(tmp_path, rows, rows[:2], SHORT)
    (tmp_path / "inspect.html").write_text(inspection_page(f"Data {ALL}", seen), encoding="utf-8")
    assert "&lt;img" in harmless(tmp_path / "inspect.html", tmp_path / "profile")
    run = tmp_path / "run"
    run.mkdir()
    write_jsonl(run / "samples.jsonl", [{"step": 1, "prompt": ALL, "response": text} for text in NASTY])
    samples = page(f"Runs {ALL}", samples_of_runs({f"run {ALL}": run}))
    (tmp_path / "runs.html").write_text(samples, encoding="utf-8")
    more = {"data": held_out_section([ALL, *NASTY], [[ALL], [NASTY[0]]])}
    said = [{"prompt": ALL, "model": name, "response": text} for name in ("a", f"b {ALL}") for text in (name, ALL)]
    models = {"models": {"a": {"score": 0.5}, f"b {ALL}": {"score": 0.5}}}
    write_report(tmp_path / "asked", ALL, {}, models, said, [], more, {"data": NASTY, "who": NASTY})
    assert "<ins>" in harmless(tmp_path / "asked/report.html", tmp_path / "profile")
    assert "&lt;svg" in harmless(tmp_path / "runs.html", tmp_path / "profile")


@pytest.mark.slow
def test_a_card_as_a_site_renders_it_runs_nothing_and_links_nowhere(tmp_path: Path) -> None:
    """CommonMark with raw HTML let through, as a careless site would."""
    facts = FACTS._replace(
        name=ALL,
        loss=NASTY[0],
        objective=ALL,
        base=ALL,
        sources=[Source(ALL, ALL, NASTY[3], {})],
        settings={"lr": 1.0, NASTY[2]: ALL},
        metrics={ALL: 1.0},
        command=f"python launch.py 'x={ALL}'",
        versions={ALL: NASTY[0]},
        commit=ALL,
    )
    front, _, body = card(facts).removeprefix("---\n").partition("\n---\n")
    assert HIT in body and not HIDDEN.search(front) and not HIDDEN.search(body)
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    (tmp_path / "card.html").write_text(f"<!doctype html><meta charset=utf-8><body>{shown}", encoding="utf-8")
    dom = harmless(tmp_path / "card.html", tmp_path / "profile")
    assert "<a " not in dom and "&lt;script&gt;" in dom


def test_a_terminal_gets_no_escape_code_of_the_data(tmp_path: Path) -> None:
    assert not HIDDEN.search(clean(ALL)) and clean("tab\tline\nü 漢 🙂") == "tab\tline\nü 漢 🙂"
    rows = [{"prompt": f"{i} {text}", "response": text or "x"} for i, text in enumerate(NASTY)]
    shown = in_terminal(looked_at(tmp_path, rows, None, SHORT), color=False)
    assert "onerror" in shown and not HIDDEN.search(shown)


@pytest.mark.slow
def test_messages_show_a_file_s_own_codes_as_marks(tmp_path: Path) -> None:
    """Column names, values, paths and files that strangers named reach a message, and no terminal as they are."""
    data = tmp_path / "rows.jsonl"
    run = ["loss=sft", "model=tiny", "datasets=[local]", f"cache_dir={tmp_path}/out", f"datasets.local.train={data}"]
    for row in ({ALL: "x"}, {"messages": [{ALL: 1}]}, {"prompt": "x", "response": {ALL: 1}}):
        data.write_text(json.dumps(row) + "\n", encoding="utf-8")
        done = launch(*run)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "rows.jsonl" in done.stderr
        assert not HIDDEN.search(done.stderr.replace("\r", "")) and not HIDDEN.search(done.stdout)
    write_pairs(data, 3)
    with data.open("a", encoding="utf-8") as out:
        out.write(json.dumps({"messages": [{"role": ALL, "content": ALL}]}) + "\n")
    done = launch(
        *run, "datasets.local.on_error=drop", "n_steps=1", "exp_name=dropped", "datasets.local.format=messages"
    )
    assert done.returncode == 0, done.stderr
    assert "1 dropped: cannot be read" in done.stdout and not HIDDEN.search(done.stdout)
