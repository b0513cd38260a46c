"""Two tokenizers beside each other: whether ids that both have mean the same text, and which token is which.

Letters: V tokens of a vocabulary.
"""

import json
from functools import lru_cache
from typing import Any

import numpy as np

from assets.build_byte_tokenizer import byte_characters
from templates import special_ids, turn_end

NOTHING = -1  # the id of a token that the other tokenizer lacks


def check_shared_ids(ours: Any, theirs: Any, what: str, whose: str = "the policy") -> int:
    """Return how many ids both tokenizers have; ValueError if one of them is another token there, with both texts.

    Rows of an embedding beyond a tokenizer's last id are padding: no id reaches them, so they are not compared.
    """
    mine, other = ({i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (ours, theirs))
    shared = sorted(mine.keys() & other.keys())
    different = [i for i in shared if mine[i] != other[i]]
    if different:
        i = different[0]
        raise ValueError(
            f"{what} has another tokenizer than {whose}: {len(different)} of the {len(shared)} ids that both have "
            f"are other tokens. The first, id {i}, is {mine[i]!r} for {whose} and {other[i]!r} there. "
            "Use one of the same family"
        )
    return len(shared)


def check_reads_ours(ours: Any, theirs: Any, what: str, whose: str = "the policy") -> None:
    """Refuse a frozen model that cannot read the policy's ids: shared ids are other tokens, or it lacks some of ours.

    Tokens that only it has are no hindrance: its logits are cut to the policy's vocabulary before the softmax.
    """
    check_shared_ids(ours, theirs, what, whose)
    missing = sorted(set(ours.get_vocab().values()) - set(theirs.get_vocab().values()))
    if missing:
        raise ValueError(
            f"{what} has another tokenizer than {whose}: it lacks {len(missing)} tokens, the first is id "
            f"{missing[0]}, {ours.convert_ids_to_tokens(missing[0])!r}. It could not read what is said with them"
        )


@lru_cache(maxsize=4)
def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """Return the bytes [V] that each token adds in the middle of a text; None for what is no text (special tokens).

    Byte-level tokenizers write bytes as characters (GPT-2's table); a token <0xE4> is that byte; any other token is
    decoded behind another one, so that a space which it brings is seen.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    names: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(size)))
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    special, found = special_ids(tokenizer), list[bytes | None]()
    table = {character: byte for byte, character in enumerate(byte_characters())}
    behind = {} if "ByteLevel" in decoder else _decoded_behind(tokenizer, size)
    for i, name in enumerate(names):
        if name is None or i in special:
            found.append(None)
        elif i in added:
            found.append(added[i].encode())
        elif "ByteFallback" in decoder and len(name) == 6 and name.startswith("<0x"):
            found.append(bytes([int(name[3:5], 16)]))
        elif "ByteLevel" in decoder:
            found.append(b"".join(bytes([table[c]]) if c in table else c.encode() for c in name))
        else:
            found.append(behind[i].encode())
    return found


def _decoded_behind(tokenizer: Any, size: int) -> dict[int, str]:
    """Decode every token behind a plain one, and take that one's text away."""
    special = special_ids(tokenizer)
    words = [i for i in range(size) if i not in special and (tokenizer.convert_ids_to_tokens(i) or "").isalpha()]
    if not words:
        raise ValueError("the tokenizer has no token of letters, so nobody can tell what its tokens mean as text")
    anchor, options = words[0], {"clean_up_tokenization_spaces": False, "skip_special_tokens": False}
    alone = tokenizer.decode([anchor], **options)
    texts = tokenizer.batch_decode([[anchor, i] for i in range(size)], **options)
    return {i: text.removeprefix(alone) for i, text in enumerate(texts)}


def matched_ids(theirs: Any, ours: Any) -> np.ndarray:
    """Return for each id of their vocabulary [V] the id of ours with the same bytes, else NOTHING.

    One to one: of several tokens with the same bytes (a letter, and the byte of that letter) the first is meant.
    Special tokens are matched by their names, and the ends of a turn with each other, whatever they are called.
    """
    first: dict[bytes, int] = {}
    for i, text in enumerate(token_bytes(ours)):
        if text:
            first.setdefault(text, i)
    pieces = token_bytes(theirs)
    found = np.full(len(pieces), NOTHING, dtype=np.int64)
    for i, text in enumerate(pieces):
        if text:
            found[i] = first.pop(text, NOTHING)
    named = {ours.convert_ids_to_tokens(i): i for i in special_ids(ours)}
    for i in special_ids(theirs):
        found[i] = named.get(theirs.convert_ids_to_tokens(i), NOTHING)
    ends = turn_end(theirs).id, turn_end(ours).id
    if ends[1] is not None:
        found[found == ends[1]] = NOTHING  # a token of that name that ends no turn there
    if ends[0] is not None and ends[1] is not None:
        found[ends[0]] = ends[1]
    return found
