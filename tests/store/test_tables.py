"""Parquet tables: what is read back equals what was written, and other tools can read it."""

from __future__ import annotations

import io
from array import array

import msgspec
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rorqual.records import from_json, to_json
from rorqual.store.files import StoreError
from rorqual.store.tables import ScoredTrajectory, read_table, write_table

from .conftest import ROWS, make_row


def round_trip(rows: list[ScoredTrajectory]) -> list[ScoredTrajectory]:
    file = io.BytesIO()
    write_table(file, rows, "rl", 3)
    file.seek(0)
    return read_table(file)


@settings(max_examples=30, phases=[Phase.generate])
@given(st.lists(ROWS, max_size=4))
def test_any_rows_come_back_equal(rows: list[ScoredTrajectory]) -> None:
    again = round_trip(rows)
    assert again == rows
    assert to_json(again) == to_json(rows)  # also the type code of each array


@settings(max_examples=30, phases=[Phase.generate])
@given(ROWS)
def test_json_comes_back_equal(row: ScoredTrajectory) -> None:
    assert from_json(to_json(row), ScoredTrajectory) == row


def test_columns_are_plain_lists_and_maps_for_other_tools() -> None:
    file = io.BytesIO()
    write_table(file, [make_row("a", 1.0), make_row("b", 0.0)], "rl", 3)
    table = pq.read_table(file)
    assert table.column("step").to_pylist() == [3, 3]
    assert pc.mean(table.column("reward")).as_py() == 0.5
    assert table.column("reward_parts").to_pylist() == [[("accuracy", 1.0)], [("accuracy", 0.0)]]
    segment = table.column("segments").to_pylist()[0][0]
    assert segment["token_ids"] == [1, 44, 7]
    assert segment["kept"] == {"offsets": [0, 2], "ids": [7, 9]}
    assert segment["routes"] is None
    assert str(table.schema.field("segments").type.value_type.field("logprobs").type) == "large_list<element: float>"


def test_wrong_array_type_is_refused_by_name() -> None:
    row = make_row("a")
    segment = msgspec.structs.replace(row.trajectory.segments[0], logprobs=array("d", [0.0, 0.0, -0.5]))
    bad = msgspec.structs.replace(row, trajectory=msgspec.structs.replace(row.trajectory, segments=(segment,)))
    with pytest.raises(StoreError, match=r'Segment.logprobs is array\("d"\)'):
        round_trip([bad])


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"not parquet", lambda data: b""])
def test_damaged_file_is_a_clear_error(tmp_path, damage) -> None:
    path = tmp_path / "step.parquet"
    with path.open("wb") as file:
        write_table(file, [make_row("a")], "rl", 3)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StoreError, match=r"step\.parquet is not a readable table"):
        read_table(path)
