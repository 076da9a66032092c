"""lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on a loaded model, by its Python interface."""

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

KEPT = ("results", "groups", "versions", "n-shot", "n-samples")  # of what the harness answers


def load_tasks(names: list[str], folder: Path | None, option: str = "--") -> list[Any]:
    """Tasks with their questions, of the harness's own and those whose YAML files lie in `folder`.

    Args:
        names: of tasks or patterns such as "arc_*"; each may hold several with commas between.
        option: what the options' names begin with, where mistakes are told.

    Raises:
        ConfigError: where the harness is not installed, the folder is none, a name is no task's, or a task's data cannot be
            had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError(
            f"{option}tasks needs lm-evaluation-harness, which is not installed; run `pip install 'smolds-dist[eval]'`."
        ) from None
    own = f"{option}include-path" if option == "--" else f"{option}include_path"
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{own} {folder} is not a folder; give one with the YAML files of tasks.")
    manager = TaskManager(include_path=folder)
    words = [word.strip() for name in names for word in name.split(",") if word.strip()]
    names = [*dict.fromkeys(name for word in words for name in fnmatch.filter(manager.all_tasks, word) or [word])]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)} is no task of lm-evaluation-harness; `lm-eval ls tasks` lists them, "
            f"{own} adds your own."
        )
    try:
        loaded = manager.load(names)
    except Exception as error:  # the data sets library's, the network's, a task file's
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
    """Results of each task, with the harness's and the tasks' versions, and the harness's own table of them."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    adapter = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch)
    answer = _ask(adapter, tasks, few_shot, limit)
    kept = {"harness": version("lm_eval")} | {key: answer[key] for key in KEPT if key in answer}
    return kept, make_table(answer)


def evaluate_live(
    engine: Engine, topology: Topology, tokenizer: Any, tasks: list[Any], settings: Eval
) -> dict[str, float]:
    """Scores of the model that is being trained, by task and measure (quiz/acc). Collective.

    Ranks share the questions, and all make the same number of forward passes: expert-parallel ranks need each other in every
    one. Scores are on rank 0 alone.
    """
    import torch
    import torch.distributed as dist
    from lm_eval.models.huggingface import HFLM

    class LiveModel(HFLM):
        def all_gather(self, tensor: Any) -> Any:
            if topology.world_size == 1:
                return tensor
            parts = [torch.empty_like(tensor) for _ in range(topology.world_size)]
            dist.all_gather(parts, tensor)
            return torch.cat([part.reshape(-1) for part in parts])

        def barrier(self) -> None:
            engine.barrier()

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            # Ranks whose texts have ended go on until all have.
            together = {"synced_gpus": True} if topology.world_size > 1 else {}
            return super()._model_generate(context, max_length, stop, **together, **options)

    model = engine.model
    # Its cache of logits would skip forward passes, on each rank others.
    adapter = LiveModel(
        pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=settings.batch_size, logits_cache=False
    )
    adapter._rank, adapter._world_size = topology.rank, topology.world_size
    model.eval()
    with eager_regions():
        answer = _ask(adapter, tasks, settings.num_fewshot, settings.limit, bootstrap_iters=0)  # errors are not kept
    model.train()
    return {
        f"{task}/{name.removesuffix(',none')}": value
        for task, found in (answer["results"] if answer else {}).items()
        for name, value in found.items()
        if isinstance(value, float | int) and not isinstance(value, bool) and "," in name and "stderr" not in name
    }


def _ask(adapter: Any, tasks: list[Any], few_shot: int | None, limit: int | None, **more: Any) -> Any:
    """The harness's answer, on rank 0; random numbers of others, the training's above all, stay as they are."""
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is loaded already
    more |= {"random_seed": None, "numpy_random_seed": None, "torch_random_seed": None, "log_samples": False}
    return simple_evaluate(adapter, tasks=tasks, num_fewshot=few_shot, limit=limit, **more)
