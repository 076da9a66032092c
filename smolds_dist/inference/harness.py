"""lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on a loaded model, by its Python interface."""

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smolds_dist.errors import ConfigError

KEPT = ("results", "groups", "versions", "n-shot", "n-samples")  # of what the harness answers


def find_tasks(names: list[str], folder: Path | None) -> Any:
    """The harness's task manager, which knows its own tasks and those whose YAML files lie in `folder`.

    Raises:
        ConfigError: where the harness is not installed, the folder is none, or a name is no task's.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError(
            "--tasks needs lm-evaluation-harness, which is not installed; run `pip install 'smolds-dist[eval]'`."
        ) from None
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--include-path {folder} is not a folder; give one with the YAML files of tasks.")
    manager = TaskManager(include_path=folder)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)} is no task of lm-evaluation-harness; `lm-eval ls tasks` lists them, "
            "--include-path adds your own."
        )
    return manager


def evaluate_tasks(
    model: Any, tokenizer: Any, names: list[str], manager: Any, few_shot: int | None, limit: int | None, batch: int
) -> tuple[dict[str, Any], str]:
    """Results of each task, with the harness's and the tasks' versions, and the harness's own table of them.

    Raises:
        ConfigError: where a task's data cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    try:
        loaded = manager.load(names)
    except Exception as error:  # the data sets library's, the network's, a task file's
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise ConfigError(
            f"--tasks {' '.join(names)} could not be loaded ({reason}); check the network, and HF_TOKEN for gated data."
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is loaded already
    groups = [group for name, group in loaded["groups"].items() if name in names]
    grouped = {task.task_name for group in groups for task in group.get_all_tasks()}
    tasks = [*groups, *(task for name, task in loaded["tasks"].items() if name not in grouped)]
    adapter = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch)
    answer: Any = simple_evaluate(adapter, tasks=tasks, num_fewshot=few_shot, limit=limit, log_samples=False)
    kept = {"harness": version("lm_eval")} | {key: answer[key] for key in KEPT if key in answer}
    return kept, make_table(answer)
