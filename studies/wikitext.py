"""Joins the rows of WikiText, which are paragraphs, into articles, so that prepare.py reads an article as a document.

    python -m nanometa.studies.wikitext data/wikitext2/test.jsonl --output=out/wikitext2/test.jsonl

WikiText (Merity et al., arXiv 1609.07843) is text of Wikipedia under CC BY-SA. Its rows have the field "text": a
paragraph, a heading, or nothing. An article begins at a heading with one equals sign on each side, " = Nero = ", which
follows an empty row.
"""

import json
import re
from collections.abc import Iterable, Iterator

from nanometa.common.errors import UserError
from nanometa.common.files import read_json_lines, write_atomically
from nanometa.common.terminal import write_line
from nanometa.config.command_line import Parser, path_argument, run_cli

TITLE = re.compile(r" = (?!=).*(?<!=) = \n")


def articles(rows: Iterable[str]) -> Iterator[str]:
    """Yields the text of each article, given the text of the rows. Text before the first title is an article, too."""
    held, before = "", ""
    for row in rows:
        if TITLE.fullmatch(row) and not before.strip() and held.strip():
            yield held
            held = ""
        held, before = held + row, row
    if held.strip():
        yield held


def main(argv: list[str]) -> None:
    """Writes the file that argv names. A file with this content stays untouched, because prepare.py refuses to go on
    with files that were written anew."""
    parser = Parser(prog="python -m nanometa.studies.wikitext", description=__doc__)
    parser.add_argument("rows", type=path_argument, help='JSON lines with the field "text", a paragraph each')
    parser.add_argument("--output", type=path_argument, required=True, help="the file to write, NAME.jsonl")
    args = parser.parse_args(argv)
    if args.output.suffix != ".jsonl":
        raise UserError(f"--output={args.output} must end with .jsonl, because prepare.py reads its rows: rename it.")
    rows = [line["text"] for line in read_json_lines(args.rows, check, "WikiText")]
    if not any(map(TITLE.fullmatch, rows)):
        raise UserError(f"{args.rows} has no title of an article, such as ' = Nero = ': give the rows of WikiText.")
    found = list(articles(rows))
    content = "".join(json.dumps({"text": article}) + "\n" for article in found).encode()
    if not args.output.is_file() or args.output.read_bytes() != content:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, content)
    write_line(f"{len(found):,} articles in {args.output}")


def check(line: dict) -> None:
    """Raises TypeError or KeyError for a row without text."""
    if not isinstance(line["text"], str):
        raise TypeError("its text is no text")


if __name__ == "__main__":
    run_cli(main)
