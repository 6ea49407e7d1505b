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
