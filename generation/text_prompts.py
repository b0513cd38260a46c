"""Prompts as text, for a server that takes no token ids: what its own tokenizer makes of each has to be our ids.

`python -m llama_cpp.server` is one: /completions takes a text, /extras/tokenize says which ids it makes of it.
"""

from typing import Any

from generation.server import Refused, Server

# Its defaults cut the distribution: nothing else is to act than the temperature and top-p that were asked for.
UNCUT = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}


class TextPrompts:
    """Ids as the text which that server reads as these very ids."""

    def __init__(self, server: Server, tokenizer: Any, model: str) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.root = Server(server.base_url.removesuffix("/v1"), server.timeout, server.retries)
        self.root.stopped = server.stopped

    def ids_there(self, text: str) -> list[int]:
        """Return what the server makes of a text; ValueError where it does not say."""
        try:
            answer = self.root.call("/extras/tokenize", {"model": self.model, "input": text})
        except Refused as error:
            if error.code != 404:
                raise
            raise ValueError(
                f"generation.prompts_as=text: {self.root.base_url} has no /extras/tokenize, so nobody can tell which "
                "tokens it makes of a text. It is for llama_cpp.server; others take ids: generation.prompts_as=ids"
            ) from error
        return list(answer.get("tokens", []))

    def text(self, ids: list[int]) -> str:
        """Return a prompt as text; ValueError where the server would read other tokens.

        A server that puts a begin-of-sequence token before every text gets one without it.
        """
        bos = [self.tokenizer.bos_token_id]
        tries = [ids, ids[1:]] if ids[:1] == bos else [ids]
        for kept in tries:
            text = self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            there = self.ids_there(text)
            if there == ids:
                return text
        at = next((i for i, pair in enumerate(zip(ids, there, strict=False)) if pair[0] != pair[1]), len(there))
        raise ValueError(
            f"{self.root.base_url} reads a prompt as other tokens than the model learned, from token {at} on: ours are "
            f"{self.tokenizer.convert_ids_to_tokens(ids[at : at + 5])}, the server's "
            f"{self.tokenizer.convert_ids_to_tokens(there[at : at + 5])}. Does it serve this model?"
        )
