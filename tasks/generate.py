"""task=generate: sample responses of a model to the prompts of the data sets, as token ids.

The backends are in generation/: hf.py, vllm.py, openai.py. Here is what they share: prompts, rows on disk, and going on
where a killed run stopped. A row is written as soon as its response is there. At the end the rows stand in a fixed
order, longest prompt first. What a response is sampled with follows from the run's seed and its place alone, so several
processes (accelerate launch, torchrun), each with a model or an engine on its device, write what one writes.
"""

import importlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import models
from dataloader import Example, Tokens, encode_prompt, load_examples
from engine.processes import Apart
from evaluation.answer_files import answer_row, form_of
from evaluation.turns import Answered, body_text, go_on, later_turns
from generation.checks import Gap, check_gap, logp_gap, stop_notes
from generation.hf import HfBackend
from generation.interface import Answer, Backend, Progress, cut, length_batches
from rewards.verifiers import prompt_text
from settings.artifacts import write_bytes, write_json, write_jsonl
from settings.parts import Parts, share_of, wait_for
from settings.schema import ModelConfig, Settings
from templates import adds_bos, special_ids, tokenizer_digest

__all__ = ["backend_of", "cut", "length_batches", "run"]

# ---- which backend


class Start(NamedTuple):
    """What a backend is made from."""

    settings: Settings
    tokenizer: Any
    stop: list[int]
    longest: int  # tokens of the longest prompt


def _hf(start: Start) -> Backend:
    return HfBackend(start.settings, start.tokenizer, start.stop)


def _vllm(start: Start) -> Backend:
    from generation.vllm import VllmBackend

    wanted = start.longest + start.settings.generation.max_new_tokens
    length = min(wanted, max(positions_of(start.settings.model) or wanted, start.longest + 1))
    return VllmBackend(start.settings, start.tokenizer, start.stop, length)


def _openai(start: Start) -> Backend:
    from generation.openai import OpenAIBackend

    return OpenAIBackend(start.settings, start.tokenizer, start.stop)


BACKENDS: dict[str, Callable[[Start], Backend]] = {"hf": _hf, "vllm": _vllm, "openai": _openai}


def backend_of(name: str) -> Callable[[Start], Backend]:
    """Return the maker of a backend; ValueError for one that is not there."""
    if name not in BACKENDS:
        raise ValueError(f"generation.backend={name!r} is not known; use {', '.join(BACKENDS)}")
    return BACKENDS[name]


def backend_name(settings: Settings) -> str:
    """Resolve generation.backend=auto: vllm where it is installed and reads this model, else hf, and say why."""
    name = settings.generation.backend
    if name != "auto":
        return name
    why = importlib.import_module("generation.vllm").missing(settings.model)
    print(f"generation.backend=auto: {'vllm' if why is None else f'hf ({why})'}")
    return "vllm" if why is None else "hf"


def positions_of(config: ModelConfig) -> int | None:
    """Return for how many tokens the model was made; None if nobody says."""
    source = models.model_source(config)
    if source is None:
        return (config.build or {}).get("max_position_embeddings")
    try:
        architecture = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):  # a server's model need not be here
        return None
    return getattr(architecture.get_text_config(), "max_position_embeddings", None)


# ---- the task


class Job(NamedTuple):
    """One response to make: the example, its number in the data, and which of its n samples this is."""

    example: Example
    number: int
    sample: int


def run(settings: Settings) -> None:
    """Write run_dir/generations.jsonl: n responses to every prompt of the split; goes on where a killed run stopped."""
    config, generation, process = settings.model, settings.generation, Apart()
    name = backend_name(settings)
    if name == "openai" and process.world_size > 1:
        raise ValueError(
            "generation.backend=openai runs in one process (generation.concurrency requests at once): start it with "
            "`python launch.py`, without accelerate launch"
        )
    make = backend_of(name)
    tokenizer = models.load_tokenizer(config)
    stop = models.stop_ids_of(config, tokenizer)
    for note in stop_notes(config, tokenizer, stop, generation.teacher):
        process.print(f"note: {note}")
    jobs = _jobs(settings, tokenizer)
    prompts = [job.example.prompt for job in jobs]
    head = {
        "sampling": _sampling(settings, name, stop),
        "model_digest": models.config_digest(config),
        "tokenizer_digest": tokenizer_digest(tokenizer),
    }
    if any(later_turns(job.example.conversation) for job in jobs) and process.world_size > 1:
        raise ValueError("questions of several turns are answered in one process: start it without accelerate launch")
    path = settings.run.run_dir / "generations.jsonl"
    parts = Parts(path, process.rank)
    done = _resume(parts, jobs, head, generation.n)
    wanted = _share(prompts, generation.batch_size if name == "hf" else 1, process) - done
    answer_file = path.parent / "model_answer" / f"{path.parent.name}.jsonl"
    to_answer = process.world_size == 1 and not answer_file.is_file() and _has_ids(jobs)
    if wanted or (to_answer and any(later_turns(job.example.conversation) for job in jobs)):
        longest = max(_room(job, tokenizer, generation.max_new_tokens) for job in jobs)
        if process.is_main:
            _notes(tokenizer, longest + generation.max_new_tokens, positions_of(config), prompts[0])
        with (
            closing(make(Start(settings, tokenizer, stop, longest))) as backend,
            Progress(len(wanted) + len(done), len(done)) as progress,
        ):
            if wanted:
                answers = backend.answers(prompts, wanted, generation.seed)
                _write(parts, jobs, answers, tokenizer, stop, head, progress)
            if to_answer:
                _write_answers(answer_file, settings, jobs, parts, backend, tokenizer)
        print(f"{parts.own}: {progress.tokens} tokens at {progress.tokens_per_second:.0f} tokens/s")
    elif to_answer:
        _write_answers(answer_file, settings, jobs, parts, None, tokenizer)
    elif len(done) == len(jobs):
        process.print(f"{path}: all {len(done)} responses are there")
    if process.is_main:
        wait_for(lambda: len({_job_of(row, generation.n) for _, row in parts.rows()}) == len(jobs))
        _in_order(parts, prompts, generation.n)
        _summarize(path, settings, tokenizer, name)


def _has_ids(jobs: list[Job]) -> bool:
    """Tell whether the prompts are questions of Arena-Hard or MT-bench, whose answers have a file of their own."""
    return any(form_of(job.example.conversation.meta) for job in jobs)


def _room(job: Job, tokenizer: Any, max_new_tokens: int) -> int:
    """Return how many tokens the longest prompt of a question may have: that of its last turn."""
    turns = later_turns(job.example.conversation)
    asked = [len(encode_prompt(tokenizer, [{"role": "user", "content": turn}])) for turn in turns]
    return len(job.example.prompt) + sum(asked) + len(turns) * max_new_tokens


def _write_answers(
    path: Path, settings: Settings, jobs: list[Job], parts: Parts, backend: Backend | None, tokenizer: Any
) -> None:
    """Ask the later turns of each question after its first answer; write model_answer/RUN.jsonl, whole."""
    n, seed = settings.generation.n, settings.generation.seed

    def sample(prompts: list[list[int]]) -> list[Answered]:
        assert backend is not None, "no backend is needed where every question has one turn"
        found = {answer.number: answer for answer in backend.answers(prompts, range(len(prompts)), seed)}
        return [(found[i].ids, found[i].finish_reason, 0.0) for i in range(len(prompts))]

    rows = {_job_of(row, n): row for _, row in parts.rows()}
    first = [(rows[i]["response_ids"], rows[i]["finish_reason"], 0.0) for i in range(len(jobs))]
    asked = [job.example.conversation for job in jobs]
    answers = go_on(sample, tokenizer, first, asked, settings.model.max_prompt_length)
    said = [[body_text(tokenizer, answer) for answer in turns] for turns in answers]
    path.parent.mkdir(exist_ok=True)
    write_jsonl(
        path,
        [
            answer_row(c.meta, prompt_text(c.prompt), path.stem, said[i : i + n], len(answers[i][0][0]), time.time())
            for i, c in list(enumerate(asked))[::n]
            if form_of(c.meta)
        ],
    )
    print(f"{path}: {len(jobs) // n} questions, turn by turn")


def _share(prompts: list[list[int]], size: int, process: Apart) -> set[int]:
    """Return the jobs of this process: whole batches of those that one process samples, as padding and seed are a
    batch's; `size` 1 where each response has a seed of its own.
    """
    batches = length_batches(prompts, size)
    return {i for batch in share_of(batches, process.rank, process.world_size) for i in batch}


def _job_of(row: dict[str, Any], n: int) -> int:
    """Return which response a row holds."""
    return int(row.get("index", -1)) * n + int(row.get("sample", 0))


def _write(
    parts: Parts,
    jobs: list[Job],
    answers: Iterator[Answer],
    tokenizer: Any,
    stop: list[int],
    head: dict[str, Any],
    progress: "Progress",
) -> None:
    """Append a row for each answer as it comes; a row is whole once its line break is written."""
    for answer in answers:
        parts.append(_row(jobs[answer.number], answer, tokenizer, stop, head))
        progress.add(answer.ids)


def _jobs(settings: Settings, tokenizer: Any) -> list[Job]:
    run, generation = settings.run, settings.generation
    limit = run.n_examples if generation.split == "train" else run.n_eval_examples
    examples = load_examples(
        settings.datasets, generation.split, tokenizer, settings.model, limit, run.seed, run.tokens_dir, run.num_proc
    )
    if not examples:
        raise ValueError(
            f"no prompts: no data set has a {generation.split} source; set datasets.NAME.{generation.split}"
        )
    for example in examples:
        check_bos(tokenizer, example.prompt)
    return [Job(example, i, s) for i, example in enumerate(examples) for s in range(generation.n)]


def check_bos(tokenizer: Any, ids: list[int]) -> None:
    """Assert that a prompt begins with exactly one begin-of-sequence token, where the tokenizer has such a habit."""
    bos = tokenizer.bos_token_id
    if bos is not None:
        assert ids[:2] != [bos, bos], f"two begin-of-sequence tokens: {tokenizer.decode(ids[:20])!r}"
        assert not adds_bos(tokenizer) or ids[0] == bos, f"no begin-of-sequence token: {tokenizer.decode(ids[:20])!r}"


def _sampling(settings: Settings, name: str, stop: list[int]) -> dict[str, Any]:
    """Return what the responses are sampled with: what another value of would give others."""
    generation = settings.generation
    keys = ["max_new_tokens", "temperature", "top_p", "top_k", "n", "seed"]
    keys += {"hf": ["batch_size"], "openai": ["model_name", "text_responses"]}.get(name, [])
    keys += ["calculator"] if generation.calculator else []
    found = {"backend": name} | {key: getattr(generation, key) for key in keys} | {"stop_ids": stop}
    if name == "openai":
        return found
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return found | {"dtype": str(models.resolve_dtype(settings.model.policy_dtype, device)).removeprefix("torch.")}


def _notes(tokenizer: Any, length: int, positions: int | None, prompt: list[int]) -> None:
    """Print what a user should know before the first response."""
    if positions is not None and length > positions:
        print(f"note: prompt and response may take {length} tokens, the model was made for {positions}")
    print(f"first prompt: {tokenizer.decode(prompt)[-400:]!r}", flush=True)


def _row(job: Job, answer: Answer, tokenizer: Any, stop: list[int], head: dict[str, Any]) -> dict[str, Any]:
    body = answer.ids[:-1] if answer.finish_reason == "stop" else answer.ids
    strange = set(body) & (special_ids(tokenizer) | set(stop))
    if strange:
        raise ValueError(f"special tokens inside a response: {tokenizer.convert_ids_to_tokens(sorted(strange))}")
    conversation = job.example.conversation
    row = {
        "prompt": conversation.prompt,
        "prompt_ids": job.example.prompt,
        "response_ids": answer.ids,
        "response": tokenizer.decode(body, clean_up_tokenization_spaces=False),
        "finish_reason": answer.finish_reason,
        "index": job.number,
        "sample": job.sample,
        **head,
        "meta": conversation.meta,
    }
    if answer.logps is not None:
        row["response_logps"] = [round(x, 6) for x in answer.logps]
    return row | ({"ids_from_text": True} if answer.from_text else {})


def _resume(parts: Parts, jobs: list[Job], head: dict[str, Any], n: int) -> set[int]:
    """Return which jobs have their row, in whatever process's file; ValueError if the rows are another run's."""
    done: set[int] = set()
    numbers: Counter[Path] = Counter()
    seen: set[tuple[Path, int]] = set()
    for path, row in parts.rows():
        numbers[path] += 1
        job, where = _job_of(row, n), f"{path}, line {numbers[path]}"
        difference = next((key for key, value in head.items() if row.get(key) != value), None)
        if not 0 <= job < len(jobs) or row.get("prompt_ids") != jobs[job].example.prompt:
            difference = difference or "prompt"
        if difference:
            raise ValueError(f"{where}: written with another {difference}. Remove the file or choose another exp_name")
        assert (path, job) not in seen, f"{where}: a second row for response {job}"
        seen.add((path, job))
        done.add(job)
    if 0 < len(done) < len(jobs) and parts.own == parts.path:
        print(f"{parts.path}: going on after {len(done)} of {len(jobs)} responses")
    return done


def _in_order(parts: Parts, prompts: list[list[int]], n: int) -> None:
    """Put the rows of all processes into one file, in the order of length_batches, whatever order they came in."""
    found: dict[int, bytes] = {}
    for file in [*parts.others(), parts.path]:
        lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
        found |= {_job_of(json.loads(line), n): line for line in lines if line.endswith(b"\n")}
    ordered = b"".join(found[i] for batch in length_batches(prompts, 1) for i in batch)
    if not parts.path.is_file() or ordered != parts.path.read_bytes():
        write_bytes(parts.path, ordered)
    parts.remove_others()


# ---- afterwards


def _summarize(path: Path, settings: Settings, tokenizer: Any, name: str) -> None:
    """Write summary.json beside the rows: counts, and how far the generator's log-probs are from the trainer's."""
    with path.open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    reasons = Counter(row["finish_reason"] for row in rows)
    from_text = sum(row.get("ids_from_text", False) for row in rows)
    summary: dict[str, Any] = {
        "backend": name,
        "responses": len(rows),
        "tokens": sum(len(row["response_ids"]) for row in rows),
        "finish_reasons": dict(reasons),
        "ids_from_text": from_text,
        "logp_gap": None,
    }
    print(f"{path}: {len(rows)} responses; {reasons['stop']} ended, {reasons['length']} cut by max_new_tokens")
    if from_text:
        print(
            f"warning: {from_text} responses have ids made from the server's text, which may not be the ids it sampled"
        )
    gap = _measured_gap(rows, settings, tokenizer)
    if gap is not None:
        summary["logp_gap"] = gap._asdict()
    write_json(path.parent / "summary.json", summary)
    if gap is not None:
        print(check_gap(gap, settings.generation.max_logp_gap))


def _measured_gap(rows: list[dict[str, Any]], settings: Settings, tokenizer: Any) -> Gap | None:
    """Compare the log-probabilities of the first rows that have some; None if none has, or the weights are not here."""
    checked = [row for row in rows if row.get("response_logps")][: settings.generation.check_rows]
    source = models.model_source(settings.model)
    if not checked:
        return None
    if source is not None and not Path(source).is_dir() and settings.generation.backend == "openai":
        print(f"note: the weights of {source} are no folder here, so the server's log-probabilities are not checked")
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = models.resolve_dtype(settings.model.policy_dtype, device)
    model: Any = models.load_model(settings.model, dtype=dtype, trainable=False).to(device)  # type: ignore[arg-type]
    tokens = [
        Tokens(
            row["prompt_ids"] + row["response_ids"],
            [False] * len(row["prompt_ids"]) + [True] * len(row["response_ids"]),
        )
        for row in checked
    ]
    logps = [row["response_logps"] for row in checked]
    return logp_gap(model, tokens, logps, tokenizer.pad_token_id, len(tokenizer), settings.model.eval_batch_size)
