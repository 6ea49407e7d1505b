"""Reads run folders and .jsonl files for a report, and checks their lines."""

import json
from dataclasses import dataclass
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.reports.page import Section
from nanometa.reports.training import METRICS, Metrics, read_run


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
    kept: dict[str, dict[tuple, dict]] = {kind: {} for kind in kinds}
    runs, repeated = [], 0
    for source in dict.fromkeys(sources):
        path = Path(source)
        paths = (
            [path]
            if source.endswith(".jsonl")
            else [file for kind in kinds if (file := path / f"{kind}.jsonl").exists()]
        )
        if not source.endswith(".jsonl") and (path / METRICS).exists():
            runs.append(read_run(path))
        elif not paths:
            raise UserError(
                f"{source} has none of {METRICS}, {', '.join(f'{kind}.jsonl' for kind in kinds)}: give folders of runs "
                f"that train.py, eval.py or probe.py wrote to, or .jsonl files of the latter two."
            )
        for path in paths:
            for line in _lines(path, kinds):
                kind = kind_of(line)
                key = kinds[kind].key(line)
                earlier = kept[kind].get(key)
                repeated += earlier is not None
                if earlier is None or line.get("n", 0) >= earlier.get(
                    "n", 0
                ):  # a measurement on fewer texts does not replace one on more
                    kept[kind][key] = line
    lines = {kind: list(of.values()) for kind, of in kept.items() if of}
    if not lines and not runs:
        raise UserError(f"{', '.join(sources)} has no line: run eval.py or probe.py first.")
    return Found(lines, runs, repeated)


def kind_of(line: dict) -> str:
    """Returns the evaluation or probe that wrote a line, which is also the name of its file in a run's folder."""
    return line.get("eval", line.get("probe", ""))


def _lines(path: Path, kinds: dict[str, Section]):
    """Yields the checked lines of a file."""
    try:
        rows = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): give folders of runs that eval.py or probe.py measured, or .jsonl files."
        ) from error
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            line = json.loads(row, parse_constant=_refuse)
            if not isinstance(line, dict) or kind_of(line) not in kinds:
                raise ValueError(f'it does not say "eval" or "probe": one of {", ".join(kinds)}')
            json.dumps(line, ensure_ascii=False).encode()  # raises for half a surrogate pair, which is no text
            kinds[kind_of(line)].check(line)
        except (ValueError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number} is no line of eval.py or probe.py ({error}): remove it, and measure it again."
            ) from error
        yield line


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no figure")
