"""task=export: what is refused and compared, and, where llama.cpp is installed, a file that its server answers from.

llama.cpp runs in the interpreter that GGUF_PYTHON names (default: that of ./install.sh --gguf):
GGUF_PYTHON=/path/to/python .venv/bin/python -m pytest -m slow tests/test_gguf.py
"""

import json
import math
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import launch
from engine import gguf
from launch import settings_of
from settings.artifacts import read_json
from tests.support.helpers import ROOT, composed, free_port
from tests.support.tokenizers import small

PYTHON = os.environ.get("GGUF_PYTHON", str(ROOT / ".gguf/bin/python"))
SEARCH = "import importlib.util, sys; sys.exit(importlib.util.find_spec('llama_cpp') is None)"
THERE = Path(PYTHON).is_file() and subprocess.run([PYTHON, "-c", SEARCH], check=False).returncode == 0
needs_llama_cpp = pytest.mark.skipif(
    not THERE, reason=f"{PYTHON} has no llama.cpp: ./install.sh --gguf, or set GGUF_PYTHON"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BPE = {"type": "BPE", "merges": [["a", "b"]]}


# ---- what is refused before anything runs


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("export.format=onnx", "export.format='onnx' is not known; choose one of gguf"),
        ("export.quantization=q4", "export.quantization='q4' is not known; choose one of none, q8_0"),
        ("export.max_kl=0", "must be above 0 nats"),
        ("export.keep_float=true", "keeps the float file beside a quantized one"),
    ],
)
def test_a_wrong_key_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(composed("task=export", "model=smollm2", override))


def test_a_model_in_memory_and_a_missing_environment_are_refused(tmp_path: Path) -> None:
    own = settings_of(composed("task=export", "model=tiny", f"export.python={tmp_path}/python"))
    with pytest.raises(ValueError, match="built in memory. Name a folder"):
        gguf.source_folder(own.model)
    with pytest.raises(ValueError, match=r"python is no file. ./install.sh --gguf makes the environment"):
        gguf.tools_python(own.export)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config.json": "{}"}, "holds a LoRA adapter"),
        ({}, "has no config.json"),
        (
            {"config.json": '{"architectures": ["LlamaForSequenceClassification"]}'},
            "is a LlamaForSequenceClassification",
        ),
        ({"config.json": '{"architectures": ["LlamaForCausalLM"]}', "model.bin": ""}, "has no safetensors"),
    ],
)
def test_a_folder_that_is_no_language_model_in_safetensors_is_refused(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        gguf.check_folder(tmp_path)


def test_the_splitting_of_a_tokenizer_is_read_where_llama_cpp_has_the_same() -> None:
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
    odd = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "x"}}, BYTE_LEVEL]}
    assert gguf.splitting_of({"model": BPE, "pre_tokenizer": BYTE_LEVEL}) == "gpt-2"
    assert gguf.splitting_of({"model": BPE, "pre_tokenizer": digits}) == "smollm"
    assert gguf.splitting_of({"model": BPE, "pre_tokenizer": odd}) is None
    assert gguf.splitting_of({"model": BPE, "pre_tokenizer": {**BYTE_LEVEL, "use_regex": False}}) is None
    assert gguf.splitting_of({"model": {"type": "Unigram"}, "pre_tokenizer": None}) is None
    with pytest.raises(ValueError, match="a WordLevel, which GGUF has no place for"):
        gguf.splitting_of(read_json(ROOT / "assets/arithmetic_tokenizer/tokenizer.json"))
    with pytest.raises(ValueError, match="a BPE without merges"):
        gguf.splitting_of(read_json(ROOT / "assets/byte_tokenizer/tokenizer.json"))


# ---- what is compared


def test_a_text_that_is_read_as_other_tokens_is_shown() -> None:
    tokenizer = small("bpe")
    texts = gguf.sample_texts(tokenizer, count=20)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert len(texts) == 37 and len({*texts}) > 35
    gguf.check_tokens(tokenizer, texts, ids)
    ids[3] = [*ids[3][:5], *reversed(ids[3][5:])]
    with pytest.raises(ValueError, match="is not the model's") as refused:
        gguf.check_tokens(tokenizer, texts, ids)
    assert texts[3][:20] in str(refused.value) and "from token 3" in str(refused.value)
    with pytest.raises(ValueError, match="chat template is not the tokenizer's"):
        gguf.check_facts(tokenizer, {"chat_template": "other", "eos": tokenizer.eos_token_id})
    with pytest.raises(ValueError, match=f"ends a text by token 7, the model by {tokenizer.eos_token_id}"):
        gguf.check_facts(tokenizer, {"chat_template": tokenizer.chat_template, "eos": 7})


def logps(row: list[float]) -> list[float]:
    return [x - math.log(sum(map(math.exp, row))) for x in row]


def test_the_divergence_is_what_a_loop_finds() -> None:
    drawn = torch.Generator().manual_seed(3)
    prompts = [[1, 0, 2], [2, 2]]
    ours = [torch.randn(len(ids), 4, generator=drawn) for ids in prompts]
    theirs = [rows + 0.1 * torch.randn(rows.shape, generator=drawn) for rows in ours]
    found = gguf.agreement(ours, theirs, prompts)
    divergences, gaps, same = [], [], []
    for own, other, ids in zip(ours, theirs, prompts, strict=True):
        for t in range(len(ids)):
            logp, logq = logps(own[t].tolist()), logps(other[t].tolist())
            divergences.append(sum(math.exp(a) * (a - b) for a, b in zip(logp, logq, strict=True)))
            same.append(logp.index(max(logp)) == logq.index(max(logq)))
            if t + 1 < len(ids):
                gaps.append(abs(logp[ids[t + 1]] - logq[ids[t + 1]]))
    assert found.tokens == 5 and found.same_top == sum(same) / 5
    assert found.mean_kl == pytest.approx(sum(divergences) / 5) and found.max_kl == pytest.approx(max(divergences))
    assert found.max_gap == pytest.approx(max(gaps))
    assert gguf.agreement(ours, ours, prompts)[1:] == (0, 0, 0, 1)
    with pytest.raises(ValueError, match=r"logits of shape \(3, 3\), the model \(3, 4\)"):
        gguf.agreement(ours, [rows[:, :3] for rows in ours], prompts)


# ---- the whole way


def saved(kind: str, folder: Path) -> Path:
    """Save a small Llama with a tokenizer of this kind."""
    tokenizer = small(kind)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        max_position_embeddings=512,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def served(file: Path, log: Path) -> Iterator[str]:
    """Serve a file by llama.cpp's Python server; yield its base URL."""
    port = free_port()
    command = [PYTHON, "-m", "llama_cpp.server", "--model", str(file), "--port", port, "--n_ctx", "512"]
    command += ["--type_k", "0", "--type_v", "0"]  # keys and values in float32, for greedy responses that are the same
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def exported(base: Path, kind: str, *more: str) -> Path:
    """Export the small model; return the run's folder."""
    source = saved(kind, base / f"{kind}_model")
    run = ["task=export", "model=base_model", f"model.load_from={source}", f"export.python={PYTHON}"]
    launch.run_task(composed(*run, f"cache_dir={base}", f"exp_name={kind}", *more))
    return base / kind


@pytest.mark.slow
@needs_llama_cpp
def test_an_exported_model_answers_through_a_server_and_is_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = exported(tmp_path, "bpe", "export.quantization=q8_0", "export.keep_float=true")
    record = read_json(run / "EXPORT/export.json")
    assert [file["name"] for file in record["files"]] == ["model-f32.gguf", "model-q8_0.gguf"]
    whole, small = (file["agreement"] for file in record["files"])
    assert whole["mean_kl"] < 1e-6 < small["mean_kl"] < 0.05 and whole["same_top"] == 1
    assert record["files"][1]["bytes"] < record["files"][0]["bytes"]
    assert not [*(run / "EXPORT").glob("scratch*")] and "same ids for" in capsys.readouterr().out
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"prompt": f"say {i} 10"}) + "\n" for i in range(3)))
    models = [f"+evaluation.models.file={run}/EXPORT", f"+evaluation.models.folder={tmp_path}/bpe_model"]
    data = ["datasets=[local]", f"datasets.local.test={tmp_path}/test.jsonl", f"cache_dir={tmp_path}"]
    greedy = ["evaluation.temperatures=[0.0]", "evaluation.max_new_tokens=12", "evaluation.served=[file]"]
    with served(run / "EXPORT/model-f32.gguf", tmp_path / "server.log") as url:
        server = ["generation.backend=openai", f"generation.base_url={url}", "generation.prompts_as=text"]
        server += ["generation.text_responses=tokenize", "task=evaluate", "model=tiny"]
        launch.run_task(composed(*server, *models, *data, *greedy, "exp_name=judged"))
    rows = [json.loads(line) for line in (tmp_path / "judged/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:  # greedy, float32 in both
        assert said(row, "file").startswith(said(row, "folder")) and len(said(row, "folder")) > 6


def said(row: dict[str, Any], name: str) -> str:
    """Return the ASCII of a model's response of a row of samples.jsonl.

    The server leaves out bytes that make no character, and says a token more where the last one would be cut in two.
    """
    return "".join(letter for letter in row["responses"][name] if letter.isascii())


@pytest.mark.slow
@needs_llama_cpp
def test_a_tokenizer_that_llama_cpp_reads_in_another_way_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task=export: ") as refused:
        exported(tmp_path, "unigram")
    assert "\n" not in str(refused.value) or "theirs" in str(refused.value)
    assert not (tmp_path / "unigram/EXPORT").exists() and not [*(tmp_path / "unigram").glob("*.tmp")]
