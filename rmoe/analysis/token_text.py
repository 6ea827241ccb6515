"""How a token is shown to a reader."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenText:
    """The text of single token ids under a transformers tokenizer.

    A token that is no whole text, such as one byte of a longer UTF-8 character, is shown byte by byte as `\\xNN`.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._cached = cache(self._text)

    def __call__(self, token_id: int) -> str:
        return self._cached(token_id)

    def _text(self, token_id: int) -> str:
        text = self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        if _REPLACEMENT not in text:
            return text
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        if fallback := _FALLBACK_BYTE.fullmatch(piece):  # sentencepiece's byte tokens
            return f"\\x{fallback[1].lower()}"
        if all(character in _BYTE_OF_CHARACTER for character in piece):  # byte-level BPE
            raw = bytes(_BYTE_OF_CHARACTER[character] for character in piece)
            return raw.decode("utf-8", errors="backslashreplace")
        return text
