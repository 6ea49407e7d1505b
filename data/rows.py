"""Reads the rows of JSON lines and Parquet files: the text of each row, or the reason why it has none."""

import itertools
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from nanometa.common.errors import UserError, printable
from nanometa.common.files import parse_json
from nanometa.config.checks import nearest_name
from nanometa.data.opening import DAMAGED

ROW_BYTES = 2**26  # longest line of JSON and longest text of a row, because a row is held in memory as a whole
SAMPLED_ROWS = 100  # rows in which a misspelled column is looked for before the preparation starts
BLOCK_BYTES = 2**20
TOO_LONG = f"a row of more than {ROW_BYTES // 2**20} MiB, which does not fit in memory"
MISSING = object()  # in place of the value of a column that a row does not have


class Skipped(NamedTuple):
    """A document or file that could not be read: where it is, and why.

    kind: the reason without details; skipped documents are counted by it. detail: the rest of the reason."""

    where: str
    kind: str
    detail: str = ""

    @property
    def reason(self) -> str:
        """The whole reason."""
        return self.kind + self.detail


# ----------------------------------------------------------------------------- one row


def cell_of(row, column: str):
    """Returns the value of a column in a row, or MISSING.

    A dotted name such as content.text stands for the column of that name, or else for a field of a nested column."""
    if not isinstance(row, dict):
        return MISSING
    if column in row:
        return row[column]
    first, _, rest = column.partition(".")
    return cell_of(row.get(first), rest) if rest else MISSING


def text_of(value, column: str, where: str) -> str | Skipped:
    """Returns the text of a row, given the value of its text column, or a Skipped if it is no text."""
    if value is MISSING:
        return Skipped(where, f"no {column!r}")
    if not isinstance(value, str):
        return Skipped(where, f"its {column!r} is {type(value).__name__}, not text")
    if len(value) > ROW_BYTES:
        return Skipped(where, TOO_LONG)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON, but invalid Unicode
        return Skipped(where, "invalid Unicode", f" at character {error.start}")
    return value


def names_in(row: dict, prefix: str = "") -> list[str]:
    """Returns the names of the columns of a row. A nested column gives the dotted names of its fields."""
    names = []
    for name, value in row.items():
        nested = names_in(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"]
        names += nested
    return names


def check_column(where: str, column: str, rows: list) -> None:
    """Raises UserError if rows were found, but none has the column, or no value of the column is text."""
    if rows and not any(isinstance(row, dict) for row in rows):
        raise UserError(f'{where} has no rows: each of its lines must be an object, such as {{"{column}": "…"}}.')
    rows = [row for row in rows if isinstance(row, dict)]
    values = [value for row in rows if (value := cell_of(row, column)) is not MISSING]
    if rows and not values:
        names = dict.fromkeys(name for row in rows for name in names_in(row))  # in the order of their appearance
        raise UserError(no_column(where, column, list(names)))
    others = [type(value).__name__ for value in values if value is not None]
    if others and "str" not in others:
        raise UserError(not_text(where, column, others[0]))


def no_column(where: str, column: str, columns: list[str]) -> str:
    """Returns the error message for a missing text column."""
    close = nearest_name(column, columns)
    cure = close if close.startswith("did you") else "name the column that holds the text, with --text_column=NAME."
    return f"{where} has no column {column!r}, its columns are {', '.join(columns)}: {cure}"


def not_text(where: str, column: str, kind: str) -> str:
    """Returns the error message for a text column that holds something else."""
    return (
        f"the column {column!r} of {where} holds {kind}, not text: name the column that holds the text, with "
        f"--text_column=NAME."
    )


# ----------------------------------------------------------------------------- JSON lines


def lines_of(file: BinaryIO) -> Iterator[bytes | None]:
    """Yields the lines of a file, and None in place of each line that is longer than ROW_BYTES."""
    while line := file.readline(ROW_BYTES + 1):
        if len(line) <= ROW_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(BLOCK_BYTES)
        yield None


def texts_in_json_lines(file: BinaryIO, column: str, name: str) -> Iterator[str | Skipped]:
    """Yields the text of each row of JSON lines, and a Skipped for each row without text. name: name of the file."""
    number = 0
    try:
        for number, line in enumerate(lines_of(file), 1):
            where = f"{name}:{number}"
            if line is None:
                yield Skipped(where, TOO_LONG)
            elif line.strip():
                try:
                    row = parse_json(line)
                except ValueError as error:  # includes invalid UTF-8
                    yield Skipped(where, "invalid JSON", f" ({error})")
                else:
                    yield text_of(cell_of(row, column), column, where)
    except DAMAGED as error:
        yield Skipped(f"{name}:{number + 1}", "damaged from here on", f" ({error})")


def sampled_rows(file: BinaryIO) -> list:
    """Returns the parsed rows among the first SAMPLED_ROWS lines of JSON lines, or among fewer if they are long."""
    rows, size = [], 0
    try:
        for line in itertools.islice(lines_of(file), SAMPLED_ROWS):
            size += len(line or b"")
            if size > ROW_BYTES:
                break
            try:
                rows.append(parse_json(line or b""))
            except ValueError:  # texts_in_json_lines reports it
                continue
    except (OSError, *DAMAGED):
        pass
    return rows


# ----------------------------------------------------------------------------- Parquet


def texts_in_parquet(file: BinaryIO, column: str, name: str) -> Iterator[str | Skipped]:
    """Yields the text of each row of a Parquet file, and a Skipped for each row without text.

    name: name of the file."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(
            file, page_checksum_verification=True, buffer_size=BLOCK_BYTES, pre_buffer=False
        ) as parquet:
            path, kind = _find_column(parquet.schema_arrow, column)
            if kind is None:
                yield Skipped(name, f"no column {column!r}", f", only {', '.join(parquet.schema_arrow.names)}")
                return
            if not _is_text(kind):
                yield Skipped(name, f"its column {column!r} is {kind}, not text")
                return
            for group in range(parquet.num_row_groups):
                facts = parquet.metadata.row_group(group)
                if _bytes_per_row(facts, ".".join(path)) > ROW_BYTES:
                    where = f"{name}:{number + 1}"
                    yield Skipped(where, TOO_LONG, f" (the average of the next {facts.num_rows:,} rows)")
                    number += facts.num_rows
                    continue
                # few rows at a time, because each may be long
                for batch in parquet.iter_batches(64, [group], [".".join(path)], use_threads=False):
                    for cell in _cells(batch, path):
                        number += 1
                        yield _text_of_cell(cell, column, f"{name}:{number}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = printable(" ".join(str(error).split()))
        yield Skipped(f"{name}:{number + 1}", "damaged from here on", f" ({reason})")


def check_parquet(file: BinaryIO, column: str, name: str) -> None:
    """Raises UserError if a Parquet file lacks the column, or if the column holds no text. name: name of the file.

    Raises OSError for a file that cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(file)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error
    check_schema(name, column, schema)


def check_schema(where: str, column: str, schema) -> None:
    """Raises UserError if a schema of pyarrow lacks the column, or if the column holds no text."""
    _, kind = _find_column(schema, column)
    if kind is None:
        raise UserError(no_column(where, column, schema.names))
    if not _is_text(kind):
        raise UserError(not_text(where, column, str(kind)))


def _find_column(fields, column: str) -> tuple[list[str], object]:
    """Returns the path of names to a column and its type, or ([], None). fields: a schema or a struct type of pyarrow.

    A dotted name such as content.text stands for the column of that name, or else for a field of a nested column."""
    import pyarrow

    kinds = {field.name: field.type for field in fields}
    if column in kinds:
        return [column], kinds[column]
    first, _, rest = column.partition(".")
    if rest and first in kinds and pyarrow.types.is_struct(kinds[first]):
        path, kind = _find_column(kinds[first], rest)
        return [first, *path], kind
    return [], None


def _is_text(kind) -> bool:
    """Returns whether a type of pyarrow holds text. A column without any value has the type null."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return any(
        is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    )


def _bytes_per_row(row_group, name: str) -> float:
    """Returns the average size of a row's text in a row group of a Parquet file. name: dotted name of the column."""
    columns = map(row_group.column, range(row_group.num_columns))
    size = max((column.total_uncompressed_size for column in columns if column.path_in_schema == name), default=0)
    return size / max(row_group.num_rows, 1)


def _cells(batch, path: list[str]):
    """Returns the cells of a column in a batch of rows. path: names of the column and of the nested fields."""
    import pyarrow.compute

    column = batch.column(batch.schema.names.index(path[0]))
    return pyarrow.compute.struct_field(column, path[1:]) if path[1:] else column


def _text_of_cell(cell, column: str, where: str) -> str | Skipped:
    """Returns the text of a scalar of pyarrow, or a Skipped if it is null, too long or not UTF-8."""
    if not cell.is_valid:
        return text_of(None, column, where)
    cell = cell.value if hasattr(cell, "dictionary") else cell  # a category, whose text is in a dictionary
    if cell.as_buffer().size > ROW_BYTES:
        return Skipped(where, TOO_LONG)
    try:
        return text_of(cell.as_py(), column, where)
    except UnicodeDecodeError as error:
        return Skipped(where, "not UTF-8", f" at byte {error.start}")
