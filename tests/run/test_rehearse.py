"""What a rehearsal refuses on empty models: rows that are too long, measures of another task."""

from dataclasses import replace

import pytest
import torch

from compressor.errors import CompressError
from compressor.model.checkpoint import Checkpoint, load_directory
from compressor.model.manifest import Manifest, StageRecord, list_files, write_manifest
from compressor.model.saving import save
from compressor.model.side import Side, attach, write_sides
from compressor.model.sparse import prunable
from compressor.prune import magnitude
from compressor.quantize import rtn
from compressor.run.forget import WEIGHTS_REMOVED
from compressor.run.loading import load_profile
from compressor.run.rehearse import empty, rehearse
from compressor.run.setting import open_source
from families import CONFIGS, pico


@pytest.fixture
def source(tmp_path):
    """Factory: a model as a checkpoint on disk."""

    def save(model):
        model.module.save_pretrained(tmp_path / "model")
        model.processor.save_pretrained(tmp_path / "model")
        return open_source(str(tmp_path / "model"))

    return save


@pytest.fixture
def profile(tmp_path):
    """Factory: a profile of these YAML lines."""

    def load(*lines):
        (tmp_path / "p.yaml").write_text("\n".join(lines))
        return load_profile(tmp_path / "p.yaml")

    return load


SHORT = "measures: [size]"
EXPORT = "stages: [export.onnx]"


@pytest.mark.parametrize(
    ("stages", "what", "option"),
    [
        (
            "stages: [{prune.minitron: {parameters: 0.8}}]",
            "prune.minitron): length is 128",
            "stages.1.length",
        ),
        (
            "stages: [{prune.minitron: {parameters: 0.8, length: 64}}, distill.latent]",
            "distill.latent): train.length is 128",
            "stages.2.train.length",
        ),
        (
            EXPORT + "\nbaselines: {a: [{prune.minitron: {parameters: 0.8}}]}",
            "prune.minitron): length is 128",
            "baselines.a.1.length",
        ),
    ],
)
def test_rows_longer_than_the_model_takes(stages, what, option, pico_bert, source, profile):
    with pytest.raises(CompressError) as caught:
        rehearse(profile(stages, SHORT), source(pico_bert()))
    assert what in caught.value.what and "at most 64 tokens" in caught.value.what
    assert caught.value.hint == f"set {option} to 64 or less"


def test_rows_that_just_fit_pass(pico_bert, source, profile):
    stages = [
        "stages:",
        "- prune.minitron: {parameters: 0.8, length: 64}",
        "- distill.latent: {train: {length: 64}}",
    ]
    rehearse(profile(*stages, SHORT), source(pico_bert()))


@pytest.mark.parametrize(
    ("measure", "head", "refused"),
    [
        ("perplexity", None, True),
        ("perplexity", "sequence-classification", True),
        ("accuracy", None, True),
        ("accuracy", "masked-lm", False),
        ("accuracy", "sequence-classification", False),
        ("fidelity", None, False),
    ],
)
def test_a_measure_of_another_task(measure, head, refused, pico_bert, source, profile):
    wanted = profile(EXPORT, f"measures: [{measure}]")
    model = source(pico_bert(head))
    if not refused:
        rehearse(wanted, model)
        return
    with pytest.raises(CompressError, match=f"the measure {measure} is for") as caught:
        rehearse(wanted, model)
    assert f"leave {measure} out" in caught.value.hint


def test_a_decoder_has_all_measures(pico_llama, source, profile):
    rehearse(profile(EXPORT, "measures: [perplexity, accuracy]"), source(pico_llama()))


def test_what_a_cut_refuses_is_refused_on_the_empty_model(pico_bert, source, profile):
    sizes = "{hidden: 24, heads: 3}"
    stages = f"stages: [prune.minitron: {{sizes: {sizes}, length: 16, rescale: true}}]"
    with pytest.raises(CompressError, match="rescale works for RMSNorm; bert has LayerNorm"):
        rehearse(profile(stages, SHORT), source(pico_bert()))


def test_a_missing_teacher_is_no_fault_of_a_candidate(pico_llama, source, profile):
    stages = [
        "teacher: no/such/teacher",
        "stages:",
        "- search.minitron: {parameters: 0.6, multiple: 4, length: 16, train: {length: 16}}",
        "- distill.kd: {train: {length: 16}}",
    ]
    model = source(pico_llama())
    last = "- distill.kd: {teacher: no/such/teacher, train: {length: 16}}"
    for lines in (stages, [*stages[1:3], last]):
        with pytest.raises(CompressError) as caught:
            rehearse(profile(*lines, SHORT), model)
        assert "no/such/teacher" in caught.value.what and "candidate" not in caught.value.what
    last = "- distill.kd: {teacher: 'stage:2', train: {length: 16}}"
    with pytest.raises(CompressError, match=r"^teacher 'stage:2' is no earlier stage"):
        rehearse(profile(*stages[1:3], last, SHORT), model)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_cut_without_weights(name, tmp_path, profile):
    model = pico(name)
    (tmp_path / "model").mkdir()
    save(model, tmp_path / "model", tmp_path)
    stages = "stages: [prune.minitron: {parameters: 0.6, multiple: 4, length: 16}]"
    rehearse(profile(stages, SHORT), open_source(str(tmp_path / "model")))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("{pattern: '2:4'}", "pattern 2:4 does not divide the 42 inputs"),
        ("{ratios: {'*.value': 0.1, '*.values': 0.2}}", "ratios: '*.values' fits no layer"),
        ("{length: 65}", "length is 65 and the model takes at most 64"),
    ],
)
@pytest.mark.parametrize("place", ["stages.1", "baselines.a.1"])
def test_what_a_sparse_stage_refuses_is_refused_before_any_work(
    options, what, place, pico_bert, source, profile
):
    stage = f"[prune.wanda: {options}]"
    lines = [f"stages: {stage}"] if "stages" in place else [EXPORT, f"baselines: {{a: {stage}}}"]
    with pytest.raises(CompressError) as caught:
        rehearse(profile(*lines, SHORT), source(pico_bert(intermediate_size=42)))
    assert what in caught.value.what
    assert caught.value.what.startswith(f"{place} (prune.wanda): ")
    fitting = stage.replace("65", "64").replace("'*.values'", "'*'").replace("2:4", "1:2")
    lines = [line.replace(stage, fitting) for line in lines]
    rehearse(profile(*lines, SHORT), source(pico_bert(intermediate_size=42)))


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        ({"sparse": "{pattern: '2:4'}"}, "2:4 does not divide the 42 inputs", "sparse.undivided:"),
        ({"mixed": "{bytes: 100}"}, "2 bits for every layer take", "mixed.bytes: "),
        ({"length": 65}, "length is 65 and the model takes at most 64", "64 or less"),
        ({"uneven": "refuse"}, "group 16 does not divide the 42 inputs of ", "uneven: channel"),
    ],
)
def test_what_gptq_refuses_is_refused_before_any_work(
    options, what, hint, pico_bert, source, profile
):
    given = {"group": 16, "uneven": "channel", "length": 64} | options
    line = ", ".join(f"{key}: {value}" for key, value in given.items())
    stages = profile(f"stages: [quantize.gptq: {{{line}}}]", SHORT)
    with pytest.raises(CompressError, match=what) as caught:
        rehearse(stages, source(pico_bert(intermediate_size=42)))
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("stage", ["quantize.gptq", "distill.ce", "prune.wanda"])
def test_a_quantized_checkpoint_is_only_exported(stage, pico_llama, make_work, profile, tmp_path):
    model = pico_llama()
    rtn.run(model, rtn.Options(group=16), make_work())
    save(model, tmp_path, tmp_path)
    base = {"id": "owner/float"}
    write_manifest(tmp_path, Manifest("checkpoint", "llama", base, formats=model.formats))
    made = Checkpoint.open(tmp_path)
    with pytest.raises(
        CompressError, match=f"quantized already, and {stage} needs float"
    ) as caught:
        rehearse(profile(f"stages: [{stage}, export.onnx]", SHORT), made)
    assert "--model owner/float" in (caught.value.hint or "")
    rehearse(profile(EXPORT, SHORT), made)


@pytest.mark.parametrize("removed", [False, True])
def test_the_float_stage_beside_a_quantized_one_is_named(
    removed, pico_llama, make_work, profile, tmp_path
):
    model, base = pico_llama(), {"id": "owner/float", "sha256": "s"}
    record = StageRecord("prune.wanda", {}, 0, None, None, 0.0, 0, "s", "pruned")
    last = replace(record, method="quantize.rtn", parent="pruned", fingerprint="quantized")
    folders = [tmp_path / name for name in ("01-prune.wanda", "02-quantize.rtn")]
    for folder, stages in zip(folders, ([record], [record, last]), strict=True):
        if last in stages:
            rtn.run(model, rtn.Options(group=16), make_work())
        folder.mkdir()
        save(model, folder, tmp_path)
        found = Manifest("checkpoint", "llama", base, stages=stages, formats=dict(model.formats))
        found = replace(found, files=list_files(folder), metrics={WEIGHTS_REMOVED: removed})
        write_manifest(folder, found)
    with pytest.raises(CompressError, match="quantized already") as caught:
        rehearse(profile("stages: [distill.ce]", SHORT), Checkpoint.open(folders[1]))
    named = "owner/float" if removed else folders[0]
    assert f"--model {named}," in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("prune.ast: {side: 32, train: {length: 16}}", "the 48 inputs"),
        ("prune.squarehead: {teacher: 'stage:1', train: {length: 16}}", "compares all layers"),
        ("distill.kd: {teacher: 'stage:2', train: {length: 16}}", "'stage:2' is no earlier stage"),
    ],
)
def test_a_trained_stage_of_a_baseline_is_gone_through_as_any_other(
    method, what, pico_llama, source, profile
):
    cut = "stages: [{prune.minitron: {sizes: {layers: 2}, length: 16}}]"
    lines = [cut, "baselines:", "  a:", "  - prune.magnitude: {}", f"  - {method}"]
    with pytest.raises(CompressError) as caught:
        rehearse(profile(*lines, SHORT), source(pico_llama()))
    assert caught.value.what.startswith(f"baselines.a.2 ({method.partition(':')[0]}): ")
    assert what in caught.value.what
    fitting = method.replace("32", "16").replace("'stage:1'", "input").replace("stage:2", "stage:1")
    lines[-1] = f"  - {fitting}"
    rehearse(profile(*lines, SHORT), source(pico_llama()))


AST = "prune.ast: {%s, train: {length: 16}}"


@pytest.mark.parametrize(
    ("first", "second", "what", "hint"),
    [
        (
            "{sparsity: 0.75}",
            AST % "pattern: '2:4'",
            "75.0% of the weights are zero already and stay zero; 50.0% ask for fewer",
            "ask for more than 75.0%",
        ),
        (
            "{pattern: '2:4'}",
            AST % "pattern: '4:8'",
            "is 2:4 already and its zeros stay zero, so it is 4:8 too",
            "leave out the stage that pruned before",
        ),
        (
            "{pattern: '2:4'}",
            "prune.magnitude: {pattern: '3:8'}",
            "has the pattern 2:4 already, and no layer can promise 3:8 beside it",
            "pattern: 2:4 or unstructured",
        ),
    ],
)
def test_a_sparse_stage_that_earlier_zeros_leave_no_room_for(
    first, second, what, hint, pico_llama, source, profile
):
    with pytest.raises(CompressError) as caught:
        rehearse(
            profile(f"stages: [prune.magnitude: {first}, {second}]", SHORT), source(pico_llama())
        )
    assert what in caught.value.what and hint in caught.value.hint
    assert caught.value.what.startswith("stages.2 (prune.")


def test_side_paths_of_an_earlier_stage_are_seen_before_any_work(pico_llama, source, profile):
    stages = f"stages: [{AST % 'side: 8'}, {AST % 'side: %s'}]"
    with pytest.raises(CompressError, match="the model has side paths already"):
        rehearse(profile(stages % 8, SHORT), source(pico_llama()))
    rehearse(profile(stages % "null", SHORT), source(pico_llama()))


def test_side_paths_of_a_source_without_manifest_are_seen(pico_llama, source, profile, tmp_path):
    model = pico_llama()
    given = source(model)
    attach(model, "model.layers.0.mlp.up_proj", Side(torch.ones(48, 4)))
    write_sides(model, given.path, torch.float32)
    assert empty(given.path).formats == load_directory(given.path).formats
    with pytest.raises(CompressError, match="the model has side paths already"):
        rehearse(profile(f"stages: [{AST % 'side: 8'}]", SHORT), given)


def test_a_wrong_pattern_is_named(profile):
    with pytest.raises(CompressError, match=r"option 'pattern' of prune.ast: .*like 2:4.*'4:2'"):
        profile("stages: [prune.ast: {pattern: '4:2'}]")


def test_fewer_zeros_than_there_are_and_none_that_are_new_are_remarked(pico_llama, source, profile):
    given = source(pico_llama())

    def said(*stages):
        return rehearse(profile(f"stages: [{', '.join(stages)}]", SHORT), given)

    dense = "prune.magnitude: {ratios: {'*': 0.0, '*.0.mlp.up_proj': 0.1}}"
    more, less, same = (f"prune.wanda: {{length: 16, sparsity: {s}}}" for s in (0.75, 0.5, 0.75))
    assert said(less, more) == [] and said(dense, less) == []
    (fewer,) = said(more, less)
    assert fewer.startswith("prune.wanda: 75.0% of the weights are zero already and stay zero")
    assert said(more, same) == [
        "prune.wanda: 75.0% of the weights are zero already, as asked for: it makes no new zeros"
    ]
    ast = AST % "pattern: '2:4'"
    assert said("prune.magnitude: {sparsity: 0.3}", ast) == []


def test_an_input_that_never_saw_the_finetuning_is_remarked(pico_llama, source, profile):
    given = source(pico_llama())

    def said(before, extra):
        stage = f"prune.squarehead: {{length: 16, train: {{length: 16}}{extra}}}"
        return rehearse(profile(f"stages: [{before}{stage}]", SHORT), given)

    tuned = "distill.ce: {train: {length: 16}}, "
    assert said("", "") == said(tuned, ", teacher: 'stage:1'") == []
    assert said(tuned, ", squarehead: 0.0") == []  # asks no teacher
    assert said(tuned, "") == [
        "prune.squarehead: its teacher is the input, which never saw what stage 1 trained: "
        "teacher: stage:1 is the model that this one starts from"
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_zeros_that_no_manifest_speaks_of_are_told(family, profile, tmp_path):
    stages, model = profile("stages: [export.safetensors]", SHORT), pico(family)
    folder = tmp_path / "model"
    folder.mkdir()

    def said():
        save(model, folder, tmp_path, shard=20_000)
        return rehearse(stages, open_source(str(folder)))

    linears = prunable(model)
    for linear in [*linears.values()][: len(linears) // 2]:
        linear.weight.data[:, ::2] = 0
    assert said() == []  # in half of the layers
    for linear in linears.values():
        linear.weight.data[:, ::2] = 0
    count = len(linears)
    (remark,) = said()
    assert remark.startswith(f"{count} of {count} layers of 'model' have 50.0% zeros, and without")


def test_a_sparse_checkpoint_is_told_only_where_its_manifest_is_lost(
    pico_llama, make_work, profile, tmp_path
):
    model = pico_llama()
    magnitude.run(model, magnitude.Options(pattern="2:4"), make_work())
    (tmp_path / "plain").mkdir()
    save(model, tmp_path / "plain", tmp_path)
    write_manifest(tmp_path / "plain", Manifest("checkpoint", "llama", {}, formats=model.formats))
    stages = profile("stages: [export.safetensors]", SHORT)
    assert rehearse(stages, Checkpoint.open(tmp_path / "plain")) == []
    (tmp_path / "plain" / "manifest.json").unlink()
    (said,) = rehearse(stages, open_source(str(tmp_path / "plain")))
    assert "put the manifest.json of the pruned checkpoint beside its weights" in said
