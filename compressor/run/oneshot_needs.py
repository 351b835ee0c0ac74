"""What methods need that calibrate block by block: Hessians, and the activations between."""

from collections.abc import Mapping

from compressor.training.calibrated import CalibrationOptions, rows_at_once

_COPIES = 4  # of the largest Hessian for its factor: itself, reversed, decomposed, inverse
_WEIGHTS = 4  # of the largest layer while it is solved: transposed, back, its change, a product
_SLOWER = 3  # than a large matrix product: the column loop of the solver


def oneshot_needs(
    options: CalibrationOptions,
    sizes: Mapping[str, int],
    parameters: int,
    weight_bytes: float,
    positions: int,
    rate: float,
) -> tuple[float, float, float]:
    """Peak memory beside the process, disk beside the result, and seconds.

    Args:
        sizes: of the model, see Family.read_sizes.
        parameters: of the model.
        weight_bytes: of a parameter on disk.
        positions: of a calibration sequence.
        rate: float32 operations a second.
    """
    hidden, mlp = sizes["hidden"], sizes["mlp"]
    depth = sizes["layers"] + sizes.get("decoder_layers", 0)
    tables = sizes["vocabulary"] * hidden
    block, tokens = (parameters - tables) / depth, options.samples * positions
    solves = options.solves
    largest, squares = max(hidden, mlp), 3 * hidden**2 + mlp**2  # what q and gate read is shared
    memory = 4.0 * _WEIGHTS * hidden * mlp + 4.0 * squares * solves
    memory += 4.0 * (_COPIES - 1) * largest**2 * solves
    inside = rows_at_once(positions) * positions  # tokens that are in a block at a time
    memory += 4.0 * inside * (6 * hidden + 3 * mlp)
    streams = 4.0 * tokens * hidden
    memory += 4.0 * (tables + block) if options.offload else 4.0 * parameters + streams
    disk = 0.0
    if options.offload:  # weights converted and weights replaced; later those of the proof
        disk = streams + 4.0 * parameters * (2 if weight_bytes < 4 else 1)
    ranked = getattr(options, "allocation", None) == "sensitivity"
    passes = 2 + ranked  # watched, run again
    work = 2.0 * passes * tokens * (parameters - tables)
    if solves:
        inputs = block / (hidden + mlp)  # outputs of all layers of a block, roughly
        columns = inputs * (hidden**2 + mlp**2)
        tried = getattr(options, "alphas", None)  # each costs a product of a weight with its matrix
        work += depth * (1.2 * tokens * squares + (2 * tried if tried else _SLOWER) * columns)
    return memory, disk, work / rate
