"""Processes of torchrun and srun are one run; settings that contradict each other are refused."""

import os
import subprocess
import sys

import pytest
import torch

from commands import free_port, slurm_variables
from mabn_d2.engine import ConfigError
from mabn_d2.engine.launch import StartedProcess, check_launch, started_process
from paths import ROOT

SCRIPT = """
import sys, torch, torch.distributed as dist
from detectron2.utils import comm
from mabn_d2.engine import ConfigError, launch

def main(fail):
    total = torch.tensor(float(comm.get_rank() + 1))
    dist.all_reduce(total)
    place = f"rank {comm.get_rank()} of {comm.get_world_size()} local {comm.get_local_rank()}"
    print(f"{place} sum {total.item()}", flush=True)  # in one piece: both write to one pipe

def check(fail):
    print("checked", flush=True)
    if fail:
        raise ConfigError("SOLVER.X is wrong")

if __name__ == "__main__":
    launch(main, 1, args=("fail" in sys.argv,), check=check)
"""
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("SLURM_", "TORCHELASTIC"))
    and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
}


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def outputs(commands_and_environments):
    processes = [
        subprocess.Popen(
            command, env={**CLEAN, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for command, more in commands_and_environments
    ]  # fmt: skip
    return [p.communicate(timeout=250)[0] for p in processes], [p.returncode for p in processes]


def torchrun(script, *arguments):
    port = str(free_port())
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
            port, str(script), *arguments]  # fmt: skip


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_one_run_of_two_processes(script, launcher):
    if launcher == "torchrun":
        texts, codes = outputs([(torchrun(script), {})])
    else:
        port = free_port()
        command = [sys.executable, str(script)]
        texts, codes = outputs([(command, slurm_variables(rank, port)) for rank in range(2)])
    text = "".join(texts)
    assert set(codes) == {0}, text[-3000:]
    for rank in range(2):
        assert f"rank {rank} of 2 local {rank} sum 3.0" in text
    assert text.count("checked") == 1
    if not torch.cuda.is_available():
        assert text.count("there is no GPU: 2 processes train on the CPU") == 1


def test_an_error_is_said_once(script):
    (text,), (code,) = outputs([(torchrun(script, "fail"), {})])
    assert code == 1 and text.count("script.py: SOLVER.X is wrong") == 1 and "sum" not in text


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "h", "MASTER_PORT": "5"}  # fmt: skip
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "31",
         "SLURM_NODELIST": "gpu[03-04],x1", "SLURM_TASKS_PER_NODE": "4(x2)"}  # fmt: skip


def test_what_the_environment_says():
    assert started_process({}) is None
    assert started_process(TORCHRUN) == StartedProcess("torchrun", 1, 4, 1, 2, "h:5")
    assert started_process(SLURM) == StartedProcess("srun", 5, 8, 1, 4, "gpu03:20031")
    assert started_process({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert started_process({**TORCHRUN, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0",
                            "LOCAL_RANK": "0"}) is None  # fmt: skip
    assert started_process(SLURM | TORCHRUN).launcher == "torchrun"  # srun has started torchrun
    for wrong in ({"MASTER_PORT": None}, {"RANK": "4"}, {"LOCAL_WORLD_SIZE": "3"}, {"RANK": "x"}):
        environment = {k: v for k, v in {**TORCHRUN, **wrong}.items() if v is not None}
        with pytest.raises(ConfigError, match=r"RANK|rank|torchrun"):
            started_process(environment)
    for wrong in ({"SLURM_TASKS_PER_NODE": "many"}, {"SLURM_NODELIST": "[1-2]"}):
        with pytest.raises(ConfigError, match="variables of torchrun or srun are wrong"):
            started_process(SLURM | wrong)


@pytest.mark.parametrize("settings, environment, message", [
    ((0, 2), {}, "--num-gpus 0 with --num-machines 2"),
    ((-1,), {}, "--num-gpus -1"),
    ((1, 2, 2), {}, "--machine-rank 2"),
    ((2, 2, 0, "auto"), {}, "--dist-url auto with --num-machines 2"),
    ((4,), TORCHRUN, "torchrun has started 2 processes on each of 2 machines, but --num-gpus is 4"),
    ((2, 3), TORCHRUN, "--num-machines 3"),
    ((8,), SLURM, "srun has started 4 processes"),
])  # fmt: skip
def test_contradictions(settings, environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        check_launch(*settings)


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="--num-gpus asks for 4 .* this machine has 2"):
        check_launch(4)
    check_launch(2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_launch(4)  # the CPU, with a warning of `launch`
