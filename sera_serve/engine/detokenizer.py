"""Text of a growing token sequence, cut at stop strings, emitted only once it can no longer change."""

from __future__ import annotations

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """Turns tokens into text as they come.

    Text is held back while it could be the beginning of a stop string, or of a character whose bytes are still to come.

    Attributes:
        text: Everything emitted so far.
        stopped: Whether a stop string was met; it and what follows are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int], stop: list[str]) -> None:
        # The prompt's tokens decide whether the first new one begins with a space.
        self._stream = DecodeStream(ids=prompt, skip_special_tokens=True)
        self._backend = tokenizer.backend_tokenizer
        self._stop = stop
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token; returns the text that is now certain, maybe empty."""
        self._held += self._stream.step(self._backend, token) or ""
        cuts = [at for at in (self._held.find(word) for word in self._stop) if at >= 0]
        if cuts:
            self.stopped = True
            self._held = self._held[: min(cuts)]
            return self.flush()
        certain = len(self._held) - self._possible_stop()
        return self._emit(certain)

    def flush(self) -> str:
        """End of the sequence: returns what was held back."""
        return self._emit(len(self._held))

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for word in self._stop:
            for length in range(min(len(word) - 1, len(self._held)), longest, -1):
                if self._held.endswith(word[:length]):
                    longest = length
                    break
        return longest

    def _emit(self, length: int) -> str:
        emitted, self._held = self._held[:length], self._held[length:]
        self.text += emitted
        return emitted
