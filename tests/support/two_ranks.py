"""Run by two processes (test_losses.py): every loss on its share of the items against the whole on one process."""

import torch
from accelerate import PartialState

from tests.support.bigram import items_of, trainer_of
from tests.support.helpers import ROOT


def main() -> None:
    """Print `equal NAME` for every loss whose summed loss and gradient are those of one process."""
    rank, world_size = PartialState(cpu=True).process_index, 2
    for path in sorted((ROOT / "config" / "loss").glob("*.yaml")):
        trainer = trainer_of(path.stem)
        items = items_of(trainer, path.stem)[:5] + items_of(trainer, path.stem)[-2:]  # 7 do not divide by 2
        found = []
        for share in (world_size, 1):
            # alone: this process takes all items; its sums over ranks are then twice one process's, as is its gradient
            micros = list(trainer.deal(items, list(range(len(items))), 2, share)) if share == world_size else [items]
            batches = trainer.prepared([trainer.batch_of(micro) for micro in micros], False)
            counts = trainer.global_counts(batches)
            loss = torch.stack([trainer.terms(batch, counts)[0] for batch in batches]).sum()
            gradient = torch.autograd.grad(loss, trainer.policy.table)[0]
            both = torch.cat([loss.detach().reshape(1), gradient.flatten()])
            torch.distributed.all_reduce(both)
            found.append(both)
        torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)
        if rank == 0:
            print(f"equal {path.stem}", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # left to the interpreter's end, gloo's threads may abort the process


if __name__ == "__main__":
    main()
