"""The parity task: the answer is the exclusive or of all bits before the mark.

     one zero zero one one zero one zero
     one zero<|meta|> one one zero zero one one
     ? parity: one

Bits are words, so that each is one token in every tokenizer, and stand in lines of 8. The level sets how many bits
count: at most 1/32 of all bits at easy, 1/16 at medium, 1/4 at hard, 1/2 at extra_hard and all at long, but at least 4,
8, 12, 16 and 24, and at least half of that number, equally likely. These shares are the same at every length, so
a longer text is a larger problem. Bits after the mark fill the rest of the length and do not count.

The bits before the mark (the prefix) decide the split of a text, so no prefix of the training split occurs in the
others, and a table of training prefixes answers nothing. Every number of bits from 3 has a quarter of its prefixes in
val and a quarter in test, and in each split as many with answer zero as with answer one.

Short prefixes are few: the test split has 6 of 3 or 4 bits and 1,016 of 6 to 11 bits. Among so few, parts of the prefix
agree with the answer by accident (the first bit at level easy), which the printed floors include. A table that also
knows that one changed bit changes the answer knows the rule of the task; it answers prefixes that are short enough to
have a neighbor in the table.
"""

from nanometa.common.keyed_random import Draws, stable_key
from nanometa.tasks.example import POINT, SPLITS, STOP, Draft, Maker, show

QUESTION_NAMES_PLACE = False
ANSWER_IN_TEXT = False
CHANCE = 1 / 2
# for each level, the largest number of bits before the mark in short texts, and as a share of all bits in longer ones
SIZES = {"easy": (4, 1 / 32), "medium": (8, 1 / 16), "hard": (12, 1 / 4), "extra_hard": (16, 1 / 2), "long": (24, 1.0)}
LEAST = 3  # fewer bits than that do not have prefixes in every split
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
    n, (short, share) = len(bits), SIZES[level]
    if n < LEAST:
        return None
    most = min(n, max(short, round(share * n)))
    least = max(LEAST, most // 2)
    cut = draws.between(least, most)
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
        "the parity of the bits that are likely to count": WORDS[sum(bits[: (least + most) // 2]) % 2],
        "a table of training prefixes, by the first bits": _in_table(bits[:k] for k in range(cut, LEAST - 1, -1)),
        "a table of training prefixes, by the last bits": _in_table(
            bits[cut - k : cut] for k in range(cut, LEAST - 1, -1)
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
