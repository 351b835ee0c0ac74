"""One-shot pruning as a whole run: planned, pruned, saved, and the same with offload."""

import json

import pytest
import torch
from safetensors.torch import load_file

import compressor
from compressor.errors import CompressError
from compressor.model.sparse import broken_promise
from compressor.model.tables import QuantTable
from compressor.prune import squarehead, wanda
from compressor.run.oneshot_needs import oneshot_needs
from compressor.run.preflight import plan

OPTIONS = {"pattern": "2:4", "samples": 8, "length": 16}


@pytest.fixture
def go(llama_folder, text_file, tmp_path):
    """Factory: run, or plan, one stage of these options."""

    def start(method, do=compressor.run, name="out", **given):
        profile = tmp_path / "p.yaml"
        profile.write_text(f"stages: [{{{method}: {json.dumps(given)}}}]\nmeasures: []\n")
        return do(str(profile), str(llama_folder), out=tmp_path / name, data=str(text_file))

    return start


def test_a_run_gives_the_same_weights_with_and_without_offload(go, tmp_path):
    found = []
    for offload in (False, True):
        result = go("prune.sparsegpt", name=str(offload), offload=offload, **OPTIONS)
        model = result.checkpoint.load()
        assert not broken_promise(model, result.checkpoint.manifest.formats)
        notes = result.checkpoint.manifest.metrics["notes"]["sparsity"]
        assert all(0 < note["error"] < 1 and note["sparsity"] == 0.5 for note in notes.values())
        assert len(notes) == len(result.checkpoint.manifest.formats) == 21
        found.append(load_file(result.checkpoint.path / "model.safetensors"))
        assert not list(tmp_path.glob(f"{offload}/.scratch/*"))
    assert all(torch.equal(x, found[1][key]) for key, x in found[0].items())


def test_the_plan_knows_samples_hessians_and_offload(go):
    def stage(method, **given):
        return go(method, plan, **given)["stages"][0]

    few, many = (stage("prune.sparsegpt", samples=n, length=64) for n in (8, 64))
    assert few["peak_memory_bytes"] < many["peak_memory_bytes"]
    assert stage("prune.wanda", **OPTIONS)["peak_memory_bytes"] < few["peak_memory_bytes"]
    spilled = stage("prune.sparsegpt", samples=64, length=64, offload=True)
    assert spilled["peak_memory_bytes"] < many["peak_memory_bytes"]
    assert spilled["disk_bytes"] > many["disk_bytes"]


def test_rows_that_are_too_long_end_a_run_before_it_begins(go, tmp_path):
    with pytest.raises(CompressError, match=r"stages.1 \(prune.sparsegpt\): length is 129"):
        go("prune.sparsegpt", length=129)
    assert not list((tmp_path / "out").glob("0*"))


@pytest.mark.parametrize("method", ["quantize.rtn", "quantize.gptq"])
def test_a_quantizer_notes_what_its_codes_take(method, go):
    data = {} if method == "quantize.rtn" else {"samples": 4, "length": 16, "offload": True}
    result = go(method, bits=4, group=16, table_bits=8, **data)
    size, path = result.checkpoint.manifest.metrics["notes"]["size"], result.checkpoint.path
    content = (path / "model.safetensors").read_bytes()
    assert size["stored_bytes"] == len(content) - 8 - int.from_bytes(content[:8], "little")
    modules = result.checkpoint.load().module.modules()
    tables = {m.codes_OI.data_ptr(): m for m in modules if isinstance(m, QuantTable)}.values()
    counts = sum(torch.bincount(t.codes_OI.flatten(), minlength=256) for t in tables)
    shares = counts[counts > 0] / counts.sum()
    entropy = -float((shares * shares.log2()).sum())
    assert size["weights"] == counts.sum() and 4 < size["bits"] < 8
    assert entropy <= size["huffman_bits"] <= entropy + 1
    assert (
        f"in a Huffman code {size['huffman_bits']:.2f}" in (path.parent / "report.md").read_text()
    )


def test_sparse_finetuning_is_costed_by_the_method_that_it_starts_with():
    sizes = {"hidden": 256, "mlp": 1024, "layers": 4, "vocabulary": 1000}
    needs = {
        start: oneshot_needs(method.Options(**given), sizes, 10**7, 4, 64, 1e9)
        for start, method, given in (
            ("shot", wanda, {}),
            ("wanda", squarehead, {"start": "wanda"}),
            ("sparsegpt", squarehead, {}),
        )
    }
    assert needs["wanda"] == needs["shot"]
    assert all(needs["wanda"][i] < needs["sparsegpt"][i] for i in (0, 2))  # memory, seconds
