"""A run directory: what was written stays, whatever happens next."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from rorqual.store import files
from rorqual.store.files import StoreError
from rorqual.store.run import Run

from .conftest import Inner, Settings, make_row


def test_manifest_says_what_was_run(run: Run) -> None:
    manifest = Run.read(run.path).manifest
    assert manifest["config"] == {"seed": 1, "inner": {"rate": 0.1}}
    assert manifest["seeds"] == {"run": 1}
    (session,) = manifest["sessions"]
    assert session["command"] == ["rorqual", "run"]
    assert session["versions"]["python"] == sys.version.split()[0]
    assert session["versions"]["torch"]


def test_resuming_adds_a_session_and_other_settings_are_refused(run: Run, settings: Settings) -> None:
    run.close()
    Run.open(run.path, settings, {"run": 1}).close()
    assert len(Run.read(run.path).manifest["sessions"]) == 2
    with pytest.raises(StoreError, match=r"other config:\n  inner\.rate: 0\.1 then, 0\.2 now\nTo go on.*--out"):
        Run.open(run.path, Settings(inner=Inner(rate=0.2)), {"run": 1})
    with pytest.raises(StoreError, match="other seeds"):
        Run.open(run.path, settings, {"run": 2})


@pytest.mark.parametrize(("number", "last"), [(5, "  5: 5 then, 6 now"), (8, "  and 3 more")])
def test_settings_that_differ_are_listed_one_a_line_and_five_at_most(run: Run, number: int, last: str) -> None:
    plan = {str(key): key for key in range(1, number + 1)}
    run.begin_eval("base", plan)
    with pytest.raises(StoreError) as caught:
        run.begin_eval("base", {key: value + 1 for key, value in plan.items()})
    first, *listed, advice = str(caught.value).splitlines()
    assert first.endswith("was started with other settings:")
    assert listed[0] == "  1: 1 then, 2 now"
    assert listed[-1] == last
    assert len(listed) == min(number, 6)
    assert advice.startswith("To go on with it")


def test_one_writer_at_a_time(run: Run, settings: Settings) -> None:
    with pytest.raises(StoreError, match=f"another process .pid {os.getpid()}."):
        Run.open(run.path, settings, {"run": 1})
    reader = Run.read(run.path)
    with pytest.raises(StoreError, match="reading only"):
        reader.append_metrics("rl", 1, {})
    run.close()
    Run.open(run.path, settings, {"run": 1}).close()


def test_lock_of_a_dead_process_is_taken_over(tmp_path: Path, settings: Settings) -> None:
    code = (
        "import os, sys; from pathlib import Path; from rorqual.store.files import DirectoryLock;"
        "lock = DirectoryLock(Path(sys.argv[1])); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (tmp_path / "lock").read_text().isdecimal()
    Run.open(tmp_path, settings, {}).close()


def test_foreign_directories_are_refused(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="not a run"):
        Run.open(tmp_path, settings, {})
    with pytest.raises(StoreError, match="no manifest.json"):
        Run.read(tmp_path)


def test_metrics_come_back_and_are_cut_on_resuming(run: Run) -> None:
    for step in range(4):
        run.append_metrics("base", step, {"loss": 1.0 / (step + 1)})
    for step in range(4):
        run.append_metrics("rl", step, {"reward/total": step, "bad": float("nan")})
        run.write_trajectories("rl", step, [make_row(str(step))])
    run.rewind("rl", 1)
    assert [(row["stage"], row["step"]) for row in run.metrics()] == [
        *(("base", step) for step in range(4)),
        ("rl", 0),
        ("rl", 1),
    ]
    assert run.metrics("rl")[1] == {"stage": "rl", "step": 1, "reward/total": 1, "bad": "nan"}
    assert run.trajectory_steps("rl") == [0, 1]
    assert run.stages() == ["base", "rl"]


def test_half_written_last_line_is_left_out_then_repaired(run: Run, settings: Settings) -> None:
    run.append_metrics("rl", 1, {"x": 1})
    run.close()
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"stage": "rl", "st')
    assert [row["step"] for row in Run.read(run.path).metrics()] == [1]
    with Run.open(run.path, settings, {"run": 1}) as again:
        again.append_metrics("rl", 2, {})
        assert [row["step"] for row in again.metrics()] == [1, 2]


def test_evaluation_survives_in_parts_and_is_sealed(run: Run, settings: Settings) -> None:
    rows = [make_row("a"), make_row("b", 0.0)]
    assert run.read_eval("base") == []
    run.append_eval_sample("base", rows[0])
    run.append_eval_sample("base", rows[1])
    with (run.path / "evals" / "base.partial.jsonl").open("ab") as file:
        file.write(b'{"half')
    run.close()
    with Run.open(run.path, settings, {"run": 1}) as again:
        assert again.read_eval("base") == rows
        again.append_eval_sample("base", rows[0])
        assert again.read_eval("base") == [*rows, rows[0]]
        again.finish_eval("base", rows, {"accuracy": 0.5})
        assert again.read_eval("base") == rows
        assert again.eval_summaries() == {"base": {"accuracy": 0.5}}
        assert sorted(path.name for path in (run.path / "evals").iterdir()) == ["base.json", "base.parquet"]


def test_missing_step_says_what_there_is(run: Run) -> None:
    run.write_trajectories("rl", 3, [make_row("a")])
    with pytest.raises(StoreError, match="at step 4; it has steps 3 to 3"):
        run.read_trajectories("rl", 4)


@pytest.mark.parametrize("name", ["", "../x", ".hidden", "a/b", "a b"])
def test_names_that_leave_the_directory_are_refused(run: Run, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a stage"):
        run.write_trajectories(name, 1, [])


def test_failing_disk_loses_nothing_earlier(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.append_metrics("rl", 1, {"x": 1})
    run.write_trajectories("rl", 1, [make_row("old")])

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", refuse)
    for action in (
        lambda: run.write_trajectories("rl", 1, [make_row("new")]),
        lambda: run.truncate_metrics("rl", 0),
        lambda: run.finish_eval("base", [make_row("a")], {}),
    ):
        with pytest.raises(StoreError, match="disk is full. Free some space and run the same command again"):
            action()
    assert run.read_trajectories("rl", 1) == [make_row("old")]
    assert [row["step"] for row in run.metrics()] == [1]
    assert not list(run.path.rglob(".tmp-*"))
    assert run.eval_summaries() == {}


FILL_A_SMALL_DISK = """
import sys
from tests_store_helpers import Settings, make_row
from rorqual.store.files import StoreError
from rorqual.store.run import Run

def save(directory):
    (directory / "w").write_bytes(b"w" * 30_000)

with Run.open(sys.argv[1] + "/run", Settings(), {"run": 1}) as run:
    refused = set()
    for step in range(10_000):
        actions = {
            "metrics": lambda: run.append_metrics("rl", step, {"text": "x" * 3000}),
            "trajectories": lambda: run.write_trajectories("rl", step, [make_row(str(step))]),
            "checkpoint": lambda: run.write_checkpoint("rl", step, save, keep=1000),
        }
        for name, action in actions.items():
            try:
                action()
            except StoreError as error:
                assert "The disk is full" in str(error), error
                refused.add(name)
        if len(refused) == 3:
            break
    assert refused == {"metrics", "trajectories", "checkpoint"}
    rows = run.metrics("rl")
    assert [row["step"] for row in rows] == list(range(len(rows)))
    for step in run.trajectory_steps("rl"):
        assert run.read_trajectories("rl", step) == [make_row(str(step))]
    assert run.latest_checkpoint("rl").step > 3
    assert not list(run.path.rglob(".tmp-*"))
    print("survived", len(rows))
"""


def test_full_disk_for_real(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "tests_store_helpers.py")
    (tmp_path / "fill.py").write_text(FILL_A_SMALL_DISK)
    (tmp_path / "disk").mkdir()
    mount = (
        f"mount -t tmpfs -o size=1m tmpfs {tmp_path}/disk && exec {sys.executable} {tmp_path}/fill.py {tmp_path}/disk"
    )
    answer = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount],
        capture_output=True,
        text=True,
        check=False,
    )
    if "mount" in answer.stderr or "unshare" in answer.stderr:
        pytest.skip(f"a small disk cannot be mounted here: {answer.stderr.strip()}")
    assert "survived" in answer.stdout, answer.stderr


WRITE_UNTIL_KILLED = """
import sys
from pathlib import Path
from tests_store_helpers import Settings, make_row
from rorqual.store.run import Run

run = Run.open(sys.argv[1], Settings(), {"run": 1})
checkpoint = run.latest_checkpoint("rl")
step = checkpoint.step if checkpoint else 0
if checkpoint:
    assert (Path(checkpoint.path) / "w").read_bytes() == str(step).encode() * 5000
run.rewind("rl", step)
print("ready", step, flush=True)
while True:
    step += 1
    run.write_trajectories("rl", step, [make_row(str(step))])
    run.append_metrics("rl", step, {"text": "x" * 2000})
    run.append_eval_sample("held_out", make_row(str(step)))
    if step % 3 == 0:
        run.write_checkpoint("rl", step, lambda p: (p / "w").write_bytes(str(step).encode() * 5000), keep=2)
"""


def check_consistent(path: Path) -> None:
    with Run.open(path, Settings(), {"run": 1}) as run:
        steps = [row["step"] for row in run.metrics("rl")]
        assert steps == list(range(1, len(steps) + 1))
        for step in run.trajectory_steps("rl"):
            assert run.read_trajectories("rl", step) == [make_row(str(step))]
        checkpoint = run.latest_checkpoint("rl")
        assert (checkpoint.step if checkpoint else 0) <= len(steps)
        assert len(run.trajectory_steps("rl")) in (len(steps), len(steps) + 1)
        assert all(row.trajectory.task_id == "t" for row in run.read_eval("held_out"))
        assert not list(path.rglob(".tmp-*"))


def wait_for_checkpoint_after(path: Path, step: int) -> None:
    deadline = time.monotonic() + 60.0
    while not any(int(found.name[5:]) > step for found in path.glob("checkpoints/rl/step_??????")):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_at_random_moments_the_run_stays_consistent(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "tests_store_helpers.py")
    (tmp_path / "write.py").write_text(WRITE_UNTIL_KILLED)
    dice = random.Random(5)
    resumed_from = []
    for round_number in range(8):
        command = [sys.executable, str(tmp_path / "write.py"), str(tmp_path / "run")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            said = process.stdout.readline().split()
            assert said[0] == "ready"
            resumed_from.append(int(said[1]))
            if round_number % 2:
                wait_for_checkpoint_after(tmp_path / "run", resumed_from[-1])
            time.sleep(dice.uniform(0.0, 0.08))
            process.kill()
        check_consistent(tmp_path / "run")
    assert resumed_from == sorted(resumed_from)
    assert len(set(resumed_from)) >= 4


def test_store_imports_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import rorqual.store.run"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_are_told_apart() -> None:
    assert make_row("a") != make_row("b")
    assert msgspec.structs.replace(make_row("a"), advantage=None) != make_row("a")


def test_evaluations_keep_their_order_when_a_run_is_copied(run: Run) -> None:
    for name in ("base", "rl", "control"):
        run.finish_eval(name, [make_row(name)], {"name": name})
    run.finish_eval("base", [make_row("base")], {"name": "base again"})
    for age, name in enumerate(("rl", "base", "control")):
        os.utime(run.path / "evals" / f"{name}.json", (age, age))
    assert list(Run.read(run.path).eval_summaries()) == ["base", "rl", "control"]


def test_selection_maps_are_whole_or_absent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.read_selection_maps("sparse") is None
    run.write_selection_maps("sparse", {"edges": [0, 4], "layers": []})
    assert Run.read(run.path).read_selection_maps("sparse") == {"edges": [0, 4], "layers": []}

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="The disk is full"):
        patch.setattr(os, "replace", full)
        run.write_selection_maps("sparse", {"edges": [0, 9]})
    assert run.read_selection_maps("sparse") == {"edges": [0, 4], "layers": []}
    with pytest.raises(StoreError, match="open for reading only"):
        Run.read(run.path).write_selection_maps("sparse", {})
    with pytest.raises(ValueError, match="cannot name"):
        run.write_selection_maps("../sparse", {})
