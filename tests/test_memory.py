"""Tests that preparation needs the same memory for any size of the corpus."""

import json
import random
import subprocess
import sys

import pytest

from tests.conftest import ROOT, manifest

# prepares a dataset, then prints the peak memory in KiB of this process and of its largest worker
MEASURED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from nanometa import prepare
prepare.main(sys.argv[2:])
print([resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)])
"""


def write_corpus(folder, megabytes: int) -> None:
    """Writes rows of 4 KB of random words, in files of 50 MB. No two rows are equal."""
    draw = random.Random(1)
    words = ["".join(draw.choices("etaoinshrdlucmfw", k=draw.randrange(1, 12))) for _ in range(20_000)]
    block = [" ".join(draw.choices(words, k=600)) for _ in range(1000)]
    folder.mkdir()
    for number in range(megabytes // 50):
        rows, size = [], 0
        while size < 50e6:
            rows.append(json.dumps({"text": f"{number} {len(rows)} {block[len(rows) % 1000]}\n"}) + "\n")
            size += len(rows[-1])
        (folder / f"{number:03}.jsonl").write_text("".join(rows))


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_corpus(tmp_path):
    peaks = {}
    for megabytes in (200, 2000):
        write_corpus(tmp_path / f"c{megabytes}", megabytes)
        args = ("--source=files", f"--files=c{megabytes}/*.jsonl", f"--name=m{megabytes}", "--workers=2")
        out = subprocess.run(
            [sys.executable, "-c", MEASURED, str(ROOT), *args], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        peaks[megabytes] = json.loads(out.splitlines()[-1])
        print(f"{megabytes} MB: peak of the main process {peaks[megabytes][0] / 1024:.0f} MiB, "
              f"of the largest worker {peaks[megabytes][1] / 1024:.0f} MiB")  # fmt: skip
        splits = manifest(tmp_path / f"data/m{megabytes}")["splits"].values()
        assert sum(split["bytes"] for split in splits) > 0.9e6 * megabytes
    for small, large in zip(peaks[200], peaks[2000], strict=True):
        assert 0.8 < large / small < 1.2
