"""Tests that every kind of source gives the same documents, and that unreadable input is counted and named."""

import gzip
import importlib.metadata
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nanometa import prepare
from nanometa.common.errors import UserError
from nanometa.common.files import file_sha256
from nanometa.config import PrepareConfig
from nanometa.data import sources
from nanometa.data.sources import FileSource, Piece, Skipped, open_source, pieces_of, read_pieces
from nanometa.data.staging import SPLITS, finished_segments
from nanometa.data.tokenizer import Tokenizer
from tests.conftest import cli, manifest, override, refusal, tree, write_texts

SMALL = ("--bpe_vocab_size=300", "--chunk_content=28", "--chunk_markers=4", "--val_fraction=0.1", "--workers=2")


def texts_of(source) -> list[str]:
    """Returns the documents of a source, with their pieces joined."""
    documents, text = [], ""
    for unit in range(source.n_units):
        for item in source.read(unit):
            assert isinstance(item, Piece)
            text += item.text
            if item.last:
                documents.append(text)
                text = ""
    return documents


def files_source(*patterns, **settings) -> FileSource:
    return open_source(PrepareConfig(source="files", files=tuple(map(str, patterns)), **settings))


@pytest.fixture(scope="module")
def formats(tmp_path_factory) -> tuple[Path, list[str]]:
    """The same documents as text files, jsonl (also compressed) and parquet (two files of each), one of them long."""
    folder = tmp_path_factory.mktemp("formats")
    write_texts(folder / "texts", documents=40)
    # long enough for several pieces, with line ends that must be kept
    (folder / "texts/doc999.txt").write_text("é𝄞\r\n and more of it\n" * 9000)
    documents = [path.read_bytes().decode() for path in sorted((folder / "texts").iterdir())]
    for number, rows in enumerate((documents[:17], documents[17:])):
        lines = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(rows)).encode()
        (folder / f"{number}.jsonl").write_bytes(lines)
        (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines))
        with pyarrow.CompressedOutputStream(folder / f"{number}.jsonl.zst", "zstd") as file:
            file.write(lines)
        table = pyarrow.table({"id": range(len(rows)), "body": rows})
        pyarrow.parquet.write_table(table, folder / f"{number}.parquet", row_group_size=7, write_page_checksum=True)
    (folder / "hub").mkdir()
    for number in range(2):
        (folder / f"hub/{number}.jsonl").write_bytes((folder / f"{number}.jsonl").read_bytes())
    return folder, documents


def test_every_format_gives_the_same_shards(formats):
    folder, _ = formats
    kinds = {
        "txt": ("--source=files", "--files=texts/*.txt"),
        "jsonl": ("--source=files", "--files=*.jsonl"),
        "gz": ("--source=files", "--files=*.jsonl.gz"),
        "zst": ("--source=files", "--files=*.jsonl.zst"),
        "parquet": ("--source=files", "--files=*.parquet"),
        "stream": ("--source=hf", "--hf_dataset=hub"),
        "loaded": ("--source=hf", "--hf_dataset=hub", "--streaming=False"),
    }
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    for name, args in kinds.items():
        args += () if name == "txt" else ("--text_column=body",)
        result = cli("prepare.py", *args, *SMALL, f"--name={name}", cwd=folder, env=env)
        assert result.returncode == 0, result.stderr.decode()
    expected = {path.name: file_sha256(path) for path in (folder / "data/txt").iterdir() if path.suffix == ".bin"}
    assert set(expected) == {"train_000000.bin", "val_000000.bin"}
    for name in kinds:
        for file, sha256 in expected.items():
            assert file_sha256(folder / f"data/{name}/{file}") == sha256, (name, file)
        assert file_sha256(folder / f"data/{name}/tokenizer.json") == file_sha256(folder / "data/txt/tokenizer.json")
    splits = [manifest(folder / f"data/{name}")["splits"] for name in kinds]
    assert all(split == splits[0] for split in splits)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab\n\r é𝄞", max_size=200), st.integers(4, 50), st.integers(1, 60), st.integers(1, 300))
def test_pieces_join_to_the_document_however_it_is_read(tmp_path_factory, text, limit, step, read_bytes):
    path = tmp_path_factory.mktemp("p") / "f.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_CHARS", limit)
        patch.setattr(sources, "READ_BYTES", read_bytes)
        pieces = list(read_pieces(path))
        assert pieces == list(pieces_of([text]))
        assert pieces == list(pieces_of(text[i : i + step] for i in range(0, len(text), step)))
    assert "".join(piece.text for piece in pieces) == text
    assert all(len(piece.text) <= limit for piece in pieces)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)
    assert all(piece.text.endswith("\n") for piece in pieces[:-1] if "\n" in piece.text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=300), st.floats(0, 500))
def test_units_contain_the_files_in_order(sizes, least):
    paths = [Path(str(i)) for i in range(len(sizes))]
    groups = list(sources._grouped(paths, sizes, least))
    assert [path for group in groups for path in group] == paths
    assert all(sum(sizes[int(path.name)] for path in group) >= least for group in groups[:-1])


def test_the_place_of_bad_utf8_is_counted_from_the_start_of_the_file(tmp_path):
    path = tmp_path / "bad.txt"
    for n in (0, 5, 2**20 - 1, 2**20 + 3):
        for bad in (b"\xc3\x28", b"\xc3"):  # also if the file ends within a character
            path.write_bytes(b"a" * n + bad)
            with pytest.raises(UnicodeDecodeError) as caught:
                next(read_pieces(path))  # the error comes before any text
            assert caught.value.start == n
    path.write_bytes(b"a" + "é".encode() * 2**20)  # a character may lie across the border of two blocks
    assert "".join(piece.text for piece in read_pieces(path)) == "a" + "é" * 2**20


def test_the_stdlib_source_has_the_library_without_tests():
    stdlib = open_source(PrepareConfig())
    assert 40 < stdlib.n_units <= 65 and stdlib.total_bytes > 5e6
    names = [str(path) for unit in stdlib.units for path in unit]
    assert not any("/test/" in name or "site-packages" in name for name in names)
    assert any(name.endswith("/json/decoder.py") for name in names)


def test_the_packages_source_reads_the_required_versions():
    version = importlib.metadata.version("einops")
    source = open_source(PrepareConfig(source="packages", packages=(f"einops=={version}", "tyro")))
    files = [path for unit in source.units for path in unit]
    names = [str(path).split("site-packages/")[1] for path in files]
    first = [name for name in names if name.startswith("einops/")]
    assert "einops/einops.py" in first and names[: len(first)] == first == sorted(first)
    assert not any("/tests/" in name for name in names) and len(texts_of(source)) > 20
    assert source.description.startswith(f"Python source of einops=={version}, tyro==")
    for wanted, sentence in (
        (("einops==0.0.1",), "pip install einops==0.0.1"),
        (("nosuchthing",), "not installed: pip"),
        (("tyro", "einops", f"einops=={version}"), "--packages names einops 2 times: name it once"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_source(PrepareConfig(source="packages", packages=wanted))


# ----------------------------------------------------------------------------- input that cannot be read


def test_broken_lines_are_counted_by_file_and_line(tmp_path):
    good = json.dumps({"text": "good"})
    lines = [
        good,
        "",
        "{no json",
        '["a list"]',
        '{"text": null}',
        '{"text": 7}',
        '{"txt": "x"}',
        '{"text": "\\ud800"}',
        good,
    ]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n' + good.encode())
    source = files_source(tmp_path / "a.jsonl")
    items = [item for unit in range(source.n_units) for item in source.read(unit)]
    assert [item for item in items if isinstance(item, Piece)] == [Piece("good", True)] * 3
    skipped = [(int(item.where.rsplit(":", 1)[1]), item.reason) for item in items if isinstance(item, Skipped)]
    assert [line for line, _ in skipped] == [3, 4, 5, 6, 7, 8, 10]
    reasons = [reason for _, reason in skipped]
    assert (
        "invalid JSON" in reasons[0] and "no 'text'" in reasons[1] and "NoneType" in reasons[2] and "int" in reasons[3]
    )
    assert "no 'text'" in reasons[4] and "invalid Unicode" in reasons[5] and "invalid JSON" in reasons[6]


def damaged(formats, tmp_path, name: str, cut: int | None = None, flip: bool = False) -> list:
    raw = bytearray((formats[0] / name).read_bytes())
    if flip:
        raw[len(raw) // 2] ^= 0xFF
    (tmp_path / name).write_bytes(raw[:cut])
    source = files_source(tmp_path / name, text_column="body")
    return [item for unit in range(source.n_units) for item in source.read(unit)]


def test_a_damaged_file_is_named_and_its_readable_part_is_kept(formats, tmp_path):
    whole = damaged(formats, tmp_path, "1.jsonl.gz")
    assert not [item for item in whole if isinstance(item, Skipped)]
    cut = damaged(formats, tmp_path, "1.jsonl.gz", cut=-200)
    assert isinstance(cut[-1], Skipped) and "1.jsonl.gz:" in cut[-1].where and "damaged from here on" in cut[-1].reason
    assert cut[:-1] == whole[: len(cut) - 1]
    for change in ({"cut": 100}, {"cut": -100}, {"flip": True}):
        items = damaged(formats, tmp_path, "1.parquet", **change)
        assert isinstance(items[-1], Skipped) and "1.parquet" in items[-1].where, change
        assert len([item for item in items if isinstance(item, Skipped)]) == 1
    (tmp_path / "empty.parquet").write_bytes(b"")
    assert isinstance(next(iter(files_source(tmp_path / "empty.parquet").read(0))), Skipped)


def test_skipped_rows_are_printed_and_recorded_in_the_manifest(tmp_path):
    write_texts(tmp_path / "texts", documents=30)
    rows = [json.dumps({"text": path.read_text()}) for path in sorted((tmp_path / "texts").iterdir())]
    rows[7] = "oops"
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    result = cli("prepare.py", "--source=files", "--files=a.jsonl", "--name=a", *SMALL, cwd=tmp_path)
    assert (
        result.returncode == 0
        and b"1 document was skipped" in result.stdout
        and b"a.jsonl:8: invalid JSON" in result.stdout
    )
    facts = manifest(tmp_path / "data/a")
    assert facts["documents_skipped"] == 1 and facts["skipped"][0][0] == "a.jsonl:8"
    assert facts["skipped_by_kind"] == {"invalid JSON": 1} and b"    1 x invalid JSON\n" in result.stdout


def test_skipped_rows_are_counted_by_their_kind_with_a_warning_if_they_are_most(tmp_path):
    write_texts(tmp_path / "texts", documents=40)
    rows = [json.dumps({"text": path.read_text()}) for path in sorted((tmp_path / "texts").iterdir())]
    rows[10:10] = ['{"text": 1}'] * 7 + ["no json"] * 30 + ["{}"] * 5
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    result = cli("prepare.py", "--source=files", "--files=a.jsonl", "--name=a", *SMALL, cwd=tmp_path)
    out = result.stdout.decode()
    assert result.returncode == 0 and "  most of the source could not be read; 42 documents were skipped:\n" in out
    assert "    30 x invalid JSON\n    7 x its 'text' is int, not text\n    5 x no 'text'\n" in out
    by_kind = {"its 'text' is int, not text": 7, "invalid JSON": 30, "no 'text'": 5}
    assert manifest(tmp_path / "data/a")["skipped_by_kind"] == by_kind


@pytest.mark.parametrize(
    ("args", "sentences"),
    [
        (["--files=*.jsonl"], ["has no column 'text', its columns are id, body", "--text_column=NAME"]),
        (["--files=*.parquet", "--text_column=bdy"], ["its columns are id, body", "did you mean 'body'?"]),
        (["--source=hf", "--hf_dataset=hub", "--text_column=bdy"], ["its columns are id, body"]),
        (["--source=hf", "--hf_dataset=hub", "--hf_split=test"], ["could not be opened", "Bad split: test"]),
        (["--source=hf", "--hf_dataset=allenai/c4", "--hf_config=en"],
         ["'allenai/c4' (configuration en, split train) could not be opened", "library with python prepare.py"]),
        (["--source=hf"], ["source=hf needs hf_dataset"]),
        (["--source=packages"], ["source=packages needs packages"]),
        (["--source=packages", "--packages=numpy==0.1"], ["is installed, but 0.1 is required: pip install numpy==0.1"]),
        (["--packages=numpy"], ["--packages has no effect: it is only used with --source=packages"]),
        (["--files=empty/*.jsonl"], ["there is no text in files empty/*.jsonl: give files"]),
    ],
)  # fmt: skip
def test_bad_sources_are_refused_and_change_nothing_on_disk(formats, args, sentences):
    folder, _ = formats
    for name in ("empty", "data"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "empty/a.jsonl").write_text("\n")
    before = tree(folder)
    base = override(("--source=files", *SMALL, "--name=bad"), "--tokenizer=gpt2")
    if args == ["--packages=numpy"]:
        args = [*args, "--source=stdlib"]
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    error = refusal(cli("prepare.py", *override(base, *args), cwd=folder, env=env))
    for sentence in sentences:
        assert sentence in error
    after = {name: facts for name, facts in tree(folder).items() if not name.startswith("cache")}
    assert after == {name: facts for name, facts in before.items() if not name.startswith("cache")}


def test_an_unreadable_rest_ends_the_document(tmp_path, monkeypatch):
    """A file that fails in its middle ends its document, so no document continues in the next one."""
    write_texts(tmp_path / "texts", documents=4)
    whole = FileSource.read

    def read(self, unit):
        for number, item in enumerate(whole(self, unit)):
            yield item._replace(last=False) if number == 1 else item
            if number == 1:
                yield Skipped("disk", "gone")

    monkeypatch.setattr(FileSource, "read", read)
    source = files_source(tmp_path / "texts/*.txt")
    source.units, source.n_units = [[path for unit in source.units for path in unit]], 1
    cfg = PrepareConfig(source="files", files=("x",), tokenizer="gpt2", workers=1)
    prepare.tokenize(source, tmp_path, cfg, Tokenizer.gpt2(), Console(quiet=True))
    (segment,) = finished_segments(tmp_path, 0, 2)
    assert sum(segment.splits[split]["documents"] for split in SPLITS) == 4 and segment.skipped == 1
