"""Tests the reading of shards that change while they are read."""

import os

import numpy as np
import pytest

from nanometa.common.errors import UserError
from nanometa.data import shards
from nanometa.data.shards import HEADER, ShardWriter, TokenStream


@pytest.fixture
def written(tmp_path):
    """Two shards of 50,000 ids each: their folder, their entries in a manifest, and all ids."""
    ids = np.arange(100_000) % 300
    writer = ShardWriter(tmp_path, "train", n_vocab=320, shard_tokens=50_000)
    writer.write(ids)
    writer.close()
    return tmp_path, writer.entries, ids


def test_a_shard_that_is_cut_short_is_named(written):
    """If the file were memory-mapped, the process would be killed."""
    folder, entries, ids = written
    stream = TokenStream(folder, entries, 320)
    os.truncate(folder / "train_000001.bin", HEADER.size + 2 * 40_000)
    assert stream.read(0, 90_000).tolist() == ids[:90_000].tolist()
    for start, stop in ((89_990, 90_001), (95_000, 95_010), (0, 100_000)):
        with pytest.raises(UserError, match="train_000001.bin has been cut short since it was opened: restore the da"):
            stream.read(start, stop)


def test_a_shard_that_is_deleted_or_replaced_stays_readable(written):
    folder, entries, ids = written
    stream = TokenStream(folder, entries, 320)
    (folder / "train_000000.bin").unlink()
    (folder / "new").write_bytes(bytes(HEADER.size + 100_000))
    (folder / "new").rename(folder / "train_000001.bin")
    assert stream.read(0, 100_000).tolist() == ids.tolist()


def test_a_stream_of_many_shards_keeps_few_of_them_open(written, monkeypatch):
    """A shard is checked again when it is opened again."""
    folder, entries, ids = written
    monkeypatch.setattr(shards, "OPEN_SHARDS", 1)
    stream = TokenStream(folder, entries, 320)
    for start in (0, 60_000, 49_990, 10):
        assert stream.read(start, start + 20).tolist() == ids[start : start + 20].tolist()
        assert len(stream._files) == 1
    os.truncate(folder / "train_000001.bin", 100)
    with pytest.raises(UserError, match="train_000001.bin is damaged: its header or its size of 100 bytes"):
        stream.read(60_000, 60_005)


def test_an_error_of_the_disk_names_the_shard(written, monkeypatch):
    folder, entries, _ = written
    stream = TokenStream(folder, entries, 320)

    class Failing:
        def seek(self, place):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(stream, "_file", lambda number: Failing())
    with pytest.raises(UserError, match=r"train_000000.bin cannot be read any more \(Input/output error\)"):
        stream.read(0, 5)
