"""The measurements of benchmarks/memory.py; each is called in a process of its own.

They return bytes of resident memory before, at the peak and after, and seconds.
"""

import re
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.distill import kd
from compressor.export import safetensors as export
from compressor.model.checkpoint import load_directory
from compressor.model.families import find_family
from compressor.model.manifest import Manifest, write_manifest
from compressor.model.model import Model
from compressor.model.saving import save
from compressor.quantize import rtn
from compressor.run.machine import peak_memory, reset_peak_memory
from compressor.run.prove import save_and_prove
from compressor.screen import Silent
from compressor.training.losses import divergence
from compressor.training.workbench import Workbench

SIZES = {  # hidden, layers, heads, kv_heads, mlp, vocabulary
    "0.03M": (32, 3, 4, 2, 48, 96),
    "6M": (256, 6, 4, 2, 704, 4096),
    "60M": (512, 10, 8, 2, 1408, 32000),
    "250M": (1024, 16, 16, 4, 2816, 32000),
    "1B": (2048, 20, 16, 4, 5632, 32000),
}


def llama(hidden, layers, heads, kv_heads, mlp, vocabulary, **more):
    """A llama of random weights, without a tie."""
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )
    return Model(LlamaForCausalLM(config).eval(), find_family("llama"), None)


def quantized(model):
    """The model with 4-bit weights in groups of 32."""
    screen = Silent()
    never = {"_batches": None, "_teacher": None, "_reference": None}
    scratch = Path(tempfile.gettempdir())
    work = Workbench(0, torch.device("cpu"), scratch, screen, lambda line: None, **never)
    rtn.run(model, rtn.Options(bits=4, group=32, uneven="channel"), work)
    return model


def make(size, folder):
    """Write the checkpoints that the other workers read: float32, bfloat16 and int4."""
    torch.manual_seed(0)
    model = llama(*SIZES[size])
    for name in ("float32", "bfloat16", "int4"):
        path = Path(folder, name)
        path.mkdir()
        model.source_dtype = "bfloat16" if name == "bfloat16" else "float32"
        if name == "int4":
            quantized(model)
        save(model, path, path)
    write_manifest(path, Manifest("checkpoint", "llama", base_model={}, formats=model.formats))
    return {"parameters": sum(p.numel() for p in llama_shapes(size))}


def llama_shapes(size):
    """The parameters of a size, without memory."""
    with torch.device("meta"):
        return list(llama(*SIZES[size]).module.parameters())


def measured(act):
    """Resident bytes before, at the peak and after a call, its seconds, and its result."""
    reset_peak_memory()
    before, start = resident(), time.perf_counter()
    result = act()
    seconds, peak = time.perf_counter() - start, peak_memory()
    return {"before": before, "peak": peak, "after": resident(), "seconds": seconds}, result


def resident():
    """Resident bytes of this process now."""
    found = re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024


def checkpoint(action, folder):
    """One action; `model` is the weights in memory, `file` what was read or written."""
    kind, form, plain = re.fullmatch(r"([a-z ]+) (\w+)(, transformers)?", action).groups()
    folder = Path(folder)
    if kind == "load":
        files = folder / form
        found, model = measured(lambda: loaded(files, plain))
        held = weight_bytes(model)
    else:
        float_start = form in ("float32", "bfloat16") or kind == "quantize"
        model = load_directory(folder / ("float32" if float_start else "int4"))
        model.source_dtype = form if form == "bfloat16" else "float32"
        own(model)
        held, files = weight_bytes(model), Path(tempfile.mkdtemp(dir=folder))
        acts = {
            "save": lambda: save(model, files, folder / form),
            "save and prove": lambda: save_and_prove(model, files, folder / form),
            "quantize": lambda: quantized(model),
            "export": lambda: export.run(model, export.Options(), files),
        }
        if plain:
            acts["save"] = lambda: save_plain(model.module, getattr(torch, form), files)
        found, _ = measured(acts[kind])
    size = sum(f.stat().st_size for f in files.glob("*.safetensors"))
    return found | {"model": held, "file": size}


def own(model):
    """Give the weights memory of their own, as training does: none stays a mapped file."""
    for tensor in model.module.state_dict(keep_vars=True).values():
        tensor.data = tensor.data.clone()


def loaded(path, plain):
    """A float32 model of which every weight was read once: mapped files are lazy."""
    if plain:
        module = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        model = Model(module, find_family("llama"), None)
    else:
        model = load_directory(path)
    for tensor in model.module.state_dict().values():
        tensor.view(-1).view(torch.uint8)[::1024].max()
    return model


def save_plain(module, dtype, out):
    """What transformers alone does, the model in memory left as it is."""
    state = module.state_dict()
    if dtype != module.dtype:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    module.save_pretrained(out, state_dict=state)


def weight_bytes(model):
    """Bytes of all weights, codes and scales in memory."""
    tensors = {t.data_ptr(): t for t in model.module.state_dict().values()}
    return sum(t.nbytes for t in tensors.values())


def kl(how, vocabulary, length):
    """One forward and backward pass of distill.kd, or of the same loss on full logits."""
    shape = (64, 1, 2, 2, 64, vocabulary)
    student, teacher = (llama(*shape, max_position_embeddings=4096) for _ in range(2))
    teacher.module.requires_grad_(False)
    if how != "naive":
        objective = kd.objective(kd.Options(), student, teacher)
    else:
        objective = full_logits(student, teacher)
    ids = torch.randint(3, vocabulary, (1, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    short = {name: tensor[:, :8] for name, tensor in batch.items()}
    objective(short).backward()  # gradients exist from here on
    found, _ = measured(lambda: objective(batch).backward())
    return found


def full_logits(student, teacher):
    """The forward KL as it is usually written."""
    loss = divergence("forward")

    def objective(batch):
        with torch.no_grad():
            target = teacher.module(**batch, use_cache=False).logits[0, :-1]
        return loss(student.module(**batch, use_cache=False).logits[0, :-1], target).mean()

    return objective
