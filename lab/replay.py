"""Copy the logs of a run into other tools' formats. The training scripts stay free of loggers.

    python lab/report.py --csv                 OUT/csv/STAGE.csv, one line per row of the log
    python lab/report.py --tensorboard runs    runs/STAGE/events.out.tfevents...; then
                                               tensorboard --logdir runs
    python lab/report.py --wandb               one run per log; needs pip install wandb

A log has no clock, so TensorBoard shows steps, not times.

An event file is a sequence of records (TFRecord): length, its checksum, data, its checksum. The
data are a protocol buffer: fields of (number << 3 | kind) and a value, where kind 0 is a varint, 1
eight bytes, 2 bytes with their length, 5 four bytes.

    Event     1: wall time (double)   2: step (int64)   3: file version   5: Summary
    Summary   1: Value, repeated
    Value     1: tag (string)         2: simple value (float)
"""
import csv
import io
import struct
from pathlib import Path

from data.text import write_text
from scaffold.cli import UserError


def steps_of(rows):
    """Return (step, row) for each row; a row without a step takes that of the row before."""
    step = 0
    pairs = []
    for row in rows:
        step = next((row[k] for k in ("update", "step") if isinstance(row.get(k), int)), step)
        pairs.append((step, row))
    return pairs


def scalars(row):
    """Return the numbers of a row, without its step."""
    numbers = {k: v for k, v in row.items()
               if isinstance(v, int | float) and not isinstance(v, bool)}
    return {k: v for k, v in numbers.items() if k not in ("step", "update")}


def csv_text(rows):
    """Return the rows as CSV: one column per key, in the order of their first appearance."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    made = io.StringIO()
    writer = csv.DictWriter(made, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return made.getvalue()


def varint(n):
    """Encode a non-negative integer, 7 bits a byte, the lowest first."""
    made = bytearray()
    while n > 127:
        made.append(n & 127 | 128)
        n >>= 7
    return bytes([*made, n])


def field(number, value):
    """Encode one field: an int as a varint, a float as four bytes, bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def crc_table():
    """Return the table of CRC-32C, whose polynomial, bits reversed, is 0x82F63B78."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ 0x82F63B78 * (byte & 1)
        table.append(byte)
    return table


CRC = crc_table()


def masked_crc(data):
    """Return the checksum of TFRecord: CRC-32C, rotated by 15 bits, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return (crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8 & 0xFFFFFFFF


def record(data):
    """Frame the data of one event."""
    length = struct.pack("<Q", len(data))
    return (length + struct.pack("<I", masked_crc(length))
            + data + struct.pack("<I", masked_crc(data)))


def event_file(rows):
    """Return the bytes of an event file with every number of the rows."""
    clock = varint(1 << 3 | 1) + struct.pack("<d", 0.0)
    made = [record(clock + field(3, b"brain.Event:2"))]
    for step, row in steps_of(rows):
        values = [field(1, field(1, tag.encode()) + field(2, float(v)))
                  for tag, v in scalars(row).items()]
        if values:
            made.append(record(clock + field(2, step) + field(5, b"".join(values))))
    return b"".join(made)


def to_wandb(logs, out):
    """Send each log as a run of the project `out`."""
    try:
        import wandb   # asked for by --wandb
    except ImportError:
        raise UserError("--wandb: the package is not installed; pip install wandb") from None
    for stage, rows in logs.items():
        run = wandb.init(project=out.resolve().name, name=stage)
        for step, row in steps_of(rows):
            run.log(scalars(row), step=step)
        run.finish()


def replay(files, cfg):
    """Copy all logs of a folder, as cfg.csv, cfg.tensorboard and cfg.wandb say."""
    logs = files.logs | ({files.name: files.rows} if files.rows else {})
    for stage, rows in logs.items():
        if cfg.csv:
            path = files.out / "csv" / f"{stage}.csv"
            write_text(path, csv_text(rows))
            print(f"wrote {path}")
        if cfg.tensorboard:
            if Path(cfg.tensorboard).is_file():
                raise UserError(f"--tensorboard {cfg.tensorboard}: this is a file; name a folder")
            folder = Path(cfg.tensorboard) / stage
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "events.out.tfevents.0.log"   # a second copy replaces the first
            path.write_bytes(event_file(rows))
            print(f"wrote {path}")
    if cfg.wandb:
        to_wandb(logs, files.out)
