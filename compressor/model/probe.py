"""probe.safetensors: three small input batches and the outputs they must give.

Of models that write text also the logits of a greedy continuation of the first batch.

It travels with every checkpoint and artefact, so both can be verified without their parent.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.errors import CompressError
from compressor.model.model import Model

NAME = "probe.safetensors"
_GREEDY = "greedy.logits"
SHAPES = ((1, 5), (2, 16), (3, 11))  # (batch, sequence): several shapes, none of them special

Exchange = tuple[dict[str, Tensor], dict[str, Tensor]]  # inputs, outputs


def probe_batches(model: Model) -> list[dict[str, Tensor]]:
    """Three deterministic batches of random inputs; rows of text have different lengths.

    Decoders are padded on the left (as for generation), encoders on the right. Outputs at
    padded positions mean nothing and are not compared. Sound and images have a fixed size.
    """
    draw = torch.Generator().manual_seed(0)
    return [_inputs(model, rows, length, draw) for rows, length in SHAPES]


def _inputs(model: Model, rows: int, length: int, draw: torch.Generator) -> dict[str, Tensor]:
    config = model.config
    if model.sizes["vocabulary"] == 0:
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {
            "pixel_values": torch.randn(rows, config.num_channels, height, width, generator=draw)
        }
    text = _text(model, rows, length, model.task == "causal-lm", draw)
    if len(model.family.stacks) == 1:
        return text
    answer = _text(model, rows, length + 2, False, draw)
    answer = {f"decoder_{key}": value for key, value in answer.items()}
    if model.family.model_type == "whisper":
        frames = 2 * config.max_source_positions  # two convolutions, the second of stride 2
        shape = (rows, config.num_mel_bins, frames)
        return {"input_features": torch.randn(shape, generator=draw)} | answer
    return text | answer


def _text(
    model: Model, rows: int, length: int, left: bool, draw: torch.Generator
) -> dict[str, Tensor]:
    ids = torch.randint(3, model.sizes["vocabulary"], (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, slice(0, row) if left else slice(length - row, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def write_probe(
    directory: Path, exchanges: list[Exchange], continuation: Tensor | None = None
) -> None:
    """Store inputs and expected outputs as `<i>.in.<name>` and `<i>.out.<name>`.

    Args:
        continuation: logits [1, T, V] of the greedy tokens after batch 0; `greedy.logits`.
    """
    tensors = {} if continuation is None else {_GREEDY: continuation.contiguous()}
    for index, (inputs, outputs) in enumerate(exchanges):
        tensors |= {f"{index}.in.{k}": v.contiguous() for k, v in inputs.items()}
        tensors |= {f"{index}.out.{k}": v.contiguous().clone() for k, v in outputs.items()}
    save_file(tensors, directory / NAME)


def read_probe(directory: Path) -> list[Exchange]:
    """Read what `write_probe` stored.

    Raises:
        CompressError: the file is missing or damaged.
    """
    tensors = _read(directory)
    found: list[Exchange] = []
    for index in range(len(SHAPES)):
        sides = tuple(
            {k.split(".", 2)[2]: v for k, v in tensors.items() if k.startswith(f"{index}.{side}.")}
            for side in ("in", "out")
        )
        found.append((sides[0], sides[1]))
    return found


def read_continuation(directory: Path) -> Tensor | None:
    """Logits [1, T, V] of the greedy tokens after batch 0, which are their argmax, if stored.

    Raises:
        CompressError: the file is missing or damaged.
    """
    return _read(directory).get(_GREEDY)


def _read(directory: Path) -> dict[str, Tensor]:
    path = directory / NAME
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CompressError(
            f"{path} is missing or damaged ({error})", "run the stage that wrote it again"
        ) from error


def largest_difference(
    wanted: dict[str, Tensor], got: dict[str, Tensor], mask: Tensor | None
) -> dict[str, float]:
    """Relative error ||got - wanted|| / ||wanted|| per output, over real tokens only.

    Token outputs [B, S, ...] are masked, with None whole; so are pooled outputs [B, H]. A missing
    output or one with NaN gives infinity.
    """
    found = {}
    for name, target in wanted.items():
        value = got.get(name)
        if value is None or value.shape != target.shape or not bool(torch.isfinite(value).all()):
            found[name] = float("inf")
            continue
        if target.dim() == 3 and mask is not None:
            keep = mask.bool()
            target, value = target[keep], value[keep]
        scale = target.double().norm().clamp(min=1e-12)
        found[name] = float((value.double() - target.double()).norm() / scale)
    return found
