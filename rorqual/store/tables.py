"""Trajectories with their scores as Parquet, one row each, in columns that DuckDB and pandas read without this package.

    SELECT step, avg(reward), avg(len(segments[1].token_ids)) FROM 'trajectories/rl/*.parquet' GROUP BY step

Token columns are native lists inside the list of segments; reward parts are a map; only `evidence.facts`, which may
hold anything, is JSON text. What is read back equals what was written, bit for bit.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from typing import IO, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rorqual.records import KeptTokens, Record, Routes, Score, Segment, Selections, Trajectory
from rorqual.store.files import StoreError

STRUCTURES = {
    "messages": pa.list_(
        pa.struct(
            [
                ("role", pa.string()),
                ("content", pa.string()),
                ("thinking", pa.string()),
                ("tool_calls", pa.list_(pa.struct([(name, pa.string()) for name in ("id", "name", "arguments")]))),
                ("tool_call_id", pa.string()),
            ]
        )
    ),
    "evidence": pa.struct(
        [
            ("response", pa.string()),
            ("thinking", pa.string()),
            ("answer", pa.string()),
            ("num_sampled_tokens", pa.int64()),
            ("end", pa.string()),
            ("facts", pa.string()),
        ]
    ),
    "events": pa.list_(
        pa.struct(
            [
                ("kind", pa.string()),
                *((f"{name}_{when}", pa.int64()) for name in ("tokens", "num_calls") for when in ("before", "after")),
                ("turn", pa.int64()),
            ]
        )
    ),
    "numbers": pa.map_(pa.string(), pa.float64()),
}
COLUMNS = {
    "stage": pa.string(),
    "step": pa.int64(),
    "trajectory_id": pa.string(),
    "task_id": pa.string(),
    "group_id": pa.string(),
    "domain": pa.string(),
    "end": pa.string(),
    "error": pa.string(),
    "reward": pa.float64(),
    "reward_parts": STRUCTURES["numbers"],
    "reward_error": pa.string(),
    "advantage": pa.float64(),
    "training": STRUCTURES["numbers"],
    "evidence": STRUCTURES["evidence"],
    "messages": STRUCTURES["messages"],
    "events": STRUCTURES["events"],
}
TOKEN_COLUMNS = {"token_ids": "i", "sampled": "b", "logprobs": "f", "entropies": "f"}
NUMPY_TYPES = {"i": np.int32, "b": np.int8, "f": np.float32, "q": np.int64, "h": np.int16}


class ScoredTrajectory(Record):
    """One row: a trajectory, its score, and the credit that training gave it.

    advantage: None where nothing was trained on it (an evaluation, a failed reward). training: what the step measured
    on this trajectory, by name: `ScoredTrajectory(trajectory=..., score=..., advantage=0.5, training={"masked": 1.0})`.
    """

    trajectory: Trajectory
    score: Score
    advantage: float | None = None
    training: dict[str, float] = {}


def write_table(file: IO[bytes], rows: Sequence[ScoredTrajectory], stage: str, step: int) -> None:
    """Write rows as one Parquet file. Raises: StoreError for a token column whose array has not Segment's type."""
    plain = [_plain_row(row, stage, step) for row in rows]
    columns = {name: pa.array([row[name] for row in plain], type=kind) for name, kind in COLUMNS.items()}
    columns["segments"] = _segments_column([row.trajectory.segments for row in rows])
    pq.write_table(pa.table(columns), file, compression="zstd")


def read_table(source: Any) -> list[ScoredTrajectory]:
    """The rows of a file that `write_table` wrote, in order. Raises: StoreError when it is not one, or is damaged."""
    try:
        table = pq.read_table(source).combine_chunks()
        segments = _read_segments(table.column("segments").combine_chunks())
        rows = table.drop_columns(["segments"]).to_pylist()
        return [_scored_trajectory(row, parts) for row, parts in zip(rows, segments, strict=True)]
    except (pa.ArrowException, KeyError, msgspec.ValidationError) as error:
        raise StoreError(f"{source} is not a readable table of trajectories: {error}.") from error


# --------------------------------------------------------------------------------------------------- all but the tokens


def _plain_row(row: ScoredTrajectory, stage: str, step: int) -> dict[str, Any]:
    trajectory, score = row.trajectory, row.score
    evidence = msgspec.to_builtins(trajectory.evidence)
    evidence["facts"] = msgspec.json.encode(evidence["facts"]).decode()
    names = ("trajectory_id", "task_id", "group_id", "domain", "end", "error")
    return {
        "stage": stage,
        "step": step,
        **{name: getattr(trajectory, name) for name in names},
        "reward": score.total,
        "reward_parts": list(score.parts.items()),
        "reward_error": score.error,
        "advantage": row.advantage,
        "training": list(row.training.items()),
        "evidence": evidence,
        "messages": [msgspec.to_builtins(message) for message in trajectory.messages],
        "events": [msgspec.to_builtins(event) for event in trajectory.events],
    }


def _scored_trajectory(row: dict[str, Any], segments: tuple[Segment, ...]) -> ScoredTrajectory:
    evidence = {**row["evidence"], "facts": msgspec.json.decode(row["evidence"]["facts"])}
    names = ("trajectory_id", "task_id", "group_id", "domain", "end", "error", "messages", "events")
    plain = {**{name: row[name] for name in names}, "evidence": evidence, "segments": ()}
    trajectory = msgspec.structs.replace(msgspec.convert(plain, Trajectory), segments=segments)
    return ScoredTrajectory(
        trajectory=trajectory,
        score=Score(total=row["reward"], parts=dict(row["reward_parts"]), error=row["reward_error"]),
        advantage=row["advantage"],
        training=dict(row["training"]),
    )


# ------------------------------------------------------------------------------------------------------- token columns


def _segments_column(segments_of_rows: list[tuple[Segment, ...]]) -> pa.Array:
    segments = [segment for row in segments_of_rows for segment in row]
    columns = {
        name: _list_column([getattr(segment, name) for segment in segments], code, name)
        for name, code in TOKEN_COLUMNS.items()
    }
    columns["weight_version"] = pa.array([segment.weight_version for segment in segments], type=pa.int64())
    columns["kept"] = _kept_column([segment.kept for segment in segments])
    columns["kept_mass"] = pa.array([segment.kept_mass for segment in segments], type=pa.float64())
    columns["routes"] = _routes_column([segment.routes for segment in segments])
    columns["selections"] = _selections_column([segment.selections for segment in segments])
    columns["parent"] = pa.array([segment.parent for segment in segments], type=pa.int32())
    columns["break_reason"] = pa.array([segment.break_reason for segment in segments], type=pa.string())
    values = pa.StructArray.from_arrays(list(columns.values()), names=list(columns))
    return pa.ListArray.from_arrays(_offsets([len(row) for row in segments_of_rows]), values)


def _kept_column(kept: list[KeptTokens | None]) -> pa.Array:
    arrays = [
        _list_column([item.offsets if item is not None else array("q") for item in kept], "q", "kept.offsets"),
        _list_column([item.ids if item is not None else array("i") for item in kept], "i", "kept.ids"),
    ]
    return pa.StructArray.from_arrays(arrays, names=["offsets", "ids"], mask=_absent(kept))


def _routes_column(routes: list[Routes | None]) -> pa.Array:
    arrays = [
        _list_column([item.experts if item is not None else array("h") for item in routes], "h", "routes.experts"),
        pa.array([item.num_layers if item is not None else 0 for item in routes], type=pa.int32()),
        pa.array([item.experts_per_token if item is not None else 0 for item in routes], type=pa.int32()),
    ]
    return pa.StructArray.from_arrays(
        arrays, names=["experts", "num_layers", "experts_per_token"], mask=_absent(routes)
    )


def _selections_column(selections: list[Selections | None]) -> pa.Array:
    positions = [item.positions if item is not None else array("i") for item in selections]
    arrays = [
        _list_column(positions, "i", "selections.positions"),
        pa.array([item.num_layers if item is not None else 0 for item in selections], type=pa.int32()),
        pa.array([item.top_k if item is not None else 0 for item in selections], type=pa.int32()),
    ]
    return pa.StructArray.from_arrays(arrays, names=["positions", "num_layers", "top_k"], mask=_absent(selections))


def _absent(items: Sequence[object]) -> pa.Array:
    return pa.array([item is None for item in items], type=pa.bool_())


def _list_column(arrays: list[array[Any]], code: str, name: str) -> pa.Array:
    for item in arrays:
        if item.typecode != code:
            raise StoreError(
                f'Segment.{name} is array("{item.typecode}"); it must be array("{code}") to be stored exactly.'
            )
    values = b"".join(item.tobytes() for item in arrays)
    column = pa.array(np.frombuffer(values, dtype=NUMPY_TYPES[code]))
    return pa.LargeListArray.from_arrays(_offsets([len(item) for item in arrays], pa.int64()), column)


def _offsets(lengths: list[int], kind: Any = None) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), type=kind or pa.int32())


def _read_segments(column: pa.Array) -> list[tuple[Segment, ...]]:
    values = column.values
    lists = {name: _arrays(values.field(name), code) for name, code in TOKEN_COLUMNS.items()}
    kept, routes = _read_kept(values.field("kept")), _read_routes(values.field("routes"))
    selections = _read_selections(values.field("selections"))
    plain: dict[str, list[Any]] = {
        name: values.field(name).to_pylist() for name in ("weight_version", "kept_mass", "parent", "break_reason")
    }
    segments = [
        Segment(
            token_ids=lists["token_ids"][i],
            sampled=lists["sampled"][i],
            logprobs=lists["logprobs"][i],
            entropies=lists["entropies"][i],
            kept=kept[i],
            routes=routes[i],
            selections=selections[i],
            **{name: items[i] for name, items in plain.items()},
        )
        for i in range(len(values))
    ]
    offsets = column.offsets.to_pylist()
    return [tuple(segments[start:end]) for start, end in itertools.pairwise(offsets)]


def _read_kept(column: pa.Array) -> list[KeptTokens | None]:
    offsets, ids = _arrays(column.field("offsets"), "q"), _arrays(column.field("ids"), "i")
    present = column.is_valid().to_pylist()
    return [KeptTokens(offsets=offsets[i], ids=ids[i]) if valid else None for i, valid in enumerate(present)]


def _read_routes(column: pa.Array) -> list[Routes | None]:
    experts = _arrays(column.field("experts"), "h")
    layers, per_token = column.field("num_layers").to_pylist(), column.field("experts_per_token").to_pylist()
    present = column.is_valid().to_pylist()
    return [
        Routes(experts=experts[i], num_layers=layers[i], experts_per_token=per_token[i]) if valid else None
        for i, valid in enumerate(present)
    ]


def _read_selections(column: pa.Array) -> list[Selections | None]:
    positions = _arrays(column.field("positions"), "i")
    layers, top_k = column.field("num_layers").to_pylist(), column.field("top_k").to_pylist()
    present = column.is_valid().to_pylist()
    return [
        Selections(positions=positions[i], num_layers=layers[i], top_k=top_k[i]) if valid else None
        for i, valid in enumerate(present)
    ]


def _arrays(column: pa.Array, code: str) -> list[array[Any]]:
    values = np.asarray(column.values.to_numpy(zero_copy_only=False), dtype=NUMPY_TYPES[code])
    offsets = column.offsets.to_pylist()
    return [array(code, values[start:end].tobytes()) for start, end in itertools.pairwise(offsets)]
