"""Tests which files are read as text, which as rows, and which are refused, and how a text becomes documents."""

import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanometa.common.errors import UserError
from nanometa.data import rows, sources
from nanometa.data.sources import Piece, Skipped, read_pieces
from tests.conftest import ROOT, cli, manifest, refusal, write_texts
from tests.test_sources import SMALL, files_source

ROWS = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(3))
DOCUMENTS = ["document 0", "document 1", "document 2"]


def write(path, content):
    """Writes a file, and returns its path."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zstd(content: bytes) -> bytes:
    """Returns the content as a Zstandard frame without a checksum."""
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as file:
        file.write(content)
    return out.getvalue().to_pybytes()


def items_of(*paths, **settings) -> list:
    """Returns everything that the files give: the text of each piece, and each Skipped."""
    source = files_source(*paths, **settings)
    items = [item for unit in range(source.n_units) for item in source.read(unit)]
    return [item.text if isinstance(item, Piece) else item for item in items]


def reason_of(*paths, **settings) -> str:
    """Returns the reason for which the only document is skipped."""
    (item,) = items_of(*paths, **settings)
    assert isinstance(item, Skipped)
    return item.reason


# ----------------------------------------------------------------------------- names


PACKERS = {".gz": gzip.compress, ".zst": zstd, ".zstd": zstd}


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.json", "a.NdJson.GZ", "a.json.gz", "a.jsonl.zst", "a.json.ZSTD"]
)
def test_rows_of_json_are_documents_whatever_the_file_is_called(tmp_path, name):
    pack = PACKERS.get((tmp_path / name).suffix.lower(), bytes)
    assert items_of(write(tmp_path / name, pack(ROWS.encode()))) == DOCUMENTS


@pytest.mark.parametrize(
    "name", ["a.txt", "A.TXT", "a.md", "a.tex", "a.c", "a", ".text", "a.b.c", "a.yaml", "en-pt.pt", "a.jl"]
)
def test_plain_text_is_read_whatever_the_file_is_called(tmp_path, name):
    assert items_of(write(tmp_path / name, "# text\n")) == ["# text\n"]
    for suffix, pack in PACKERS.items():
        assert items_of(write(tmp_path / f"{name}{suffix}", pack(b"# text\n"))) == ["# text\n"]


@pytest.mark.parametrize(
    ("name", "cure"),
    [("a.csv", "convert it to .jsonl"), ("a.TSV", "convert it to .jsonl"), ("a.csv.gz", "convert it to .jsonl"),
     ("a.arrow", "convert it to .jsonl"), ("a.tar.zst", "unpack it"), ("a.txt.bz2", "unpack it"),
     ("a.csv.zst", "convert it to .jsonl"), ("a.parquet.zst", "unpack it"),
     ("a.xz", "unpack it"), ("a.zip", "unpack it"), ("a.tar.gz", "unpack it"), ("a.parquet.gz", "unpack it"),
     ("a.html", "save its text as .txt"), ("a.docx", "save its text as .txt"), ("a.Pdf", "save its text as .txt")],
)  # fmt: skip
def test_formats_that_are_not_read_are_refused_with_the_cure(tmp_path, name, cure):
    write(tmp_path / "good.txt", "text")
    write(tmp_path / name, "looks like text")
    with pytest.raises(UserError, match=f"{name} has the format .*, which cannot be read as documents: {cure}"):
        files_source(tmp_path / "*")


def test_rows_in_a_file_of_another_name_are_not_taken_for_text(tmp_path):
    """Only .txt says that the syntax is the text."""
    for name, content in (("part-00000", ROWS), ("a.dump.gz", gzip.compress(ROWS.encode())), ("b", '[{"text": "x"}]')):
        assert "JSON, to judge by its first line: rename it to .jsonl" in reason_of(write(tmp_path / name, content))
    assert items_of(write(tmp_path / "a.txt", ROWS)) == [ROWS]
    for text in ("{}\n", "{not json}\n", "[1, 2]\n", "{ x }"):
        assert items_of(write(tmp_path / "a.md", text)) == [text]


def test_a_json_file_without_rows_is_refused(tmp_path):
    for value in ([{"text": "x"}], {"text": "x", "more": [1, 2]}):
        for indent in (None, 2):
            path = write(tmp_path / "a.json", json.dumps(value, indent=indent))
            if isinstance(value, list) or indent:
                with pytest.raises(UserError, match="is JSON, but not one object per line: convert it to .jsonl"):
                    files_source(path)
                write(tmp_path / "0.jsonl", ROWS)  # after a good file it is skipped
                assert items_of(tmp_path / "0.jsonl", path)[3].kind == "JSON, but not one object per line"
    with pytest.raises(UserError, match="each of its lines must be an object, such as"):
        files_source(write(tmp_path / "b.jsonl", "[1]\n[2]\n"))


# ----------------------------------------------------------------------------- encodings


def test_a_byte_order_mark_is_left_out_in_every_format(tmp_path):
    text = "\ufeffhello\n"
    pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / "a.parquet")
    for path in (
        write(tmp_path / "a.txt", text),
        write(tmp_path / "a.txt.gz", gzip.compress(text.encode())),
        write(tmp_path / "a.txt.zst", zstd(text.encode())),
        write(tmp_path / "a.jsonl", "\ufeff" + json.dumps({"text": text})),
        tmp_path / "a.parquet",
    ):
        assert items_of(path) == ["hello\n"], path
    assert items_of(write(tmp_path / "a.txt", "a\ufeffb")) == ["a\ufeffb"]
    assert items_of(write(tmp_path / "a.txt", "\ufeff")) == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_text_in_other_unicode_encodings_is_skipped_with_the_reason(tmp_path, encoding):
    assert "UTF-16" in reason_of(write(tmp_path / "a.txt", "English text\n".encode(encoding)))
    with pytest.raises(UserError, match="UTF-16"):
        files_source(write(tmp_path / "a.jsonl", ROWS.encode(encoding)))
    write(tmp_path / "b.jsonl", ROWS)  # beside a good file, it is skipped
    skipped, *items = items_of(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert "UTF-16" in skipped.reason and items == DOCUMENTS


def test_a_damaged_archive_of_text_gives_no_half_document(tmp_path):
    packed = gzip.compress(b"a line of text\n" * 200_000)
    for damaged in (packed[:-100], packed[:-4], b"not gzip", packed[:1000] + b"x" + packed[1001:]):
        assert "damaged" in reason_of(write(tmp_path / "a.txt.gz", damaged))
    whole = items_of(write(tmp_path / "a.txt.gz", packed))
    assert "".join(whole) == "a line of text\n" * 200_000 and len(whole) > 10


def test_a_damaged_zstandard_file_gives_no_half_document(tmp_path):
    packed = zstd(b"a line of text\n" * 200_000)
    path = tmp_path / "a.txt.zst"
    for damaged in (packed[:-20], packed[:-1], packed[:3], b"not zstd", packed + b"garbage", packed[:40] + packed[90:]):
        assert reason_of(write(path, damaged)).startswith("damaged (")
    whole = items_of(write(path, packed))
    assert "".join(whole) == "a line of text\n" * 200_000 and len(whole) > 10
    assert "UTF-16" in reason_of(write(path, zstd("English text\n".encode("utf-16"))))


def test_a_zstandard_file_of_rows_is_read_up_to_its_damage(tmp_path):
    rows = "".join(json.dumps({"text": f"document {i} {i**9}"}) + "\n" for i in range(100_000))
    packed = zstd(rows.encode())
    whole = items_of(write(tmp_path / "a.jsonl.zst", packed))
    assert whole == [json.loads(row)["text"] for row in rows.splitlines()]
    *read, skipped = items_of(write(tmp_path / "a.jsonl.zst", packed[:-1000]))
    assert read == whole[: len(read)] and len(read) > 10_000
    assert skipped.where == f"{tmp_path / 'a.jsonl.zst'}:{len(read) + 1}"
    assert skipped.reason.startswith("damaged from here on (")


def test_zstandard_files_may_have_several_frames_or_none(tmp_path):
    skippable = bytes.fromhex("502a4d18 04000000") + b"note"
    path = tmp_path / "a.jsonl.zst"
    assert items_of(write(path, zstd(ROWS.encode()) + skippable + zstd(ROWS.encode()))) == 2 * DOCUMENTS
    assert items_of(write(path, b"")) == [] == items_of(write(tmp_path / "a.zst", zstd(b"")))


def test_a_zstandard_window_that_is_too_long_is_refused_with_the_cure(tmp_path):
    """Some corpora are compressed with zstd --long=31."""
    frame = bytes.fromhex("28b52ffd 00 a0 290000") + b"hello"  # a window of 1 GiB
    with pytest.raises(UserError, match="a window of more than 128 MiB: unpack it with zstd --decompress --long=31"):
        files_source(write(tmp_path / "a.jsonl.zst", frame))
    assert "more than 128 MiB: unpack it" in reason_of(write(tmp_path / "a.txt.zst", frame))
    frame = bytes.fromhex("28b52ffd 00 88 290000") + b"hello"  # a window of 128 MiB
    assert items_of(write(tmp_path / "a.txt.zst", frame)) == ["hello"]


# ----------------------------------------------------------------------------- separators


def documents_in(path, separator) -> list[str]:
    found, text = [], ""
    for piece in read_pieces(path, separator):
        text += piece.text
        if piece.last:
            found.append(text)
            text = ""
    assert not text
    return found


def test_a_separator_divides_a_text_file_into_documents(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffone\n<|end|>\ntwo <|end|><|end|>three\n\n<|end|>\r\n\nfour<|end|>\n")
    assert documents_in(path, "<|end|>") == ["one\n", "two ", "three\n\n", "\nfour"]
    assert documents_in(path, "") == [path.read_bytes().decode().removeprefix("\ufeff")]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab|\n\ré", max_size=60), st.sampled_from(["|", "||", "a|a", "\n\n"]), st.integers(1, 9))
def test_documents_do_not_depend_on_the_blocks_that_are_read(tmp_path_factory, text, separator, read_bytes):
    path = write(tmp_path_factory.mktemp("s") / "a.txt", text)
    parts = sources.re.split(sources.re.escape(separator) + r"(?:\r?\n)?", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "READ_BYTES", read_bytes)
        assert documents_in(path, separator) == [part for part in parts if part]


def test_separators_in_the_text_are_counted_and_said(tmp_path):
    write_texts(tmp_path / "texts", documents=60)
    one = "<|endoftext|>\n".join(path.read_text() for path in sorted((tmp_path / "texts").iterdir()))
    write(tmp_path / "one.txt", one)
    args = ("--source=files", *SMALL, "--name=divided", "--files=one.txt", "--separator=<|endoftext|>")
    result = cli("prepare.py", *args, cwd=tmp_path)
    assert result.returncode == 0 and b"ordinary text" not in result.stdout, result.stderr.decode()
    assert b"occurs in none" not in result.stdout
    facts = manifest(tmp_path / "data/divided")
    assert sum(split["documents"] for split in facts["splits"].values()) == 60 and facts["endoftext_in_text"] == 0
    # with enough documents, a literal <|endoftext|> is only counted
    write(tmp_path / "texts/zz.txt", one[:50_000])
    args = ("--source=files", *SMALL, "--name=said", "--files=texts/*.txt", "--separator=<|endoftxt|>")
    result = cli("prepare.py", *args, cwd=tmp_path)
    assert "warning: --separator=<|endoftxt|> occurs in none of the files" in result.stdout.decode()
    count = one[:50_000].count("<|endoftext|>")
    assert manifest(tmp_path / "data/said")["endoftext_in_text"] == count > 10
    assert f"<|endoftext|> occurs {count} times in the text and is ordinary text there" in result.stdout.decode()


# ----------------------------------------------------------------------------- columns


def test_rows_without_the_column_are_skipped_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"meta": 1}\n' + ROWS + '{"text": null}\n' * 2)
    items = items_of(path)
    assert items[1:4] == DOCUMENTS and [item.kind for item in (items[0], *items[4:])] == [
        "no 'text'", "its 'text' is NoneType, not text", "its 'text' is NoneType, not text",
    ]  # fmt: skip
    with pytest.raises(UserError, match="a.jsonl has no column 'text', its columns are meta, body: name the column"):
        files_source(write(path, '{"meta": 1}\n{"body": "x"}\n'))
    assert items_of(path, write(tmp_path / "b.jsonl", ROWS))[2:] == DOCUMENTS  # the rows of another file may have it
    with pytest.raises(UserError, match="a.jsonl has no column 'text'"):  # a file without rows says nothing
        files_source(write(tmp_path / "0.jsonl", "\n"), path)


@pytest.mark.parametrize("column", ["content.text", "a.b.c"])
def test_a_dotted_name_is_a_field_of_a_nested_column(tmp_path, column):
    first, *rest = column.split(".")
    cells: list = ["deep", None, "deeper"]
    for name in rest[::-1]:
        cells = [None if cell is None else {name: cell, "number": 1} for cell in cells]
    table = pyarrow.table({first: cells, "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    for name in ("a.parquet", "a.jsonl"):
        first_item, skipped, last_item = items_of(tmp_path / name, text_column=column)
        assert (first_item, last_item) == ("deep", "deeper") and column in skipped.reason
    # a column of exactly that name comes first
    pyarrow.parquet.write_table(table.append_column(column, [["x", "y", "z"]]), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", "".join(json.dumps({**row, column: "x"}) + "\n" for row in table.to_pylist()))
    assert items_of(tmp_path / "a.parquet", text_column=column) == ["x", "y", "z"]
    assert items_of(tmp_path / "a.jsonl", text_column=column) == ["x"] * 3
    with pytest.raises(UserError, match="has no column 'text', its columns are .*number"):
        files_source(tmp_path / "a.jsonl")


@pytest.mark.parametrize("column", ["number", "time", "list", "nested", "bytes"])
def test_a_column_that_is_not_text_is_refused_once(tmp_path, column):
    """The times lie beyond the year 9999, which Python's datetime cannot represent."""
    table = pyarrow.table({
        "number": [1, 2], "time": pyarrow.array([2**60] * 2, pyarrow.timestamp("ms")), "list": [["a"], ["b"]],
        "nested": [{"a": 1}] * 2, "bytes": [b"a", b"b"], "text": ["a", "b"],
    })  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert items_of(tmp_path / "a.parquet") == ["a", "b"]
    with pytest.raises(UserError, match=f"the column '{column}' of .*a.parquet holds .*, not text: name the column"):
        files_source(tmp_path / "a.parquet", text_column=column)
    if column != "time" and column != "bytes":
        rows = table.select(["number", "list", "nested"]).to_pylist()
        write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError, match=f"the column '{column}' of .*a.jsonl holds (int|list|dict), not text"):
            files_source(tmp_path / "a.jsonl", text_column=column)
    # in a later file, it is skipped once
    pyarrow.parquet.write_table(pyarrow.table({column: ["good"]}), tmp_path / "0.parquet")
    good, skipped = items_of(tmp_path / "0.parquet", tmp_path / "a.parquet", text_column=column)
    assert good == "good" and skipped.kind.endswith("not text")


def test_every_kind_of_text_column_is_read(tmp_path):
    texts = ["a", None, "b"]
    for number, kind in enumerate((pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), None)):
        column = pyarrow.array(texts, kind) if kind else pyarrow.array(texts).dictionary_encode()
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{number}.Parquet")
        first, skipped, last = items_of(tmp_path / f"{number}.Parquet")
        assert (first, last) == ("a", "b") and "NoneType" in skipped.reason
    offsets = pyarrow.array([0, 1, 2], pyarrow.int32()).buffers()[1]
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"a\xff")])
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "bad.parquet")
    first, skipped = items_of(tmp_path / "bad.parquet")
    assert first == "a" and skipped.reason == "not UTF-8 at byte 0"


# ----------------------------------------------------------------------------- size


def test_a_row_that_does_not_fit_in_memory_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "ROW_BYTES", 1000)
    lines = [json.dumps({"text": text}) for text in ("a" * 980, "b" * 2000, "c", "d" * 50_000, "e" * 3000)]
    for name, content in (("a.jsonl", "\n".join(lines)), ("a.jsonl.gz", gzip.compress("\n".join(lines).encode()))):
        first, *others = items_of(write(tmp_path / name, content))
        assert first == "a" * 980 and others[1] == "c"
        skipped = [item for item in others if isinstance(item, Skipped)]
        assert [item.where.rsplit(":")[-1] for item in skipped] == ["2", "4", "5"]
        assert {item.kind for item in skipped} == {rows.TOO_LONG}
    small = [f"text {i}" for i in range(500)]
    pyarrow.parquet.write_table(pyarrow.table({"text": [*small, "b" * 2000, "c"]}), tmp_path / "a.parquet")
    items = items_of(tmp_path / "a.parquet")
    assert items[:500] == small and items[501] == "c" and items[500].kind == rows.TOO_LONG
    # a row group whose rows are longer on average is not even read
    table = pyarrow.table({"text": ["b" * 2000, "c" * 2000, *small]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    items = items_of(tmp_path / "a.parquet")
    assert items[0].where.endswith(":1") and "the average of the next 2 rows" in items[0].reason and items[1:] == small


MEASURED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from nanometa.config import PrepareConfig
from nanometa.data.sources import open_source
source = open_source(PrepareConfig(source="files", files=(sys.argv[2],)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print([item.kind for item in source.read(0)], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_huge_line_in_a_small_archive_takes_little_memory(tmp_path):
    """400 MB in one line, which gzip packs into less than 1 MB."""
    block = gzip.compress(b"a" * 2**22)
    with open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(gzip.compress(b'{"text": "'))
        for _ in range(100):
            file.write(block)
    out = subprocess.run(
        [sys.executable, "-c", MEASURED, str(ROOT), str(tmp_path / "a.jsonl.gz")], capture_output=True, text=True,
        check=True, env={"PATH": "/usr/bin:/bin"},
    ).stdout  # fmt: skip
    assert out.startswith(f"[{rows.TOO_LONG!r}]") and int(out.split()[-1]) < 300, out


# ----------------------------------------------------------------------------- settings without an effect


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--files=*.txt", "--text_column=text"], "--text_column has no effect, because no JSON lines or Parquet file"),
        (["--files=*.jsonl", "--separator=x"], "--separator has no effect, because no text file matches --files"),
        (["--source=stdlib", "--separator=x"], "--separator has no effect: it is only used with --source=files"),
        (["--files=*.txt", "--name=x", "--recipe=y"], "--recipe has no effect: it is only used without --name"),
        (["--files=*.txt", "--hf_revision=main"], "--hf_revision has no effect: it is only used with --source=hf"),
    ],
)  # fmt: skip
def test_settings_without_an_effect_on_these_files_are_refused(tmp_path, args, sentence):
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "a.jsonl", ROWS)
    source = () if "--source=stdlib" in args else ("--source=files",)
    assert sentence in refusal(cli("prepare.py", *source, *args, cwd=tmp_path))


def test_settings_of_a_config_file_may_lose_their_effect(tmp_path):
    write_texts(tmp_path / "texts", documents=40)
    write(tmp_path / "mine.py", "from config import PrepareConfig\nconfig = PrepareConfig(source='files', "
          "files=('*.jsonl',), text_column='body', separator='', bpe_vocab_size=300, chunk_content=28, "
          "chunk_markers=4, val_fraction=0.1, workers=1)\n")  # fmt: skip
    result = cli("prepare.py", "mine.py", "--files=texts/*.txt", "--name=a", cwd=tmp_path)
    assert result.returncode == 0, result.stderr.decode()
