"""Small tokenizers of three kinds, trained on a few lines: byte-level BPE, unigram with byte fallback, whole words."""

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.helpers import WORDS

END = {"bpe": "<|im_end|>", "unigram": "</s>", "words": "<end>"}
LINES = [f"say {word} {i}! The {word} and the {WORDS[i - 3]} speak, naïve café?" for i, word in enumerate(WORDS)] * 3
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':\\n' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)


def trained(kind: str) -> Tokenizer:
    """Train one on LINES."""
    special = ["<pad>", END[kind]]
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "words":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(special_tokens=[*special, "<unk>"], show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        trainer = trainers.UnigramTrainer(
            vocab_size=160, special_tokens=[*special, "<unk>"], unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(LINES, trainer)
    if kind == "unigram":
        pieces = [(token, 0.0) for token in (*special, "<unk>")] + [("\n", -9.0)]
        pieces += [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
        known = {token for token, _ in pieces}
        learned = [(t, tokenizer.get_vocab()[t]) for t in tokenizer.get_vocab() if t not in known]
        pieces += [(token, -2.0 - 0.01 * i) for token, i in sorted(learned, key=lambda row: row[1])]
        tokenizer.model = models.Unigram(pieces, 2, True)
        replace, fuse = decoders.Replace("▁", " "), decoders.Fuse()
        tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), fuse, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


@cache
def small(kind: str) -> Any:
    """Return the tokenizer of a kind, with a template and an end of turn of its own."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=trained(kind),
        pad_token="<pad>",
        eos_token=END[kind],
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )
    if kind != "bpe":
        fast.unk_token = "<unk>"
    return fast


def written(kind: str, folder: Path) -> Path:
    """Write it as a folder."""
    small(kind).save_pretrained(str(folder / kind))
    return folder / kind
