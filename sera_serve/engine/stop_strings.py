"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopSearch:
    """Finds the first of some strings in a text that comes in pieces, in one step or two for each character and string.

    By the algorithm of Knuth, Morris and Pratt (SIAM Journal on Computing 6(2), 1977, section 2): how much of a string
    the text ends with is known at each character, so that nothing is compared again. That is also what must be held
    back. With 16 strings of 256 characters, comparing each end of the text took 0.4 ms a token, on the event loop.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """Look for `words`, each of one character or more."""
        self._words = [_Word(word) for word in words]

    @property
    def held(self) -> int:
        """Characters at the end of the text that may begin a string."""
        return max((word.matched for word in self._words), default=0)

    def push(self, text: str) -> tuple[int, str] | None:
        """Take the next piece.

        Returns:
            The string that is found in it, and where that begins, from the piece's first character on: below 0 where it
            began in an earlier piece. Of several, the one that begins first. None where there is none. Nothing may be
            pushed after a string was found.
        """
        if not self._words:
            return None
        ends = [(word.find_end(text), word.text) for word in self._words]
        return min(((end - len(word), word) for end, word in ends if end is not None), default=None)


class _Word:
    """One string, and how much of it the text ends with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # For each beginning of the string: the longest end of it, but for itself, that the string begins with. As far
        # as the text has matched: most texts have the first characters of a stop string only.
        self._borders = [0]

    def find_end(self, text: str) -> int | None:
        """Take more of the text. Returns how many of its characters complete the string, or None."""
        at = 0
        while at < len(text):
            if self.matched == 0:
                at = text.find(self.text[0], at)
                if at < 0:
                    return None
                self.matched = 1
            else:
                self.matched = self._longer(self.matched, text[at])
            at += 1
            if self.matched == len(self.text):
                return at
        return None

    def _longer(self, matched: int, character: str) -> int:
        """How much of the string a text ends with that ended with `matched` characters of it, and has one more."""
        while matched and self.text[matched] != character:
            matched = self._border(matched)
        return matched + (self.text[matched] == character)

    def _border(self, matched: int) -> int:
        while len(self._borders) < matched:
            self._borders.append(self._longer(self._borders[-1], self.text[len(self._borders)]))
        return self._borders[matched - 1]
