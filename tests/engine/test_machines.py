"""Two "machines" that meet on loopback, one slower than the other."""

import pytest
import torch

from commands import CONFIG, SMALL, free_port, start


def on_two_machines(*arguments):
    url = f"tcp://127.0.0.1:{free_port()}"
    processes = [
        start(tool, "--num-gpus", 1, "--num-machines", 2, "--machine-rank", rank, "--dist-url", url,
              "--config-file", CONFIG, *arguments)
        for rank, tool in enumerate(("train_net.py", "../tests/support/slow_machine.py"))
    ]  # fmt: skip
    outputs = [process.communicate(timeout=700)[0] for process in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    return outputs


@pytest.mark.slow  # test_faults.py has two machines without the commands
@pytest.mark.timeout(1500)
def test_training_evaluation_and_resumption(tmp_path):
    options = [*SMALL, "OUTPUT_DIR", tmp_path, "SOLVER.CHECKPOINT_PERIOD", 2,
               "MODEL.MABN.SYNC_BEFORE_EVAL", True]  # fmt: skip
    first, other = on_two_machines(*options, "SOLVER.MAX_ITER", 3, "DATASETS.TEST", "()")
    names = ["model_0000001.pth", "model_final.pth"]
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == names
    assert "Saving checkpoint" in first and "Saving checkpoint" not in other
    second, _ = on_two_machines("--resume", *options, "SOLVER.MAX_ITER", 5)
    assert "Starting training from iteration 3" in second and "copypaste: Task: segm" in second
    names.insert(1, "model_0000003.pth")
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == names
    state = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert state["iteration"] == 4
    assert state["model"]["backbone.bottom_up.stem.conv1.norm.iters"] == 5
