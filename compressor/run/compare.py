"""What was gained: the original, the baselines and the artefacts, measured side by side."""

import hashlib
import json
from pathlib import Path
from typing import Any

from compressor.model.count import count_parameters
from compressor.model.manifest import Artifact, file_digest, read_manifest
from compressor.run.bench import VERSION, measure_candidates
from compressor.run.candidates import Candidate
from compressor.run.layout import stage_directories, stage_name
from compressor.run.machine import machine, packages
from compressor.run.measuring import plain_options
from compressor.run.rehearse import empty
from compressor.run.report import presentable
from compressor.run.setting import Setting

STORED = "bench.json"


def compare(setting: Setting, artifacts: list[Artifact]) -> dict[str, Any] | None:
    """Measure all candidates, or return what was stored when none of them changed.

    The first candidate is the original in torch; baselines and artefacts follow. Returns None
    for a profile without measures or without data.
    """
    measures = setting.profile.measures
    if not measures or setting.corpus is None:
        return None
    candidates = _candidates(setting, artifacts)
    identity = _identity(setting, candidates)
    stored = setting.home / STORED
    if stored.is_file():
        content = json.loads(stored.read_text(encoding="utf-8"))
        if content["identity"] == identity and not content["result"]["noisy"]:
            return content["result"]  # a noisy one is measured again
    setting.screen.say("measuring " + ", ".join(c.name for c in candidates))
    result = measure_candidates(candidates, setting.measuring(), measures)
    result = presentable(result | {"data": setting.data_record})
    temporary = stored.with_suffix(".tmp")
    temporary.write_text(json.dumps({"identity": identity, "result": result}), encoding="utf-8")
    temporary.rename(stored)
    return result


def _candidates(setting: Setting, artifacts: list[Artifact]) -> list[Candidate]:
    found = [Candidate("original, torch", setting.source.path)]
    for name in setting.profile.baselines:
        last = stage_directories(setting.home / "baselines" / name)[-1]
        found.append(Candidate(f"original, {name}", last))
    models = [s.method for s in setting.profile.stages if s.kind != "export"]
    sizes = setting.profile.finished_sizes
    found += [_size(setting, number) for number in sizes]
    if not artifacts and models:
        last = setting.home / stage_name(len(models), models[-1])
        whole = _size(setting, len(models)) if sizes else Candidate("ours, torch", last)
        found.append(whole)
    return found + [Candidate(f"ours, {_short(a.path)}", a.path) for a in artifacts]


def _size(setting: Setting, number: int) -> Candidate:
    """One size of a family, named by the share of the original's parameters and its stage."""
    name = stage_name(number, setting.profile.stages[number - 1].method)
    own = read_manifest(setting.home / name).metrics["parameters"]
    share = own / count_parameters(empty(setting.source.path).module)
    return Candidate(f"ours, {share:.0%}, {name}", setting.home / name)


def _short(path: Path) -> str:
    return path.name.partition("-")[2].removeprefix("export.")


def _identity(setting: Setting, candidates: list[Candidate]) -> str:
    parts: list[Any] = [VERSION, setting.data_record, setting.profile.seed]
    parts += [machine(), packages()]  # times of another machine are not ours
    for name, options in setting.profile.measures.items():
        parts.append([name, plain_options(options)])
    for candidate in candidates:
        manifest = candidate.path / "manifest.json"
        known = file_digest(manifest) if manifest.is_file() else setting.source.manifest.fingerprint
        parts.append([candidate.name, known])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
