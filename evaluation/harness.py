"""Benchmarks of lm-evaluation-harness through its own library (./install.sh --lm-eval), on the models that we load.

Tasks come from the library, or from YAML files in evaluation.lm_eval_path; their data must be on this machine where
there is no hub. A task's YAML may run Python of its own folder: name only folders that you trust.
"""

import logging
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from settings.schema import EvaluationConfig, Settings
from settings.typed import nearest
from templates import stopped

INSTALL = "./install.sh --lm-eval"


def check_benchmarks(config: EvaluationConfig) -> None:
    """Refuse benchmarks that cannot be run, before a model loads."""
    if not config.lm_eval:
        return
    if find_spec("lm_eval") is None:
        raise ValueError(
            f"evaluation.lm_eval={config.lm_eval} needs lm-evaluation-harness, which is not installed: {INSTALL}"
        )
    if config.lm_eval_path and not Path(config.lm_eval_path).expanduser().is_dir():
        raise ValueError(f"evaluation.lm_eval_path={config.lm_eval_path} is no folder: give one that holds task YAMLs")
    known = _task_manager(config.lm_eval_path).all_tasks
    for name in config.lm_eval:
        if name not in known:
            close = nearest(name, known) if len(known) < 50 or "Did you mean" in nearest(name, known) else ""
            raise ValueError(
                f"evaluation.lm_eval: lm-evaluation-harness has no task {name!r}.{close} Tasks of your own: "
                "evaluation.lm_eval_path=FOLDER"
            )


@cache
def _task_manager(folder: str | None) -> Any:
    """Index the library's tasks and those of a folder; it takes seconds."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    return TaskManager(include_path=str(Path(folder).expanduser()) if folder else None)


def benchmark_metrics(settings: Settings, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Run evaluation.lm_eval on a loaded model; {task: {"n", "metrics": {metric: {"value", "stderr"}}}}.

    stderr is the library's own standard error, None where it has none for that metric.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    config, seed = settings.evaluation, settings.run.seed
    wrapped = HFLM(
        pretrained=model,
        tokenizer=stopped(tokenizer),
        batch_size=settings.model.eval_batch_size,
        max_length=settings.model.max_length,
    )
    found = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=list(config.lm_eval),
        task_manager=_task_manager(config.lm_eval_path),
        log_samples=False,
        apply_chat_template=config.lm_eval_chat_template,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert found is not None, "simple_evaluate returns None on ranks other than 0 only"
    counts = {name: count["effective"] for name, count in found["n-samples"].items()}
    better = found.get("higher_is_better") or {}
    return {
        name: {"n": counts.get(name), "metrics": metrics_of(row, better.get(name))}
        for name, row in found["results"].items()
    }


def metrics_of(row: Mapping[str, Any], better: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Read one task's row of the library: {"acc,none": .5, "acc_stderr,none": .1} -> {"acc": {"value", "stderr"}}.

    A filter other than `none` stays in the name: "exact_match,strict-match". better: {metric: whether more is}; one of
    which less is better is marked, `higher_is_better` false.
    """
    metrics = {}
    for key, value in row.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = row.get(f"{name}_stderr,{kind}")
        known = isinstance(stderr, int | float)
        error = float(stderr) if known else None  # type: ignore[arg-type]
        less = {"higher_is_better": False} if (better or {}).get(name) is False else {}
        metrics[name if kind == "none" else key] = {"value": float(value), "stderr": error, **less}
    return metrics


def table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the benchmarks as a Markdown table; empty where there are none."""
    rows = [
        f"| {name} | {task} | {metric} | {one['value']:.3f} | "
        f"{'-' if one['stderr'] is None else format(one['stderr'], '.3f')} | {found['n']} |"
        for name, entry in models.items()
        for task, found in (entry.get("lm_eval") or {}).items()
        for metric, one in found["metrics"].items()
    ]
    return (
        "\n".join(["| model | task | metric | value | standard error | n |", "|---" * 6 + "|", *rows]) + "\n"
        if rows
        else ""
    )
