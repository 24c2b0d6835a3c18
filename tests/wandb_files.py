"""Reads what the real W&B client wrote offline; apart from the reader of the package, so that one checks the other."""

import importlib
import json
import zlib
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32 * 1024, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def wandb_files(folder: Path) -> list[Path]:
    """The offline runs below a run's folder, oldest first."""
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def wandb_records(path: Path) -> list[Any]:
    """The protobuf records of a `.wandb` file: a LevelDB log of 32 KiB blocks after a 7-byte file header. A kill may cut off its end."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    content, at, pieces, records = path.read_bytes(), HEADER, b"", []
    assert content[:4] == b":W&B"
    while at + HEADER <= len(content):
        left_in_block = BLOCK - at % BLOCK
        if left_in_block < HEADER:
            at += left_in_block
            continue
        checksum, length, kind = (
            int.from_bytes(content[at : at + 4], "little"),
            int.from_bytes(content[at + 4 : at + 6], "little"),
            content[at + 6],
        )
        body = content[at + HEADER : at + HEADER + length]
        if len(body) < length:
            break
        assert checksum == zlib.crc32(content[at + 6 : at + HEADER] + body)
        at += HEADER + length
        pieces = body if kind in (FULL, FIRST) else pieces + body
        if kind in (FULL, LAST):
            record = messages.Record()
            record.ParseFromString(pieces)
            records.append(record)
    return records


def history_of(records: list[Any]) -> list[dict[str, Any]]:
    """The rows, each with W&B's "step"."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append(row | {"step": record.history.step.num})
    return rows
