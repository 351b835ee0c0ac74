"""A profile: the validated recipe of a run, and its text with every default written out."""

import dataclasses
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import yaml
from pydantic import TypeAdapter

CUTS = ("prune", "search")  # kinds that make a model smaller


@dataclass(frozen=True)
class Stage:
    """One step of the chain: a method with validated options."""

    kind: str
    name: str
    options: Any
    teacher: str | None = None
    seed: int | None = None

    @property
    def method(self) -> str:
        """`kind.name`, which is also the path of the method's file."""
        return f"{self.kind}.{self.name}"

    @property
    def trains(self) -> bool:
        """Whether the stage itself trains; then its method has an `objective` beside `Options`.

        A search trains too, but in the stages of its candidates.
        """
        return self.kind != "search" and hasattr(self.options, "train")

    @property
    def sparse(self) -> bool:
        """Whether the stage leaves a pattern of zeros, which nothing after it may refill."""
        return self.kind == "prune" and hasattr(self.options, "pattern")

    def plain_options(self) -> dict[str, Any]:
        """Options with every default filled in, as plain JSON values."""
        return TypeAdapter(type(self.options)).dump_python(self.options, mode="json")


@dataclass(frozen=True)
class Profile:
    """A validated recipe. `text` is the resolved YAML: every default written out."""

    name: str
    stages: tuple[Stage, ...]
    description: str = ""
    model: str | None = None
    from_float: bool = False  # a quantized model gives way to the float one that it was made from
    teacher: str = "input"
    data: dict[str, list[str]] = field(default_factory=dict)
    seed: int = 0
    dtype: str | None = None  # of saved checkpoints; None keeps the dtype of the source
    keep: str = "all"
    measures: dict[str, Any] = field(default_factory=dict)  # {measure name: options}
    baselines: dict[str, tuple[Stage, ...]] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)  # {quality key: lowest allowed}
    text: str = ""

    @property
    def finished_sizes(self) -> list[int]:
        """Numbers of the stages that finish a size before a smaller one is cut from it.

        Such a stage trains a model that was pruned since the last one, and the next prunes again.
        """
        found, cut = [], False
        for number, (stage, after) in enumerate(pairwise(self.stages), start=1):
            cut = cut or stage.kind in CUTS
            if cut and (stage.trains or stage.kind == "search") and after.kind in CUTS:
                found.append(number)
                cut = False
        return found


KEYS = tuple(f.name for f in dataclasses.fields(Profile) if f.name != "text")


def resolved_text(profile: Profile) -> str:
    """YAML of a profile with every default written out; loading it gives the same profile."""

    def stage(item: Stage) -> dict[str, Any]:
        extra = {"teacher": item.teacher, "seed": item.seed}
        kept = {key: value for key, value in extra.items() if value is not None}
        return {item.method: item.plain_options() | kept}

    content = {key: getattr(profile, key) for key in KEYS}
    content["stages"] = [stage(s) for s in profile.stages]
    content["baselines"] = {k: [stage(s) for s in v] for k, v in profile.baselines.items()}
    content["measures"] = [
        {k: TypeAdapter(type(v)).dump_python(v, mode="json")} for k, v in profile.measures.items()
    ]
    # without the key a profile has the default measures, so an empty list is written
    kept = {k: v for k, v in content.items() if k == "measures" or v not in (None, {}, "", [])}
    return yaml.safe_dump(kept, sort_keys=False, width=100)
