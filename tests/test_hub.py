"""Tests local folders of Hugging Face datasets: they may only lead to their own files."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from nanometa.common.errors import UserError
from nanometa.config import PrepareConfig
from nanometa.data.sources import Piece, open_source

ROWS = "".join(
    json.dumps({"text": f"document {i}", "content": {"text": f"deep {i}"}, "id": i}) + "\n" for i in range(3)
)
CARD = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of a dataset. Beside it are a file and a folder that it must not read."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "other").mkdir()
    for name in ("secret.jsonl", "other/secret.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": "secret"}) + "\n")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def opened(folder, streaming=True, **settings):
    return open_source(PrepareConfig(source="hf", hf_dataset=str(folder), streaming=streaming, **settings))


def items_of(source) -> list:
    items = [item for unit in range(source.n_units) for item in source.read(unit)]
    return [item.text if isinstance(item, Piece) else item for item in items]


@pytest.mark.parametrize(
    "data_files",
    ["../secret.jsonl", "{root}/secret.jsonl", "https://example.com/x.jsonl", "hf://datasets/a/b/x.jsonl",
     "[a.jsonl, ../secret.jsonl]", "[{{split: train, path: a.jsonl}}, {{split: test, path: '../**'}}]",
     "'zip://x.jsonl::https://example.com/a.zip'", "linked.jsonl", "linked/*.jsonl", "'**'", "sub/../../secret.jsonl"],
)  # fmt: skip
def test_the_metadata_of_a_dataset_cannot_lead_out_of_its_folder(folder, data_files):
    (folder / "a.jsonl").write_text(ROWS)
    (folder / "README.md").write_text(CARD.format(data_files.format(root=folder.parent)))
    if "linked" in data_files or "**" in data_files:
        (folder / "linked.jsonl").symlink_to("../secret.jsonl")
        (folder / "linked").symlink_to("../other")
    with pytest.raises(UserError, match="which is not a file in the folder of the dataset: a dataset may only name"):
        opened(folder)
    if "linked" not in data_files:
        (folder / "README.md").rename(folder / "about.md")
        card = CARD.format(data_files.format(root=folder.parent)).replace("---\n", "")
        (folder / ".huggingface.yaml").write_text(card)
        with pytest.raises(UserError, match="which is not a file in the folder of the dataset"):
            opened(folder)


def test_the_metadata_may_name_files_of_the_folder(folder):
    (folder / "sub").mkdir()
    (folder / "a.jsonl").write_text(ROWS)
    (folder / "sub/b.jsonl").write_text(ROWS.replace("document", "other"))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: x\n  data_dir: sub\n  data_files: '*.jsonl'\n---\n"
    )
    assert items_of(opened(folder)) == ["other 0", "other 1", "other 2"]
    (folder.parent / "linked").symlink_to(folder)  # a link to the folder itself
    assert items_of(opened(folder.parent / "linked")) == ["other 0", "other 1", "other 2"]
    for text in ("---\n: : [\n---\n", "---\nconfigs: 3\n---\n", b"---\nconfigs: \xff\n---\n"):
        (folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match="the metadata in .*README.md are damaged"):
            opened(folder)


@pytest.mark.parametrize("streaming", [True, False])
def test_columns_are_checked_as_in_files(folder, streaming):
    (folder / "a.jsonl").write_text(ROWS)
    assert items_of(opened(folder, streaming, text_column="content.text")) == ["deep 0", "deep 1", "deep 2"]
    for column, sentence in (
        ("id", "the column 'id' of the dataset .* holds int64, not text"),
        ("txt", "has no column 'txt', its columns are text, content, id: did you mean 'text'"),
    ):
        with pytest.raises(UserError, match=sentence):
            opened(folder, streaming, text_column=column)
    os.remove(folder / "a.jsonl")
    times = pyarrow.array([2**60] * 2, pyarrow.timestamp("ms"))  # beyond the year 9999
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "time": times}), folder / "a.parquet")
    assert items_of(opened(folder, streaming)) == ["a", "b"]
    with pytest.raises(UserError, match="the column 'time' of the dataset .* holds timestamp.*, not text"):
        opened(folder, streaming, text_column="time")


def test_links_that_repeat_files_are_refused(folder):
    (folder / "sub").mkdir()
    (folder / "sub/a.jsonl").write_text(ROWS)
    (folder / "sub/again").symlink_to("..")
    (folder / "b.jsonl").symlink_to("sub/a.jsonl")
    with pytest.raises(UserError, match="are the same file: remove links from the folder of the dataset"):
        opened(folder)


def test_aliases_in_the_metadata_are_not_expanded(folder):
    """Ten levels of ten aliases stand for ten billion values."""
    (folder / "a.jsonl").write_text(ROWS)
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 11))
    text = f"---\nl0: &l0 [a.jsonl]\n{levels}configs:\n- config_name: x\n  data_files: *l10\n---\n"
    (folder / "README.md").write_text(text)
    with pytest.raises(UserError, match=r"README.md are damaged \(they have more than 100,000 values\)"):
        opened(folder)


def test_a_revision_of_a_local_folder_is_refused(folder):
    (folder / "a.jsonl").write_text(ROWS)
    with pytest.raises(UserError, match="hf_revision=v1 has no effect, because .* is a local folder: leave it out"):
        opened(folder, hf_revision="v1")


def test_a_change_of_the_files_changes_the_digest_and_is_noticed(folder):
    (folder / "a.jsonl").write_text(ROWS)
    source = opened(folder)
    before = source.digest(0)
    (folder / "a.jsonl").write_text(ROWS.replace("document", "DOCUMENT"))
    with pytest.raises(UserError, match="a.jsonl has changed during the preparation"):
        items_of(source)
    assert opened(folder).digest(0) != before
    (folder / "a.jsonl").write_text(ROWS)
    assert opened(folder).digest(0) == before
