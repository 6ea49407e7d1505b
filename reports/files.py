"""Reads run folders and .jsonl files for a report, and checks their lines."""

from dataclasses import dataclass
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.common.files import own_file, read_json_lines
from nanometa.reports.lines import most_texts
from nanometa.reports.page import Section
from nanometa.reports.training import METRICS, Metrics, read_run, require_folder


@dataclass(frozen=True)
class Found:
    """The lines and runs that a report shows."""

    lines: dict[str, list[dict]]  # lines by the kind of their section, without repetitions
    runs: list[Metrics]
    repeated: int  # number of lines replaced by another of the same cell


def read(sources: tuple[str, ...], sections: list[Section]) -> Found:
    """Returns the lines of run folders and .jsonl files. If several lines are about the same cell, the one with the
    most texts counts, or the last of those with equally many. A folder may lack most of the files.

    Raises UserError, naming file and line, for a line that cannot be shown."""
    kinds = {section.kind: section for section in sections}

    def check(line: dict) -> None:
        if kind_of(line) not in kinds:
            raise ValueError(f'it has no field "eval" or "probe" with one of the values {", ".join(kinds)}')
        kinds[kind_of(line)].check(line)

    lines: dict[str, list[dict]] = {kind: [] for kind in kinds}
    runs = []
    for source in dict.fromkeys(sources):
        path = Path(source)
        if not source.endswith(".jsonl"):
            require_folder(path)
        paths = [path] if source.endswith(".jsonl") else [own_file(path / f"{kind}.jsonl") for kind in kinds]
        paths = [file for file in paths if file.exists() or file == path]
        if not source.endswith(".jsonl") and (path / METRICS).exists():
            runs.append(read_run(path))
        elif not paths:
            raise UserError(
                f"{source} has none of {METRICS}, {', '.join(f'{kind}.jsonl' for kind in kinds)}: give folders of runs "
                f"that train.py, eval.py or probe.py wrote to, or .jsonl files of the latter two."
            )
        for file in paths:
            for line in read_json_lines(file, check, "eval.py or probe.py"):
                lines[kind_of(line)].append(line)
    kept = {kind: most_texts(of, kinds[kind].key) for kind, of in lines.items() if of}
    if not kept and not runs:
        raise UserError(f"{', '.join(sources)} has no line: run eval.py or probe.py first.")
    return Found(kept, runs, sum(map(len, lines.values())) - sum(map(len, kept.values())))


def kind_of(line: dict) -> str:
    """Returns the evaluation or probe that wrote a line, which is also the name of its file in a run's folder."""
    return line.get("eval", line.get("probe", ""))
