"""Train on several processes or machines: the layers of `fastbptt.torch` under torch's DDP.

    torchrun --nproc-per-node 2 examples/torch_ddp.py
    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \
        examples/torch_ddp.py

Each process has its own share of every batch, and gloo adds the gradients up over the network. The
task: the sum of the two numbers that are marked, out of a long row (Hochreiter & Schmidhuber 1997).
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist

# Imported before there is a process group: its functions keep the default group of that moment as
# the default of an argument. DDP imports it later; then the group outlives destroy_process_group,
# and gloo's threads, still running while Python ends, now and then abort the process.
import torch.distributed.nn
from torch.nn.parallel import DistributedDataParallel

import fastbptt.torch


class Adder(torch.nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.recurrent = fastbptt.torch.LSTM(2, hidden_size)
        self.readout = torch.nn.Linear(hidden_size, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, (h, _) = self.recurrent(x)
        return self.readout(h[-1])


def batch(T: int, B: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of numbers, two of each marked, and the sums of those two."""
    numbers = torch.rand(T, B, generator=generator)
    marks = torch.zeros(T, B)
    for half in (slice(0, T // 2), slice(T // 2, T)):
        place = torch.randint(half.start, half.stop, (1, B), generator=generator)
        marks.scatter_(0, place, 1.0)
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(0)[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--length", type=int, default=20, metavar="T")
    parser.add_argument("--batch", type=int, default=64, help="rows of all processes together")
    parser.add_argument("--hidden", type=int, default=64)
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(Adder(options.hidden))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    # Every process draws the whole batch and takes its rows of it.
    generator = torch.Generator().manual_seed(1)
    share = slice(options.batch * rank // size, options.batch * (rank + 1) // size)
    for step in range(1, options.steps + 1):
        x, target = batch(options.length, options.batch, generator)
        loss = torch.nn.functional.mse_loss(model(x[:, share]), target[share])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == options.steps:
            mean = loss.detach()
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step}: loss {mean.item() / size:.4f} on {size} processes", flush=True)
    # None takes the connections down while another still works on its last step.
    dist.barrier()
    del model  # holds the group too, and only the last to let go of it ends gloo's threads
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
