"""`smolds bench scale --what build resume export generate`: what ranks hold in memory, and read, beside what they keep.

Every number of ranks and ZeRO stage builds the model; where more is asked for it takes a step, saves, exports, evaluates a
batch and writes a few tokens, and other processes resume. Peaks are the kernel's, of a process's resident memory above what
it had before; the largest rank's counts.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from smolds_dist.bench.common import keep, run_python
from smolds_dist.errors import ConfigError

KINDS = ("build", "resume", "export", "generate")
PROMPT, NEW = 16, 4  # tokens


def bench_memory(options: Any, settings: list[str]) -> None:
    """Measures, prints a table and, with --json, writes all numbers.

    Raises:
        ConfigError: on another system than Linux, or where a layout fails.
    """
    from smolds_dist.bench.train import describe_machine, make_task

    if sys.platform != "linux":
        raise ConfigError(
            f"smolds bench scale --what {' '.join(options.what)} reads Linux's counts of memory; use Linux."
        )
    options.sequences = 1
    rows = []
    for ranks in options.ranks:
        for zero in [0] if ranks == 1 else options.zero:
            folder = Path(tempfile.mkdtemp(prefix="bench-scale-", dir=options.dir))
            try:
                given = [
                    "--preset", options.preset, *settings, f"--train.dtype={options.dtype}", f"--train.global_batch={ranks}",
                    "--train.micro_batch=1", "--parallel.expert=max", f"--parallel.zero={zero}", f"--run.dir={folder}",
                    "--run.name=run", "--parallel.device=cpu", "--checkpoint.resume=auto", "--checkpoint.background=false",
                ]  # fmt: skip
                told: dict[str, Any] = {}
                phases = ["build" if options.what == ["build"] else "step"]
                for phase in [*phases, "resume"] if "resume" in options.what else phases:
                    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
                    command = ["-m", "smolds_dist.bench.scale_memory", phase, json.dumps(given)]
                    run_python([*(start if ranks > 1 else []), *command])
                    by_rank = [json.loads(path.read_text()) for path in sorted(folder.glob("told_*.json"))]
                    told |= {name: max(one[name] for one in by_rank) for name in by_rank[0]}
                rows.append({"ranks": ranks, "zero": zero} | told)
            finally:
                shutil.rmtree(folder)
    result = describe_machine(make_task(options, settings)) | {"layouts": rows}
    keep(options, result)
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """A line for each layout.

    `kept` is weights, what the optimizer works on, and at ZeRO 3 gradients; `state` what a checkpoint has of a rank.
    """
    columns = {
        "kept": "kept", "build": "peak of build", "state": "state", "read": "read", "resume": "peak of resume",
        "export": "peak of export", "generate": "of eval and generate",
    }  # fmt: skip
    shown = {name: title for name, title in columns.items() if name in result["layouts"][0]}
    lines = [
        f"{result['preset']}, {result['dtype']}, on {result['machine']}; GB of the rank that has most",
        f"{'ranks':>5}{'ZeRO':>6}" + "".join(f"{title:>{len(title) + 4}}" for title in shown.values()),
    ]
    for row in result["layouts"]:
        cells = [f"{row[name] / 1e9:>{len(title) + 4}.2f}" for name, title in shown.items()]
        lines.append(f"{row['ranks']:>5}{row['zero']:>6}" + "".join(cells))
    return "\n".join(lines)


def resident(name: str) -> int:
    """Bytes by the kernel's name: VmRSS now, VmHWM at the most since `forget_peak`."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match
    return 1024 * int(match[1])


def forget_peak() -> int:
    """Lets the peak begin anew; the bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def measure(phase: str, given: list[str]) -> None:
    """One rank's work; what it has measured goes into a file of its own."""
    import numpy as np
    import torch

    from smolds_dist.checkpoint.resume import open_checkpoint, restore
    from smolds_dist.checkpoint.writer import CheckpointWriter, Progress
    from smolds_dist.config import load_config
    from smolds_dist.data.held_out import HeldOut
    from smolds_dist.inference.held_out import evaluate_source
    from smolds_dist.interchange.final_export import write_weights
    from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM
    from smolds_dist.parallel.balancer import Balancer
    from smolds_dist.parallel.fragments import tensor_shapes
    from smolds_dist.parallel.process_group import end_process_group, start_process_group
    from smolds_dist.parallel.ranks import rank_from_environment
    from smolds_dist.parallel.topology import detect_machine, plan_topology
    from smolds_dist.training.build import new_engine

    config = load_config(given, benchmark=True)
    info = rank_from_environment()
    topology = plan_topology(config, detect_machine(), info)
    start_process_group(topology, info)
    settings = config.model.architecture()
    settings["vocab_size"] = settings["vocab_size"] or 49_152
    model_config = DeepSeekV3Config(**settings)
    with torch.device("meta"):
        skeleton = DeepSeekV3ForCausalLM(model_config)
    import deepspeed  # noqa: F401  which is there anyway

    before = forget_peak()
    told: dict[str, int] = {}
    reader = open_checkpoint(config, topology) if phase == "resume" else None
    engine = new_engine(model_config, config, topology, reader)
    balancer = Balancer(engine.model, config.train.balance_rate)
    if reader:
        restore(reader, engine, balancer, topology)
        told["resume"] = resident("VmHWM") - before
        told["read"] = reader.bytes_read
        told["state"] = sum(tensor.nbytes for one in engine.fragments() for tensor in one.tensors.values())
    else:
        told["build"] = resident("VmHWM") - before
        tensors = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.model.parameters()]
        tensors += [fragment.tensors["value"] for fragment in engine.fragments()]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
        told["kept"] = sum(storages.values())
        if topology.zero == 3:  # DeepSpeed makes room for the gradients already
            told["kept"] += sum(fragment.tensors["value"].nbytes for fragment in engine.fragments())
    if phase == "step":
        ids = torch.randint(0, model_config.vocab_size, (1, config.data.seq_len))
        with balancer.counting():
            loss = engine.forward(ids, ids)
        engine.backward(loss)
        engine.step(1e-4)
        balancer.step()
        writer = CheckpointWriter(config, topology, tensor_shapes(skeleton), lambda samples: {})
        writer.save(engine, balancer, Progress(1), None, wait=True)
        if error := writer.failure():
            raise RuntimeError(error)
        engine.barrier()
        before = forget_peak()
        write_weights(config.run_dir / "export", skeleton, engine, balancer, topology)
        told["export"] = resident("VmHWM") - before
        before = forget_peak()
        text = HeldOut(ids.repeat(topology.world_size, 1).flatten().numpy(), np.empty(0), 0, 0.0, [])
        evaluate_source(config, topology, engine, text, None)
        prompt, model = ids[:, :PROMPT], cast(Any, engine.model)
        with torch.no_grad():
            mask = torch.ones_like(prompt)
            model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=None)
        told["generate"] = resident("VmHWM") - before
    Path(config.run.dir, f"told_{topology.rank}.json").write_text(json.dumps(told))
    engine.barrier()
    engine.close()
    end_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measure(sys.argv[1], json.loads(sys.argv[2]))
