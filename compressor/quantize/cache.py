"""A decoder's key-value cache in 8 bits: a quarter of its memory, for long texts and many rows.

    s = max|x| / 127 over all real tokens of the calibration sequences

for every channel of a key or value head: keys have channels that are large for every token
(arXiv 2402.02750), which one scale for a head would pay for. Scales are fixed, so that a token is
rounded once, when it is written, and what is in the cache never changes. Weights are left alone:
the stage stands behind the one that quantizes them, if any, and only exports may follow.

ONNX Runtime's attention reads such a cache as it is (export.onnx); no other export can say so.
Where we differ from that paper: values too have a scale for each channel, where it has one for
each token, and 8 bits instead of 2.
"""

import torch

from compressor.errors import CompressError
from compressor.model.forward import accepted
from compressor.model.kv_cache import Scales, attach, cache_facts
from compressor.model.model import Model
from compressor.options import options
from compressor.training.batches import on_device
from compressor.training.calibrated import SequenceOptions, calibration
from compressor.training.workbench import Workbench


@options
class Options(SequenceOptions):
    """Which text decides how large keys and values become."""


def refuse(model: Model) -> None:
    """Raise CompressError for a model without a cache that ONNX Runtime could hold in 8 bits."""
    if model.task != "causal-lm":
        raise CompressError(
            f"quantize.cache is for decoders that write text; this {model.family.model_type} is "
            f"for {model.task}",
            "leave the stage out",
        )
    if model.sizes["head_dim"] % 8:
        raise CompressError(
            f"heads have {model.sizes['head_dim']} channels, and ONNX Runtime's node with a cache "
            "in 8 bits wants a multiple of 8",
            "leave quantize.cache out",
        )


@torch.no_grad()
def run(model: Model, options: Options, work: Workbench) -> None:
    """Fix the scales of `model`, which rounds keys and values from now on; fill notes["cache"].

    Raises:
        CompressError: see refuse; or keys or values are NaN or infinite.
    """
    refuse(model)
    model.module.to(work.device)
    batches = calibration(options.samples, options.tokens(model.config), work)
    largest: list[Scales] = []
    with work.progress("keys and values", len(batches)) as advance:
        for i in range(len(batches)):
            found = _largest(model, on_device(batches[i], work.device))
            pairs = zip(largest, found, strict=True) if largest else ()
            largest = [
                (torch.maximum(k, own_k), torch.maximum(v, own_v))
                for (k, v), (own_k, own_v) in pairs
            ] or found
            advance(1)
    if not all(bool(x.isfinite().all()) for pair in largest for x in pair):
        raise CompressError(
            "keys or values have NaN or infinite values on the calibration data",
            "start from a sound checkpoint",
        )
    attach(model, [(_scale(k), _scale(v)) for k, v in largest])
    model.notes["cache"] = cache_facts(model.sizes)
    work.log(f"cache: {model.notes['cache']}")


def _largest(model: Model, batch: dict[str, torch.Tensor]) -> list[Scales]:
    """max|x| [kv_heads, head_dim] of the keys and values of every layer, over real tokens."""
    from transformers import DynamicCache

    cache = DynamicCache()
    model.base(**accepted(model, batch), past_key_values=cache, use_cache=True)  # without the head
    real_B1S1 = batch["attention_mask"][:, None, :, None].bool()

    def most(x_BKSD: torch.Tensor) -> torch.Tensor:
        return x_BKSD.abs().where(real_B1S1, 0).amax(dim=(0, 2))

    return [(most(layer.keys), most(layer.values)) for layer in cache.layers]  # type: ignore[arg-type]


def _scale(largest_KD: torch.Tensor) -> torch.Tensor:
    """A channel that is always zero may have any scale."""
    return (largest_KD / 127).where(largest_KD > 0, 1.0).float()
