"""What an export cannot express is refused before any work, for whatever a stage may leave."""

import pytest

import compressor
from compressor.errors import CompressError

FLOAT_TABLES = "embeddings: false, head: false"


def planned(tmp_path, llama_folder, text_file, quantize, export):
    profile = tmp_path / "profile.yaml"
    profile.write_text(
        f"name: x\ndescription: y\nstages:\n  - {quantize}\n  - {export}\nmeasures: []\n"
    )
    return compressor.plan(
        profile, model=str(llama_folder), out=tmp_path / "out", data=str(text_file)
    )


@pytest.mark.parametrize(
    ("quantize", "export", "what"),
    [
        (
            "quantize.rtn: {group: 16, mixed: {average_bits: 5, choices: [3, 8]}}",
            "export.onnx: {}",
            "8, 4 and 2 bits; .* has 3",
        ),
        (
            "quantize.rtn: {bits: 4, group: 16}",
            "export.compressed_tensors: {}",
            "no form for 'model.embed_tokens'",
        ),
        (
            "quantize.nf4: {group: 16, embeddings: false, head: false}",
            "export.compressed_tensors: {}",
            "a codebook",
        ),
        (
            "prune.magnitude: {sparsity: 0.5}",
            "export.compressed_tensors: {}",
            "none of this model is quantized",
        ),
        (
            "quantize.rtn: {bits: 8, group: 16}",
            "export.gguf: {tokenizer: none}",
            "blocks of GGUF have 32 inputs, .* groups of 16",
        ),
    ],
)
def test_refused(tmp_path, llama_folder, text_file, quantize, export, what):
    with pytest.raises(CompressError, match=what):
        planned(tmp_path, llama_folder, text_file, quantize, export)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("quantize", "export"),
    [
        ("quantize.rtn: {bits: 2, group: 16}", "export.onnx: {}"),
        ("quantize.nf4: {group: 16}", "export.onnx: {}"),
        (
            f"quantize.rtn: {{bits: 3, group: 16, {FLOAT_TABLES}}}",
            "export.compressed_tensors: {}",
        ),
        ("prune.magnitude: {sparsity: 0.5}", "export.gguf: {tokenizer: none, type: f16}"),
    ],
)
def test_accepted(tmp_path, llama_folder, text_file, quantize, export):
    assert planned(tmp_path, llama_folder, text_file, quantize, export)["fits"]
