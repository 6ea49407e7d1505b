"""Finds the ends of sentences and lines in token ids, for whole texts and token by token.

A sentence ends after a token with a newline; after a token that ends in a full stop, an exclamation mark or a question
mark, closing quotes and brackets apart, if the next token begins with white space; and before <|endoftext|>. A line
ends after a token with a newline. An end is known once the next token has come.
"""

import functools
import re

import numpy as np

from nanometa.config.marker_settings import MarkerConfig
from nanometa.data.tokenizer import Tokenizer

STOP = re.compile(rb"""[.!?]["')\]}]*\Z""")


class Sentences:
    """Cuts text into segments of sentences, or of lines, by tables over the vocabulary."""

    def __init__(self, tokenizer: Tokenizer, cfg: MarkerConfig):
        lines = cfg.marker_place == "newline"
        self.least, self.number = (1, 1) if lines else (cfg.sentence_tokens, cfg.chunk_sentences)
        self.eot = -1 if lines else tokenizer.eot
        size = tokenizer.n_content
        self.newline, self.stop, self.space = (np.zeros(size, dtype=bool) for _ in range(3))
        for token, id in tokenizer.ranks.items():
            self.newline[id] = b"\n" in token
            self.stop[id] = not lines and STOP.search(token) is not None
            self.space[id] = token[:1].isspace()

    def segments(self, content: np.ndarray) -> np.ndarray:
        """Returns the first and the last token (N, 2) of each segment of content (n,) that another token follows."""
        now, following = content[:-1], content[1:]
        last = following == self.eot
        ends = np.flatnonzero(self.newline[now] | (self.stop[now] & self.space[following]) | last)
        found, state = [], Ends(self)
        for end in ends.tolist():
            if state.closes(end, bool(last[end])):
                found.append((state.first, end))
                state.first = end + 1
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    def begin(self) -> "Following":
        """Returns an object that finds the ends of segments in a text that comes token by token."""
        return Following(self)


@functools.lru_cache(maxsize=4)
def sentences_of(tokenizer: Tokenizer, cfg: MarkerConfig) -> Sentences:
    """Returns the Sentences of a tokenizer and settings. Building its tables takes as long as reading much text."""
    return Sentences(tokenizer, cfg)


class Ends:
    """Decides which ends of sentences close a segment: those of every `number` sentences with `least` tokens each."""

    def __init__(self, rules: Sentences):
        self.rules = rules
        self.first = 0  # the first token of the open segment
        self.begun = 0  # the first token of the open sentence
        self.sentences = 0  # number of complete sentences in the open segment

    def closes(self, end: int, document_ends: bool) -> bool:
        """Returns whether the end of a sentence at token `end` closes the open segment."""
        if not document_ends and end + 1 - self.begun < self.rules.least:
            return False  # a short sentence is joined to the next one
        self.begun, self.sentences = end + 1, self.sentences + 1
        if document_ends or self.sentences == self.rules.number:
            self.sentences = 0
            return True
        return False


class Following:
    """Finds the ends of segments in a text that comes token by token."""

    def __init__(self, rules: Sentences):
        self.rules, self.ends, self.count, self.before = rules, Ends(rules), 0, -1

    def ends_before(self, token: int) -> bool:
        """Takes the next token, and returns whether a segment ends before it."""
        rules, before, last = self.rules, self.before, token == self.rules.eot
        end = before >= 0 and (rules.newline[before] or (rules.stop[before] and rules.space[token]) or last)
        self.before, self.count = token, self.count + 1
        return bool(end) and self.ends.closes(self.count - 2, last)
