"""Train our model and transformers', with the same weights, under Trainer or in an accelerate loop; write losses as JSON.

Usage: trainer_worker.py trainer|accelerate FOLDER [DS_CONFIG]
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peer_state import transformers_state_dict
from torch.utils.data import DataLoader
from transformers import Ernie4_5_MoeForCausalLM

from smolds_dist.interchange.transformers_format import transformers_config
from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM

STEPS, BATCH = 20, 2
SETTINGS = dict(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16,
)  # fmt: skip


def samples() -> list[dict[str, torch.Tensor]]:
    rows = (torch.arange(4 * BATCH * STEPS)[:, None] + torch.arange(24) * 3) % 64  # counting in threes
    return [{"input_ids": row, "labels": row} for row in rows]


def with_trainer(model: Any, folder: str, ds_config: str | None) -> list[float]:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=BATCH, gradient_accumulation_steps=2, learning_rate=1e-2,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, deepspeed=ds_config,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=samples())
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def with_accelerate(model: Any, ds_config: str | None) -> list[float]:
    from accelerate import Accelerator, DeepSpeedPlugin

    plugin = DeepSpeedPlugin(hf_ds_config=ds_config) if ds_config else None
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(samples(), batch_size=BATCH)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    losses = []
    for step, batch in enumerate(loader):
        if step == STEPS:
            break
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


if __name__ == "__main__":
    way, folder, *rest = sys.argv[1:]
    torch.manual_seed(0)
    ours = DeepSeekV3ForCausalLM(DeepSeekV3Config(**SETTINGS))
    theirs = Ernie4_5_MoeForCausalLM(transformers_config(ours.config))
    theirs.load_state_dict(transformers_state_dict(ours.state_dict(), ours.config), strict=False)
    ds_config = rest[0] if rest else None
    losses = {
        name: with_trainer(model, folder, ds_config) if way == "trainer" else with_accelerate(model, ds_config)
        for name, model in (("ours", ours), ("theirs", theirs))
    }
    if int(os.environ.get("RANK", "0")) == 0:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "losses.json").write_text(json.dumps(losses))
