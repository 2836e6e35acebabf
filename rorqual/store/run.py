"""A run directory: everything a run leaves behind, append-only, safe against being killed, readable by other tools.

manifest.json                         resolved config, versions, seeds, git state, command; one entry a resumption
metrics.jsonl                         one JSON object a line: stage, step, and flat keys such as "reward/accuracy"
trajectories/<stage>/step_000012.parquet
evals/<name>.plan.json                all that the samples depend on: protocol, seed, digests of weights and problems
evals/<name>.partial.jsonl            the samples so far, while the evaluation is being made
evals/<name>.parquet, <name>.json     every sample; {"place", "summary"}: its place among the evaluations, its figures
selection_maps/<label>.json           where one held-out document's attention looks, and what the indexers select
checkpoints/<stage>/step_000012/      see checkpoints.py
tokenizer/tokenizer.json              so that a report can show text
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from rorqual.config import resolved
from rorqual.records import Record, from_json, to_json
from rorqual.store import checkpoints
from rorqual.store.checkpoints import Checkpoint, step_name
from rorqual.store.files import DirectoryLock, StoreError, disk_errors, remove_temporaries, write_atomic
from rorqual.store.provenance import describe_session
from rorqual.store.tables import ScoredTrajectory, read_table, write_table

Metrics = dict[str, Any]


class Run:
    """One run directory. `Run.open` writes it, holding its lock; `Run.read` only looks. Use either with `with`.

    Names of stages and evaluations become file names: letters, digits, "_", "-" and "." only.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], lock: DirectoryLock | None) -> None:
        self.path = path
        self.manifest = manifest
        self._lock = lock

    # ------------------------------------------------------------------------------------------------ opening

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: Record,
        seeds: Mapping[str, int],
        command: Sequence[str] = (),
        recipe: str = "",
    ) -> Self:
        """Start a run, or resume the one that is there, repairing what an interruption left behind.

        Raises: StoreError when another process writes it, when the directory holds something else, or when it was
        started with other settings; the message lists the keys that differ.
        """
        root = Path(path)
        with disk_errors("create", root):
            root.mkdir(parents=True, exist_ok=True)
        if not (root / "manifest.json").exists() and any(item.name not in _OWN_LEFTOVERS for item in root.iterdir()):
            raise StoreError(f"{root} has files in it but is not a run; choose an empty or new directory with --out.")
        lock = DirectoryLock(root)
        try:
            remove_temporaries(root)
            checkpoints.restore_replaced(root / "checkpoints")
            for lines in (root / "metrics.jsonl", *root.glob("evals/*.partial.jsonl")):
                _repair_last_line(lines)
            session = describe_session(command)
            manifest = _start_or_resume(root, recipe, resolved(config), dict(seeds), session)
        except BaseException:
            lock.release()
            raise
        return cls(root, manifest, lock)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Look at a run, also while another process writes it. Raises: StoreError when there is no run."""
        root = Path(path)
        return cls(root, _read_manifest(root), None)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config that the run was started with."""
        config: dict[str, Any] = self.manifest["config"]
        return config

    # ------------------------------------------------------------------------------------------------ metrics

    def append_metrics(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Add one line. Values are numbers, text, booleans or None; NaN and infinities become "nan" and "inf"."""
        line = msgspec.json.encode({"stage": stage, "step": step, **{k: _finite(v) for k, v in values.items()}}) + b"\n"
        _append_line(self._writable("metrics.jsonl"), line)

    def metrics(self, stage: str | None = None) -> list[Metrics]:
        """The lines of one stage, or of all, in the order written. A line cut short by a crash is left out."""
        rows = _read_lines(self.path / "metrics.jsonl")
        return [row for row in rows if stage is None or row["stage"] == stage]

    def truncate_metrics(self, stage: str, step: int) -> None:
        """Drop the lines of `stage` after `step`, so that a stage resumed there leaves no step twice."""
        path = self._writable("metrics.jsonl")
        rows = _read_lines(path)
        kept = [row for row in rows if row["stage"] != stage or row["step"] <= step]
        if len(kept) < len(rows):
            write_atomic(path, lambda file: file.writelines(msgspec.json.encode(row) + b"\n" for row in kept))

    def rewind(self, stage: str, step: int) -> None:
        """Forget the metrics and trajectories of `stage` after `step`: on resuming, the step of the checkpoint."""
        self.truncate_metrics(stage, step)
        for later in self.trajectory_steps(stage):
            if later > step:
                self._trajectory_path(stage, later).unlink()

    # ------------------------------------------------------------------------------------------- trajectories

    def write_trajectories(self, stage: str, step: int, rows: Sequence[ScoredTrajectory]) -> Path:
        """Store one step's trajectories as one Parquet file, or nothing. Raises: StoreError when the disk refuses."""
        path = self._writable(str(self._trajectory_path(stage, step).relative_to(self.path)))
        write_atomic(path, lambda file: write_table(file, rows, stage, step))
        return path

    def read_trajectories(self, stage: str, step: int) -> list[ScoredTrajectory]:
        """What `write_trajectories` stored. Raises: StoreError when that step has none, or is damaged."""
        path = self._trajectory_path(stage, step)
        if not path.exists():
            steps = self.trajectory_steps(stage)
            held = f"steps {steps[0]} to {steps[-1]}" if steps else "none"
            raise StoreError(f"{self.path} has no trajectories of stage {stage} at step {step}; it has {held}.")
        return read_table(path)

    def trajectory_steps(self, stage: str) -> list[int]:
        """The steps of `stage` whose trajectories are stored, ascending."""
        return sorted(
            int(path.stem[5:]) for path in (self.path / "trajectories" / _checked(stage)).glob("step_*.parquet")
        )

    def stages(self) -> list[str]:
        """Every stage that has metrics, in the order in which each first appeared."""
        return list(dict.fromkeys(row["stage"] for row in self.metrics()))

    # --------------------------------------------------------------------------------------------- evaluations

    def begin_eval(self, name: str, plan: Mapping[str, Any]) -> None:
        """Start an evaluation, or go on with it. `plan`, JSON values, is all that its samples depend on.

        Raises: StoreError when samples of another plan stand under this name; the message lists what differs.
        """
        path = self._writable(f"evals/{_checked(name)}.plan.json")
        plan = json.loads(json.dumps(plan))
        if path.exists():
            _check_same_settings(path, json.loads(path.read_bytes()), dict(plan), "settings")
        else:
            write_atomic(path, lambda file: file.write(_pretty(plan)))

    def append_eval_sample(self, name: str, row: ScoredTrajectory) -> None:
        """Store one sample of an evaluation that is under way; it survives a crash from here on."""
        _append_line(self._writable(f"evals/{_checked(name)}.partial.jsonl"), to_json(row) + b"\n")

    def read_eval(self, name: str) -> list[ScoredTrajectory]:
        """All samples of an evaluation, or those made so far; empty when it has not begun."""
        finished = self.path / "evals" / f"{_checked(name)}.parquet"
        if finished.exists():
            return read_table(finished)
        partial = self.path / "evals" / f"{name}.partial.jsonl"
        return [from_json(line, ScoredTrajectory) for line in _whole_lines(partial)]

    def finish_eval(self, name: str, rows: Sequence[ScoredTrajectory], summary: Mapping[str, Any]) -> None:
        """Seal an evaluation: every sample as Parquet, and its summary as JSON with its place among the others."""
        places = {each: number for number, each in enumerate(self.eval_summaries())}
        sealed = {"place": places.get(name, len(places)), "summary": dict(summary)}
        table = self._writable(f"evals/{_checked(name)}.parquet")
        write_atomic(table, lambda file: write_table(file, rows, name, 0))
        write_atomic(table.with_suffix(".json"), lambda file: file.write(_pretty(sealed)))
        table.with_suffix(".partial.jsonl").unlink(missing_ok=True)

    def eval_summaries(self) -> dict[str, dict[str, Any]]:
        """The summary of every finished evaluation, by name, in the order in which they were finished."""
        paths = [path for path in (self.path / "evals").glob("*.json") if not path.name.endswith(".plan.json")]
        sealed = {path.stem: json.loads(path.read_bytes()) for path in paths}
        return {name: sealed[name]["summary"] for name in sorted(sealed, key=lambda name: sealed[name]["place"])}

    # ------------------------------------------------------------------------------------------ selection maps

    def write_selection_maps(self, label: str, maps: Mapping[str, Any]) -> None:
        """Store the maps, JSON values, of the model that the metrics know as the stage `held_out_LABEL`."""
        path = self._writable(f"selection_maps/{_checked(label)}.json")
        write_atomic(path, lambda file: file.write(msgspec.json.encode(maps) + b"\n"))

    def read_selection_maps(self, label: str) -> dict[str, Any] | None:
        """What `write_selection_maps` stored, None where nothing is. Raises: StoreError for a damaged file."""
        path = self.path / "selection_maps" / f"{_checked(label)}.json"
        if not path.exists():
            return None
        try:
            maps: dict[str, Any] = msgspec.json.decode(path.read_bytes())
        except msgspec.DecodeError as error:
            raise StoreError(f"{path} is not JSON: {error}. Delete it and run the command again.") from error
        return maps

    # --------------------------------------------------------------------------------------------- checkpoints

    def write_checkpoint(self, stage: str, step: int, write: Callable[[Path], object], keep: int = 2) -> Path:
        """Have `write` fill a directory, then seal it and put it in place; the newest `keep` of the stage are kept.

        Metrics are flushed to the disk first, so that a checkpoint never knows of steps that the metrics lost.
        """
        root = self._writable(f"checkpoints/{_checked(stage)}")
        _sync_file(self.path / "metrics.jsonl")
        return checkpoints.write_checkpoint(root, step, write, keep)

    def latest_checkpoint(self, stage: str) -> Checkpoint | None:
        """The newest checkpoint of `stage` that verifies, or None. Raises: StoreError when every one is broken."""
        return checkpoints.latest_checkpoint(self.path / "checkpoints" / _checked(stage))

    # ------------------------------------------------------------------------------------------------- private

    def _trajectory_path(self, stage: str, step: int) -> Path:
        return self.path / "trajectories" / _checked(stage) / f"{step_name(step)}.parquet"

    def _writable(self, name: str) -> Path:
        if self._lock is None:
            raise StoreError(f"{self.path} is open for reading only; use Run.open to write to it.")
        return self.path / name


MAX_DIFFERENCES_SHOWN = 5
"""Settings that an error lists, one a line; of the others it says how many there are."""

_OWN_LEFTOVERS = {"lock", ".tmp-manifest.json"}


# ------------------------------------------------------------------------------------------------------------ manifest


def _read_manifest(root: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((root / "manifest.json").read_bytes())
    except FileNotFoundError:
        raise StoreError(
            f"{root} is not a run: it has no manifest.json. Give the directory that `rorqual run` made."
        ) from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{root / 'manifest.json'} cannot be read: {error}.") from error
    return manifest


def _start_or_resume(
    root: Path, recipe: str, config: dict[str, Any], seeds: dict[str, int], session: dict[str, Any]
) -> dict[str, Any]:
    path = root / "manifest.json"
    if path.exists():
        manifest = _read_manifest(root)
        _check_same_settings(root, {"recipe": manifest["recipe"]}, {"recipe": recipe}, "recipe")
        _check_same_settings(root, manifest["config"], config, "config")
        _check_same_settings(root, manifest["seeds"], seeds, "seeds")
        manifest["sessions"].append(session)
    else:
        manifest = {"recipe": recipe, "config": config, "seeds": seeds, "sessions": [session]}
    write_atomic(path, lambda file: file.write(_pretty(manifest)))
    return manifest


def _check_same_settings(root: Path, before: dict[str, Any], now: dict[str, Any], what: str) -> None:
    old, new = dict(_flatten(before)), dict(_flatten(now))
    absent = "(absent)"
    differing = [
        f"{key}: {old.get(key, absent)!r} then, {new.get(key, absent)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    ]
    if differing:
        shown = differing[:MAX_DIFFERENCES_SHOWN]
        if len(differing) > len(shown):
            shown.append(f"and {len(differing) - len(shown)} more")
        lines = "".join(f"\n  {each}" for each in shown)
        raise StoreError(
            f"{root} was started with other {what}:{lines}\nTo go on with it, give the same; to try the new ones, "
            "choose another name or directory (--out)."
        )


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not value or not isinstance(value, dict | list):
        yield prefix, value
    for key, inner in items:
        yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))


def _pretty(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


# --------------------------------------------------------------------------------------------------------------- lines


def _append_line(path: Path, line: bytes) -> None:
    with disk_errors("append to", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            length = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError("the line was cut short; the disk may be full: No space left on device")
            except OSError:
                file.truncate(length)
                raise


def _whole_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    return path.read_bytes().split(b"\n")[:-1]


def _read_lines(path: Path) -> list[Metrics]:
    try:
        return [msgspec.json.decode(line) for line in _whole_lines(path)]
    except msgspec.DecodeError as error:
        raise StoreError(
            f"{path} holds a line that is not JSON: {error}. Delete that line and run the command again."
        ) from error


def _repair_last_line(path: Path) -> None:
    """Cut off a last line that has no end, so that the next line does not run into it."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def _sync_file(path: Path) -> None:
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    return (
        str(value) if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))) else value
    )


def _checked(name: str) -> str:
    if not name or name.startswith(".") or not all(c.isalnum() or c in "_-." for c in name):
        raise ValueError(f'"{name}" cannot name a stage or an evaluation: use letters, digits, "_", "-" and "." only.')
    return name
