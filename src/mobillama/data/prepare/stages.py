"""Stages: the same tasks run on this machine's cores, a Slurm cluster or a Ray cluster, by datatrove's executors.

A task is a rank of a pipeline of datatrove's steps. One that is done leaves a completion marker and is never run again; the
error of the first that fails ends the stage. The number of tasks comes from the input alone, never from the workers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import Any, Literal

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats
from loguru import logger

from mobillama.errors import CorruptDataError, MobiLlamaError, UsageError
from mobillama.record.files import write_json

Progress = Callable[[str, float, float], None]

_WATCH_SECONDS = 0.2
_SLURM_POLL_SECONDS = 1.0
_CANCEL_SECONDS = 30.0
_SLURM_JOBS = 1000  # a cluster takes arrays of 1,000 unless it was set up otherwise
_RAY_TASKS = 4096  # handed to Ray at a time
_ERRORS: dict[str, type[Exception]] = {error.__name__: error for error in (UsageError, CorruptDataError, RuntimeError)}


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
    """Slurm time limit of a job, which does its share of a stage's tasks."""
    memory_gb: int = 2
    """Memory asked of Slurm or Ray for a task, in GiB."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UsageError(f"--workers: {self.workers} is negative; 0 means all cores")
        if self.executor != "slurm" and self.slurm_partition:
            raise UsageError("--slurm-partition: has no effect without --executor slurm")
        if self.executor == "slurm" and not self.slurm_partition:
            raise UsageError("--slurm-partition: name the Slurm partition to run on ('sinfo' lists them)")
        if self.executor == "ray" and find_spec("ray") is None:
            raise UsageError("--executor ray: Ray is not installed; pip install 'mobillama[ray]'")
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
        progress: told (stage, done, total) as tasks report, from a thread of its own.

    Raises:
        UsageError, CorruptDataError: as the first task that failed said; or tasks were killed.
        RuntimeError: a task failed otherwise; the text holds its traceback.
    """
    folder, total = work.absolute() / "stages" / name, float(sum(sizes))
    if sizes and not (folder / "done").exists():
        for part in ("completions", "progress"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        logger.disable("datatrove")
        with _watched(folder, sizes, lambda amount: progress(name, amount, total)):
            _EXECUTORS[execution.executor](folder, steps, len(sizes), execution).run()
        (folder / "done").touch()
    progress(name, total, total)


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


@contextmanager
def _watched(folder: Path, sizes: Sequence[float], report: Callable[[float], None]) -> Iterator[None]:
    """Report how far the tasks are while the block runs."""
    ended = threading.Event()

    def watch() -> None:
        pause = 0.0
        while not ended.wait(pause):
            started = time.monotonic()
            amount = _amount(folder, sizes)
            if amount < sum(sizes):
                report(amount)
            pause = max(_WATCH_SECONDS, 20 * (time.monotonic() - started))  # many markers take long to list

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _amount(folder: Path, sizes: Sequence[float]) -> float:
    done = {int(path.name) for path in (folder / "completions").iterdir()}
    amount = sum(sizes[rank] for rank in done)
    for path in (folder / "progress").iterdir():
        if int(path.name) not in done:
            amount += min(float(path.read_text() or 0), sizes[int(path.name)])
    return amount


class _Told:
    """An executor whose tasks say nothing on the terminal; what goes wrong is an error whose message tells it all."""

    logging_dir: Any

    @property
    def folder(self) -> Path:
        return Path(self.logging_dir.path)

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        logger.disable("datatrove")
        try:  # not Ray's way to do it, which logs in a directory of /tmp that belongs to who came first
            return PipelineExecutor._run_for_rank(self, rank, local_rank, node_rank)
        except MobiLlamaError:
            raise
        except OSError as error:
            where = error.filename or self.folder.parents[1]
            reason = f"{where}: {error.strerror}" if error.strerror else str(error)
            raise UsageError(f"{reason}; free space or mend permissions, then run this again") from None
        except Exception:
            said = f"task {rank} of stage '{self.folder.name}' failed\n{traceback.format_exc()}"
            raise RuntimeError(said) from None


class _Local(_Told, LocalPipelineExecutor):
    """datatrove's local executor, on processes that end with this one and whose death is noticed.

    Its own pool waits for ever for a task whose worker the system has killed, and leaves processes behind when this one
    is killed. Here the only link to a worker is a pipe, which breaks with either end.
    """

    def run(self) -> None:
        ranks = iter(self.get_incomplete_ranks())
        if self.workers == 1:
            for rank in ranks:
                self._run_for_rank(rank)
            return
        context = _worker_context()
        workers: dict[Any, Any] = {}
        try:
            with _ctrl_c_waits():
                for rank in itertools.islice(ranks, self.workers):
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_work, args=(self, theirs), daemon=True)
                    process.start()
                    workers[ours] = process
                    theirs.close()
                    ours.send(rank)
            busy = set(workers)
            while busy:
                worker: Any
                for worker in connection.wait(list(busy)):
                    if not self._hand_on(worker, ranks):
                        busy.remove(worker)
        finally:
            for process in workers.values():
                process.kill()
            for process in workers.values():
                process.join()

    def _hand_on(self, worker: Any, ranks: Iterator[int]) -> bool:
        """Raise what a worker has met, or give it the next task; tell whether there was one."""
        try:
            error = worker.recv()
            rank = None if error else next(ranks, None)
            if rank is not None:
                worker.send(rank)
        except (EOFError, OSError):
            raise UsageError(
                f"stage '{self.folder.name}': a worker process was killed, by the system if memory ran out; "
                "use fewer --workers, then run this again"
            ) from None
        if error:
            raise error
        return rank is not None


def _worker_context() -> Any:
    """Return a context whose processes have everything imported already, and leave Ctrl-C to this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mobillama.data.prepare.pipeline"])
    resource_tracker.ensure_running()  # here, because its start unblocks the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return context


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block: a worker that is told half of what it is to do prints a traceback."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears of signals
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def _work(executor: _Local, parent: Any) -> None:
    """Do one task after the other as a worker process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for each core
    with suppress(EOFError, OSError):  # the parent has ended
        while True:
            rank, error = parent.recv(), None
            try:
                executor._run_for_rank(rank)
            except Exception as raised:
                error = raised
            parent.send(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


class _Ray(_Told, RayPipelineExecutor):
    """datatrove's Ray executor, on tasks of Ray's.

    Its own run starts an actor and a pool of processes for each task, goes on where one has failed, and never ends after
    Ctrl-C.
    """

    def run(self) -> None:
        import ray

        ranks, this = iter(self.get_incomplete_ranks()), ray.put(self)
        do_task = ray.remote(num_cpus=1, memory=self.mem_per_cpu_gb << 30)(_do_ray_task)
        running = [do_task.remote(this, rank) for rank in itertools.islice(ranks, min(self.workers, _RAY_TASKS))]
        try:
            while running:
                (ended,), running = ray.wait(running)
                ray.get(ended)
                running += [do_task.remote(this, rank) for rank in itertools.islice(ranks, 1)]
        except BaseException as error:
            ray.shutdown()  # ends the tasks; to cancel them would at times crash this process
            if isinstance(error, ray.exceptions.RayTaskError):
                raise error.cause from None
            if isinstance(error, ray.exceptions.RayError):
                raise UsageError(f"--executor ray: {' '.join(str(error).split())}") from None
            raise


def _do_ray_task(executor: _Ray, rank: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    executor._run_for_rank(rank)


class _Slurm(_Told, SlurmPipelineExecutor):
    """datatrove's Slurm executor, which here waits for its jobs and takes them with it when it is stopped."""

    def run(self) -> None:
        if "SLURM_ARRAY_TASK_ID" in os.environ:  # within a job
            super().run()
            return
        self._cancel()  # jobs that outlived an earlier attempt write the same files
        for part in ("failures", "slurm_logs"):
            shutil.rmtree(self.folder / part, ignore_errors=True)
            (self.folder / part).mkdir()
        try:
            self.launch_job()
            while self.get_incomplete_ranks():
                queued = self._is_queued()  # asked before the records are read: who has ended has left his
                self._raise_failure()
                if not queued and (missing := self.get_incomplete_ranks()):
                    raise UsageError(
                        f"--executor slurm: {len(missing)} of {self.tasks} tasks of stage '{self.folder.name}' were ended "
                        f"from outside ({self._last_words()}); more --slurm-time or --memory-gb may help"
                    )
                time.sleep(_SLURM_POLL_SECONDS)
        except subprocess.CalledProcessError:
            raise UsageError("--executor slurm: sbatch refused the job; its reason stands above") from None
        except BaseException:
            self._cancel()
            raise

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            return super()._run_for_rank(rank, local_rank, node_rank)
        except Exception as error:  # a record for the process that waits
            write_json(self.folder / "failures" / f"{rank:05d}.json", [type(error).__name__, str(error)])
            raise

    def _raise_failure(self) -> None:
        for path in sorted((self.folder / "failures").glob("[0-9]*.json")):
            kind, message = json.loads(path.read_text(encoding="utf-8"))
            raise _ERRORS[kind](message)

    def _last_words(self) -> str:
        logs = sorted((self.folder / "slurm_logs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        lines = [line for path in logs for line in path.read_text(errors="replace").splitlines() if line.strip()]
        words = [line for line in lines if not line.startswith("+ ")]  # the script's own trace
        return words[-1] if words else "their logs do not say why"

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """Return datatrove's script, but with quotes: paths may have spaces, those of stages do."""
        quoted = {key: f'"{value}"' if value else value for key, value in sbatch_args.items()}
        command = shlex.join(["launch_pickled_pipeline", str(self.folder / "executor.pik")])
        return str(super().get_launch_file_contents(quoted, command))

    def launch_merge_stats(self) -> None:
        """Start no second job for statistics: the ledger holds them."""

    def _is_queued(self) -> bool:
        """Tell whether jobs wait or run; as long as Slurm does not answer, they may."""
        words = ["squeue", "--noheader", f"--name={self.job_name}"]
        listed = subprocess.run(words, capture_output=True, text=True)  # noqa: S603
        return listed.returncode != 0 or bool(listed.stdout.strip())

    def _cancel(self) -> None:
        if not self._is_queued():
            return
        subprocess.run(["scancel", f"--name={self.job_name}"], capture_output=True)  # noqa: S603, S607
        until = time.monotonic() + _CANCEL_SECONDS
        while self._is_queued() and time.monotonic() < until:
            time.sleep(_SLURM_POLL_SECONDS)


def _local(folder: Path, steps: list[PipelineStep], tasks: int, execution: Execution) -> PipelineExecutor:
    return _Local(steps, tasks, workers=min(execution.local_workers, tasks), logging_dir=str(folder))


def _ray(folder: Path, steps: list[PipelineStep], tasks: int, execution: Execution) -> PipelineExecutor:
    try:
        import ray
    except ModuleNotFoundError:
        raise UsageError("--executor ray: needs Ray: pip install 'mobillama[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise UsageError(f"--executor ray: {' '.join(str(error).split())}") from None
    workers = execution.workers or -1
    return _Ray(steps, tasks, workers=workers, mem_per_cpu_gb=execution.memory_gb, logging_dir=str(folder))


def _slurm(folder: Path, steps: list[PipelineStep], tasks: int, execution: Execution) -> PipelineExecutor:
    return _Slurm(
        steps,
        tasks,
        time=execution.slurm_time,
        partition=execution.slurm_partition,
        mem_per_cpu_gb=execution.memory_gb,
        workers=execution.workers or -1,
        job_name=f"mobillama-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}",
        qos="",
        env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
        tasks_per_job=-(-tasks // min(execution.workers or _SLURM_JOBS, _SLURM_JOBS)),
        with_srun=False,
        logging_dir=str(folder),
    )


_EXECUTORS = {"local": _local, "ray": _ray, "slurm": _slurm}
