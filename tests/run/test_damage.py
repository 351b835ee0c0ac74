"""Damaged and edited directories: verify and inspect say what is wrong, whatever it is."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.errors import CompressError
from compressor.model.manifest import StageRecord, list_files, write_manifest
from compressor.quantize import differentiable, rtn
from compressor.run.prove import save_and_prove
from compressor.training.options import Train

LAYER = "model.layers.0.mlp.up_proj"
FLOAT_TABLES = {"embeddings": False, "head": False}
SHORT = Train(steps=1, batch=2, length=16, precision="float32")
METHODS = {
    "packed": (rtn, {"bits": 4, "group": 16, **FLOAT_TABLES}),  # as compressed-tensors
    "int8": (rtn, {"bits": 8, "group": 16, "symmetric": False}),
    "ours": (rtn, {"bits": 4, "group": 16}),
    "points": (
        differentiable,
        {"bits": 3, "bucket": "flat", "group": 40, "allocation": "gradient", "train": SHORT},
    ),
    "even": (rtn, {"bits": 4, "group": 32}),
}
EXPORTS = {"exported": ("int8", "compressed_tensors"), "coded": ("even", "huffman")}


@pytest.fixture(scope="module")
def made():
    """Directories that were made already, by kind."""
    return {}


@pytest.fixture
def copy_of(made, pico_llama, make_work, tmp_path, tmp_path_factory):
    """A copy, to be damaged, of a checkpoint or artefact of some kind."""

    def checkpoint(kind):
        method, settings = METHODS[kind]
        model = pico_llama(num_hidden_layers=1, intermediate_size=1024 if kind == "even" else 48)
        method.run(model, method.Options(**settings), make_work(pico_llama(num_hidden_layers=1)))
        directory, source = tmp_path_factory.mktemp(kind), tmp_path_factory.mktemp("source")
        model.processor.save_pretrained(source)
        manifest = save_and_prove(model, directory, source)
        manifest.base_model.update(id="pico", sha256="0" * 64, license=None)
        manifest.stages.append(StageRecord("q", {}, 0, None, None, 0.0, 0, "0" * 64, "1" * 64))
        manifest.files.update(list_files(directory))
        write_manifest(directory, manifest)
        return directory

    def directory(kind):
        if kind not in made and kind in EXPORTS:
            parent, engine = EXPORTS[kind]
            made[kind] = tmp_path_factory.mktemp("exports") / kind
            compressor.export_checkpoint(str(directory(parent)), engine, made[kind])
        elif kind not in made:
            made[kind] = checkpoint(kind)
        return made[kind]

    def copy(kind):
        return shutil.copytree(directory(kind), tmp_path / "copy")

    return copy


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def formats(**fields):
    """Other fields of one module's format in manifest.json."""
    return lambda path: edit(
        path / "manifest.json", lambda content: content["formats"][LAYER].update(fields)
    )


def stated(change):
    """Another quantization_config in config.json."""
    return lambda path: edit(path / "config.json", change)


def groups(**fields):
    return stated(
        lambda content: [
            group["weights"].update(fields)
            for group in content["quantization_config"]["config_groups"].values()
        ]
    )


def dense(path):
    """Integers that are said to be floats."""
    config = path / "config.json"
    config.write_text(config.read_text().replace("naive-quantized", "dense"))


def tensors(part, change):
    """Another tensor of one module, or none."""

    def damage(path):
        file = next(path.glob("[mp][oa]*.safetensors"))
        found, name = load_file(file), f"{LAYER}.{part}"
        old = found.pop(name)
        if change is not None:
            found[name] = change(old)
        save_file(found, file, {"format": "pt"})

    return damage


def truncated(path):
    file = next(path.glob("[mp][oa]*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def probe_of_another(path):
    save_file({"0.in.x": torch.zeros(2)}, path / "probe.safetensors")


@pytest.mark.parametrize("kind", [*METHODS, *EXPORTS])
def test_nothing_is_wrong_with_what_was_just_made(kind, copy_of):
    path = copy_of(kind)
    report = compressor.verify(path)
    assert report["ok"], report
    assert compressor.inspect(str(path))["parameters"] > 0


FOREIGN = "is none that compress writes"
MANIFEST = r"manifest.json is damaged \({} of '{}'"
CASES = [
    ("packed", truncated, "is truncated or damaged"),
    ("packed", formats(bits=17), MANIFEST.format("bits", LAYER)),
    ("packed", formats(bits="4"), MANIFEST.format("bits, group.*", LAYER)),
    ("packed", formats(group=-1), MANIFEST.format("bits, group.*", LAYER)),
    ("packed", formats(pattern="2/4"), MANIFEST.format("pattern", LAYER)),
    ("packed", formats(codebook="foo"), MANIFEST.format("codebook", LAYER)),
    ("packed", formats(flat=True), MANIFEST.format("flat", LAYER)),
    ("packed", formats(points=3), MANIFEST.format("points", LAYER)),
    ("packed", formats(activation={"bits": 8}), MANIFEST.format("activation", LAYER)),
    ("packed", formats(symmetric=False), "not those of its weights.*zero points of 4 bits"),
    ("packed", formats(codebook="nf4"), "not those of its weights.*codebook"),
    ("packed", formats(bits=3), "weight_packed' is torch.int32"),
    ("packed", stated(lambda c: c.update(quantization_config="x")), FOREIGN),
    ("exported", stated(lambda c: c.update(quantization_config={"quant_method": "gptq"})), FOREIGN),
    ("exported", formats(group=8), "weight_scale' is torch.float16"),
    ("points", formats(group=0), MANIFEST.format("bits, group.*", LAYER)),
    ("points", tensors("codes_OI", lambda t: t.fill_(255)), "it has code"),
    ("points", tensors("points_P", None), "missing"),
    ("coded", tensors("codes_OI.chunks", lambda t: t[:0]), "missing or empty"),
    ("coded", tensors("codes_OI.stream", lambda t: t.flip(0)), "does not end where it should"),
]


@pytest.mark.parametrize(("kind", "damage", "said"), CASES)
def test_damage_is_said_by_verify_and_inspect(kind, damage, said, copy_of):
    path = copy_of(kind)
    damage(path)
    with pytest.raises(CompressError, match=said) as caught:
        compressor.inspect(str(path))
    assert caught.value.hint
    if "manifest.json is damaged" in said:
        with pytest.raises(CompressError, match=said):
            compressor.verify(path)
        return
    wrong = [check["detail"] for check in compressor.verify(path)["checks"] if not check["ok"]]
    assert any(caught.value.what == detail for detail in wrong)


@pytest.mark.parametrize(
    ("kind", "damage", "said"),
    [
        ("packed", groups(num_bits=3), "config.json"),  # the manifest says it, so it still runs
        ("exported", groups(num_bits="a"), "transformers cannot load"),
        ("exported", dense, "it does not run: "),
        ("exported", tensors("weight_scale", lambda t: t * float("nan")), "is off by inf"),
        ("ours", probe_of_another, "it does not run: "),
        ("ours", tensors("scale_OG", lambda t: t * 2), "is off by"),
    ],
)
def test_what_only_running_shows_is_said_by_verify(kind, damage, said, copy_of):
    path = copy_of(kind)
    damage(path)
    report = compressor.verify(path)
    wrong = [f"{check['name']}: {check['detail']}" for check in report["checks"] if not check["ok"]]
    assert not report["ok"] and any(said in line for line in wrong), report
    assert all("\n" not in line for line in wrong)
