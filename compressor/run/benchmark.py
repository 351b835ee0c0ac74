"""`compress bench`: measure any models side by side, and write what was found."""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressor.engines import refuse_device
from compressor.engines.onnx_session import find_provider
from compressor.errors import CompressError
from compressor.model.checkpoint import Checkpoint, load_processor, read_task
from compressor.model.manifest import Manifest
from compressor.model.model import CLASSIFIERS
from compressor.model.sources import read_config
from compressor.options import nearest
from compressor.run.bench import MEASURES, fingerprint, measure_candidates
from compressor.run.candidates import Candidate, find_candidates
from compressor.run.machine import machine, packages
from compressor.run.measuring import measure_options, own_data, refuse_unfit
from compressor.run.methods import method_names
from compressor.run.outputs import claim, write_files
from compressor.run.page import html
from compressor.run.profile import Profile
from compressor.run.report import markdown, presentable
from compressor.run.setting import Setting
from compressor.run.tables import facts
from compressor.screen import Screen, Silent

RESULT = "bench.json"
REPORT = ("report.md", "report.html")
DEFAULT_TEXT = "stdlib:pydoc_data.topics"
TEXT_TASKS = ("causal-lm", "feature-extraction", "fill-mask", "text-classification")
BY_TASK = {
    "causal-lm": ("perplexity",),
    "feature-extraction": ("batch_sensitivity",),
    "speech-seq2seq": ("wer",),
}


def bench(
    models: Sequence[str | Path],
    data: str | None = None,
    measures: Sequence[str] = (),
    threads: int = 1,
    rounds: int = 7,
    device: str = "cpu",
    out: str | Path | None = None,
    screen: Screen | None = None,
    set: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure models side by side: size, speed, memory and quality of each, against the first.

    Args:
        models: directories, hub ids or package:NAME[/subdir]; checkpoints and artefacts.
        data: what quality is measured on: its held-out part, exactly that of a run with this
            data. Text models take Python's help topics when it is not given.
        measures: exactly these (size always); by default size, latency, memory, fidelity to the
            first, and what fits the task: perplexity, accuracy (labelled data), batch
            sensitivity, word error rate.
        threads: threads of speed and memory; at most the processors of this machine.
        rounds: turns per candidate.
        device: "cpu", or an execution provider of the ONNX Runtime that is installed, such as
            "cuda"; then all models are directories of export.onnx, and memory is not measured.
        out: directory for bench.json and a report; it holds nothing else.
        screen: where progress is shown; nowhere by default.
        set: "MEASURE.OPTION=VALUE", options of the measures.

    Returns:
        The `bench --json` form, see `run.bench.measure_candidates`; `data` {name, sha256} and
        `domain`, a sentence about the data, besides.

    Raises:
        CompressError: the user must act.
    """
    begin, show = time.perf_counter(), screen or Silent()
    _refuse_settings(threads, rounds, device, measures)
    candidates = find_candidates([str(m) for m in models], device)
    if not candidates:
        raise CompressError("nothing to measure", "compress bench MODEL [MODEL ...]")
    for candidate in candidates:
        refuse_device(candidate.engine, candidate.path, device)
    if out is not None:
        claim(Path(out), (RESULT, *REPORT))
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as home:
        setting = _setting(candidates[0], data, Path(home), show)
        domain = _domain(setting, data)
        chosen = measure_options(measures or _defaults(setting, candidates), set)
        refuse_unfit(chosen, candidates[0].path)
        show.say("measuring " + ", ".join(c.name for c in candidates))
        found = measure_candidates(candidates, setting.measuring(), chosen, threads, rounds)
    domain = f"{domain} {own_data(found.get('measures', {}))}".strip()
    found |= {"data": setting.data_record, "domain": domain}
    found = presentable(found)
    if out is not None:
        report = _report(found, time.perf_counter() - begin)
        result = json.dumps(found, indent=1, allow_nan=False) + "\n"
        pages = {"report.md": markdown(report, RESULT), "report.html": html(report)}
        write_files(Path(out), {**pages, RESULT: result})
    return found


def _refuse_settings(threads: int, rounds: int, device: str, measures: Sequence[str]) -> None:
    if device != "cpu":
        find_provider(device)
        if "memory" in measures:
            raise CompressError(
                f"--measure memory is of the CPU, and --device {device} is another",
                "leave one of the two out",
            )
    cores = processors()
    if threads < 1:
        raise CompressError(f"--threads {threads}: at least one is needed", "--threads 1")
    if threads > cores:
        raise CompressError(
            f"--threads {threads}: this machine gives {cores} processors to this process; more "
            "threads than that take turns on one processor, and times become worthless",
            f"--threads {cores}",
        )
    if rounds < 1:
        raise CompressError(f"--rounds {rounds}: at least one round is needed", "--rounds 7")
    known = method_names("measure")
    for name in measures:
        if name not in known:
            raise CompressError(
                f"unknown measure '{name}'{nearest(name, known)}", f"measures: {', '.join(known)}"
            )


def processors() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _setting(first: Candidate, data: str | None, home: Path, screen: Screen) -> Setting:
    """The surroundings of a run without stages, whose source is the first candidate."""
    task = read_task(first.path)
    if data is None and task not in TEXT_TASKS:
        raise CompressError(
            f"'{first.name}' is for {task}, which has no built-in data", "add --data F"
        )
    if task in TEXT_TASKS and load_processor(first.path) is None:
        raise CompressError(
            f"'{first.name}' has no tokenizer, so it can read no text",
            "add tokenizer.json and tokenizer_config.json to its directory",
        )
    manifest = Manifest(
        kind="checkpoint",
        family=read_config(first.path)["model_type"],
        base_model={"id": first.name, "sha256": fingerprint(first.path), "license": None},
    )
    profile = Profile("bench", stages=(), data={"train": [data or DEFAULT_TEXT]})
    return Setting(profile, Checkpoint(first.path, manifest), home, screen, screen.say)


def _defaults(setting: Setting, candidates: Sequence[Candidate]) -> list[str]:
    """Measures by task; a model alone is not compared with itself, nor a device's memory read."""
    chosen = [name for name in MEASURES if name != "fidelity" or len(candidates) > 1]
    if candidates[0].device != "cpu":
        chosen.remove("memory")
    if setting.task in CLASSIFIERS:
        sample = setting.measuring().batches("heldout", 1)
        return chosen + (["accuracy"] if len(sample) and "labels" in sample[0] else [])
    return chosen + list(BY_TASK.get(setting.task, ()))


def _domain(setting: Setting, data: str | None) -> str:
    """Where the quality comes from, in a sentence; reads the data, so that mistakes end early."""
    corpus = setting.corpus
    assert corpus is not None
    if data is None:
        return (
            f"Quality is measured on held-out documents of {DEFAULT_TEXT}, Python's own help "
            "texts, because no --data was given: expect other numbers on your text."
        )
    return (
        f"Quality is measured on the held-out part of {corpus.name}: no compress run with "
        "this data trains on it; whether a model saw it elsewhere is not known."
    )


def _report(found: dict[str, Any], seconds: float) -> dict[str, Any]:
    names = [c["name"] for c in found["candidates"]]
    return {
        "title": "bench: " + ", ".join(names),
        "description": f"Models for {found['task']}, each against the first.",
        "machine": machine(),
        "packages": packages(),
        "seconds": seconds,
        "data": f"{found['data']['name']} (sha256 {found['data']['sha256'][:16]})",
        "speed": f"{found['rounds']} rounds, noise {facts(found['noise']) or 'not measured'}",
        "stages": [],
        "bench": found,
        "domain": found["domain"],
    }
