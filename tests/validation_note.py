"""A stand-in for the loss on the validation split that distillation is to note before and after.

A search reads `notes["validation"]`. Until distill/runner.py writes it, `install` makes it do so;
afterwards it changes nothing, and this file can go.
"""

import torch

from compressor.distill import runner


def install():
    """Make every distillation of this process note its objective's validation loss."""
    trained = runner.run

    def run(model, objective, options, work):
        before = _loss(objective, options, work)
        facts = trained(model, objective, options, work)
        note = {"before": before, "after": _loss(objective, options, work), "rows": 0}
        model.notes.setdefault("validation", note)
        return facts

    runner.run = run


@torch.no_grad()
def _loss(objective, options, work):
    length = options.train.length
    batches = work.batches("validation", 4, batch=4, length=length)
    return float(torch.stack([objective(batch) for batch in batches]).mean())
