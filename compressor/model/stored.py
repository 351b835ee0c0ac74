"""What a checkpoint holds for the tensors of a module: under which names, and in what form.

Three things differ between memory and disk: names (transformers renames some architectures when
it loads, and back when it saves), ties (stored once), and form (dtype, packed codes).
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.model.side import without_sides
from compressor.model.stream import Lazy
from compressor.model.tables import ROWS, QuantTable
from compressor.numerics.packing import pack


def stored(module: nn.Module, dtype: torch.dtype, name: str, tensor: Tensor) -> Tensor:
    """The form in which a checkpoint holds the tensor that `module` calls `name`.

    The one place where a tensor changes on its way to disk. It is also called with tensors on
    the meta device, which tell shape and dtype of the result before anything is computed; so it
    must decide by module and name, never by values.
    """
    owner_name, _, part = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if isinstance(owner, QuantTable) and part in owner.held:  # scales are as codes need them
        if part != "codes_OI":
            return tensor
        return torch.cat([pack(rows, owner.bits) for rows in tensor.split(ROWS)])
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def float_state(module: nn.Module, dtype: torch.dtype) -> dict[str, Lazy]:
    """The state of a float model as `save_pretrained` would store it, with `dtype` for floats."""
    state = without_sides(module, module.state_dict())
    return {
        key: Lazy.map(partial(stored, module, dtype, name), state[name])
        for key, name in names_on_disk(module, state).items()
    }


def quantized_state(module: nn.Module, dtype: torch.dtype) -> dict[str, Lazy]:
    """The state of a model with Quant modules, by names in memory, every tied tensor once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in without_sides(module, module.state_dict(keep_vars=True)).items():
        found.setdefault(id(tensor), (name, tensor))
    return {
        name: Lazy.map(partial(stored, module, dtype, name), tensor)
        for name, tensor in found.values()
    }


def names_on_disk(module: Any, state: dict[str, Tensor]) -> dict[str, str]:
    """{name in the file: name in memory} of what transformers would store of a state.

    The steps of `save_pretrained`: leave out what is never stored, keep one of tied tensors (the
    one that transformers fills on loading), undo the renaming of loading.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = module._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in state.items() if name not in ignored}
    return _renamed(module, remove_tied_weights_from_state_dict(kept, module))


def kept_and_renamed(empty: Any, names: Collection[str]) -> dict[str, str]:
    """{name in the file: name} of what transformers would store of tensors with these names.

    Args:
        empty: the model on the meta device, float, with its ties.
        names: of its tensors, or of others that its modules have (scales): those are kept.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    whole = empty.state_dict()
    dropped = whole.keys() - remove_tied_weights_from_state_dict(dict(whole), empty).keys()
    dropped |= set(empty._keys_to_ignore_on_save or ())
    stand_ins = {name: torch.empty(0) for name in names if name not in dropped}
    return _renamed(empty, stand_ins)


def _renamed(module: Any, kept: dict[str, Tensor]) -> dict[str, str]:
    """{name in the file: name in memory}: undo the renaming of loading."""
    from transformers.core_model_loading import revert_weight_conversion

    names = {id(tensor): name for name, tensor in kept.items()}
    renamed = revert_weight_conversion(module, kept)
    # merged experts, say, would come back as new tensors: no family of the table has them
    assert all(id(tensor) in names for tensor in renamed.values()), "tensors cut or merged"
    return {key: names[id(tensor)] for key, tensor in renamed.items()}
