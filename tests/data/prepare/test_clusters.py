"""The same preparation on real clusters of one node: Ray, and Slurm with its daemons run from a private directory."""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from conftest import run_cli
from mobillama.config import to_yaml
from mobillama.data.prepare.pipeline import prepare
from mobillama.recipe import CleanConfig

pytestmark = pytest.mark.cluster

CLEAN = CleanConfig(repair=True, exact_duplicates=True, near_duplicates=True)
SLURM_DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
SLURM = ("--executor", "slurm", "--slurm-partition", "all", "--memory-gb", "1")


@pytest.fixture(scope="module")
def recipe(prepare_recipe, tmp_path_factory) -> Path:
    """The recipe that tests share, with cleaning on and documents of one source in another, in a path with spaces."""
    folder = tmp_path_factory.mktemp("with spaces ")
    books = Path(prepare_recipe.sources["books"].path).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "books.jsonl").write_text("".join([*books, *books[:5]]), encoding="utf-8")
    sources = {name: dataclasses.replace(source, clean=CLEAN) for name, source in prepare_recipe.sources.items()}
    sources["books"] = dataclasses.replace(sources["books"], path=str(folder / "books.jsonl"))
    prepare(dataclasses.replace(prepare_recipe, sources=sources), folder / "expected")
    (folder / "recipe.yaml").write_text(to_yaml(dataclasses.replace(prepare_recipe, sources=sources)), encoding="utf-8")
    return folder / "recipe.yaml"


@pytest.fixture
def bad_recipe(recipe, tmp_path) -> Path:
    """The same with a line that is no JSON."""
    lines = (recipe.parent / "books.jsonl").read_text(encoding="utf-8")
    (tmp_path / "books.jsonl").write_text(lines + "{\n", encoding="utf-8")
    text = recipe.read_text(encoding="utf-8").replace(str(recipe.parent / "books.jsonl"), str(tmp_path / "books.jsonl"))
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    return tmp_path / "recipe.yaml"


def expected(recipe: Path) -> bytes:
    return (recipe.parent / "expected" / "manifest.json").read_bytes()


def start(recipe: Path, out: Path, *words: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mobillama", "data", "prepare", str(recipe), "--out", str(out), *words]
    return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"no {what} within {seconds} s"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def daemon(*words: object, log: Path, environment: dict[str, str]) -> Iterator[None]:
    """Run a program in the foreground of a group of its own while the block runs."""
    with open(log, "wb") as file:
        process = subprocess.Popen(
            list(map(str, words)), stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def short_directory() -> Iterator[Path]:
    """Yield a directory whose path is short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="mobillama-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def ray_environment() -> Iterator[dict[str, str]]:
    """Environment in which Ray keeps to a directory of its own and needs no token."""
    pytest.importorskip("ray")
    with short_directory() as folder:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        yield {**kept, "RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def ray_cluster(ray_environment) -> Iterator[dict[str, str]]:
    """Environment of a running Ray cluster of one node."""
    address = f"127.0.0.1:{free_port()}"
    program = Path(sys.executable).with_name("ray")
    command = [program, "start", "--head", "--block", f"--port={address.rpartition(':')[2]}", "--num-cpus=2"]
    with short_directory() as folder:
        command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={folder}"]
        log = folder / "log"
        with daemon(*command, log=log, environment=ray_environment):
            wait_for(lambda: "Ray runtime started" in log.read_text(), "Ray")
            yield {**ray_environment, "RAY_ADDRESS": address}


def test_ray_started_by_the_command(recipe, ray_environment, tmp_path):
    out = tmp_path / "out"
    done = run_cli("data", "prepare", recipe, "--out", out, "--executor", "ray", "--memory-gb", 1, env=ray_environment)
    assert done.returncode == 0, done.stderr
    assert (out / "manifest.json").read_bytes() == expected(recipe)


def test_ray_cluster(recipe, bad_recipe, ray_cluster, tmp_path):
    out, words = tmp_path / "out", ("--executor", "ray", "--memory-gb", "1")
    done = run_cli("data", "prepare", bad_recipe, "--out", out, *words, env=ray_cluster)
    assert done.returncode == 4
    assert f"{tmp_path}/books.jsonl:36: not valid JSON" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    process = start(recipe, out, *words, environment=ray_cluster)
    wait_for(lambda: any(tmp_path.glob("out.partial/stages/*/completions/*")), "finished task")
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    done = run_cli("data", "prepare", recipe, "--out", out, *words, env=ray_cluster)
    assert done.returncode == 0, done.stderr
    assert (out / "manifest.json").read_bytes() == expected(recipe)


def slurm_conf(folder: Path, node: str) -> str:
    return f"""
ClusterName=test
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
MpiDefault=none
ReturnToService=2
KillWait=2
MinJobAge=2
NodeName={node} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes={node} Default=YES State=UP
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """Environment of a running Slurm cluster of one node."""
    programs = {name: shutil.which(name, path=SBIN) for name in SLURM_DAEMONS}
    if not all(programs.values()) or os.geteuid() != 0:
        pytest.skip("needs munged, slurmctld and slurmd, and root to run them")
    with short_directory() as folder, ExitStack() as daemons:
        node = socket.gethostname().partition(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(slurm_conf(folder, node))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # asked for, though nothing here uses it
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        munge = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        commands = {
            "munged": ["--foreground", "--force", *(f"--{k}={folder}/munge.{v}" for k, v in munge.items())],
            "slurmctld": ["-D", "-c"],
            "slurmd": ["-D", "-c", "-N", node],
        }
        for name, words in commands.items():
            daemons.enter_context(daemon(programs[name], *words, log=folder / f"{name}.out", environment=environment))
            if name == "munged":
                wait_for((folder / "munge.socket").exists, "munge")
        wait_for(lambda: ask(environment, "sinfo", "--noheader", "--format=%T") == "idle", "idle node")
        yield environment
        ask(environment, "scancel", f"--user={getpass.getuser()}")
        wait_for(lambda: queue(environment) == "", "empty queue")


def ask(environment: dict[str, str], *words: str) -> str:
    return subprocess.run(words, env=environment, capture_output=True, text=True).stdout.strip()


def queue(environment: dict[str, str]) -> str:
    return ask(environment, "squeue", "--noheader", "--format=%i %T")


def test_slurm(recipe, slurm, tmp_path):
    out = tmp_path / "out of Slurm"
    done = run_cli("data", "prepare", recipe, "--out", out, *SLURM, env=slurm)
    assert done.returncode == 0, done.stderr
    assert (out / "manifest.json").read_bytes() == expected(recipe)
    assert queue(slurm) == ""
    print(json.loads((out / "preparation.json").read_text())["seconds"])


def test_errors_of_slurm_and_of_its_tasks_come_through(recipe, bad_recipe, slurm, tmp_path):
    out = tmp_path / "out"
    done = run_cli("data", "prepare", bad_recipe, "--out", out, *SLURM, env=slurm)
    assert done.returncode == 4
    assert f"{tmp_path}/books.jsonl:36: not valid JSON" in done.stderr.splitlines()[-1]
    done = run_cli("data", "prepare", recipe, "--out", out, *SLURM, "--slurm-partition", "absent", env=slurm)
    assert done.returncode == 2
    assert "invalid partition specified: absent" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("mobillama: --executor slurm: sbatch refused the job")
    process = start(recipe, out, *SLURM, environment=slurm)
    logs = tmp_path / "out.partial" / "stages" / "read and tokenise" / "slurm_logs"
    wait_for(lambda: any(path.stat().st_size for path in logs.glob("*")), "words of a job")
    ask(slurm, "scancel", f"--user={getpass.getuser()}")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "tasks of stage 'read and tokenise' were ended from outside" in said.splitlines()[-1]


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGKILL])
def test_a_slurm_preparation_that_was_ended_goes_on(recipe, slurm, tmp_path, ended_by):
    out = tmp_path / "out"
    process = start(recipe, out, *SLURM, "--workers", "2", environment=slurm)
    wait_for(lambda: "RUNNING" in queue(slurm), "running job")
    os.killpg(process.pid, ended_by)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    if ended_by == signal.SIGINT:
        assert process.returncode == 130
        assert queue(slurm) == ""
    done = run_cli("data", "prepare", recipe, "--out", out, *SLURM, "--workers", "2", env=slurm)
    assert done.returncode == 0, done.stderr
    assert (out / "manifest.json").read_bytes() == expected(recipe)
