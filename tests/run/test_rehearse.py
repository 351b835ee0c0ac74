"""What a rehearsal refuses on empty models: rows that are too long, measures of another task."""

import pytest

from compressor.errors import CompressError
from compressor.model.checkpoint import save
from compressor.run.loading import load_profile
from compressor.run.rehearse import rehearse
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


AST = "prune.ast: {{pattern: {}, {}train: {{length: 16}}}}"
WANDA = "prune.wanda: {{pattern: {}, {}length: 16}}"


@pytest.mark.parametrize(
    ("earlier", "later", "refused"),
    [
        (WANDA.format("unstructured", "sparsity: 0.8, "), AST.format("'2:4'", ""), True),
        (WANDA.format("'2:4'", ""), AST.format("unstructured", "sparsity: 0.6, "), True),
        (WANDA.format("'2:4'", ""), AST.format("'4:8'", ""), True),
        (WANDA.format("'4:8'", ""), AST.format("'2:4'", ""), False),
        (WANDA.format("'2:4'", ""), AST.format("'1:4'", ""), False),
        (WANDA.format("unstructured", "sparsity: 0.5, "), AST.format("'2:4'", ""), False),
    ],
)
def test_a_mask_that_would_not_keep_earlier_zeros_is_refused_before_any_work(
    earlier, later, refused, pico_llama, source, profile
):
    wanted, model = profile("stages:", f"- {earlier}", f"- {later}", SHORT), source(pico_llama())
    if not refused:
        rehearse(wanted, model)
        return
    with pytest.raises(CompressError, match=r"from an earlier stage, which .* would not keep"):
        rehearse(wanted, model)


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
