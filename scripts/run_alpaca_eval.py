"""Run AlpacaEval's own tool on what task=evaluate wrote, against a judge of yours (docs/judging_tools.md).

    .alpaca_eval/bin/python scripts/run_alpaca_eval.py outputs/judged --base-url http://127.0.0.1:8000/v1

Prompt, parser and arithmetic are the tool's; the opponent's file takes the place of its reference from the hub, and the
judge's name that of GPT-4. Writes RUN/alpaca_eval/tool.json, one entry a model, and prints it beside ours.
It runs in the tool's own environment (./install.sh --alpaca-eval) and imports nothing of this project.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import yaml

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"  # AlpacaEval 2's own: one token, its probability is the preference
FORMULA = "length_controlled_minimal"  # the tool's regression without the difficulty of AlpacaEval's own instructions


def served_model(base_url: str) -> str:
    """Ask the server which model it has; ValueError unless it is one."""
    with urllib.request.urlopen(f"{base_url.rstrip('/')}/models", timeout=30) as answer:
        names = [str(row["id"]) for row in json.load(answer)["data"]]
    if len(names) != 1:
        raise ValueError(f"{base_url} serves {names}: give one by --model")
    return names[0]


def annotator_of(tool: Path, name: str, model: str, client: Path) -> tuple[str, dict[str, Any]]:
    """Return an annotator of the tool as it stands there, but for whom it asks; ValueError for an unknown one."""
    folder = tool / "evaluators_configs"
    file = folder / name / "configs.yaml"
    if not file.is_file():
        known = sorted(path.parent.name for path in folder.glob("*/configs.yaml"))
        raise ValueError(f"--annotator={name} is not known; the tool has {', '.join(known)}")
    config = next(iter(yaml.safe_load(file.read_text(encoding="utf-8")).values()))
    if config.get("fn_completions") != "openai_completions":
        raise ValueError(f"--annotator={name} asks no OpenAI-compatible server: take one whose fn_completions does")
    template = folder / config["prompt_template"]
    if not template.read_text(encoding="utf-8").lstrip().startswith("<|im_start|>"):
        raise ValueError(f"--annotator={name} writes no chat, and a judge is asked by /chat/completions: take another")
    config["prompt_template"] = str(template)
    asking = {"model_name": model, "requires_chatml": True, "price_per_token": 0.0, "client_config_path": str(client)}
    config["completions_kwargs"] = {**config["completions_kwargs"], **asking}
    return f"{name} asking {model}", config


def without_the_hub(folder: Path, rows: int) -> None:
    """Give the tool's regression a table of difficulties, which FORMULA does not read: it would fetch one otherwise."""
    from alpaca_eval.metrics import glm_winrate

    table = folder / "difficulties.csv"
    lines = [f"x,{i},0.0" for i in range(rows)]
    table.write_text("\n".join(["model,index,instruction_difficulty", *lines]) + "\n", encoding="utf-8")
    glm_winrate.hf_hub_download = lambda **_: str(table)


def judged(run: Path, name: str, opponent: str, config: Path, length_controlled: bool) -> dict[str, Any]:
    """Return what the tool says of a model against the opponent: rates in percent, as it prints them."""
    from alpaca_eval import evaluate

    metric = {"fn_metric": "get_winrate", "sort_by": "win_rate"}
    if length_controlled:
        kwargs = {"glm_name": FORMULA, "save_weights_dir": None}
        metric = {"fn_metric": "get_length_controlled_winrate", "metric_kwargs": kwargs}  # type: ignore[dict-item]
    table, annotations = evaluate(
        model_outputs=str(run / "alpaca_eval" / f"{name}.json"),
        reference_outputs=str(run / "alpaca_eval" / f"{opponent}.json"),
        annotators_config=str(config),
        precomputed_leaderboard=None,
        is_return_instead_of_print=True,
        is_cache_leaderboard=False,
        output_path=str(config.parent / name),
        annotation_kwargs={"is_ordered": True},  # a prompt that stands twice is two games, not four
        **metric,
    )
    return {key: value.item() if hasattr(value, "item") else value for key, value in table.loc[name].items()}


def ours(results: dict[str, Any], name: str) -> str:
    """Return our win rates of a model by the judge, in percent; a dash where it was not judged."""
    found = results["models"][name].get("judged")
    if not found:
        return "-"
    return f"{100 * found['win_rate']:.2f} ({100 * found['length_controlled_win_rate']:.2f} at equal length)"


def main() -> int:
    """Judge every model of a run; exit 2 with one line for what cannot be done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished task=evaluate")
    parser.add_argument("--base-url", required=True, help="the judge: http://HOST:PORT/v1; key: $OPENAI_API_KEY")
    parser.add_argument("--model", help="the served model; left out: the only one there is")
    parser.add_argument("--opponent", help="left out: evaluation.opponent of the run")
    parser.add_argument("--annotator", default=ANNOTATOR, help="a folder of the tool's evaluators_configs")
    parser.add_argument("--no-length-control", action="store_true", help="the plain win rate alone")
    asked = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", "none")  # the client wants one, servers on loopback do not
    try:
        import alpaca_eval

        results = json.loads((asked.run / "results.json").read_text(encoding="utf-8"))
        opponent = asked.opponent or results.get("opponent")
        if opponent not in results["models"]:
            raise ValueError(f"the opponent is {opponent!r}: give --opponent, one of {', '.join(results['models'])}")
        for chatty in ("", "httpx", "httpx2"):  # a line a request otherwise
            logging.getLogger(chatty).setLevel(logging.WARNING)
        folder = asked.run / "alpaca_eval" / "tool"
        folder.mkdir(parents=True, exist_ok=True)
        client, config = folder / "server.yaml", folder / "configs.yaml"
        client.write_text(yaml.safe_dump({"default": [{"base_url": asked.base_url}]}), encoding="utf-8")
        model = asked.model or served_model(asked.base_url)
        tool = Path(alpaca_eval.__file__).parent
        name, annotator = annotator_of(tool, asked.annotator, model, client.resolve())
        config.write_text(yaml.safe_dump({name: annotator}), encoding="utf-8")
        found = {}
        with tempfile.TemporaryDirectory() as temporary:
            without_the_hub(Path(temporary), 1 + max(row.get("n", 0) for row in results["models"].values()))
            for one in results["models"]:
                if one != opponent:
                    found[one] = judged(asked.run, one, opponent, config.resolve(), not asked.no_length_control)
    except (ValueError, OSError, ImportError) as error:
        print(f"run_alpaca_eval.py: {error}", file=sys.stderr)
        return 2
    said = {"annotator": name, "opponent": opponent, "models": found}
    (asked.run / "alpaca_eval" / "tool.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    print(f"against {opponent}, {name}")
    for one, row in found.items():
        controlled = row.get("length_controlled_winrate")
        more = "" if controlled is None else f", length-controlled {controlled:.2f}"
        print(f"{one}: win rate {row['win_rate']:.2f} of {row['n_total']}{more}; ours {ours(results, one)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
