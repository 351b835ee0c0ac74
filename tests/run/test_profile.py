"""Every mistake in a profile is one sentence with file, line and the nearest valid name."""

import pytest
import yaml

from compressor.errors import CompressError
from compressor.run.loading import load_profile, shipped_profiles
from compressor.run.methods import describe

GOOD = """\
name: good
stages:
  - prune.minitron: {parameters: 0.5}
  - distill.kd:
      temperature: 2
      train: {steps: 10}
  - export.onnx: {}
"""


def write(tmp_path, text):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return path


MISTAKES = {
    "unknown key": ("stagse: []\n" + GOOD, "p.yaml:1: unknown key 'stagse'; did you mean stages?"),
    "unknown method": (
        GOOD.replace("prune.minitron", "prune.minitorn"),
        "p.yaml:3: unknown method 'prune.minitorn'; did you mean prune.minitron?",
    ),
    "unknown option": (
        GOOD.replace("temperature", "temprature"),
        "p.yaml:5: unknown option 'temprature' of distill.kd; did you mean temperature?",
    ),
    "unknown nested option": (
        GOOD.replace("steps", "stpes"),
        "p.yaml:6: unknown option 'train.stpes' of distill.kd; did you mean steps?",
    ),
    "out of range": (GOOD.replace("0.5", "1.5"), "p.yaml:3: option 'parameters' of prune.minitron"),
    "wrong type": (GOOD.replace("10", "many"), "p.yaml:6: option 'train.steps' of distill.kd"),
    "no stages": ("name: x\n", "'stages' must be a list of stages"),
    "order": (
        GOOD.replace("export.onnx: {}", "quantize.rtn: {}\n  - distill.ce: {}"),
        "p.yaml:8: distill.ce cannot come after quantize.rtn",
    ),
    "two quantize": (
        GOOD.replace("export.onnx: {}", "quantize.rtn: {}\n  - quantize.rtn: {bits: 4}"),
        "p.yaml:8: a second quantize stage",
    ),
    "not YAML": ("stages: [", "p.yaml:1: not valid YAML"),
    "twice": ("name: a\nname: b\n", "p.yaml:2: 'name' stands twice"),
    "measure": (GOOD + "measures: [perplexty]\n", "did you mean perplexity?"),
    "data key": (GOOD + "data: {trian: a.txt}\n", "unknown key 'trian'; did you mean train?"),
    "floor": (GOOD + "floor: {cosin: 0.9}\n", "did you mean cosine?"),
    "keep": (GOOD + "keep: lst\n", "keep is 'lst'; did you mean last?"),
    "seed": (GOOD + "seed: -1\n", "seed must be a whole number"),
    "number for options": (
        GOOD.replace("{parameters: 0.5}", "0.5"),
        "p.yaml:3: 'prune.minitron' must be a mapping (got 0.5)",
    ),
    "list for options": (
        GOOD.replace("prune.minitron: {parameters: 0.5}", "distill.kd: [1]"),
        "p.yaml:3: 'distill.kd' must be a mapping (got [1])",
    ),
    "stage teacher": (
        GOOD.replace("temperature: 2", "teacher: 1"),
        "p.yaml:5: 'teacher' must be a text (got 1)",
    ),
    "stage seed": (
        GOOD.replace("temperature: 2", "seed: abc"),
        "p.yaml:5: seed must be a whole number >= 0 (got 'abc')",
    ),
    "negative stage seed": (
        GOOD.replace("temperature: 2", "seed: -1"),
        "p.yaml:5: seed must be a whole number >= 0 (got -1)",
    ),
    "number of nested options": (GOOD.replace("{steps: 10}", "{3: 1}"), "p.yaml:6: "),
    "measures a number": (GOOD + "measures: 3\n", "p.yaml:8: 'measures' must be a list (got 3)"),
    "measures a text": (GOOD + "measures: size\n", "p.yaml:8: 'measures' must be a list"),
    "measure options": (
        GOOD + "measures: [{size: 3}]\n",
        "p.yaml:8: 'size' must be a mapping (got 3)",
    ),
    "measure without name": (GOOD + "measures: [{}]\n", "p.yaml:8: a measure is one NAME"),
    "measure mapped": (
        GOOD + "measures:\n  size: {}\n  fidelity: {rows: 0}\n",
        "p.yaml:10: option 'rows' of measure.fidelity",
    ),
    "floor a number": (GOOD + "floor: 0.9\n", "p.yaml:8: 'floor' must be a mapping (got 0.9)"),
    "baselines a list": (
        GOOD + "baselines: [export.onnx]\n",
        "p.yaml:8: 'baselines' must be a mapping",
    ),
    "model a number": (GOOD + "model: 3\n", "p.yaml:8: 'model' must be a text (got 3)"),
    "from_float a text": (
        GOOD + "from_float: maybe\n",
        "p.yaml:8: 'from_float' must be true or false (got 'maybe')",
    ),
    "teacher a number": (GOOD + "teacher: 3\n", "p.yaml:8: 'teacher' must be a text (got 3)"),
    "name a list": (GOOD.replace("name: good", "name: [x]"), "p.yaml:1: 'name' must be a text"),
    "data a number": (GOOD + "data: 3\n", "p.yaml:8: 'data' must be a text (got 3)"),
    "data of a split": (
        GOOD + "data:\n  train: [a.txt, 3]\n",
        "p.yaml:9: 'train' must be a text (got 3)",
    ),
    "merge key": (
        GOOD.replace("temperature: 2", "<<: {temperature: 2}"),
        "p.yaml:5: '<<' cannot be read as 'merge'",
    ),
    "tag": (GOOD.replace("good", "!tag x"), "p.yaml:1: 'x' cannot be read as '!tag'"),
    "tag of a mapping": (GOOD.replace("{steps", "!tag {steps"), "p.yaml:6: a list or mapping"),
    "list as key": (GOOD + "? [a]\n: b\n", "p.yaml:8: a list or mapping cannot be read"),
    "no such day": (GOOD.replace("good", "2024-13-45"), "p.yaml:1: '2024-13-45' cannot be read"),
    "baseline outside the run": (
        GOOD + "baselines: {../../x: [export.onnx]}\n",
        "p.yaml:8: baseline '../../x' must be named",
    ),
    "hidden baseline": (GOOD + "baselines: {.x: [export.onnx]}\n", "baseline '.x' must be named"),
    "baseline a number": (GOOD + "baselines: {8: [export.onnx]}\n", "baseline 8 must be named"),
    "baseline order": (
        GOOD + "baselines:\n  a:\n    - export.onnx\n    - quantize.rtn\n",
        "p.yaml:11: quantize.rtn cannot come after export.onnx",
    ),
    "baseline with two exports": (
        GOOD + "baselines:\n  a: [export.onnx, export.safetensors]\n",
        "p.yaml:9: baseline 'a' has several exports",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_names_its_line_and_the_nearest_name(case, tmp_path):
    text, expected = MISTAKES[case]
    with pytest.raises(CompressError) as caught:
        load_profile(write(tmp_path, text))
    assert expected in caught.value.what
    assert caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text", ["distill.kd: {temperature: 0}", "measures: [{fidelity: {rows: 0}}]"]
)
def test_the_hint_names_a_method_that_can_be_looked_up(text, tmp_path):
    whole = GOOD + text if text.startswith("m") else f"stages: [{text}]"
    with pytest.raises(CompressError, match=r"lists|must|option") as caught:
        load_profile(write(tmp_path, whole))
    method = caught.value.hint.split()[2]
    assert describe(method)["name"] == method


def test_empty_values_are_the_defaults(tmp_path):
    empty = "data:\nfloor:\nbaselines:\nmeasures:\nteacher:\n"
    filled = load_profile(write(tmp_path, GOOD + empty + "description:\n"))
    assert filled == load_profile(write(tmp_path, GOOD))
    assert filled.baselines == {} and filled.teacher == "input"


def test_set_reaches_nested_options_and_is_validated(tmp_path):
    path = write(tmp_path, GOOD)
    profile = load_profile(path, ("stages.2.train.steps=7", "stages.2.temperature=3", "seed=5"))
    assert profile.stages[1].options.train.steps == 7
    assert profile.stages[1].options.temperature == 3
    assert profile.seed == 5
    with pytest.raises(CompressError, match="stpes"):
        load_profile(path, ("stages.2.train.stpes=7",))
    with pytest.raises(CompressError, match=r"stages\.1 to stages\.3"):
        load_profile(path, ("stages.4.bits=7",))
    with pytest.raises(CompressError, match="no KEY=VALUE"):
        load_profile(path, ("stages",))


def test_a_second_budget_is_laid_to_the_set_that_gave_it_and_the_hint_takes_the_first_away():
    given = "stages.1.latency=0.5"
    with pytest.raises(CompressError) as caught:
        load_profile("minitron-search", (given,))
    assert caught.value.what == (
        f"--set {given}: search.minitron: give exactly one of parameters, bytes and latency "
        "(got parameters and latency)"
    )
    assert caught.value.hint == "add --set stages.1.parameters=null"
    repaired = load_profile("minitron-search", (given, "stages.1.parameters=null"))
    assert repaired.stages[0].options.latency == 0.5


def test_a_pattern_needs_no_quotes(tmp_path):
    """YAML 1.1 takes 2:4 for a number in base 60."""
    text = "name: x\nstages:\n  - prune.wanda: {pattern: 2:4}\n"
    path = write(tmp_path, text)
    assert load_profile(path).stages[0].options.pattern == "2:4"
    assert load_profile(path, ("stages.1.pattern=4:8",)).stages[0].options.pattern == "4:8"
    resolved = yaml.safe_load(load_profile(path).text)
    assert resolved["stages"][0]["prune.wanda"]["pattern"] == "2:4"


WHOLE = {
    "several in the profile": ("prune.minitron: {parameters: 0.5, bytes: 9}", "p.yaml:1: prune"),
    "none": ("prune.minitron: {}", "p.yaml:1: prune.minitron: give exactly one"),
    "ast": (
        "prune.ast: {side_start: xavier, train: {steps: 1}}",
        "p.yaml:1: prune.ast: side_start xavier draws",
    ),
    "pattern": ("prune.wanda: {pattern: '2:4', sparsity: 0.6}", "p.yaml:1: prune.wanda: pattern"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_mistake_of_options_together_names_the_method_and_no_python_objects(case, tmp_path):
    stage, expected = WHOLE[case]
    with pytest.raises(CompressError) as caught:
        load_profile(write(tmp_path, f"stages: [{stage}]"))
    assert caught.value.what.startswith(expected)
    assert "option ''" not in caught.value.what and "ArgsKwargs" not in caught.value.what


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("stages.2.train.stpes=7", "unknown option 'train.stpes' of distill.kd"),
        ("stages.1.parameters=2", "option 'parameters' of prune.minitron"),
        ("seed=-1", "seed must be a whole number"),
        ("keep=lst", "keep is 'lst'"),
    ],
)
def test_a_mistake_of_the_command_line_names_no_line_of_the_profile(given, expected, tmp_path):
    with pytest.raises(CompressError) as caught:
        load_profile(write(tmp_path, GOOD), (given,))
    assert caught.value.what.startswith(f"--set {given}: {expected}")


@pytest.mark.parametrize("name", shipped_profiles())
def test_the_resolved_text_of_a_shipped_profile_loads_to_the_same_profile(name, tmp_path):
    profile = load_profile(name)
    again = load_profile(write(tmp_path, profile.text))
    assert again == profile
    assert profile.description


def test_missing_profile_names_the_nearest():
    with pytest.raises(CompressError, match="unknown profile 'demoo'; did you mean demo"):
        load_profile("demoo")
    with pytest.raises(CompressError, match="cannot be read"):
        load_profile("nowhere.yaml")


def test_the_resolved_profile_names_what_the_command_line_gave(llama_folder, text_file, chain):
    from compressor.run.pipeline import prepare

    loaded = prepare(chain, str(llama_folder), "input", str(text_file), ())
    again = yaml.safe_load(loaded.text)
    assert again["model"] == str(llama_folder)
    assert again["data"] == {"train": [str(text_file)]}
