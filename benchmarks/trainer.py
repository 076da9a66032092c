"""A run of transformers' Trainer, for `python -m benchmarks loss`: `python -m benchmarks.trainer JSON`."""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from benchmarks.common import mean_validation_loss
from smolds_dist.config import load_config


@dataclass
class Job:
    given: list[str]  # the smolds run's options
    steps: int
    learning_rate: float | None  # None: the Trainer's default


def train(job: Job) -> dict[str, Any]:
    """Train; return steps, tokens, seconds (steps times the median step time) and validation loss of the full schedule."""
    from transformers import Ernie4_5_MoeForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from smolds_dist.data.prepare import prepare_data
    from smolds_dist.interchange.transformers_format import transformers_config
    from smolds_dist.training.build import make_model_config

    config = load_config(job.given)
    data, length = prepare_data(config), config.data.seq_len
    (source,), (order,) = data.sources.values(), data.orders.values()

    class Sequences(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return order.num_samples

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            (ids,) = data.batch(range(index, index + 1))
            return {"input_ids": ids, "labels": ids}

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            ends.append(time.perf_counter())

    torch.manual_seed(config.train.seed)
    architecture: Any = transformers_config(make_model_config(config, data))
    model: Any = Ernie4_5_MoeForCausalLM(architecture)
    own: Any = {} if job.learning_rate is None else {"learning_rate": job.learning_rate}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=config.train.global_batch, max_steps=job.steps, report_to="none",
            logging_strategy="no", save_strategy="no", disable_tqdm=True, **own,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=Sequences(), callbacks=[Clock()]).train()

    model.eval()

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> float:
        return model(input_ids=ids.to(model.device), labels=labels.to(model.device), use_cache=False).loss.item()

    val_loss = mean_validation_loss(loss_of, source.validation.tokens, length, config.train.eval_sequences)
    step_s = median(after - before for before, after in pairwise(ends)) if len(ends) > 1 else float("nan")
    tokens = job.steps * config.train.global_batch * length
    return {"steps": job.steps, "tokens": tokens, "seconds": step_s * job.steps, "val_loss": val_loss}


if __name__ == "__main__":
    print(json.dumps(train(Job(**json.loads(sys.argv[1])))))
