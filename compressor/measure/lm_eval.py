"""Tasks of lm-eval (github.com/EleutherAI/lm-evaluation-harness), answered by the file itself.

Prompts, choices, metrics and filters are those of the library; the answers come from the engine
that serves the candidate (lm_eval_model.py), whatever it is. A task's own YAML and data may lie in
`include_path`: such tasks need no network. Everything in that folder is trusted, since lm-eval runs
the Python functions that a YAML names. Keys are TASK_METRIC, or TASK_METRIC_FILTER where a filter
has a name. Intervals are over the task's documents, drawn anew 1,000 times (interval.py); groups of
tasks, and metrics of a whole corpus that take long (bleu, chrf, ter), have none.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from compressor.engines import Engine
from compressor.errors import CompressError, first_line
from compressor.measure.inputs import fitting_length
from compressor.measure.interval import bootstrap
from compressor.model.checkpoint import load_processor
from compressor.options import nearest, options
from compressor.training.workbench import Workbench

TASKS = ("causal-lm",)
LONGEST = 2048  # tokens of a row where the model has no limit, as in lm-eval
_SLOW = ("bleu", "chrf", "ter")


@options
class Options:
    """The tasks, and how much of them."""

    tasks: tuple[str, ...] = Field(min_length=1, description="names of tasks or groups of lm-eval")
    include_path: Path | None = Field(None, description="folder with YAML files of your own tasks")
    limit: int | None = Field(None, ge=1, description="documents of each task, the first ones")
    fewshot: int | None = Field(
        None, ge=0, description="examples in front, instead of the task's own number"
    )
    batch: int = Field(8, ge=1, description="rows per forward pass")


def check(options: Options, path: Path) -> None:
    """Raise what `run` would raise of the library, the tasks and their data."""
    _need_library()
    _load(options)
    _tokenizer(path)


def run(engine: Engine, options: Options, work: Workbench) -> dict[str, float]:
    """Answer all tasks.

    Returns:
        TASK_METRIC with _low, _high and _n (documents) for every metric that is a number.

    Raises:
        CompressError: lm-eval is not installed; a task is unknown, cannot be loaded, or asks for
            what an engine here cannot do; the model has no tokenizer.
    """
    _need_library()
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]

    from compressor.measure.lm_eval_model import EngineLM

    known = _load(options)
    length = fitting_length(engine.path, LONGEST)
    model = EngineLM(engine, _tokenizer(engine.path), length, options.batch)
    results: Any = simple_evaluate(
        model=model,
        tasks=list(options.tasks),
        num_fewshot=options.fewshot,
        limit=options.limit,
        bootstrap_iters=0,  # intervals are made here
        log_samples=True,
        task_manager=_manager(options.tasks, options.include_path),
    )
    found: dict[str, float] = {}
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            metric, comma, filtered = name.partition(",")
            if comma and isinstance(value, int | float) and not metric.endswith("_stderr"):
                key = "_".join([task, metric, *([filtered] if filtered != "none" else [])])
                found[key] = float(value)
                samples = results["samples"].get(task, [])
                scores = [s[metric] for s in samples if s["filter"] == filtered and metric in s]
                if task in known and len(scores) > 1 and metric not in _SLOW:
                    found |= _interval(key, scores, known[task].aggregation()[metric])
    return found


def _interval(key: str, scores: Sequence[Any], aggregate: Callable[..., float]) -> dict[str, float]:
    """The aggregate of the documents' scores with its interval."""

    def statistic(times_NU: Tensor) -> Tensor:
        drawn = (
            [score for score, count in zip(scores, row, strict=True) for _ in range(int(count))]
            for row in times_NU.tolist()
        )
        return torch.tensor([aggregate(each) for each in drawn], dtype=torch.float64)

    return bootstrap(statistic, len(scores)).keys(key)


def _need_library() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise CompressError(
            "measure.lm_eval needs the package lm-eval", "pip install 'compress[lm-eval]'"
        )


def _tokenizer(path: Path) -> Any:
    found = load_processor(path)
    if found is None or found.eos_token_id is None:
        raise CompressError(
            f"'{path.name}' has no tokenizer with an end of text, which lm-eval needs",
            "add tokenizer.json and a tokenizer_config.json with eos_token to its directory",
        )
    return found


def _load(options: Options) -> dict[str, Any]:
    """{name: task} of all tasks, those of groups included, with their data.

    Raises:
        CompressError: one is unknown, cannot be loaded, runs code that a model wrote, or shows
            images.
    """
    if options.include_path is not None and not options.include_path.is_dir():
        raise CompressError(
            f"include_path '{options.include_path}' is no folder",
            "name the folder with your tasks' YAML files",
        )
    manager = _manager(options.tasks, options.include_path)
    for name in options.tasks:
        if name not in manager.all_tasks:
            raise CompressError(
                f"lm-eval has no task '{name}'{nearest(name, manager.all_tasks)}",
                "lm-eval ls tasks lists them; include_path: FOLDER adds your own",
            )
    try:
        found = manager.load(list(options.tasks))["tasks"]
    except Exception as error:  # of whatever kind: a library reads what a user may edit
        raise CompressError(
            f"lm-eval cannot load {', '.join(options.tasks)}: {first_line(error)}",
            "check the task's YAML and data; tasks of the hub need a network once",
        ) from error
    for name, task in found.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise CompressError(
                f"the task {name} runs code that a model wrote, or shows it images",
                f"leave {name} out of tasks",
            )
    return found


@lru_cache(maxsize=1)  # the index of lm-eval's own tasks takes many seconds
def _manager(tasks: tuple[str, ...], include_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
        return TaskManager(include_path=str(include_path))
    return TaskManager()
