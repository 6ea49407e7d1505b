"""Measures what simple programs get right in the texts of the tasks, beside the floors that eval.py prints.

    python -m nanometa.tasks.floors --length 64 128 256 512

The programs read the text alone, as a person would, and share no code with the task writers. Each looks for a way to
answer without doing the task. If one of them is right more often than the largest floor of its task, the floors are
incomplete and no accuracy above them shows that a model does the task (tests/test_floors.py).

Programs that are told the first word of the answer are listed apart. They show what is left of copying once the marks
are found.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import Draws, stable_key
from nanometa.common.statistics import wilson
from nanometa.common.terminal import BOLD, write, write_line
from nanometa.config import TaskConfig
from nanometa.config.command_line import Parser, in_home, run_cli
from nanometa.config.tasks import LEVELS, PLACEMENTS, TASKS
from nanometa.data.tokenizer import META, Tokenizer, open_tokenizer
from nanometa.tasks.example import Example, Maker

SIGN = "@"  # stands for the marks in the texts that the programs read


class Text(NamedTuple):
    """A text as the programs read it, with one question."""

    body: list[str]
    """words, brackets, colons, line ends and the signs @ of the marks, before the question"""
    question: list[str]
    answer: str

    @property
    def unmarked(self) -> list[str]:
        """Returns the body without the signs of the marks."""
        return [word for word in self.body if word != SIGN]


Program = Callable[[list[Text], list[Text]], Iterable[str]]
"""Takes training texts and test texts, and returns an answer to each test text."""


def read_text(example: Example, placement: str, tokenizer: Tokenizer) -> Text:
    """Returns a text of a task as the programs read it."""
    text = tokenizer.decode(example.ids).replace("<|endoftext|>", "")
    sign = META if PLACEMENTS[placement].pointer == "meta" else " mark"
    text = re.sub(rf"{re.escape(sign)}\b" if sign != META else re.escape(sign), f" {SIGN}", text).replace(META, "")
    body, question = text.split(" ?")
    question, answer = question.split(":")
    return Text(re.findall(r"\n|[\[\]:]|[^\s\[\]:]+", body), question.split(), answer.strip())


def rows(words: list[str]) -> list[list[str]]:
    """Returns the words of each line."""
    out: list[list[str]] = [[]]
    for word in words:
        if word == "\n":
            out.append([])
        else:
            out[-1].append(word)
    return [row for row in out if row]


def draws_of(text: Text) -> Draws:
    """Returns random draws that depend on the text alone, for programs that guess."""
    return Draws(stable_key("program", text.body, text.question))


def each(answer: Callable[[Text], str]) -> Program:
    """Returns the program that answers every text by itself, without training texts."""
    return lambda train, test: map(answer, test)


def table(keys: Callable[[Text], Iterable]) -> Program:
    """Returns the program that stores the answers of the training texts under keys, and answers a test text with the
    most frequent answer of its first key that is known. keys: gives a text's keys, of which the first is stored."""

    def program(train: list[Text], test: list[Text]) -> list[str]:
        known: defaultdict = defaultdict(Counter)
        for text in train:
            known[next(iter(keys(text)))][text.answer] += 1
        most = Counter(text.answer for text in train).most_common(1)[0][0]
        found = [next((known[key] for key in keys(text) if key in known), None) for text in test]
        return [counts.most_common(1)[0][0] if counts else most for counts in found]

    return program


# ----------------------------------------------------------------------------- list recall


def lists_of(words: list[str]) -> dict[str, list[str]]:
    """Returns the items of each named list."""
    split = ((row[: row.index(":")], row[row.index(":") + 1 :]) for row in rows(words))
    return {" ".join(name): items for name, items in split}


def _item(choose: Callable[[list[list[str]], Text], list[str]]) -> Program:
    """Returns the program that gives item j of a list that it chooses without the question's name."""

    def answer(text: Text) -> str:
        items = choose(list(lists_of(text.unmarked).values()), text)
        return items[min(int(text.question[-1].removeprefix("#")), len(items)) - 1]

    return each(answer)


def _item_of_the_list(text: Text) -> str:
    return draws_of(text).choice(lists_of(text.unmarked)[" ".join(text.question[:-1])])


def _most_frequent_item(text: Text) -> str:
    return Counter(item for items in lists_of(text.unmarked).values() for item in items).most_common(1)[0][0]


LIST_RECALL: dict[str, Program] = {
    "item j of the last list": _item(lambda lists, text: lists[-1]),
    "item j of the first list": _item(lambda lists, text: lists[0]),
    "item j of any list": _item(lambda lists, text: draws_of(text).choice(lists)),
    "any item of the named list": each(_item_of_the_list),
    "the most frequent item": each(_most_frequent_item),
    "a table of training questions": table(lambda text: [" ".join(text.question)]),
    "a table of the last word of training questions' names": table(lambda text: [text.question[-2]]),
}

# ----------------------------------------------------------------------------- segment counting


def _counts(text: Text) -> list[int]:
    """Returns how often the item occurs in each list."""
    return [items.count(text.question[-1]) for items in lists_of(text.unmarked).values()]


def _marked(text: Text) -> range:
    """Returns the numbers of the lists between the marks."""
    ends = [i for i, row in enumerate(rows(text.body)) for word in row if word == SIGN]
    return range(ends[0], ends[-1] + 1)


def _capped(count: Callable[[Text], float]) -> Program:
    return each(lambda text: str(max(1, min(4, round(count(text))))))


def _runs(text: Text, size: int) -> list[int]:
    counts = _counts(text)
    return [sum(counts[i : i + size]) for i in range(max(1, len(counts) - size + 1))]


def _from_first(size: int) -> Callable[[Text], int]:
    return lambda text: sum(_counts(text)[_marked(text)[0] :][:size])


def _to_last(size: int) -> Callable[[Text], int]:
    return lambda text: sum(_counts(text)[max(0, _marked(text)[-1] + 1 - size) : _marked(text)[-1] + 1])


def _mean(size: int) -> Callable[[Text], float]:
    return lambda text: size * sum(_counts(text)) / len(_counts(text))


def _largest(size: int) -> Callable[[Text], int]:
    return lambda text: max(_runs(text, size))


def _usual(size: int) -> Callable[[Text], int]:
    return lambda text: Counter(_runs(text, size)).most_common(1)[0][0]


def _last(size: int) -> Callable[[Text], int]:
    return lambda text: _runs(text, size)[-1]


def _to_next(text: Text) -> int:
    """Returns the count from the first mark to the first list after it that holds the item before one that does."""
    counts, first = _counts(text), _marked(text)[0]
    ends = (i for i in range(first + 1, len(counts) - 1) if counts[i] and counts[i + 1])
    return sum(counts[first : next(ends, len(counts)) + 1])


WINDOWS = {"the largest count": _largest, "the most frequent count": _usual, "the mean count": _mean,
           "the count in the last": _last, "the count from the first mark": _from_first,
           "the count up to the last mark": _to_last}  # fmt: skip
SEGMENT_COUNTING: dict[str, Program] = {
    "the count of the whole text": _capped(lambda text: sum(_counts(text))),
    "a table of whole counts in training": table(lambda text: [sum(_counts(text))]),
    "the count from the first mark to where segments may meet": _capped(_to_next),
    "a table of largest counts in training": table(lambda text: [(_largest(2)(text), _largest(4)(text))]),
    **{f"{name}, {size} lists": _capped(of(size)) for name, of in WINDOWS.items() for size in (1, 2, 3, 4)},
}

# ----------------------------------------------------------------------------- parity


def _bits(text: Text) -> list[int]:
    return [int(word == "one") for word in text.unmarked if word != "\n"]


def prefix(text: Text) -> tuple[int, ...]:
    """Returns the bits before the mark."""
    before = [word for word in text.body if word != "\n"]
    return tuple(_bits(text)[: before.index(SIGN)])


def _parity(bits: Callable[[Text], Iterable[int]]) -> Program:
    return each(lambda text: ("zero", "one")[sum(bits(text)) % 2])


PARITY: dict[str, Program] = {
    "the parity of all bits": _parity(_bits),
    "the first bit": _parity(lambda text: _bits(text)[:1]),
    **{f"the parity of the last {n} bits": _parity(lambda text, n=n: prefix(text)[-n:]) for n in (1, 2, 3)},
    **{f"the parity of the first {n} bits": _parity(lambda text, n=n: _bits(text)[:n]) for n in (2, 3, 8)},
    "all bits before the mark but the first": _parity(lambda text: prefix(text)[1:]),
    "a table of training prefixes, by the first bits": table(
        lambda text: (prefix(text)[:k] for k in range(len(prefix(text)), 0, -1))
    ),
    "a table of training prefixes, by the last bits": table(
        lambda text: (prefix(text)[-k:] for k in range(len(prefix(text)), 0, -1))
    ),
    "a table of training texts, by the first 16 bits": table(lambda text: [tuple(_bits(text)[:16])]),
}

# ----------------------------------------------------------------------------- copying


def spans_of(words: list[str]) -> list[list[str]]:
    """Returns the words of each span in brackets."""
    return [row[row.index("[") + 1 : row.index("]")] for row in rows(words)]


def _span(choose: Callable[[list[list[str]], Text], list[str]]) -> Program:
    return each(lambda text: " ".join(choose(spans_of(text.unmarked), text)))


def _rarest(spans: list[list[str]], text: Text) -> list[str]:
    often = Counter(text.unmarked)
    return min(spans, key=lambda span: sum(often[word] for word in span) / len(span))


def _before_the_span(text: Text) -> str:
    (row,) = (row for row in rows(text.body) if SIGN in row)
    words = row[: row.index("[")]
    return " ".join([word for word in words if word != SIGN][-len(text.answer.split()) :])


def _induction(known: int, pick: Callable[[list[str], Text], str]) -> Program:
    """Returns the program that is told the first word and repeats what followed the last `known` tokens before. At
    first it knows the bracket and the first word. pick: chooses among several continuations."""

    def answer(text: Text) -> str:
        words, wrote = text.unmarked, ["[", text.answer.split()[0]]
        for _ in text.answer.split()[1:]:
            last = wrote[-known:]
            then = [words[i + known] for i in range(len(words) - known) if words[i : i + known] == last]
            wrote.append(pick(then, text) if then else "")
        return " ".join(wrote[1:])

    return each(answer)


def _told(text: Text) -> list[str]:
    return [span for span in spans_of(text.unmarked) if span[0] == text.answer.split()[0]][-1]


COPYING: dict[str, Program] = {
    "the last span": _span(lambda spans, text: spans[-1]),
    "the first span": _span(lambda spans, text: spans[0]),
    "any span": _span(lambda spans, text: draws_of(text).choice(spans)),
    "the longest span": _span(lambda spans, text: max(spans, key=len)),
    "the shortest span": _span(lambda spans, text: min(spans, key=len)),
    "the span of the rarest words": _span(_rarest),
    "the words before the marked span": each(_before_the_span),
}
AIDED = {
    "1-gram induction, last occurrence": _induction(1, lambda then, text: then[-1]),
    "1-gram induction, any occurrence": _induction(1, lambda then, text: draws_of(text).choice(then)),
    "2-gram induction": _induction(2, lambda then, text: then[-1]),
    "the last span with this word first": each(lambda text: " ".join(_told(text))),
}

PROGRAMS: dict[str, dict[str, Program]] = {
    "list_recall": LIST_RECALL, "segment_counting": SEGMENT_COUNTING, "parity": PARITY, "copying": COPYING,
}  # fmt: skip
TOLD: dict[str, dict[str, Program]] = {"copying": AIDED}
"""Programs that are told the first word of the answer, by task."""


# ----------------------------------------------------------------------------- the table


class Cell(NamedTuple):
    """What programs and floors get right in the texts of one task and length."""

    programs: dict[str, float]
    told: dict[str, float]
    floors: dict[str, float]
    chance: float
    seen: float | None
    """parity: share of test texts whose bits before the mark occur before the mark of a training text"""


def measure(maker: Maker, level: str, length: int, n: int, n_train: int) -> Cell:
    """Returns the shares of n test texts of a cell that programs answer, given n_train training texts.

    Training texts have up to `length` positions, as in a run without a curriculum."""

    def read(split: str, count: int, low: int) -> list[Example]:
        return [maker.example(split, i, low, length, (level,)) for i in range(count)]

    low = math.ceil(0.9 * length)
    examples = read("test", n, low)
    train, test = (
        [read_text(example, maker.placement, maker.tokenizer) for example in of]
        for of in (read("train/0", n_train, min(low, 48)), examples)
    )

    def share(program: Program) -> float:
        return sum(a == t.answer for a, t in zip(program(train, test), test, strict=True)) / n

    answers = [text.answer for text in test]
    floors = {
        name: sum(e.draft.shortcuts[name].strip() == a for e, a in zip(examples, answers, strict=True)) / n
        for name in examples[0].draft.shortcuts
    }
    seen = None
    if maker.name == "parity":
        known = set(map(prefix, train))
        seen = sum(prefix(text) in known for text in test) / n
    programs, told = ({name: share(of) for name, of in group.get(maker.name, {}).items()} for group in (PROGRAMS, TOLD))
    return Cell(programs, told, floors, maker.task.CHANCE, seen)


def main(argv: list[str]) -> None:
    """Runs the command line, which prints the table of programs and floors."""
    parser = Parser(prog="python -m nanometa.tasks.floors", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, help="tasks to measure (default: all)")
    add("--length", type=int, nargs="+", default=[64, 128, 256, 512], help="maximum positions (default: 64 to 512)")
    add("--level", choices=LEVELS, default="hard", help="difficulty of the texts (default: hard)")
    add("--placement", choices=PLACEMENTS, default="none", help="marker placement (default: none)")
    add("--n", type=int, default=1000, help="number of test texts of a cell (default: 1000)")
    add("--train", type=int, default=5000, help="number of training texts that tables are made of (default: 5000)")
    add("--semantic", action="store_true", help="list recall with semantic lists")
    add("--tokenizer", default="gpt2", help="gpt2, or the folder of a dataset or run (default: gpt2)")
    args = parser.parse_args(argv)
    for name, values in (("n", [args.n]), ("train", [args.train]), ("length", args.length)):
        if wrong := [value for value in values if not 1 <= value <= 2**20]:
            raise UserError(f"--{name}={wrong[0]} is out of range: it must lie in 1 .. {2**20}.")
    if args.semantic and "list_recall" not in args.tasks:
        raise UserError("--semantic has no effect without list_recall among --tasks: leave it out.")
    tokenizer, cfg = (
        open_tokenizer(in_home(args.tokenizer)),
        TaskConfig(**({"semantic_lists": True} if args.semantic else {})),
    )
    write(f"level {args.level}, placement {args.placement}, {args.n} test texts, {args.train} training texts\n", BOLD)
    for task in args.tasks:
        maker = Maker(task, args.placement, cfg, tokenizer)
        cells = [measure(maker, args.level, length, args.n, args.train) for length in args.length]
        write_line(f"| {task}, % right | " + " | ".join(map(str, args.length)) + " |", BOLD)
        write_line("|---|" + "---|" * len(cells))

        def row(name: str, values: Iterable[float]) -> None:
            write_line(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |")

        for name in cells[0].programs:
            row(name, (cell.programs[name] for cell in cells))
        for name in cells[0].floors:
            row(f"floor: {name}", (cell.floors[name] for cell in cells))
        row("chance", (cell.chance for cell in cells))
        for name in cells[0].told:
            row(f"told the first word: {name}", (cell.told[name] for cell in cells))
        if cells[0].seen is not None:
            row("test texts whose prefix occurs in training", (cell.seen for cell in cells))
        beaten = [
            f"{name} at {length}"
            for length, cell in zip(args.length, cells, strict=True)
            for name, value in cell.programs.items()
            if wilson(round(value * args.n), args.n)[0] > max(cell.chance, *cell.floors.values())
        ]
        write_line(f"above the largest floor by more than the 95 % interval: {', '.join(beaten) or 'none'}")


if __name__ == "__main__":
    run_cli(main)
