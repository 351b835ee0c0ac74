"""Every mistake in a profile is one sentence with file, line and the nearest valid name."""

import pytest

from compressor.errors import CompressError
from compressor.run.loading import load_profile, shipped_profiles

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
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_names_its_line_and_the_nearest_name(case, tmp_path):
    text, expected = MISTAKES[case]
    with pytest.raises(CompressError) as caught:
        load_profile(write(tmp_path, text))
    assert expected in caught.value.what
    assert caught.value.hint
    assert caught.value.exit_code == 2


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
