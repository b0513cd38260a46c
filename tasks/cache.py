"""task=cache: ask one teacher or two for a quantity (teacher/quantities.py) of every response, into run_dir/CACHE."""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import models
from dataloader import Tokens, load_examples
from engine.placement import Placement, Replicated
from engine.processes import Apart, Processes
from engine.strategy import launched_for, placement_of
from models import NumericPath
from settings.artifacts import write_json
from settings.schema import Settings
from settings.teacher_sections import kept_mass
from teacher.cache import Meta, Writer, begin, data_digest, finish, stored_keys, wait_for
from teacher.interchange import Tokenizing, export_cache, import_cache, is_cache
from teacher.precision import teacher_path
from teacher.quantities import Quantity, quantity_of
from teacher.scoring import Scorer, batches_of, left_to_do, missing
from teacher.served import Served, ServedScorer, check_models, check_servers, connected
from teacher.vllm import EngineTeacher, score_in_turn
from teacher.vocabulary import check_reads_ours
from teacher.writing import Scored, score_all, write_all
from tokens.generations import generated_sequences

VERSION = 3


def run(settings: Settings) -> None:
    """Score every response once; a killed run goes on behind its last whole sequence."""
    config, quantity, placement = settings.cache, quantity_of(settings.cache), _placement(settings)
    process = placement.processes
    if config.backend == "server" and process.world_size > 1:
        raise ValueError(
            f"cache.backend={config.backend} runs in one process: start it with `python launch.py`, without accelerate "
            "launch"
        )
    if config.import_from:
        if process.is_main:
            _imported(settings, Path(config.import_from).expanduser())
        return
    tokenizer = models.load_tokenizer(settings.model)
    check_own_tokenizer(tokenizer, settings)
    if config.reference:
        check_tokenizers(tokenizer, config.reference, settings)
    packing = models.packing_of(settings.model) if config.backend == "hf" else "none"
    batches = batches_of(_sequences(settings, tokenizer), config.batch_size, packing)
    keys = {t.key for batch in batches for t in batch}
    folder = settings.run.run_dir / "CACHE"
    served = connected(config) if config.backend == "server" else ()
    digests = _digests(settings, placement, served)
    meta = _meta(settings, quantity, tokenizer, _precision(settings, quantity, placement), data_digest(keys), digests)
    begin(folder, meta)
    written = stored_keys(folder, meta)
    todo = left_to_do(batches, written, process.rank, process.world_size)
    if todo and served:
        _ask(settings, quantity, tokenizer, served, folder, meta, missing(todo, written))
    elif config.backend == "vllm" and quantity.num_models == 2:
        if not keys <= written:
            score_in_turn(settings, len(tokenizer), meta, batches, process)
    elif not served:
        _score(settings, quantity, tokenizer, placement, folder, meta, todo, batches[0])
    if process.is_main:
        done = finish(folder, meta, keys)
        shutil.rmtree(settings.run.run_dir / "TOP_K", ignore_errors=True)  # the cache is whole without it
        size = sum(f.stat().st_size for f in folder.glob("shard-*/*"))
        print(
            f"{done.quantity} cache: {done.num_sequences} sequences, {done.num_tokens} tokens, "
            f"{size / max(1, done.num_tokens):.1f} bytes per token"
        )
        _handed_on(settings, folder)


def _imported(settings: Settings, source: Path) -> None:
    """Make the cache from another project's file (teacher/interchange.py); a cache of our own is handed on as it is."""
    if is_cache(source):
        if not settings.cache.export_format:
            raise ValueError(f"cache.import_from={source} is a cache already: use it, or set cache.export_format")
        _handed_on(settings, source)
        return
    tokenizer, folder = models.load_tokenizer(settings.model), settings.run.run_dir / "CACHE"
    named = settings.datasets or settings.cache.generations
    masks = {tuple(t.ids): t.response for t in _sequences(settings, tokenizer)} if named else None
    tokenizing = Tokenizing(
        len(tokenizer),
        tokenizer.convert_ids_to_tokens,
        models.tokenizer_digest(tokenizer),
        models.template_digest(tokenizer),
    )
    done, notes = import_cache(source, settings.cache.import_format, folder, tokenizing, masks, _command(settings))
    print(f"{done.quantity} cache: {done.num_sequences} sequences, {done.num_tokens} tokens, from {source}")
    for note in notes:
        print(f"note: {note}")
    _handed_on(settings, folder)


def _handed_on(settings: Settings, folder: Path) -> None:
    """Export a finished cache where the config asks for it; say what the format cannot hold."""
    config = settings.cache
    if config.export_format:
        target = Path(config.export_to).expanduser() if config.export_to else settings.run.run_dir / "EXPORT"
        lost = export_cache(folder, config.export_format, target)
        print(f"exported as {config.export_format}: {target}")
        for words in lost:
            print(f"note: {config.export_format} does not hold {words}")


def _placement(settings: Settings) -> Placement:
    """Return where teachers live: a part in each process with strategy=fsdp, or auto under an accelerate file for FSDP.

    Else they are whole in processes that share files alone. ValueError where DeepSpeed would have to place them.
    """
    asked, launched = settings.run.strategy, launched_for()
    wanted = (launched or "ddp") if asked == "auto" else asked
    if settings.cache.backend != "hf":
        return Replicated(Apart(), settings.model)
    if wanted == "deepspeed":
        by = " by the accelerate file" if launched else ""
        raise ValueError(
            f"task=cache, strategy={asked}{by}: DeepSpeed places no teachers. Start with an accelerate file "
            "for FSDP, or with torchrun and strategy=fsdp"
        )
    if wanted == "fsdp" or launched == "fsdp":  # which refuses whatever else was asked for
        return placement_of(asked, settings.model, Processes())
    return Replicated(Apart(), settings.model)


def _score(
    settings: Settings,
    quantity: Quantity,
    tokenizer: Any,
    placement: Placement,
    folder: Path,
    meta: Meta,
    todo: list[list[Tokens]],
    spare: list[Tokens],
) -> None:
    """Score this process's batches here.

    Where teachers are sharded a forward pass needs every process: each goes as many rounds as the busiest one, with
    the batch `spare` for nothing.
    """
    process = placement.processes
    rounds = max(process.gathered([len(todo)])) if placement.in_step else len(todo)
    if rounds:
        longest = max(len(t.ids) for batch in [*todo, spare] for t in batch)
        scorer, close = _scorer(settings, quantity, tokenizer, placement, longest)
        if todo:
            with closing(Writer(folder, meta, process.rank)) as writer:
                score_all(todo, writer, scorer, "cache", process.is_main, settings.cache.flush_seconds)
        for _ in range(rounds - len(todo)):
            scorer(spare)
        close()
    if placement.in_step:
        process.close()


def _ask(
    settings: Settings,
    quantity: Quantity,
    tokenizer: Any,
    served: tuple[Served, ...],
    folder: Path,
    meta: Meta,
    todo: list[list[Tokens]],
) -> None:
    """Let servers score what is missing; ValueError says what was done when one of them fails for good."""
    config, longest = settings.cache, max(len(t.ids) for batch in todo for t in batch)
    if settings.model.num_layers is not None:
        raise ValueError(f"model.num_layers={settings.model.num_layers} cuts no model that a server holds: drop it")
    before = len(stored_keys(folder, meta))
    found = check_servers(served, config, tokenizer, longest)
    check_models(folder, found, config.probe_tolerance, has_entries=before > 0)
    writer = Writer(folder, meta)
    try:
        answers = ServedScorer(quantity, served, config, len(tokenizer)).stream(todo)
        write_all(todo, answers, writer, "cache", True, flush_seconds=0)  # an answer may have cost money
    except ValueError as error:
        done, total = len(stored_keys(folder, meta)), before + sum(map(len, todo))
        raise ValueError(
            f"{error}. {done} of {total} sequences are in {folder}; the same command asks for the rest"
        ) from error
    finally:
        writer.close()


def _scorer(
    settings: Settings, quantity: Quantity, tokenizer: Any, placement: Placement, longest: int
) -> tuple[Callable[[list[Tokens]], Scored], Callable[[], None]]:
    """Return who scores batches, and what ends it."""
    config = settings.cache
    if config.backend == "vllm":
        teacher = EngineTeacher(models.model_source(settings.model), settings, len(tokenizer), longest, None)
        return teacher, teacher.close
    dtype = _path(settings, quantity, placement).weights
    place = placement.place_reference if quantity.policy_path else placement.place_frozen
    sources = (None, config.reference)[: quantity.num_models]
    load = partial(models.load_model, settings.model, dtype=dtype, trainable=False, empty=placement.empty)
    teachers = [place(load(source=source)) for source in sources]
    packing = models.packing_of(settings.model)
    scorer = Scorer(quantity, teachers, tokenizer, config.top_k, config.beta, placement.precision, packing)
    return scorer.begun, lambda: None


def _precision(settings: Settings, quantity: Quantity, placement: Placement) -> str:
    """Return the numeric path as meta.json has it; a server's is its own affair and shows in no answer."""
    return "served" if settings.cache.backend == "server" else str(_path(settings, quantity, placement))


def _path(settings: Settings, quantity: Quantity, placement: Placement) -> NumericPath:
    if settings.cache.backend == "vllm":
        dtype = models.resolve_dtype(settings.model.reference_dtype, placement.device)
        return NumericPath(dtype, dtype, dtype, "vllm")
    if quantity.policy_path:
        return placement.reference_path()
    return teacher_path(settings.model, placement.device)


def _sequences(settings: Settings, tokenizer: Any) -> list[Tokens]:
    """Return what is to be scored."""
    config, run = settings.cache, settings.run
    if config.generations:
        generated = generated_sequences(config.generations, tokenizer, run.tokens_dir, run.num_proc)
        found = [tokens for tokens in generated if tokens.num_supervised]
    else:
        limit = run.n_examples if config.split == "train" else run.n_eval_examples
        examples = load_examples(
            settings.datasets, config.split, tokenizer, settings.model, limit, run.seed, run.tokens_dir, run.num_proc
        )
        found = [t for e in examples for name in config.responses if (t := getattr(e, name)) is not None]
    if not found:
        raise ValueError(f"nothing to score: the rows have none of cache.responses={config.responses}")
    return found


def check_own_tokenizer(tokenizer: Any, settings: Settings) -> None:
    """Refuse a model that is asked in the tokens of another one if ids that both have are other tokens to it.

    A model whose folder has no tokenizer, or that is built, has none of its own to compare with.
    """
    source = models.model_source(settings.model)
    if not settings.model.tokenizer_name_or_path or source is None:
        return
    if Path(source).is_dir() and not (Path(source) / "tokenizer.json").is_file():
        return
    try:
        own = models.load_tokenizer(replace(settings.model, tokenizer_name_or_path=None))
    except ValueError as error:
        print(f"model.tokenizer_name_or_path is not compared with the model's own tokenizer: {error}")
        return
    check_reads_ours(tokenizer, own, f"model {source}", "model.tokenizer_name_or_path")


def check_tokenizers(tokenizer: Any, reference: str, settings: Settings) -> None:
    """Refuse two teachers whose tokenizers differ: their log-probabilities would be of different things."""
    other = models.load_tokenizer(replace(settings.model, tokenizer_name_or_path=reference))
    ours, theirs = models.tokenizer_digest(tokenizer), models.tokenizer_digest(other)
    if ours != theirs:
        raise ValueError(
            f"cache.reference={reference} has another tokenizer or chat template (digest {theirs}) than the teacher's "
            f"({ours})"
        )


def _digests(settings: Settings, placement: Placement, served: tuple[Served, ...]) -> tuple[str, str | None]:
    """Return the identities of the teacher and of the reference teacher, if there is one; one process reads weights."""
    if served:
        return served[0].digest, served[1].digest if len(served) == 2 else None
    model, reference, process = settings.model, settings.cache.reference, placement.processes

    def read() -> tuple[str, str | None]:
        return models.config_digest(model), models.model_digest(reference) if reference else None

    if placement.in_step:
        return process.from_main(read)
    sources = [source for source in (models.model_source(model), reference) if source]
    stamps = [models.weight_stamps(source) for source in sources]
    if process.world_size == 1 or not any(stamps):
        return read()
    # Processes that share files alone: one of each node reads, and its note is named by the files that it read.
    named = json.dumps([stamps, sources, model.num_layers, model.build, model.build_seed], sort_keys=True)
    note = settings.run.run_dir / "teacher_digests" / f"{hashlib.sha256(named.encode()).hexdigest()[:16]}.json"
    if process.is_local_main:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, read())
    wait_for(note.is_file)
    teacher, other = json.loads(note.read_text(encoding="utf-8"))
    return teacher, other


def _meta(
    settings: Settings, quantity: Quantity, tokenizer: Any, precision: str, data: str, digests: tuple[str, str | None]
) -> Meta:
    config = settings.cache
    teacher, reference = digests
    return Meta(
        quantity=quantity.name,
        k=config.top_k if quantity.is_wide else 0,
        vocab_size=len(tokenizer),
        teacher_digest=teacher,
        reference_digest=reference,
        tokenizer_digest=models.tokenizer_digest(tokenizer),
        template_digest=models.template_digest(tokenizer),
        data_digest=data,
        precision=precision,
        beta=config.beta,
        backend=config.backend,
        codec=config.codec if quantity.is_wide else "none",
        mass=kept_mass(config) if quantity.is_wide else 1.0,
        command=_command(settings),
    )


def _command(settings: Settings) -> str:
    file = settings.run.run_dir / "command.txt"
    return file.read_text().strip() if file.is_file() else ""
