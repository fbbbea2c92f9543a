"""More than one process: gradients under DistributedDataParallel are those of one process."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import require

torch = require("torch")

EXAMPLE = Path(__file__).parents[1] / "examples" / "torch_ddp.py"
WORLD = 2

# Rows 0 to 2 are the first process's, 3 to 5 the second's.
GRADIENTS = """
import sys
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: examples/torch_ddp.py says why
import fastbptt.torch

rank, world, store, to = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.ModuleDict({
    "lstm": fastbptt.torch.LSTM(3, 5, 2, bidirectional=True),
    "gru": fastbptt.torch.GRU(10, 4),
})
x = torch.randn(7, 6, 3)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = model
    def forward(self, x):
        return self.parts["gru"](self.parts["lstm"](x)[0])[0]
net = Net()
if world > 1:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    net = torch.nn.parallel.DistributedDataParallel(net)
    x = x[:, 3 * rank : 3 * rank + 3]
for _ in range(2):
    net.zero_grad()
    (net(x) ** 2).mean().backward()
torch.save({name: p.grad for name, p in model.named_parameters()}, to)
if world > 1:
    dist.barrier()
    del net
    dist.destroy_process_group()
"""


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def gradients(tmp_path: Path, world: int) -> list[dict[str, torch.Tensor]]:
    store = f"file://{tmp_path / f'store-{world}'}"
    files = [tmp_path / f"{world}-{rank}.pt" for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", GRADIENTS, str(rank), str(world), store, str(file)],
            env=environment(),
        )
        for rank, file in enumerate(files)
    ]
    try:
        assert [process.wait(timeout=100) for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()
    return [torch.load(file) for file in files]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    (alone,) = gradients(tmp_path, 1)
    together = gradients(tmp_path, WORLD)
    assert len(alone) == 20
    for found in together:
        assert list(found) == list(alone)
        for name, want in alone.items():
            torch.testing.assert_close(found[name], want, atol=1e-7, rtol=1e-5, msg=name)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_example_under_torchrun():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(WORLD)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), str(EXAMPLE)]
    result = subprocess.run(
        [sys.executable, *command, "--steps", "60", "--length", "10", "--hidden", "16"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (loss,) = re.findall(r"step 60: loss ([\d.]+) on 2 processes", result.stdout)
    assert float(loss) < 0.2  # guessing the mean gives 1/6, guessing 0 gives 7/6
