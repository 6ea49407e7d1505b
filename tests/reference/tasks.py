"""Reference solutions of the tasks: reads the text as a person would, and shares no code with the task writers."""

import re

META = "<|meta|>"
# for each placement, the regular expression of the sign that points at the answer's place
SIGNS = {"target": re.escape(META), "every": r" mark\b", "none": r" mark\b", "background": r" mark\b"}


def solve(task: str, text: str, placement: str) -> list[tuple[str, str]]:
    """Returns for each question the answer that the text gives, and the true answer.

    text: contains <|meta|> where the markers are."""
    text = text.replace("<|endoftext|>", "")
    sign = SIGNS[placement]
    if sign != re.escape(META):
        text = text.replace(META, "")
    body, *questions = text.split(" ?")
    marked = re.sub(sign, "@", body)  # @ replaces the signs
    pairs = []
    for question in questions:
        asked, given = (part.strip() for part in question.split(":"))
        true = {"list_recall": _recall, "segment_counting": _count, "parity": _parity, "copying": _copy}[task]
        pairs.append((given, true(marked, asked)))
    return pairs


def pointed_and_named(text: str, placement: str) -> tuple[str, str]:
    """Returns the name of the list that the text points at, and the name in the question."""
    text = text.removeprefix("<|endoftext|>")
    if SIGNS[placement] == re.escape(META):
        text = text.replace(META, " mark ")
    body, question = text.replace(META, "").split(" ?")
    (line,) = (line for line in body.split("\n") if "mark" in line.split())
    return line.split(":")[0].strip(), question.split()[0]


def _recall(body: str, asked: str) -> str:
    """Returns the answer of list recall, for the questions "NAME #j" and "NAME after ITEM"."""
    lists = dict(line.replace("@", " ").split(":") for line in body.strip().split("\n"))
    lists = {name.strip(): items.split() for name, items in lists.items()}
    if found := re.fullmatch(r"([\w ]+) #(\d+)", asked):
        return lists[found[1]][int(found[2]) - 1]
    name, anchor = asked.split(" after ")
    assert all(anchor in items[:-1] for items in lists.values()), "a list lacks the anchor"
    return lists[name][lists[name].index(anchor) + 1]


def _count(body: str, asked: str) -> str:
    """Returns how often the item occurs between the two signs."""
    before, segment, behind = body.split("@")
    assert ":" in before and behind is not None
    return str(segment.split().count(asked.removeprefix("count ")))


def _parity(body: str, asked: str) -> str:
    """Returns the parity of the bits before the sign."""
    before, _ = body.split("@")
    return ["zero", "one"][before.split().count("one") % 2]


def _copy(body: str, asked: str) -> str:
    """Returns the words of the span between the two signs."""
    _, span, _ = body.split("@")
    return span.strip().removeprefix("[").removesuffix("]").strip()


# ----------------------------------------------------------------------------- shortcuts


def shortcuts(task: str, text: str, placement: str, sizes: tuple) -> dict[str, str]:
    """Returns the answers of the shortcuts of a task that need no random choice, and of the programs that are told the
    first word, from a text with one question. sizes: least and largest size of the problem, as the task's level has."""
    sign = SIGNS[placement]
    text = text.replace("<|endoftext|>", "")
    body, question = (text if sign == re.escape(META) else text.replace(META, "")).split(" ?")
    body, (asked, answer) = re.sub(sign, " @ ", body), (part.strip() for part in question.split(":"))
    programs = {"list_recall": _recall_shortcuts, "segment_counting": _count_shortcuts, "parity": _parity_shortcuts,
                "copying": _copy_shortcuts}  # fmt: skip
    return programs[task](body, asked, answer, sizes)


def _recall_shortcuts(body, asked, answer, sizes):
    lists = [(line.split(":")[0].strip(), line.replace("@", "").split(":")[1].split()) for line in body.splitlines()]
    name, j = asked.split(" #")
    last = lists[-1][1]
    return {"the same place in the last list": last[min(int(j), len(last)) - 1],
            "the list's first item": dict(lists)[name][0]}  # fmt: skip


def _count_shortcuts(body, asked, answer, sizes):
    item, (least, most) = asked.split()[-1], sizes
    counts = [line.split().count(item) for line in body.splitlines()]
    marks = [i for i, line in enumerate(body.splitlines()) if "@" in line]
    first, last, middle = marks[0], marks[-1], (least + most) // 2

    def capped(count):
        return str(1 if count < 1 else 4 if count > 4 else round(count))

    found = {"from the count of the whole text": sum(counts), "always the same": 1,
             "the count of the segment's first list": counts[first],
             "the count of the segment's last list": counts[last],
             f"the mean count of {middle} adjacent lists": middle * sum(counts) / len(counts)}  # fmt: skip
    runs = [sum(counts[i : i + middle]) for i in range(max(1, len(counts) - middle + 1))]
    found[f"the most frequent count of {middle} adjacent lists"] = max(runs, key=runs.count)  # of several, the first
    for n in (least, middle, most):
        best = 0
        for i in range(len(counts)):
            best = max(best, sum(counts[i : i + n]))
        found[f"the largest count of {n} adjacent lists"] = best
        found[f"the count of {n} lists from the first mark"] = sum(counts[i] for i in range(first, len(counts))
                                                                   if i < first + n)  # fmt: skip
        found[f"the count of {n} lists up to the last mark"] = sum(counts[i] for i in range(last + 1) if i > last - n)
    return {name: capped(count) for name, count in found.items()}


def _parity_shortcuts(body, asked, answer, sizes):
    before, behind = (part.split() for part in body.split("@"))
    both = before + behind

    def parity(bits):
        return ["zero", "one"][bits.count("one") % 2]

    return {"the bit before the mark": before[-1], "the parity of all bits": parity(both), "the first bit": both[0],
            "the parity of the two bits before the mark": parity(before[-2:])}  # fmt: skip


def _copy_shortcuts(body, asked, answer, sizes):
    lines = [line.split() for line in body.splitlines()]
    spans = [" ".join(line[line.index("[") + 1 : line.index("]")]) for line in lines]
    (marked,) = (line for line in lines if "@" in line)
    before = marked[: marked.index("@")]
    words = " ".join(" ".join(line) + " ;" for line in lines).replace("@ ", "").split()
    one, two = answer.split()[:1], ["[", *answer.split()[:1]]
    while len(one) < len(answer.split()):
        ends = [i for i, word in enumerate(words[:-1]) if word == one[-1]]
        one.append(words[ends[-1] + 1])
        ends = [i for i in range(1, len(words)) if words[i - 1 : i + 1] == two[-2:]]
        two.append(words[ends[-1] + 1] if ends else "")
    return {"the last span": spans[-1], "the first span": spans[0],
            "the longest span": sorted(spans, key=lambda span: -len(span.split()))[0],
            "the words before the marked span": " ".join(before[-len(answer.split()) :]),
            "1-gram induction, given the first word": " ".join(word for word in one if word != ";"),
            "2-gram induction, given the first word": " ".join(two[1:])}  # fmt: skip
