"""Our model with packages from .venv/extras: accelerate, under Trainer and alone, and PEFT.

Usage: contract_worker.py FOLDER; writes each check's traceback to FOLDER/outcomes.json, empty if it passed.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from test_model import GQA, GQA_FAMILY, LATENT_FAMILY, build, tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

TWO_LAYERS = {name: dict(one, num_hidden_layers=2) for name, one in (("gqa", GQA_FAMILY), ("latent", LATENT_FAMILY))}
PROJECTIONS = {"gqa": ["q_proj", "v_proj"], "latent": ["q_b_proj", "kv_b_proj", "o_proj"]}


def losses_with_trainer(folder: Path, **options) -> list[float]:
    rows = (torch.arange(12)[:, None] + torch.arange(24) * 3) % 64  # counting in threes
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(build(dict(GQA, num_hidden_layers=1)).train(), arguments, train_dataset=data)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def trainer_compiles(folder: Path) -> None:
    expected = losses_with_trainer(folder)
    # test_contract.py has the machine code.
    actual = losses_with_trainer(folder, torch_compile=True, torch_compile_backend="aot_eager")
    assert len(actual) == 3 and actual[-1] < actual[0]
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def trainer_checkpoints_activations(folder: Path) -> None:
    expected = losses_with_trainer(folder)
    actual = losses_with_trainer(folder, gradient_checkpointing=True)
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def adapted(kind: str) -> PeftModel:
    """Train LoRA on attention's projections and the experts' stacked weights for three steps."""
    adapters = LoraConfig(
        r=4, target_modules=PROJECTIONS[kind], target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(build(TWO_LAYERS[kind]), adapters).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens(2, 24), labels=tokens(2, 24)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    return model.eval()


def lora_trains_adapters_alone(folder: Path) -> None:
    for kind, settings in TWO_LAYERS.items():
        model, before = adapted(kind), build(settings).state_dict()
        state = model.get_base_model().state_dict()
        kept = {name.replace(".base_layer", ""): one for name, one in state.items() if "lora_" not in name}
        assert kept.keys() == before.keys()
        for name, one in kept.items():
            assert torch.equal(one, before[name]), name
        changed = [name for name, one in state.items() if "lora_B" in name and one.any()]
        for part in (*PROJECTIONS[kind], "experts"):
            assert any(part in name for name in changed), part


def lora_is_merged(folder: Path) -> None:
    for kind, settings in TWO_LAYERS.items():
        model, plain = adapted(kind), build(settings)
        logits = model(input_ids=tokens(2, 24)).logits
        assert (logits - plain(input_ids=tokens(2, 24)).logits).abs().max() > 0.1
        merged = model.merge_and_unload()
        assert type(merged) is type(plain) and merged.state_dict().keys() == plain.state_dict().keys()
        torch.testing.assert_close(merged(input_ids=tokens(2, 24)).logits, logits, atol=1e-4, rtol=0)


def lora_is_saved_and_loaded(folder: Path) -> None:
    model = adapted("gqa")
    model.save_pretrained(str(folder / "adapters"))
    loaded = PeftModel.from_pretrained(build(TWO_LAYERS["gqa"]), str(folder / "adapters")).eval()
    assert torch.equal(loaded(input_ids=tokens(2, 24)).logits, model(input_ids=tokens(2, 24)).logits)


def device_maps(folder: Path) -> None:
    for kind, settings in TWO_LAYERS.items():
        model = build(settings, bias_scale=0.2)
        model.save_pretrained(folder / kind)
        logits = model(input_ids=tokens(2, 24)).logits
        for where in ("cpu", "auto"):
            loaded = AutoModelForCausalLM.from_pretrained(folder / kind, device_map=where)
            assert torch.equal(loaded(input_ids=tokens(2, 24).to(loaded.device)).logits.cpu(), logits)


def weights_are_offloaded(folder: Path) -> None:
    """Check CPU offload: accelerate loads each module's weights for its forward pass and removes them afterwards."""
    for settings in TWO_LAYERS.values():
        model = build(settings, bias_scale=0.2)
        logits = model(input_ids=tokens(2, 24)).logits
        cpu_offload(model, execution_device="cpu", offload_buffers=True)
        assert torch.equal(model(input_ids=tokens(2, 24)).logits, logits)


PROMISES = {
    one.__name__: one
    for one in (
        trainer_checkpoints_activations, lora_trains_adapters_alone, lora_is_merged, lora_is_saved_and_loaded, device_maps,
        weights_are_offloaded, trainer_compiles,
    )
}  # fmt: skip


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    outcomes = {}
    for name, promise in PROMISES.items():
        (folder / name).mkdir(parents=True)
        try:
            promise(folder / name)
            outcomes[name] = ""
        except Exception:  # each has its own test
            outcomes[name] = traceback.format_exc()
    (folder / "outcomes.json").write_text(json.dumps(outcomes))
