"""Parquet parts: small files, written atomically, whose schema is checked when they are read.

The Arrow schema of a folder follows from the pydantic model of its records (:func:`arrow_schema`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AwareDatetime
from pydantic.fields import FieldInfo

from simulator.component import Settings
from simulator.errors import InputError
from simulator.files import write_atomically

SCHEMA_VERSION = 3

_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    AwareDatetime: pa.timestamp("us", tz="UTC"),
}


def arrow_schema(model: type[Settings]) -> pa.Schema:
    """The columns of a model's records: its fields in their order, nullable where a field may be None.

    A Literal is text. An int is int64, or int32 where its bound ``lt`` is at most 2**31.
    """
    return pa.schema([_column(name, field) for name, field in model.model_fields.items()])


def _column(name: str, field: FieldInfo) -> pa.Field:
    kind, bounds = field.annotation, list(field.metadata)
    optional = NoneType in get_args(kind)
    if optional:
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    if get_origin(kind) is Annotated:
        kind, *notes = get_args(kind)
        bounds += [bound for note in notes if isinstance(note, FieldInfo) for bound in note.metadata]
    if get_origin(kind) is Literal:
        kind = str
    small = kind is int and any(getattr(bound, "lt", 2**63) <= 2**31 for bound in bounds)
    return pa.field(name, pa.int32() if small else _TYPES[kind], nullable=optional)


def write_part(path: Path, records: Sequence[Settings], schema: pa.Schema, config_json: str) -> Path:
    """Write records as one Parquet file, atomically, with the schema version and the config in its metadata."""
    metadata = {"exsim.schema_version": str(SCHEMA_VERSION), "exsim.config": config_json}
    part = pa.Table.from_pylist([record.model_dump() for record in records], schema=schema)
    file = io.BytesIO()
    # Arrow's own copy of the schema would hold the metadata once more, which is most of a part of one row
    with pq.ParquetWriter(file, schema, store_schema=False) as writer:
        writer.add_key_value_metadata(metadata)
        writer.write_table(part)
    write_atomically(path, file.getvalue())
    return path


def read_parts(folder: Path, schemas: Mapping[str, pa.Schema]) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """The records in a folder's parts, in the order of the parts' names.

    Args:
        schemas: the columns of each schema version that is read.

    Yields:
        ``(part, config, record)``: the file, the config in its metadata as JSON, and one of its records.

    Raises:
        InputError: a part is corrupt, of another schema version, or has not the columns of its version.
    """
    for path in sorted(folder.glob("part-*.parquet")):
        try:
            with pq.ParquetFile(path) as file:  # read_table would take a folder named a=b for a partition
                part = file.read()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is not a readable Parquet file: {' '.join(str(error).split())[:200]}") from None
        metadata = {key: value.decode(errors="replace") for key, value in (part.schema.metadata or {}).items()}
        found = metadata.get(b"exsim.schema_version", "none")
        if found not in schemas:
            known = " and ".join(schemas)
            raise InputError(f"{path} has schema version {found}, this program reads versions {known}")
        if part.schema.names != schemas[found].names or part.schema.types != schemas[found].types:
            raise InputError(f"{path} does not have the columns of schema version {found}")
        for record in part.to_pylist():
            yield path, metadata.get(b"exsim.config", ""), record
