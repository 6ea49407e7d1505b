"""The parity task: the answer is the exclusive or of all bits before the mark.

     one zero zero one one zero one zero
     one zero<|meta|> one one zero zero one one
     ? parity: one

Bits are words, so that each is one token in every tokenizer, and stand in lines of 8. The mark stands anywhere between
bit 3 and a share of all bits, which the level sets: 1/32 at easy, 1/16 at medium, 1/8 at hard, 1/2 at extra_hard, and 1
at long, but at least bit 4. The share is the same at every length, so a longer text is a larger problem. Bits after the
mark fill the rest of the length and do not count.

The bits before the mark (the prefix) decide the split of a text, so no prefix of the training split occurs in the
others, and a table of training prefixes answers nothing. Every number of bits from 3 has a quarter of its prefixes in
val, a quarter in test, and in each split as many with answer zero as with answer one. Short prefixes are few: those of 3
and 4 bits in the test split are 6, so figures of level easy at short lengths are about 6 problems. A table that also
knows that one changed bit changes the answer knows the rule of the task; it answers prefixes that are short enough to
have a neighbor in the table.
"""

from nanometa.common.keyed_random import Draws, stable_key
from nanometa.tasks.example import POINT, SPLITS, STOP, Draft, Maker, show

QUESTION_NAMES_PLACE = False
ANSWER_IN_TEXT = False
CHANCE = 1 / 2
# least number of bits before the mark, and the largest as a share of all bits
SIZES = {"easy": (3, 1 / 32), "medium": (3, 1 / 16), "hard": (3, 1 / 8), "extra_hard": (3, 1 / 2), "long": (3, 1.0)}
LARGEST = 4  # the largest number of bits before the mark is at least this
LINE = 8  # bits in a line
WORDS = (" zero", " one")


def draft(maker: Maker, draws: Draws, room: int, level: str) -> Draft | None:
    """Returns a text of at most `room` positions, or None if these draws do not fit into it."""
    left = room - maker.cost(" ?", " parity", ":", " one", "\n", POINT)
    costs, end = [maker.cost(word) for word in WORDS], maker.cost(STOP, "\n")
    bits: list[int] = []
    while True:
        bit = draws.below(2)
        left -= costs[bit] + (end if len(bits) % LINE == 0 else 0)
        if left < 0:
            break
        bits.append(bit)
    n, (least, share) = len(bits), SIZES[level]
    if n < least:
        return None
    cut = draws.between(least, min(n, max(LARGEST, round(share * n))))
    out = Draft(percentile=percentile(bits[:cut]))
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
        "a table of all training prefixes, by the first bits": _in_table(bits[:k] for k in range(cut, least - 1, -1)),
        "a table of all training prefixes, by the last bits": _in_table(
            bits[cut - k : cut] for k in range(cut, least - 1, -1)
        ),
    }
    return out


def percentile(prefix: list[int]) -> int:
    """Returns 0, 25, 50 or 75, which decides the split of the texts with this prefix of at least 3 bits.

    Bits 2 and 3 select one of the four numbers, in an order that a hash of all later bits shifts. Among the prefixes
    with equal later bits, each number therefore occurs twice: with the first bit 0 and with the first bit 1."""
    return 25 * ((stable_key("parity", prefix[3:]) + 2 * prefix[1] + prefix[2]) % 4)


def _in_table(prefixes) -> str:
    """Returns the answer of the first of the prefixes that belongs to the training split, or zero if none does."""
    known = (prefix for prefix in prefixes if percentile(prefix) in SPLITS["train"])
    return WORDS[sum(next(known, [])) % 2]


if __name__ == "__main__":
    show("parity")
