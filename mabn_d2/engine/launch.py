"""One process for each GPU: started by Detectron2's launcher, torchrun or SLURM's srun.

torchrun and srun start the processes by themselves, each with its rank in the environment. Such
processes join one run; Detectron2's own launcher would start a run in each of them, and all runs would
write the same files.
"""

import logging
import multiprocessing
import os
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from .errors import ConfigError, on_one_rank, one_line_errors

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SLURM_PORT = 20000  # plus the job's id, so that two jobs of one machine do not meet

_logger = logging.getLogger(__name__)


class StartedProcess(NamedTuple):
    """A process that torchrun or srun has started as one of several."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int  # processes on this machine
    address: str  # of rank 0, host:port


def started_process(environment: Mapping[str, str] = os.environ) -> StartedProcess | None:
    """Return this process's place among those that torchrun or srun started; None if it is alone.

    Raises:
        ConfigError: for variables that contradict each other.
    """
    try:
        found = _from_torchrun(environment) or _from_slurm(environment)
    except KeyError as error:
        raise ConfigError(
            f"the environment looks like torchrun's or srun's but has no {error}: start the program "
            "with torchrun or srun, or unset RANK, WORLD_SIZE and SLURM_PROCID"
        ) from error
    except ValueError as error:
        raise ConfigError(f"the variables of torchrun or srun are wrong: {error}") from error
    if found and not (
        0 <= found.local_rank < found.local_size <= found.world_size
        and 0 <= found.rank < found.world_size
        and found.world_size % found.local_size == 0
    ):
        raise ConfigError(
            f"the variables of {found.launcher} contradict each other: rank {found.rank} of "
            f"{found.world_size}, local rank {found.local_rank} of {found.local_size}; start the same "
            "number of processes on each machine"
        )
    return found if found and found.world_size > 1 else None


def _from_torchrun(environment: Mapping[str, str]) -> StartedProcess | None:
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    get = lambda name: int(environment[name])  # noqa: E731
    return StartedProcess(
        "torchrun",
        get("RANK"),
        get("WORLD_SIZE"),
        get("LOCAL_RANK"),
        get("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else get("WORLD_SIZE"),
        f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}",
    )


def _from_slurm(environment: Mapping[str, str]) -> StartedProcess | None:
    # Of the step that srun started; a batch script itself has no step.
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
    if "SLURM_PROCID" not in environment or not tasks or int(tasks) == 1:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get(
        "SLURM_TASKS_PER_NODE", tasks
    )
    per_node = environment.get("SLURM_NTASKS_PER_NODE") or per_node
    host = environment.get("MASTER_ADDR") or (_first_host(nodes) if nodes else "127.0.0.1")
    job = int(environment.get("SLURM_JOB_ID", 0))
    port = environment.get("MASTER_PORT") or _SLURM_PORT + job % 20000
    return StartedProcess(
        "srun",
        int(environment["SLURM_PROCID"]),
        int(tasks),
        int(environment["SLURM_LOCALID"]),
        min(int(re.split(r"[(,]", per_node)[0]), int(tasks)),  # "4(x2)" is 4 on each of 2 nodes
        f"{host}:{port}",
    )


def _first_host(nodes: str) -> str:
    """Return the first host of a node list such as "gpu[03-05,7],login1"."""
    found = re.match(r"([^,\[]+)(\[([^\]]+)\])?", nodes)
    if found is None:
        raise ValueError(f"no host in the node list {nodes!r}")
    name, _, rest = found.groups("")
    return name + re.split("[,-]", rest)[0]


def count_processes(args: Namespace) -> int:
    """Return the number of training processes on all machines, for Detectron2's arguments."""
    started = started_process()
    return started.world_size if started else max(args.num_gpus, 1) * args.num_machines


def check_launch(
    num_gpus: int, num_machines: int = 1, machine_rank: int = 0, dist_url: str | None = None
) -> None:
    """Check the launch settings against each other, the environment and the machine.

    Raises:
        ConfigError: for settings that contradict each other, or more GPUs than there are.
    """
    if num_gpus < 0 or num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise ConfigError(
            f"--num-gpus {num_gpus}, --num-machines {num_machines}, --machine-rank {machine_rank}: "
            "give at least 0 GPUs, at least 1 machine, and a rank below the number of machines"
        )
    if num_gpus == 0 and num_machines > 1:
        raise ConfigError(
            f"--num-gpus 0 with --num-machines {num_machines} would be as many runs that never "
            "meet: use --num-gpus 1, which takes the CPU where there is no GPU"
        )
    if num_machines > 1 and dist_url == "auto":
        raise ConfigError(
            f"--dist-url auto with --num-machines {num_machines}: give the address of the first "
            "machine to all of them, such as tcp://HOST:PORT"
        )
    started = started_process()
    if started:
        machines = started.world_size // started.local_size
        if num_gpus not in (0, 1, started.local_size) or num_machines not in (1, machines):
            raise ConfigError(
                f"{started.launcher} has started {started.local_size} processes on each of "
                f"{machines} machines, but --num-gpus is {num_gpus} and --num-machines "
                f"{num_machines}: leave these out, or start the program without {started.launcher}"
            )
    processes = started.local_size if started else num_gpus
    there = torch.cuda.device_count()
    if processes > there > 0 and not (started and num_gpus == 0):
        asked = f"{started.launcher} starts" if started else "--num-gpus asks for"
        raise ConfigError(
            f"{asked} {processes} processes with a GPU each, but this machine has {there}: use at "
            "most as many, or hide the GPUs (CUDA_VISIBLE_DEVICES=-1) to train on the CPU"
        )


def launch(
    main: Callable[..., Any],
    num_gpus: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple = (),
    check: Callable[..., Any] | None = None,
) -> Any:
    """Run `main(*args)` in each process of a run.

    It is `detectron2.engine.launch`, with these differences:

    - Processes that torchrun or srun has started join one run.
    - A signal stops a run of several processes as it stops a run of one (`StopOnSignal`). The workers
      get the signal that this process gets. This process waits for them and exits with their status,
      128 + signal. Without this, it would end at once, and what takes its end for the end of the job
      would kill the workers while they write their checkpoint. A worker that exits by itself has said
      why; this process then exits too, without a traceback.

    Args:
        main: called in each process.
        num_gpus, num_machines, machine_rank, dist_url: as Detectron2's command line has them.
        args: arguments of `main` and `check`.
        check: called once on each machine, before any process runs `main`. Its error ends the run and
            is said once.
    """
    with one_line_errors():
        check_launch(num_gpus, num_machines, machine_rank, dist_url)
        started = started_process()
        if started is None and check is not None:
            check(*args)
    processes = started.local_size if started else num_gpus
    if processes > 1 and not torch.cuda.is_available() and (started is None or started.rank == 0):
        _logger.warning(f"there is no GPU: {processes} processes train on the CPU")
    if started:
        return _join(started, num_gpus, main, args, check)
    arguments = (main, num_gpus, num_machines, machine_rank, dist_url, args)
    if num_machines * num_gpus <= 1:  # main runs in this process
        return detectron2_launch(*arguments)
    before = {number: signal.signal(number, _forward) for number in SIGNALS}
    try:
        return detectron2_launch(*arguments)
    except ProcessExitedException as error:
        if error.exit_code <= 0:  # killed
            raise
        sys.exit(error.exit_code)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _join(
    started: StartedProcess,
    num_gpus: int,
    main: Callable[..., Any],
    args: tuple,
    check: Callable[..., Any] | None,
) -> Any:
    """Run `main` in this process, as one of those that torchrun or srun has started."""
    on_gpu = torch.cuda.is_available() and num_gpus > 0
    if on_gpu:
        torch.cuda.set_device(started.local_rank)
    join_group(started, "nccl" if on_gpu else "gloo")
    try:
        comm.create_local_process_group(started.local_size)
        comm.synchronize()
        if check is not None:
            with one_line_errors():
                on_one_rank(lambda: check(*args))
        return main(*args)
    finally:
        dist.destroy_process_group()


def join_group(started: StartedProcess, backend: str) -> None:
    """Join the process group of the processes that torchrun or srun has started."""
    if started.rank == 0:
        meet = f"{started.launcher}: {started.world_size} processes meet at {started.address}"
        if started.launcher == "srun" and "SLURM_STEP_ID" not in os.environ:
            # A batch script has the variables of its job, too: one process would wait without a word.
            _logger.warning(f"{meet}; if srun has not started them, start the program with srun")
        else:
            _logger.info(meet)
    # torchrun's agent already listens at the address; "env://" knows how to share it.
    by_environment = started.launcher == "torchrun"
    dist.init_process_group(
        backend,
        init_method="env://" if by_environment else f"tcp://{started.address}",
        world_size=started.world_size,
        rank=started.rank,
        timeout=DEFAULT_TIMEOUT,
    )


def _forward(number: int, frame: FrameType | None) -> None:
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            os.kill(worker.pid, number)
