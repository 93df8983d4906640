"""Stages: the same tasks run on this machine's cores, a Slurm cluster or a Ray cluster, by datatrove's executors.

A task that is done leaves a completion marker and is never run again; one that fails leaves a record of its error, which
becomes the error of the stage. The number of tasks comes from the input alone, never from the workers.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from mobillama.errors import CorruptDataError, UsageError

Progress = Callable[[str, float, float], None]

_POLL_SECONDS = 0.1
_SLURM_POLL_SECONDS = 2.0
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_ERRORS = {error.__name__: error for error in (UsageError, CorruptDataError)}


@dataclass(frozen=True)
class Execution:
    """Where tasks run. Nothing here changes what they make."""

    executor: Literal["local", "slurm", "ray"] = "local"
    """local: this machine's cores. slurm: array jobs. ray: the cluster of RAY_ADDRESS, or one started here."""
    workers: int = 0
    """Tasks at a time; 0: one for each core of this machine, and with slurm and ray as many as the cluster runs."""
    slurm_partition: str = ""
    """Slurm partition to submit to."""
    slurm_time: str = "24:00:00"
    """Slurm time limit of a task."""
    memory_gb: int = 2
    """Memory asked of Slurm or Ray for a task, in GiB."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UsageError(f"--workers: {self.workers} is negative; 0 means all cores")
        if self.executor == "slurm" and not self.slurm_partition:
            raise UsageError("--slurm-partition: name the Slurm partition to run on ('sinfo' lists them)")
        if self.executor == "slurm" and shutil.which("sbatch") is None:
            raise UsageError("--executor slurm: there is no 'sbatch' here; run this on a node that submits jobs")

    @property
    def local_workers(self) -> int:
        """Processes on this machine."""
        return self.workers or len(os.sched_getaffinity(0))


def run_stage(
    work: Path,
    name: str,
    steps: list[PipelineStep],
    sizes: Sequence[float],
    execution: Execution,
    progress: Progress,
) -> None:
    """Run the tasks of a stage that are not done yet, and wait for them.

    Args:
        work: the preparation's working directory; the stage keeps its markers in ``work/stages/NAME``.
        name: of the stage.
        steps: datatrove's pipeline of a task.
        sizes: an entry for each task: how much of the stage's progress it is.
        execution: where to run.
        progress: told (stage, done, total) as tasks report.

    Raises:
        UsageError, CorruptDataError: as the first task that failed said.
        RuntimeError: a task failed otherwise; the text holds its traceback.
    """
    folder = work / "stages" / name
    total = float(sum(sizes))
    if not sizes or (folder / "done").exists():
        progress(name, total, total)
        return
    for part in ("completions", "progress"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "failures", ignore_errors=True)
    (folder / "failures").mkdir()
    executor = _executor(folder, name, steps, len(sizes), execution)
    logger.disable("datatrove")
    crash: list[BaseException] = []

    def run() -> None:
        try:
            executor.run()
        except BaseException as error:  # what a task raised stands in its record, this is for all else
            crash.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while True:
        running = thread.is_alive() or (isinstance(executor, SlurmPipelineExecutor) and _slurm_is_running(executor))
        _raise_failure(folder)
        done = {int(path.name) for path in (folder / "completions").iterdir()}
        progress(name, _done(folder, sizes, done), total)
        if len(done) == len(sizes):
            break
        if not running:
            reason = f": {crash[0]}" if crash else " without a word; see its scheduler's log"
            raise RuntimeError(f"{len(sizes) - len(done)} of {len(sizes)} tasks of stage '{name}' ended{reason}")
        time.sleep(_SLURM_POLL_SECONDS if execution.executor == "slurm" else _POLL_SECONDS)
    thread.join()
    (folder / "done").touch()


class Beat:
    """Tells the waiting stage how far a task is, at most once a second."""

    def __init__(self, work: str, stage: str, rank: int) -> None:
        self._path = Path(work) / "stages" / stage / "progress" / f"{rank:05d}"
        self._last = time.monotonic()

    def __call__(self, done: float) -> None:
        """Report ``done`` in the unit of the stage's sizes."""
        if time.monotonic() - self._last > 1:
            self._last = time.monotonic()
            self._path.write_text(str(done))


def _executor(folder: Path, name: str, steps: list[PipelineStep], tasks: int, execution: Execution) -> PipelineExecutor:
    logs = str(folder.absolute())
    if execution.executor == "slurm":
        return _Slurm(
            steps,
            tasks,
            time=execution.slurm_time,
            partition=execution.slurm_partition,
            mem_per_cpu_gb=execution.memory_gb,
            workers=execution.workers or -1,
            job_name=f"mobillama-{name}",
            qos="",
            env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
            logging_dir=logs,
        )
    if execution.executor == "ray":
        try:
            import ray
        except ModuleNotFoundError:
            raise UsageError("--executor ray: needs Ray: pip install ray") from None
        ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        workers = execution.workers or -1
        return _Ray(steps, tasks, workers=workers, mem_per_cpu_gb=execution.memory_gb, logging_dir=logs)
    return _Local(steps, tasks, workers=min(execution.local_workers, tasks), logging_dir=logs)


class _Recorded:
    """An executor whose tasks stay silent, die with the process that waits for them, and leave a record when they fail."""

    logging_dir: Any

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        logger.disable("datatrove")
        try:
            return super()._run_for_rank(rank, local_rank, node_rank)  # type: ignore[misc]
        except Exception as error:
            record = {"type": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
            if isinstance(error, OSError):
                record["path"], record["reason"] = error.filename, error.strerror
            with self.logging_dir.open(f"failures/{rank:05d}.json", "w") as file:
                json.dump(record, file)
            raise


class _Local(_Recorded, LocalPipelineExecutor):
    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        if threading.current_thread() is threading.main_thread():  # a worker process of its own
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        return super()._run_for_rank(rank, local_rank, node_rank)


class _Ray(_Recorded, RayPipelineExecutor):
    pass


class _Slurm(_Recorded, SlurmPipelineExecutor):
    def launch_merge_stats(self) -> None:
        """Start no second job for statistics: the ledger holds them."""


def _done(folder: Path, sizes: Sequence[float], done: set[int]) -> float:
    amount = sum(sizes[rank] for rank in done)
    for path in (folder / "progress").iterdir():
        if int(path.name) not in done:
            amount += min(float(path.read_text() or 0), sizes[int(path.name)])
    return amount


def _raise_failure(folder: Path) -> None:
    for path in sorted((folder / "failures").glob("*.json")):
        try:
            record = json.loads(path.read_text())
        except json.JSONDecodeError:  # being written
            continue
        if record["type"] in _ERRORS:
            raise _ERRORS[record["type"]](record["message"])
        if record.get("reason"):
            raise UsageError(f"{record['path']}: {record['reason']}; free space, mend permissions, then run this again")
        raise RuntimeError(f"task {path.stem} of stage '{folder.name}' failed\n{record['traceback']}")


def _slurm_is_running(executor: SlurmPipelineExecutor) -> bool:
    if executor.job_id in (None, -1):
        return False
    listed = subprocess.run(["squeue", "-h", "-j", str(executor.job_id)], capture_output=True, text=True)  # noqa: S603, S607
    return listed.returncode == 0 and bool(listed.stdout.strip())
