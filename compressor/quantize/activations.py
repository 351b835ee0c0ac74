"""How the inputs of 8-bit Linears may be rounded to 8 bits, and what that wants of the weights."""

from typing import Any

from compressor.quantize.weights import WeightOptions

# the word in a profile -> WeightFormat.activation
ACTIVATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "tensor": {"bits": 8, "per": "tensor", "dynamic": True},
    "dynamic": {"bits": 8, "per": "tensor", "dynamic": True},  # what rtn calls it
    "token": {"bits": 8, "per": "token", "dynamic": True},
    "static": {"bits": 8, "per": "tensor", "dynamic": False},
}


def needs_channels(options: WeightOptions, activation: str) -> None:
    """Refuse weights that integer products cannot take; for a validator of the options.

    Raises:
        ValueError: they are not all symmetric 8-bit with one scale per output channel.
    """
    if activation != "none" and getattr(options, "mixed", None) is not None:
        raise ValueError(f"activation {activation} needs bits: 8 for all layers; leave mixed out")
    fits = options.bits == 8 and options.group is None and options.symmetric
    if activation != "none" and not fits:
        raise ValueError(f"activation {activation} needs bits: 8, group: null, symmetric: true")
