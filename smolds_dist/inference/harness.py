"""lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on a loaded model, through its Python API."""

import fnmatch
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smolds_dist.errors import ConfigError, first_line
from smolds_dist.model.regions import eager_regions
from smolds_dist.parallel.engine import Engine
from smolds_dist.parallel.topology import Topology
from smolds_dist.settings import Eval

KEPT = ("results", "groups", "versions", "n-shot", "n-samples")  # keys of the harness's results


def load_tasks(names: list[str], folder: Path | None, option: str = "--") -> list[Any]:
    """Load tasks of the harness and of YAML files in `folder`, with their questions.

    Args:
        names: of tasks, or patterns such as "arc_*"; each may be a comma-separated list.
        option: prefix of the options' names in error messages.

    Raises:
        ConfigError: if the harness is not installed, the folder is missing, a name is not a task's, or a task's data
            cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError(
            f"{option}tasks needs lm-evaluation-harness, which is not installed; run `pip install 'smolds-dist[eval]'`."
        ) from None
    own = f"{option}include-path" if option == "--" else f"{option}include_path"
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{own} {folder} is not a folder; use one with YAML files of tasks.")
    manager = TaskManager(include_path=folder)
    patterns = [one.strip() for name in names for one in name.split(",") if one.strip()]
    names = [*dict.fromkeys(name for one in patterns for name in fnmatch.filter(manager.all_tasks, one) or [one])]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)} is not a task of lm-evaluation-harness; `lm-eval ls tasks` lists them, "
            f"{own} adds your own."
        )
    try:
        loaded = manager.load(names)
    except Exception as error:  # of the datasets library, the network or a task file
        raise ConfigError(
            f"{option}tasks {' '.join(names)} could not be loaded ({first_line(error)}); check the network, and HF_TOKEN "
            "for gated data."
        ) from None
    groups = [group for name, group in loaded["groups"].items() if name in names]
    grouped = {task.task_name for group in groups for task in group.get_all_tasks()}
    return [*groups, *(task for name, task in loaded["tasks"].items() if name not in grouped)]


def evaluate_tasks(
    model: Any, tokenizer: Any, tasks: list[Any], few_shot: int | None, limit: int | None, batch: int
) -> tuple[dict[str, Any], str]:
    """Return each task's results with the versions of harness and tasks, and the harness's table of them."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    adapter = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch)
    answer = _ask(adapter, tasks, few_shot, limit)
    kept = {"harness": version("lm_eval")} | {key: answer[key] for key in KEPT if key in answer}
    return kept, make_table(answer)


def evaluate_live(
    engine: Engine, topology: Topology, tokenizer: Any, tasks: list[Any], settings: Eval
) -> dict[str, float]:
    """Return the current model's scores by task and metric (quiz/acc). Collective.

    Ranks divide the questions, and all run the same number of forward passes, because expert-parallel ranks need each other
    in every pass. Only rank 0 gets the scores.
    """
    import torch
    import torch.distributed as dist
    from lm_eval.models.huggingface import HFLM

    class LiveModel(HFLM):
        def all_gather(self, tensor: Any) -> Any:
            if topology.world_size == 1:
                return tensor
            gathered = [torch.empty_like(tensor) for _ in range(topology.world_size)]
            dist.all_gather(gathered, tensor)
            return torch.cat([one.reshape(-1) for one in gathered])

        def barrier(self) -> None:
            engine.barrier()

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            # Ranks whose sequences have ended continue until all have.
            together = {"synced_gpus": True} if topology.world_size > 1 else {}
            return super()._model_generate(context, max_length, stop, **together, **options)

    model = engine.model
    # Its cache of logits would skip different forward passes on each rank.
    adapter = LiveModel(
        pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=settings.batch_size, logits_cache=False
    )
    adapter._rank, adapter._world_size = topology.rank, topology.world_size
    model.eval()
    with eager_regions():
        answer = _ask(adapter, tasks, settings.num_fewshot, settings.limit, bootstrap_iters=0)  # no standard errors
    model.train()
    return {
        f"{task}/{name.removesuffix(',none')}": value
        for task, found in (answer["results"] if answer else {}).items()
        for name, value in found.items()
        if isinstance(value, float | int) and not isinstance(value, bool) and "," in name and "stderr" not in name
    }


def _ask(adapter: Any, tasks: list[Any], few_shot: int | None, limit: int | None, **more: Any) -> Any:
    """Return the harness's results, on rank 0; leaves the random state of training and others unchanged."""
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it would warn that the model is already loaded
    more |= {"random_seed": None, "numpy_random_seed": None, "torch_random_seed": None, "log_samples": False}
    return simple_evaluate(adapter, tasks=tasks, num_fewshot=few_shot, limit=limit, **more)
