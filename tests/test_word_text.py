"""Tests the synthetic text over the words of the tasks."""

import itertools
import json
from collections import Counter

import pytest

from nanometa.data.tokenizer import Tokenizer
from nanometa.tasks import word_text
from nanometa.tasks.words import first_pools, pools
from tests.conftest import cli


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(itertools.islice(word_text.documents(seed=3), 400))


def test_a_document_depends_on_the_seed_and_its_number_alone(documents):
    assert documents[:9] == list(itertools.islice(word_text.documents(3), 9))
    assert documents[0] != next(word_text.documents(4)) and len(set(documents)) == len(documents)


def test_the_words_are_those_of_the_tasks_equally_often(documents):
    counts = Counter(word for document in documents for word in document.split())
    words = set.union(*map(set, first_pools()))
    assert counts.keys() == words and len(words) == 400
    assert min(counts.values()) > 60 and max(counts.values()) < 600  # on average 200 or somewhat more


def test_half_of_the_lines_repeat_one_of_the_last_20_different_lines(documents):
    repeated = total = 0
    for document in documents[::2]:
        lines, different = document.splitlines(), []
        assert sum(len(line.split()) for line in lines) >= word_text.WORDS
        for line in lines:
            if line in different:
                repeated += 1
                assert line in different[-word_text.RECENT :]
            else:
                different.append(line)
                assert word_text.SEGMENT[0] <= len(line.split()) <= word_text.SEGMENT[1]
        total += len(lines) - 1  # the first line has nothing to repeat
    assert repeated / total == pytest.approx(0.5, abs=0.02)


def test_the_words_of_a_cycle_follow_each_other_except_at_jumps(documents):
    jumps = total = 0
    sizes = set()
    for document in documents[1::2]:
        words = document.split()
        assert len(words) == word_text.WORDS
        follows = {}
        for word, following in itertools.pairwise(words):
            follows.setdefault(word, Counter())[following] += 1
        jumps += sum(sum(counts.values()) - max(counts.values()) for counts in follows.values())
        total += len(words) - 1
        sizes.add(len(set(words)))
    assert min(sizes) == word_text.CYCLE[0] and max(sizes) == word_text.CYCLE[1]
    assert 0.03 < jumps / total < 0.055  # one word in 20, of which some land where the cycle goes on anyway


def test_a_tokenizer_trained_on_the_text_has_one_token_for_each_word(documents):
    tokenizer = Tokenizer.train(itertools.islice(word_text.documents(1), 2000), 1500)
    found, expected = pools(tokenizer), first_pools()
    assert all(len(tokenizer.encode(f" {word}")) == 1 for pool in expected for word in pool)
    assert [set(pool) for pool in found] == [set(pool) for pool in expected]


def test_a_file_with_the_same_text_is_not_written_again(tmp_path):
    path = tmp_path / "w.jsonl"
    word_text.write(path, 3000, 1)
    before = path.stat()
    word_text.write(path, 3000, 1)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    word_text.write(path, 3000, 2)
    assert path.stat().st_ino != before.st_ino


def test_the_command_writes_rows_and_refuses_bad_arguments(tmp_path):
    result = cli("tasks/word_text.py", "--bytes=5000", "--seed=3", "--output=sub/w.jsonl", cwd=tmp_path)
    assert result.returncode == 0, result.stderr.decode()
    rows = [json.loads(line)["text"] for line in (tmp_path / "sub/w.jsonl").read_text().splitlines()]
    assert rows == list(itertools.islice(word_text.documents(3), len(rows)))
    assert sum(map(len, rows)) >= 5000 > sum(map(len, rows[:-1]))
    for argument, sentence in (("--bytes=0", "must lie in 1 .."), ("--output=w.txt", "must end with .jsonl")):
        given = {"--bytes": "5000", "--output": "w.jsonl"} | dict([argument.split("=")])
        command = [f"{name}={value}" for name, value in given.items()]
        refused = cli("tasks/word_text.py", *command, cwd=tmp_path)
        assert refused.returncode == 2 and sentence in refused.stderr.decode()
