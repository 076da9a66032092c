"""`smolds plan --calibrate FILE`: measure this machine and write an entry for `hardware.yaml`.

Measures matmuls and memory alone, links by all-to-all between two processes, and the fraction of the peak that a model
reaches by training steps of three sizes in one process on DeepSpeed's engine, which several ranks use. Tested on CPUs only;
CUDA uses the same code.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from smolds_dist.bench.contenders import Task
from smolds_dist.bench.train import log, processor, run_trial
from smolds_dist.config import load_config
from smolds_dist.costs.hardware import Hardware, parse_hardware
from smolds_dist.costs.layout import Layout
from smolds_dist.costs.memory import rank_memory
from smolds_dist.costs.step_time import step_time
from smolds_dist.errors import ConfigError
from smolds_dist.launching.doctor_probes import measure_all_to_all
from smolds_dist.settings import Model

# Three sizes dominated by different costs: many small matmuls, the LM head, large matmuls.
SIZES = (
    dict(hidden_size=192, intermediate_size=128, num_hidden_layers=6, vocab_size=4096),
    dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=16384),
    dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=2, vocab_size=8192),
)
SEQUENCES, SEQ_LEN, STEPS = 4, 512, 4


def calibrate(path: Path) -> None:
    """Measure this machine, write the entry, and print it.

    Raises:
        ConfigError: if something cannot be measured here.
    """
    machine = measure_machine()
    path.write_text(yaml.safe_dump({path.stem: machine}, sort_keys=False))
    print(path.read_text(), end="")


def measure_machine() -> dict[str, Any]:
    """Return the entry as plain values."""
    from smolds_dist.parallel.topology import available_cores, detect_machine
    from smolds_dist.parallel.versions import package_versions
    from smolds_dist.training.clock import matrix_product_peak

    here = detect_machine()
    device = torch.device(here.devices[0])
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    peaks = {name: matrix_product_peak(device, dtype, 0.5) for name, dtype in dtypes.items()}
    log("measuring memory")
    bandwidth = memory_bandwidth(device)
    log("measuring links")
    latency, link = _link(device.type, here.device_count)
    entry: dict[str, Any] = {
        "name": torch.cuda.get_device_name(0) if device.type == "cuda" else processor(),
        "device": device.type,
        "peak": {name: float(f"{peak:.3g}") for name, peak in peaks.items()},
        "memory": float(here.memory or 0),
        "bandwidth": float(f"{bandwidth:.3g}"),
        "per_node": here.device_count if device.type == "cuda" else available_cores(),
        "link": {"bandwidth": float(f"{link:.3g}"), "latency": float(f"{latency:.3g}")},
        "fabric": {"bandwidth": 1.25e9, "latency": 1e-4},
        "host_link": float(f"{bandwidth:.3g}"),
        "utilization": 1.0,
        "overhead": 0.0,
        "process": 0.0,
        "failures": 50700.0,
        "sources": [
            f"smolds plan --calibrate, {time.strftime('%Y-%m-%d')}, {json.dumps(package_versions())}",
            "fabric (10 Gb/s Ethernet) and failures - typical, not measured",
        ],
    }
    steps = []
    for number, size in enumerate(SIZES):
        log(f"measuring steps of model {number + 1}/{len(SIZES)}")
        steps.append(measure_step(size))
    layout = Layout(1, 1, 1, 1, SEQUENCES, 1, SEQ_LEN, "fp32", device="cpu")
    entry["process"] = float(f"{steps[0][1] - rank_memory(model_of(SIZES[0]), layout).total:.3g}")
    entry["utilization"], entry["overhead"] = fit(entry, [median(seconds) for seconds, _ in steps])
    return entry


def fit(entry: dict[str, Any], measured: list[float]) -> tuple[float, float]:
    """Fit utilization and overhead to the measured steps of `SIZES`: least squares of the ratio, on a grid."""
    models = [model_of(size) for size in SIZES]
    best = (float("inf"), 1.0, 0.0)
    for utilization in (share / 100 for share in range(20, 121, 2)):
        for overhead in (step / 5e3 for step in range(0, 151)):
            machine = parse_hardware("here", entry | {"utilization": utilization, "overhead": overhead})
            pairs = zip(models, measured, strict=True)
            error = sum((predict(model, machine) / seconds - 1) ** 2 for model, seconds in pairs)
            best = min(best, (error, utilization, overhead))
    return best[1], best[2]


def settings_of(size: dict[str, int]) -> list[str]:
    """Return the settings that turn the preset `debug` into a measured model."""
    return [f"--model.{name}={value}" for name, value in size.items()]


def model_of(size: dict[str, int]) -> Model:
    return load_config(["--preset", "debug", *settings_of(size)]).model


def predict(model: Model, machine: Hardware, ranks: int = 1) -> float:
    """Predict the seconds of a measured model's step, its sequences divided among `ranks`."""
    layout = Layout(
        ranks, ranks, ranks, 1 if ranks > 1 else 0, SEQUENCES // ranks, 1, SEQ_LEN, "fp32", device=machine.device
    )
    return step_time(model, layout, machine.shared_by(ranks)).total


def measure_step(
    size: dict[str, int], ranks: int = 1, settings: tuple[str, ...] = (), dtype: str = "fp32", steps: int = STEPS
) -> tuple[list[float], int]:
    """Return the seconds of `steps` steps and the peak memory in bytes, with `ranks` processes and balanced experts."""
    given = (
        *settings_of(size), f"--data.seq_len={SEQ_LEN}", "--parallel.engine=deepspeed",
        "--model.force_uniform_routing=true", *settings,
    )  # fmt: skip
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    task = Task("smolds", "debug", size["vocab_size"], SEQUENCES // ranks, SEQ_LEN, dtype, device, settings=given)
    answer = run_trial(task, steps, ranks)
    return answer["seconds"], answer["memory"]


def memory_bandwidth(device: Any) -> float:
    """Return the bytes/s read and written by copying 256 MB or adding two such tensors, whichever is faster."""
    first, second = (torch.ones(64_000_000, device=device) for _ in range(2))
    target = torch.empty_like(first)

    def seconds(operation: Callable[[], Any]) -> float:
        best = float("inf")
        for _ in range(10):
            begin = time.perf_counter()
            operation()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            best = min(best, time.perf_counter() - begin)
        return best

    copied = 2 / seconds(lambda: target.copy_(first))
    return first.nbytes * max(copied, 3 / seconds(lambda: torch.add(first, second, out=target)))


def _link(device: str, devices: int) -> tuple[float, float]:
    """Return latency (s) and bandwidth (bytes/s) of an exchange between two ranks; typical values with one GPU."""
    if device != "cpu" and devices < 2:
        return 1e-5, 1e9
    found, error = measure_all_to_all("nccl" if device == "cuda" else "gloo")
    if found is None:
        raise ConfigError(f"the link between two ranks cannot be measured ({error}); see `smolds doctor`.")
    return found["latency"], found["bandwidth"]
