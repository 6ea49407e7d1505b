"""The parity task: the answer is the exclusive or of all bits before the mark.

     one zero zero one one zero one zero
     one zero<|meta|> one one zero zero one one
     ? parity: one

Bits are words, so that each is one token in every tokenizer, and stand in lines of 8. The level sets the number of bits
before the mark. Bits after the mark fill the rest of the length and do not count. At level `long` the mark can be
anywhere.
"""

from nanometa.common.keyed_random import Draws
from nanometa.tasks.example import POINT, STOP, Draft, Maker, show

QUESTION_NAMES_PLACE = False
ANSWER_IN_TEXT = False
CHANCE = 1 / 2
SIZES = {"easy": (2, 4), "medium": (2, 8), "hard": (2, 16), "extra_hard": (2, 64), "long": (2, 10**9)}
LINE = 8  # bits in a line
WORDS = (" zero", " one")


def draft(maker: Maker, draws: Draws, room: int, level: str) -> Draft | None:
    """Returns a text of at most `room` positions, or None if these draws do not fit into it."""
    left = room - maker.cost(" ?", " parity", ":", " one", "\n", POINT)
    least, most = SIZES[level]
    bits: list[int] = []
    while True:
        bit = draws.below(2)
        left -= maker.cost(WORDS[bit]) + (maker.cost(STOP, "\n") if len(bits) % LINE == 0 else 0)
        if left < 0:
            break
        bits.append(bit)
    n = len(bits)
    if n < least:
        return None
    cut = draws.between(least, min(most, n))
    out = Draft()
    for i, bit in enumerate(bits, start=1):
        out.body.append(WORDS[bit])
        if i == cut:
            out.body.append(POINT)
        if i % LINE == 0 or i == n:
            out.body += [STOP, "\n"]
    out.questions = [([" ?", " parity", ":"], [WORDS[sum(bits[:cut]) % 2], "\n"])]
    out.shortcuts = {
        "the bit before the mark": WORDS[bits[cut - 1]],
        "the parity of all bits": WORDS[sum(bits) % 2],
        "the parity of the two bits before the mark": WORDS[sum(bits[cut - 2 : cut]) % 2],
        "the first bit": WORDS[bits[0]],
    }
    return out


if __name__ == "__main__":
    show("parity")
