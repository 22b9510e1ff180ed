"""Parquet parts: one file a record, written atomically, read back with their schema checked."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from simulator.component import Settings, describe
from simulator.errors import InputError

S = TypeVar("S", bound=Settings)


SCHEMA_VERSION = 2


def write_part(path: Path, records: Sequence[Settings], schema: pa.Schema, config_json: str) -> Path:
    """Write records as one Parquet file, atomically, with the schema version and the config in its metadata."""
    metadata = {"exsim.schema_version": str(SCHEMA_VERSION), "exsim.config": config_json}
    part = pa.Table.from_pylist([record.model_dump() for record in records], schema=schema)

    def write(file: Path) -> None:
        # Arrow's own copy of the schema would hold the metadata once more, which is most of a part of one row
        with pq.ParquetWriter(file, schema, store_schema=False) as writer:
            writer.add_key_value_metadata(metadata)
            writer.write_table(part)

    replace_file(path, write)
    return path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside ``path`` and move it there: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # hidden and with another suffix, so that a writer killed here leaves nothing that *.parquet would match
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_parts(folder: Path, schema: pa.Schema) -> Iterable[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.glob("part-*.parquet")):
        try:
            with pq.ParquetFile(path) as file:  # not read_table: it would take a folder named a=b for a partition
                part = file.read()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is not a readable Parquet file: {' '.join(str(error).split())[:200]}") from None
        metadata = part.schema.metadata or {}
        found = metadata.get(b"exsim.schema_version", b"none").decode(errors="replace")
        if found != str(SCHEMA_VERSION):
            raise InputError(f"{path} has schema version {found}, this program reads version {SCHEMA_VERSION}")
        if part.schema.names != schema.names or part.schema.types != schema.types:
            raise InputError(f"{path} does not have the columns of schema version {SCHEMA_VERSION}")
        for record in part.to_pylist():
            yield path, record


def _model(model: type[S], record: dict[str, Any], path: Path) -> S:
    try:
        return model.model_validate(record)
    except ValidationError as error:
        raise InputError(f"{path}: {describe(error)}") from None
