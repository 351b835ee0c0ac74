"""A family of sizes: every finished one is measured beside the original, and kept."""

import pytest
import yaml

import compressor
from compressor.model.manifest import read_manifest
from compressor.run.forget import WEIGHTS_REMOVED
from compressor.run.loading import load_profile

TRAIN = {"steps": 2, "batch": 2, "length": 16, "lr": 1e-3, "warmup": 1, "precision": "float32"}
PRUNE = {"parameters": 0.7, "samples": 8, "length": 16}
DISTILL = {"distill.kd": {"teacher": "input", "train": TRAIN}}
SEARCH = {"search.minitron": PRUNE | {"tolerance": 0.2, "candidates": 2, "train": TRAIN}}
SEARCH["search.minitron"] |= {"layers": [3], "hidden": [32]}


def write(tmp_path, *stages, **keys):
    content = {"name": "family", "stages": list(stages), "measures": ["size", "fidelity"]}
    (tmp_path / "family.yaml").write_text(yaml.safe_dump(content | keys))
    return tmp_path / "family.yaml"


@pytest.mark.parametrize("second", [{"prune.minitron": PRUNE}, SEARCH], ids=["prune", "search"])
def test_every_size_is_measured_named_and_kept(second, llama_folder, text_file, tmp_path):
    path = write(tmp_path, {"prune.minitron": PRUNE}, DISTILL, second, DISTILL, keep="last")
    given = {"model": str(llama_folder), "data": str(text_file), "out": tmp_path / "out"}
    result = compressor.run(path, **given)
    bench = result.metrics["bench"]
    total = compressor.inspect(str(llama_folder))["parameters"]
    names = ["original, torch"]
    for stage in ("02-distill.kd", "04-distill.kd"):
        share = compressor.inspect(str(result.path / stage))["parameters"] / total
        names.append(f"ours, {share:.0%}, {stage}")
    assert [c["name"] for c in bench["candidates"]] == names
    made = [read_manifest(d) for d in sorted(result.path.glob("0[1-4]-*"))]
    removed = [manifest.metrics.get(WEIGHTS_REMOVED, False) for manifest in made]
    assert removed == [True, False, True, False]
    trained = (read_manifest(d).stages[-1] for d in result.path.glob("0[24]-*"))
    assert len({record.teacher for record in trained}) == 1  # the original
    text = (result.path / "report.md").read_text()
    for name in names[1:]:
        said = name.replace("ours, ", "ours (") + ")"
        assert f"Against original (torch), {said} is " in text
    before = (result.path / "bench.json").read_bytes()
    compressor.run(path, **given)  # measures nothing again
    assert (result.path / "bench.json").read_bytes() == before


@pytest.mark.parametrize(
    ("stages", "numbers"),
    [
        ([{"prune.minitron": PRUNE}, DISTILL, "export.safetensors"], []),
        ([DISTILL, {"prune.minitron": PRUNE}, DISTILL], []),
        ([{"prune.minitron": PRUNE}, {"prune.minitron": PRUNE}, DISTILL], []),
        ([{"prune.minitron": PRUNE}, DISTILL, DISTILL, SEARCH, DISTILL], [3]),
        ([SEARCH, SEARCH], [1]),
    ],
)
def test_a_size_is_finished_where_the_next_is_cut_from_it(stages, numbers, tmp_path):
    assert load_profile(write(tmp_path, *stages)).finished_sizes == numbers


def test_the_shipped_family_has_three_sizes_with_the_original():
    profile = load_profile("minitron-family")
    assert profile.finished_sizes == [2] and profile.stages[-1].kind == "distill"
    assert [s.teacher for s in profile.stages if s.kind == "distill"] == ["input", "input"]
