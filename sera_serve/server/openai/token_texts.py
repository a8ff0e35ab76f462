"""The bytes that each token of a vocabulary stands for."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Names tokens. A token may be a part of a character, so its bytes need not be UTF-8."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read from the tokenizer's decoder how its tokens are written."""
        self._backend = tokenizer.backend_tokenizer
        self._added = {index: token.content for index, token in self._backend.get_added_tokens_decoder().items()}
        self._special = frozenset(tokenizer.all_special_ids)
        decoder = self._backend.decoder
        kinds = _kinds(json.loads(decoder.__getstate__())) if decoder is not None else set()
        self._alphabet = _byte_alphabet() if "ByteLevel" in kinds else None
        self._has_byte_tokens = "ByteFallback" in kinds
        self._has_metaspace = bool(kinds & {"Metaspace", "ByteFallback"})
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token. Empty for an id without a token."""
        known = self._known.get(token)
        if known is None:
            # There are no more of them than tokens of the vocabulary.
            known = self._known[token] = self._bytes(token)
        return known

    def name_of(self, token: int) -> str:
        """Return the text of a token, or `bytes:` and its bytes in hexadecimal where they are no whole text."""
        data = self.bytes_of(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def is_special(self, token: int) -> bool:
        """Whether a token is left out of texts."""
        return token in self._special

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token]).encode("utf-8")
        name = self._backend.id_to_token(token)
        if name is None:
            return b""
        if self._alphabet is not None:
            if all(symbol in self._alphabet for symbol in name):
                return bytes(self._alphabet[symbol] for symbol in name)
        elif self._has_byte_tokens and (byte := _BYTE_TOKEN.fullmatch(name)):
            return bytes.fromhex(byte[1])
        elif self._has_metaspace:
            return str(name).replace("\u2581", " ").encode("utf-8")
        return str(name).encode("utf-8")


def _kinds(state: Any) -> set[str]:
    """Types of a decoder and of the decoders in it."""
    if not isinstance(state, dict):
        return set()
    found = {str(state.get("type"))}
    for part in state.get("decoders", ()):
        found |= _kinds(part)
    return found


def _byte_alphabet() -> dict[str, int]:
    """Byte by symbol of byte-level tokenizers: printable bytes stand for themselves, the others follow from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    for place, byte in enumerate(byte for byte in range(256) if byte not in set(printable)):
        alphabet[chr(256 + place)] = byte
    if set(alphabet) != set(ByteLevel.alphabet()):
        raise RuntimeError("the byte-level alphabet of tokenizers has changed")
    return alphabet
