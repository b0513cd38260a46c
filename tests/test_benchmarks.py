"""benchmarks/run.py: figures, the check against committed ones, and how processes take turns."""

import inspect
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import figures, run
from benchmarks.figures import Figure, checkable, committed, complaints, entropy_bytes, met, ratios, slope, unlike
from benchmarks.ours import tokens_of
from benchmarks.turns import Worker
from benchmarks.works import Setup, train_overrides
from dataloader import Tokens
from tests.support.helpers import ROOT
from trainers.batches import Item

FIGURES = {
    "sft.seconds": Figure(12.0, 11.0, 13.0, "s"),
    "sft.time_ratio": Figure(0.7, 0.68, 0.72, "", "higher", 0.7),
    "sft.memory_ratio": Figure(0.7, 0.7, 0.7, "", "higher", 0.7),
    "useful_sft_mix.useful_share": Figure(0.96, 0.95, 0.97, "", "lower", 0.95),
}


def setup_in(folder: Path) -> Setup:
    return Setup("tiny", "cpu", 8, 2, 1, 2, ("seed=3",), None, folder, None)


def test_the_check_names_what_got_slower_and_larger_and_pads_more_the_worst_first() -> None:
    now = FIGURES | {
        "sft.time_ratio": Figure(0.9, 0.9, 0.9, "", "higher"),
        "sft.memory_ratio": Figure(1.75, 1.75, 1.75, "", "higher"),
        "useful_sft_mix.useful_share": Figure(0.48, 0.48, 0.48, "", "lower"),
    }
    assert complaints(now, committed(FIGURES)) == [
        "larger: sft.memory_ratio is 1.75, committed 0.7: 150% worse, tolerated 10%",
        "more padding: useful_sft_mix.useful_share is 0.48, committed 0.96: 100% worse, tolerated 3%",
        "slower: sft.time_ratio is 0.9, committed 0.7: 29% worse, tolerated 20%",
    ]


def test_the_check_is_silent_about_noise_about_gains_and_about_figures_that_nobody_committed() -> None:
    now = {
        "sft.time_ratio": Figure(0.8, 0.8, 0.8, "", "higher"),
        "sft.memory_ratio": Figure(0.3, 0.3, 0.3, "", "higher"),
        "useful_sft_mix.useful_share": Figure(1.0, 1.0, 1.0, "", "lower"),
        "dpo.time_ratio": Figure(9.0, 9.0, 9.0, "", "higher"),
    }
    assert complaints(now, committed(FIGURES)) == []
    assert "sft.seconds" not in committed(FIGURES)  # of one machine: the ratio is what is compared


def test_a_busy_machine_is_no_slower_program() -> None:
    """Seen: a step of 0.26 s took 1.33 s beside other work, and the same processor seconds."""
    committed_ = committed(FIGURES | {"sft.processor_ratio": Figure(0.7, 0.7, 0.7, "", "higher")})
    now = FIGURES | {"sft.time_ratio": Figure(2.4, 0.7, 4.1, "", "higher")}
    now["sft.processor_ratio"] = Figure(0.72, 0.7, 1.2, "", "higher")
    assert complaints(checkable(now, "cpu"), committed_) == []
    assert len(complaints(checkable(now, "cuda"), committed_)) == 1, "a GPU's seconds are the clock's"
    now["sft.processor_ratio"] = Figure(1.4, 1.4, 1.4, "", "higher")
    assert [line.split()[1] for line in complaints(checkable(now, "cpu"), committed_)] == ["sft.processor_ratio"]
    del now["sft.processor_ratio"]
    assert [line.split()[1] for line in complaints(checkable(now, "cpu"), committed_)] == ["sft.time_ratio"]


def test_checked_prints_the_complaints_and_returns_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup, path = setup_in(tmp_path), tmp_path / "cpu-tiny.json"
    run.write_baseline(setup, FIGURES, path)
    assert run.checked(setup, FIGURES, path) == 0
    worse = FIGURES | {"sft.time_ratio": Figure(2.1, 2.1, 2.1, "", "higher")}
    assert run.checked(setup, worse, path) == 1
    said = capsys.readouterr().out
    assert "slower: sft.time_ratio is 2.1, committed 0.7: 200% worse" in said
    assert run.checked(setup, {"adpa.time_ratio": FIGURES["sft.time_ratio"]}, path) == 1, "nothing was compared"


def test_figures_of_other_conditions_are_not_compared(tmp_path: Path) -> None:
    setup, path = setup_in(tmp_path), tmp_path / "cpu-tiny.json"
    run.write_baseline(setup, FIGURES, path)
    with pytest.raises(SystemExit, match="threads is 2, committed with 1"):
        run.checked(setup._replace(threads=2), FIGURES, path)
    with pytest.raises(SystemExit, match="--write-baseline makes it"):
        run.checked(setup, FIGURES, tmp_path / "none.json")
    assert unlike({"a": 1}, {"a": 1}) == []


def test_a_baseline_keeps_what_a_later_run_of_the_same_conditions_did_not_measure(tmp_path: Path) -> None:
    setup, path = setup_in(tmp_path), tmp_path / "cpu-tiny.json"
    run.write_baseline(setup, FIGURES, path)
    run.write_baseline(setup, {"adpa.time_ratio": Figure(1.0, 1.0, 1.0, "", "higher")}, path)
    assert set(json.loads(path.read_text())["figures"]) == {*committed(FIGURES), "adpa.time_ratio"}
    run.write_baseline(setup._replace(threads=2), FIGURES, path)
    assert "adpa.time_ratio" not in json.loads(path.read_text())["figures"]


@pytest.mark.parametrize("path", sorted(run.BASELINES.glob("*.json")), ids=lambda path: path.name)
def test_committed_figures_can_be_checked(path: Path) -> None:
    baseline = json.loads(path.read_text())
    assert {"shape", "device", "threads", "pairs"} <= set(baseline["conditions"])
    for name, one in baseline["figures"].items():
        assert figures.word_of(name) and one["worse"] in ("higher", "lower") and 0 < one["tolerance"] < 5, name
        assert math.isfinite(one["value"]) and one["value"] > 0, name


def test_every_ratio_of_a_run_can_be_committed() -> None:
    turn = {"seconds": 2.0, "processor_seconds": 2.0, "peak_bytes": 2**30}
    found = run.against("sft", [turn], [turn], (0.7, 0.7))
    assert {"sft.time_ratio", "sft.processor_ratio", "sft.memory_ratio"} == set(committed(found))
    suffixes = re.findall(r'f"\{name\}\.(\w+)": (?:ratios|figure\(.*"(?:higher|lower)")', inspect.getsource(run))
    assert len(suffixes) > 8 and not set(suffixes) - set(figures.WORDS)


def test_ratios_are_formed_turn_by_turn() -> None:
    # The machine was three times slower in the second turn, for both: the ratio is the same.
    assert ratios([1.0, 3.0, 1.0], [2.0, 6.0, 2.0])[:3] == (0.5, 0.5, 0.5)
    assert met(FIGURES["sft.time_ratio"]) == "≤ 0.7: met"
    assert met(Figure(0.5, 0.5, 0.5, "", "lower", 0.95)) == "≥ 0.95: not met"


def test_slopes_and_entropy() -> None:
    assert slope([10, 100, 1000], [3.0, 300.0, 30000.0]) == pytest.approx(2.0)
    assert entropy_bytes([5] * 256) == pytest.approx(1.0)
    assert entropy_bytes([7]) == 0.0


def test_needed_tokens_count_a_shared_prompt_once() -> None:
    prompt = [1, 2, 3]
    pair = [Tokens(prompt + [4] * n, [False] * 3 + [True] * n) for n in (2, 5)]
    found = tokens_of([Item(tuple(pair))])
    assert found["needed"] == 3 + 2 + 5 and found["sequences"] == 5 + 8 and found["supervised"] == 7
    # Pairs of tokens that see each other, twice: the prompt's own once, and each response's with all before it.
    assert found["squares"] == 3**2 + (5**2 - 3**2) + (8**2 - 3**2)
    alone = tokens_of([Item((pair[0],)), Item((pair[1],))])
    assert alone["needed"] == alone["sequences"] == 13, "rows of their own share nothing"


def test_overrides_reach_the_config_behind_our_own(tmp_path: Path) -> None:
    assert train_overrides(setup_in(tmp_path), "sft", ["loss=sft"])[-1] == "seed=3"


def test_a_worker_answers_turn_by_turn_and_its_failure_shows_its_log(tmp_path: Path) -> None:
    script = (
        "from benchmarks.turns import Served\n"
        "served = Served()\n"
        "print('for people')\n"  # not the protocol's
        "while True:\n"
        "    message = served.wait()\n"
        "    served.answer(twice=2 * message['n'])\n"
    )
    worker = Worker("echo", [sys.executable, "-c", script], {"PYTHONPATH": str(ROOT)}, tmp_path / "log", ROOT)
    assert [worker.ask("step", n=n)["twice"] for n in (1, 2)] == [2, 4]
    worker.send("step")
    with pytest.raises(RuntimeError, match=r"echo ended with status 1:\n(?s:.*)KeyError: 'n'"):
        worker.receive()
    worker.close()
    assert "for people" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_the_command_measures_a_small_model_and_finds_it_no_worse_than_committed(tmp_path: Path) -> None:
    words = ["--shape", "tiny", "--device", "cpu", "--threads", "1", "--repeats", "2", "--no-rivals", "--check"]
    words += ["--only", "dckd,cache,useful", "--json", str(tmp_path / "found.json")]
    words += ["--set", "model.packing=prompts"]  # as real models are computed; auto leaves one so narrow padded
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *words], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())["figures"]
    # Above 1: the last token of a sequence, which predicts nothing, is not computed.
    assert 0.95 < found["useful_dpo_mix.useful_share"]["value"] < 1.02
    assert found["dckd.seconds"]["value"] > 0 and found["cache.bytes_to_entropy"]["value"] > 1
    assert "0 worse" in done.stdout
