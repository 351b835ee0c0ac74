"""Batches with answers for pico models, and the logits [N, V] float64 that a loss counts."""

import torch

from compressor.model.forward import accepted, without_cache
from families import VOCABULARY, random_inputs


def labelled(model, seed=3):
    """A batch of what the model reads with the answers of its task."""
    batch = random_inputs(model)
    draw = torch.Generator().manual_seed(seed)
    if model.task == "image-classification":
        return batch | {"labels": torch.tensor([4, 0, 2])}
    if model.task == "fill-mask":
        hidden = (torch.rand(batch["input_ids"].shape, generator=draw) < 0.3) & batch[
            "attention_mask"
        ].bool()
        hidden[0, 2] = True
        return batch | {"labels": batch["input_ids"].masked_fill(~hidden, -100)}
    if "decoder_input_ids" in batch:
        mask = batch["decoder_attention_mask"]
        labels = torch.randint(5, VOCABULARY, mask.shape, generator=draw)
        return batch | {"labels": labels.masked_fill(mask == 0, -100)}
    return batch


def scored(model, batch):
    """Logits [N, V] float64 of the positions that count, from full logits."""
    z = model.module(**accepted(model, batch), **without_cache(model)).logits.double()
    if model.task == "image-classification":
        return z, batch["labels"]
    if model.task == "causal-lm":
        mask = batch["attention_mask"].bool()
        keep = mask[:, 1:] & mask[:, :-1]
        return z[:, :-1][keep], batch["input_ids"][:, 1:][keep]
    keep = batch["labels"] != -100
    return z[keep], batch["labels"][keep]
