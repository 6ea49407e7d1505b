"""Tests studies/wikitext.py, which joins the rows of WikiText into articles."""

import json
from pathlib import Path

from nanometa.studies import wikitext
from tests.conftest import cli, refusal

ROWS = [
    *(
        "",
        " = Nero = \n",
        "",
        " Nero was an emperor . \n",
        "",
        " = = Early life = = \n",
        "",
        " He was born in AD 37 . \n",
    ),
    *(" where k \n", " = 1 rad / s and a nominal impedance k = \n", " of the filter . \n"),
    *("", " = Manila = \n", "", " A city . \n"),
]


def test_an_article_begins_at_a_title_that_follows_an_empty_row():
    """Neither a heading of a section nor a formula of the text begins one."""
    found = list(wikitext.articles(ROWS))
    assert [article.splitlines()[0] for article in found] == [" = Nero = ", " = Manila = "]
    assert "".join(found) == "".join(ROWS)


def test_text_before_the_first_title_is_kept():
    rows = [" The end of an article . \n", *ROWS]
    assert "".join(wikitext.articles(rows)) == "".join(rows) and len(list(wikitext.articles(rows))) == 3
    assert list(wikitext.articles(["", " "])) == []


def run(folder: Path, *args: str):
    return cli("studies/wikitext.py", *args, cwd=folder)


def test_the_command_writes_an_article_a_row_once(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    output = tmp_path / "out/articles.jsonl"
    result = run(tmp_path, "rows.jsonl", "--output=out/articles.jsonl")
    assert result.returncode == 0 and b"2 articles in out/articles.jsonl" in result.stdout, result.stderr
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == list(wikitext.articles(ROWS))
    before = output.stat().st_ino
    run(tmp_path, "rows.jsonl", "--output=out/articles.jsonl")
    assert output.stat().st_ino == before


def test_other_files_are_refused(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "no title"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    for args, sentence in (
        (["none.jsonl", "--output=a.jsonl"], "none.jsonl cannot be read"),
        (["other.jsonl", "--output=a.jsonl"], "other.jsonl has no title of an article, such as ' = Nero = '"),
        (["bad.jsonl", "--output=a.jsonl"], "bad.jsonl, line 1 is no line of WikiText"),
        (["other.jsonl", "--output=a.txt"], "--output=a.txt must end with .jsonl"),
    ):
        assert sentence in refusal(run(tmp_path, *args))
    assert not (tmp_path / "a.jsonl").exists()
