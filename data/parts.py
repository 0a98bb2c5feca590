"""A batch in parts: micro-batches one after the other, or several processes side by side.

    --micro_batch 2                               two rows at a time: less memory, the same step
    torchrun --nproc_per_node 4 dpo.py ...        four processes, each with a quarter of every batch

The gradient of a sum is the sum of the gradients. So a batch can be computed in parts, if the loss of every part is
that part's term in the loss of the *whole* batch: a mean over tokens is divided by the tokens of the whole batch, a
mean over pairs by its pairs. A mean of the parts' means is another loss: a token in a part with few tokens would get
more weight, and --micro_batch would change what is learned.
"""

import atexit
import io
import os
import sys
from pathlib import Path

import torch

SHARED = ("sft", "dpo", "reward_model", "grpo", "ppo")  # the scripts that several processes can share


def micro_batches(rows, size=None):
    """The rows of one batch in lists of at most `size` rows (None: all in one list).

    With several processes these are the rows of this process only. [3, 1, 4, 1, 5] with size 2 -> [3, 1], [4, 1], [5]
    """
    rows = share(rows)
    return [rows[i : i + (size or len(rows))] for i in range(0, len(rows), size or len(rows))]


def add(log, weight, **values):
    """log[name] += weight * value. With weights that sum to 1 over the micro-batches, means become the batch's mean."""
    for name, value in values.items():
        log[name] = log.get(name, 0.0) + weight * value.detach()


def add_up(model, log):
    """After the last backward of a step: the gradients and the numbers in `log`, summed over all processes."""
    all_reduce([p.grad for p in model.parameters() if p.grad is not None] + list(log.values()))


# torchrun starts several processes and numbers them. All compute the same steps and evaluations, each its part of
# every batch. The first one prints and writes. Without torchrun there is one process, which computes whole batches.
PROCESS, PROCESSES = (
    int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone
    for name, alone in (("RANK", 0), ("WORLD_SIZE", 1))
)


def share(rows):
    """This process's part of the rows. They stay in their order, so answers to the same prompt stay neighbours."""
    if len(rows) < PROCESSES:
        sys.exit(f"{PROCESSES} processes cannot share a batch of {len(rows)}: take a larger batch or fewer processes")
    first, last = (len(rows) * n // PROCESSES for n in (PROCESS, PROCESS + 1))
    return rows[first:last]


def join_processes(parser, script, device):
    """Connect the processes; on a machine with GPUs each takes its own."""
    if PROCESSES == 1 or torch.distributed.is_initialized():
        return
    if script not in SHARED and Path(sys.argv[0]).stem == script:
        parser.error(f"{script}.py runs in one process: start it without torchrun")
    if device == "cuda" and PROCESSES <= torch.cuda.device_count():
        torch.cuda.set_device(PROCESS)
    elif device != "cpu":
        parser.error(f"{PROCESSES} processes need --device cpu, or cuda with {PROCESSES} GPUs in this machine")
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    atexit.register(torch.distributed.destroy_process_group)
    if PROCESS > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def all_reduce(tensors):
    """Replace each tensor by its sum over all processes."""
    for x in tensors if PROCESSES > 1 else ():
        torch.distributed.all_reduce(x)


def gather(items, device):
    """The lists of all processes as one list, in all of them: what `share` took apart, together again."""
    if PROCESSES == 1:
        return items
    written, found = io.BytesIO(), [None] * PROCESSES
    torch.save(items, written)
    torch.distributed.all_gather_object(found, written.getvalue())
    parts = (torch.load(io.BytesIO(part), map_location=device, weights_only=False) for part in found)
    return [item for part in parts for item in part]


def any_process(flag, device):
    """True if `flag` is true in any process. Each of them waits here for the others."""
    if PROCESSES == 1:
        return bool(flag)
    total = torch.tensor(float(bool(flag)), device=device)
    all_reduce([total])
    return total.item() > 0
