"""Chooses what the oracle reads of a text: only what the marks enclose, and the question.

With visible=marked, training and evaluation leave out all of a text except

    - the first <|endoftext|>,
    - what lies between the two marks that point, marks included, or in parity everything up to its one mark,
    - the scattered meta-tokens inside that range, and
    - the text from the first question to the end, with the meta-tokens inside it.

What is left keeps its positions in the whole text. Attention ignores the order of its keys except for their positions,
so leaving tokens out is the same as masking them from every other token. A model that reads this way has been told
which place matters. It is the positive control of comparisons by length: a measurement that does not tell it from the
other arms is insensitive, and its verdicts about them mean nothing.
"""

import numpy as np


def marked_places(places: np.ndarray, span: range, question: int) -> np.ndarray:
    """Returns the places (N,) of a text that the oracle reads, in increasing order.

    places (L,): place of each id in the text, increasing; the ids are numbered without scattered meta-tokens.
    span: numbers of the ids from the first mark to the last one. question: number of the first question's first id."""
    shown = np.arange(places[span[0]], places[span[-1]] + 1)
    return np.concatenate([[0], shown[shown > 0], np.arange(places[question], places[-1] + 1)])
