"""The dense export is an ordinary Hugging Face checkpoint with the same function."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import compressor
from compressor.errors import CompressError
from compressor.export import safetensors as export
from compressor.model import stream
from compressor.model.checkpoint import load_directory
from compressor.model.conv1d import to_linear
from compressor.model.forward import output_mask, outputs
from compressor.model.manifest import Manifest, WeightFormat, list_files, write_manifest
from compressor.model.model import Pooling
from compressor.model.probe import largest_difference, read_probe
from compressor.model.saving import save
from compressor.model.sparse import broken_promise, promise, prunable
from compressor.numerics.masks import keep_largest
from compressor.quantize import rtn
from families import CONFIGS, pico, sparse


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_model_opens_in_transformers(pico_llama, make_work, tmp_path, tied):
    model = pico_llama(tie_word_embeddings=tied)
    rtn.run(model, rtn.Options(bits=4, group=16), make_work())
    artifact = export.run(model, export.Options(), tmp_path)
    assert artifact.engine == "torch"
    assert artifact.manifest.formats == {}
    assert artifact.manifest.metrics["dequantized_modules"] == len(model.formats)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for inputs, wanted in read_probe(tmp_path):
        assert torch.allclose(loaded(**inputs).logits, wanted["logits"], atol=1e-5)
        assert torch.allclose(outputs(model, inputs)["logits"], wanted["logits"], atol=1e-5)


def test_half_precision_probe_is_of_the_rounded_weights(pico_bert, tmp_path):
    model = pico_bert(pooling=Pooling("cls", False))
    export.run(model, export.Options(dtype="bfloat16"), tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    for inputs, wanted in read_probe(tmp_path):
        hidden = loaded(**inputs).last_hidden_state
        assert torch.allclose(hidden, wanted["last_hidden_state"], atol=1e-5)
        assert torch.equal(wanted["sentence_embedding"], wanted["last_hidden_state"][:, 0])
    assert model.module.dtype == torch.float32


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_opens_in_transformers_with_the_values_of_its_codes(name, make_work, tmp_path):
    model = pico(name)
    rtn.run(model, rtn.Options(bits=8, group=16, uneven="channel"), make_work())
    export.run(model, export.Options(), tmp_path)
    loaded, report = type(model.module).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    plain = dataclasses.replace(model, module=to_linear(loaded.eval()), formats={})
    for inputs, wanted in read_probe(tmp_path):
        errors = largest_difference(wanted, outputs(plain, inputs), output_mask(inputs))
        assert max(errors.values()) < 1e-5, errors


def export_both(model, folder, dtype="source"):
    """The dense and the packed directory of one model, and the packed artefact."""
    dense, packed = folder / "dense", folder / "packed"
    dense.mkdir(), packed.mkdir()
    export.run(model, export.Options(dtype=dtype), dense)
    return dense, packed, export.run(model, export.Options(dtype=dtype, packed=True), packed)


def same_bits(found, wanted):
    """Equal floats, bit for bit; the sign of a zero alone may differ."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    kind = {2: torch.int16, 4: torch.int32}[found.dtype.itemsize]
    # adding 0 turns -0.0 into 0.0; integers tell what is left
    return torch.equal(found.view(kind), (wanted + 0.0).view(kind))


@pytest.mark.parametrize(
    ("name", "pattern", "dtype"),
    [
        ("llama", "2:4", "float32"),
        ("llama", "unstructured", "float16"),
        ("gpt2", "1:4", "float32"),
        ("gpt2", "unstructured", "bfloat16"),
        ("phi3", "1:4", "bfloat16"),
        ("bert", "unstructured", "float32"),
        ("t5", "unstructured", "bfloat16"),
        ("whisper", "1:4", "float32"),
        ("vit", "1:4", "bfloat16"),
    ],
)
def test_packed_weights_come_back_bit_for_bit(name, pattern, dtype, tmp_path):
    model = sparse(pico(name), pattern, 0.7)
    dense, packed, artifact = export_both(model, tmp_path, dtype)
    wanted, again = load_directory(dense), load_directory(packed, model.formats)
    ours, theirs = again.module.state_dict(), wanted.module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[key], theirs[key]) for key in theirs)
    assert not broken_promise(again, model.formats)
    assert artifact.manifest.formats == model.formats
    found = artifact.manifest.metrics["packed"]
    assert found["weights"] == len(prunable(model))
    assert found["bytes"] == (packed / "packed.safetensors").stat().st_size
    assert found["dense_bytes"] == (dense / "model.safetensors").stat().st_size
    with pytest.raises(OSError, match=r"model\.safetensors"):
        type(model.module).from_pretrained(packed)


def test_packed_tensors_are_what_the_formats_page_says(tmp_path):
    """Read with numpy alone; GPT-2's matrices, which transformers stores turned, are [O, I]."""
    model = sparse(pico("gpt2"), "unstructured", 0.7)
    names = list(prunable(model))
    for name in names[: len(names) // 2]:
        linear = prunable(model)[name]
        linear.weight.data *= keep_largest(linear.weight.detach().abs(), "1:8", 0, "row")
        promise(model, name, "1:8")
    dense, packed, _ = export_both(model, tmp_path)
    wanted, found = (
        load_file(d / f) for d, f in ((dense, "model.safetensors"), (packed, "packed.safetensors"))
    )
    for name in names:
        key, w = f"{name}.weight", wanted.pop(f"{name}.weight").t().numpy()
        outputs, inputs = found.pop(f"{key}.shape").tolist()
        values, again = found.pop(f"{key}.values").numpy(), np.zeros((outputs, inputs), "float32")
        if f"{key}.mask" in found:
            mask = np.unpackbits(found.pop(f"{key}.mask").numpy(), axis=1, bitorder="little")
            again[mask[:, :inputs].astype(bool)] = values
        else:
            groups, n = values.shape[1:]
            assert (n, inputs // groups) == (1, 8)
            index = found.pop(f"{key}.index").numpy()
            for row in range(outputs):
                for group in range(groups):
                    place = index[row, group // 2] >> 4 * (group % 2) & 15
                    again[row, 8 * group + place] = values[row, group, 0]
        assert np.array_equal(again, w)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)


def test_each_weight_has_its_smallest_form(pico_llama, tmp_path):
    """2:4: places take what a mask takes, so places; fewer values: a mask; no zeros: dense."""
    model = sparse(pico_llama(tie_word_embeddings=True), "2:4")
    first, second, third, *_ = prunable(model).items()
    second[1].weight.data[1:] = 0
    third[1].weight.data.zero_()
    promise(model, *third[:1], "unstructured")
    full = list(prunable(model).items())[-1]
    full[1].weight.data[:] = 1.0
    model.formats[full[0]] = WeightFormat(pattern="unstructured", sparsity=0.0)
    dense, packed, artifact = export_both(model, tmp_path)
    stored = load_file(packed / "packed.safetensors")
    assert stored[f"{first[0]}.weight.index"].dtype == torch.uint8
    assert f"{second[0]}.weight.mask" in stored
    assert stored[f"{third[0]}.weight.values"].shape == (0,)
    assert f"{full[0]}.weight" in stored and "lm_head.weight" not in stored
    assert artifact.manifest.metrics["packed"]["weights"] == len(prunable(model)) - 1
    ours, theirs = (load_directory(d).module.state_dict() for d in (packed, dense))
    assert all(same_bits(ours[key], theirs[key]) for key in theirs)


def test_packed_pieces(pico_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "SHARD", 5000)  # parts of one weight end up in different files
    dense, packed, artifact = export_both(sparse(pico_llama(), "unstructured", 0.7), tmp_path)
    found = artifact.manifest.metrics["packed"]
    for folder, key, name in ((dense, "dense_bytes", "model"), (packed, "bytes", "packed")):
        pieces = list(folder.glob(f"{name}-*.safetensors"))
        assert len(pieces) > 5 and found[key] == sum(piece.stat().st_size for piece in pieces)
    ours, theirs = (load_directory(d).module.state_dict() for d in (packed, dense))
    assert all(same_bits(ours[key], theirs[key]) for key in theirs)


def test_nothing_to_leave_out_is_refused(pico_llama, make_work, tmp_path):
    packed = export.Options(packed=True)
    with pytest.raises(CompressError, match="no weight of this model is sparse"):
        export.run(pico_llama(), packed, tmp_path)
    model = sparse(pico_llama(), "unstructured", 0.02)
    model.source_dtype = "bfloat16"  # one bit of mask for 0.02 * 16 bits
    with pytest.raises(CompressError, match="too few zeros"):
        export.run(model, packed, tmp_path)
    model = sparse(pico_llama(), "unstructured", 0.7)
    rtn.run(model, rtn.Options(bits=4, group=16), make_work())
    with pytest.raises(CompressError, match="this model is quantized"):
        export.run(model, packed, tmp_path)


def damaged(file, weight, what):
    """The weight's tensors with one thing wrong, and what must be said of it."""
    tensors = load_file(file)
    mask, values = tensors[f"{weight}.mask"], tensors[f"{weight}.values"]
    if what in ("shape", "values"):
        del tensors[f"{weight}.{what}"]
        said = f"'{weight}.{what}' is missing"
    elif what == "mask":
        del tensors[f"{weight}.mask"]
        said = "exactly one of"
    elif what == "both":
        tensors[f"{weight}.index"] = mask.clone()
        said = "exactly one of"
    elif what == "size":
        tensors[f"{weight}.shape"] = torch.tensor([mask.shape[0], 8 * mask.shape[1] + 1])
        said = f"'{weight}.values' is F32"
    elif what == "no size":
        tensors[f"{weight}.shape"] = torch.tensor([mask.shape[0]])
        said = "not two int64"
    elif what == "dtype":
        tensors[f"{weight}.values"] = values.to(torch.int32)
        said = f"'{weight}.values' is I32"
    else:
        tensors[f"{weight}.mask"] = mask ^ 1
        said = f"values and {len(values)} are stored"
    save_file(tensors, file, metadata={"format": "pt"})
    return said


@pytest.mark.parametrize(
    "what", ["shape", "values", "mask", "both", "size", "no size", "dtype", "content"]
)
def test_a_damaged_packed_weight_is_named(pico_llama, tmp_path, what):
    model = sparse(pico_llama(), "unstructured", 0.7)
    weight = f"{list(prunable(model))[3]}.weight"
    export.run(model, export.Options(packed=True), tmp_path)
    said = damaged(tmp_path / "packed.safetensors", weight, what)
    with pytest.raises(CompressError) as caught:
        load_directory(tmp_path)
    assert f"'{weight}' is damaged" in caught.value.what and said in caught.value.what
    assert "\n" not in caught.value.what and caught.value.hint


@pytest.fixture
def sparse_checkpoint(pico_llama, tmp_path):
    """A directory as a pruning stage leaves it: llama with a tied table, 1:4, in bfloat16."""
    model = sparse(pico_llama(tie_word_embeddings=True), "1:4")
    model.source_dtype = "bfloat16"
    folder, parent = tmp_path / "sparse", tmp_path / "parent"
    folder.mkdir()
    model.processor.save_pretrained(parent)
    save(model, folder, parent)
    base = {"id": "pico", "sha256": "0" * 64, "license": None}
    manifest = Manifest("checkpoint", "llama", base, formats=model.formats)
    write_manifest(folder, dataclasses.replace(manifest, files=list_files(folder)))
    return folder


def test_a_packed_directory_is_served_measured_and_a_source(sparse_checkpoint, tmp_path):
    packed, plain, again = tmp_path / "packed", tmp_path / "plain", tmp_path / "again"
    compressor.export_checkpoint(str(sparse_checkpoint), "safetensors", packed, ["packed=true"])
    assert compressor.verify(packed)["ok"]
    card = (packed / "README.md").read_text()
    found = compressor.inspect(str(packed))
    gain = found["metrics"]["packed"]
    assert f"{gain['bytes']:,} bytes of weights instead of {gain['dense_bytes']:,}" in card
    assert f"{1 - gain['bytes'] / gain['dense_bytes']:.1%} smaller on disk" in card
    assert "Plain transformers cannot open it" in card and "no faster by itself" in card
    assert "stored like other weights" not in card and card.count("sparse weights are stored") == 1
    dense = compressor.inspect(str(sparse_checkpoint))
    assert found["parameters"] == dense["parameters"] and found["formats"] == dense["formats"]
    assert gain["bytes"] == (packed / "packed.safetensors").stat().st_size
    assert gain["dense_bytes"] == (sparse_checkpoint / "model.safetensors").stat().st_size
    table = compressor.bench([str(sparse_checkpoint), str(packed)], measures=["size"])
    sizes = [(c["parameters"], c["bytes"]) for c in table["candidates"]]
    assert sizes == [(d["parameters"], d["bytes"]) for d in (dense, found)]
    for source, target in ((sparse_checkpoint, plain), (packed, again)):
        compressor.export_checkpoint(str(source), "safetensors", target)
    one, two = (load_file(d / "model.safetensors") for d in (plain, again))
    assert one.keys() == two.keys() and all(same_bits(two[key], one[key]) for key in one)
    profile = tmp_path / "pack.yaml"
    profile.write_text("stages: [{quantize.rtn: {group: 16}}, export.safetensors]\n")
    made = compressor.run(profile, model=str(packed), out=tmp_path / "run")
    assert made.checkpoint.manifest.formats.keys() >= found["formats"].keys()
    (packed / "manifest.json").rename(tmp_path / "manifest.json")
    bare = compressor.inspect(str(packed))  # what the weights are is told by their tensors alone
    assert bare["nonzero_parameters"] == dense["nonzero_parameters"] < bare["parameters"]
    table = compressor.bench([str(packed)], measures=["size"])
    assert table["candidates"][0]["parameters"] == dense["parameters"]
    (tmp_path / "manifest.json").rename(packed / "manifest.json")
    file = packed / "packed.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert not compressor.verify(packed)["ok"]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("{export.safetensors: {packed: true}}", "no weight of this model is sparse"),
        (
            "{quantize.rtn: {group: 16}}, {export.safetensors: {packed: true}}",
            "this model is quantized",
        ),
    ],
)
def test_a_run_that_could_not_pack_is_refused_before_it_works(pico_llama, tmp_path, stages, said):
    model, profile = pico_llama(), tmp_path / "p.yaml"
    model.module.save_pretrained(tmp_path / "m")
    profile.write_text(f"stages: [{stages}]\n")
    with pytest.raises(CompressError, match=said):
        compressor.plan(profile, model=str(tmp_path / "m"))
