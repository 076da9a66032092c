"""The topology's rules, as pure functions of a configuration, a machine and a rank."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ranks
import torch

from smolds_dist.config import load_config
from smolds_dist.costs.hardware import known_hardware
from smolds_dist.costs.layout import layout_of
from smolds_dist.costs.memory import PROCESS_BYTES, rank_memory, with_vocabulary
from smolds_dist.costs.step_time import step_time
from smolds_dist.errors import ConfigError
from smolds_dist.parallel.ranks import RankInfo, rank_from_environment
from smolds_dist.parallel.topology import Machine, detect_machine, expert_sizes, plan_topology

CPU = Machine(("cpu",), 4, False)
GPUS = Machine(("cuda", "cpu"), 8, True)
APPLE = Machine(("mps", "cpu"), 1, False)


def plan(machine: Machine, world: int, *options: str):
    config = load_config(["--preset", "debug", "--train.global_batch=48", *options])
    return plan_topology(config, machine, RankInfo(0, 0, world))


def test_one_process_is_plain_pytorch_and_several_are_deepspeed():
    for machine, device, dtype in ((CPU, "cpu", "fp32"), (GPUS, "cuda", "bf16"), (APPLE, "mps", "fp32")):
        one = plan(machine, 1)
        assert (one.device, one.engine, one.backend, one.dtype) == (device, "local", None, dtype)
    assert plan(CPU, 4).backend == "gloo"
    assert plan(GPUS, 4).backend == "nccl"
    assert plan(GPUS, 4).torch_device == "cuda:0"
    assert plan(GPUS, 1, "--parallel.device=cpu").device == "cpu"
    assert plan(CPU, 1, "--parallel.zero=2").engine == "deepspeed"


@pytest.mark.parametrize(("major", "dtype"), [(7, "fp32"), (9, "bf16")])
def test_bf16_is_the_default_only_on_gpus_that_do_not_emulate_it(monkeypatch, major, dtype):
    """V100 and T4 have compute capability 7. No such GPU is in the tests' machines."""
    gpu = SimpleNamespace(major=major, total_memory=16 * 10**9)
    changes = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "T4"}
    for name, value in (changes | {"get_device_properties": gpu, "_check_bf16_tensor_supported": True}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert plan(detect_machine(), 1).dtype == dtype


def test_a_rank_that_sees_one_gpu_needs_one_of_its_own():
    config = load_config(["--preset", "debug", "--train.global_batch=48"])
    one, second = replace(GPUS, device_count=1), RankInfo(1, 1, 4, 2, gpus_on_node=2)
    assert plan_topology(config, GPUS, second).torch_device == "cuda:1"
    assert plan_topology(config, one, second).torch_device == "cuda:0"
    for gpus in (0, 1):  # unknown, or one for both ranks
        with pytest.raises(ConfigError, match="local rank 1 has no GPU"):
            plan_topology(config, one, replace(second, gpus_on_node=gpus))


def test_bf16_is_advised_against_without_bf16_matmuls():
    asked = "--train.dtype=bf16"
    for machine in (CPU, replace(GPUS, bf16=False)):
        assert "no bf16 matmuls: omit --train.dtype" in plan(machine, 1, asked).reason
    for machine in (replace(CPU, bf16=True), GPUS):
        assert "bf16" not in plan(machine, 1, asked).reason
    assert "bf16" not in plan(CPU, 1).reason


def test_cpu_returns_freed_memory_if_memory_is_short():
    little = replace(CPU, memory=100_000_000)
    short, asked = plan(little, 2), plan(replace(CPU, memory=10**12), 2, "--parallel.keep_memory=false")
    for topology in (short, asked):
        assert not topology.keeps_memory and "freed memory is returned to the system" in topology.reason
    for topology in (
        plan(CPU, 2),
        plan(replace(CPU, memory=10**12), 2),
        plan(little, 2, "--parallel.keep_memory=true"),
    ):
        assert topology.keeps_memory and "returned to the system" not in topology.reason


FREES = """
import sys

import psutil
import torch

from smolds_dist.config import load_config
from smolds_dist.model import DeepSeekV3Config
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import detect_machine, plan_topology
from smolds_dist.training.build import new_engine

given = ["--preset=debug", "--parallel.device=cpu", "--model.vocab_size=64", f"--parallel.keep_memory={sys.argv[1]}"]
config = load_config(given)
topology = plan_topology(config, detect_machine(), RankInfo(0, 0, 1))
engine = new_engine(DeepSeekV3Config(**config.model.architecture()), config, topology, None)
before = psutil.Process().memory_info().rss
tensor = torch.ones(25_000_000)
del tensor
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_freed_memory_is_kept_or_returned_as_set():
    grown = {}
    for keeps in ("true", "false"):
        finished = ranks.run([sys.executable, "-c", FREES, keeps], timeout=60)
        assert not finished.returncode, finished.text
        grown[keeps] = int(finished.stdout.splitlines()[-1])
    assert grown["true"] > 90e6 and grown["false"] < 10e6


@pytest.mark.parametrize(
    ("world", "experts", "sizes"), [(1, 8, [1]), (4, 8, [1, 2, 4]), (6, 8, [1, 2]), (16, 8, [1, 2, 4, 8])]
)
def test_expert_sizes_divide_ranks_and_experts(world, experts, sizes):
    assert expert_sizes(world, experts) == sizes
    assert plan(CPU, world, f"--model.num_experts={experts}", "--parallel.expert=max").expert == sizes[-1]


def test_auto_is_the_fastest_size_by_the_planners_formulas():
    """On every known machine, no other size that fits a node and the memory has a shorter step."""
    cases, sizes = 0, set()
    configs = [
        load_config(["--preset", preset, "--train.global_batch=64"])
        for preset in ("debug", "smollm2-deepseek-255m", "moe-1b-a200m", "moe-7b-a1b")
    ]
    for name, count, memory in (
        ("NVIDIA A100-SXM4-40GB", 8, 40e9), ("NVIDIA H100 80GB HBM3", 8, 80e9), ("NVIDIA B200", 4, 180e9), ("cpu", 4, 2e9),
        ("cpu", 2, 24e9),
    ):  # fmt: skip
        device = "cpu" if name == "cpu" else "cuda"
        machine = Machine(tuple(dict.fromkeys((device, "cpu"))), count, device == "cuda", int(memory), name)
        hardware = known_hardware(name)
        assert hardware is not None
        for given in configs:
            for zero in (1, 3):
                config = replace(given, parallel=replace(given.parallel, zero=zero))
                rank = RankInfo(0, 0, count, count)
                chosen = plan_topology(config, machine, rank)
                model, seconds = with_vocabulary(config), {}
                available = memory / count if device == "cpu" else memory
                for size in expert_sizes(count, config.model.num_experts):
                    one = replace(config, parallel=replace(config.parallel, expert=size))
                    layout = layout_of(one, plan_topology(one, machine, rank))
                    if rank_memory(model, layout, PROCESS_BYTES[device]).total <= 0.9 * available:
                        seconds[size] = (
                            step_time(model, layout, hardware.shared_by(count)).total / layout.tokens_per_step
                        )
                expected = min(seconds, key=lambda size: seconds[size]) if seconds else count
                assert chosen.expert == expected, (name, count, zero, seconds)
                sizes.add((chosen.expert, bool(seconds)))
                cases += 1
    assert cases == 40 and {one[0] for one in sizes} > {1} and (1, True) in sizes


def test_auto_gives_its_reason_and_missing_specs(tmp_path):
    options = ("--model.num_experts=8",)
    gpus = replace(GPUS, name="NVIDIA H100 80GB HBM3")
    assert (
        "faster than sharding over 2 ranks, by the planner's formulas for NVIDIA H100" in plan(gpus, 8, *options).reason
    )
    for name in ("NVIDIA L4", "NVIDIA H100 PCIe", None):
        unknown = plan(replace(GPUS, name=name), 8, *options)
        assert unknown.expert == 8 and "smolds plan --calibrate" in unknown.reason
    calibrated = plan(replace(GPUS, name="NVIDIA L4"), 8, *options, "--parallel.hardware=a100")
    assert calibrated.expert == 1 and "NVIDIA A100" in calibrated.reason
    for world in (1, 8):
        with pytest.raises(ConfigError, match="'z80' is unknown"):
            plan(gpus, world, "--parallel.hardware=z80")
    (tmp_path / "here.yaml").write_text("{here: [")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        plan(gpus, 1, f"--parallel.hardware={tmp_path / 'here.yaml'}")


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12, 16, 24, 48])
@pytest.mark.parametrize("seq_len", [16, 256, 1024])
def test_micro_batches_make_up_the_global_batch(world, seq_len):
    topology = plan(CPU, world, f"--data.seq_len={seq_len}")
    assert topology.micro_batch * topology.accumulation * world == 48
    assert topology.micro_batch * seq_len <= 4096


MISTAKES = [
    (CPU, 4, "--parallel.expert=3", "valid values: 1, 2, 4"),
    (CPU, 2, "--parallel.expert=8", "valid values: 1, 2"),
    (CPU, 5, "--parallel.expert=auto", "use 45 or 50"),
    (CPU, 4, "--train.micro_batch=8", "valid values: 1, 2, 3, 4, 6, 12"),
    (CPU, 1, "--parallel.device=cuda", "use cpu"),
    (CPU, 2, "--parallel.engine=local", "use deepspeed or auto"),
    (APPLE, 2, "--parallel.expert=1", "--parallel.device cpu"),
]


@pytest.mark.parametrize(("machine", "world", "option", "fix"), MISTAKES)
def test_impossible_topology_is_rejected_with_the_valid_values(machine, world, option, fix):
    with pytest.raises(ConfigError, match=fix) as error:
        plan(machine, world, option)
    assert "\n" not in str(error.value)


def test_combinations_of_options_are_rejected():
    with pytest.raises(ConfigError, match=r"--parallel\.engine deepspeed"):
        plan(CPU, 1, "--parallel.engine=local", "--parallel.zero=2")
    with pytest.raises(ConfigError, match="start fewer ranks"):
        plan_topology(load_config(["--preset", "debug"]), GPUS, RankInfo(8, 8, 16))


def test_rank_comes_from_the_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert rank_from_environment() == RankInfo(0, 0, 1)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ConfigError, match="LOCAL_RANK"):
        rank_from_environment()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        rank_from_environment()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert rank_from_environment() == RankInfo(3, 1, 4)


def test_expert_groups_stay_inside_a_node_with_the_lowest_zero_stage_that_fits():
    """Check the rules over a table of machines, ranks and models, and that no better layout was skipped."""
    cases = 0
    for preset in ("debug", "smollm2-deepseek-255m", "moe-1b-a200m", "moe-7b-a1b"):
        for experts in (8, 12, 64):
            config = load_config(["--preset", preset, f"--model.num_experts={experts}", "--train.global_batch=960"])
            model = with_vocabulary(config)
            for nodes in (1, 2, 3, 4):
                for per_node in (1, 2, 3, 4, 6, 8):
                    for memory in (16e9, 80e9):
                        world = nodes * per_node
                        if world == 1 or 960 % world:
                            continue
                        machine = Machine(("cuda", "cpu"), per_node, True, int(memory))
                        plan = plan_topology(config, machine, RankInfo(0, 0, world, per_node))
                        better = [size for size in expert_sizes(world, experts) if per_node % size == 0]
                        assert plan.expert == max(better)
                        groups = [range(i, i + plan.expert) for i in range(0, world, plan.expert)]
                        assert all(group[0] // per_node == group[-1] // per_node for group in groups)
                        needs = {
                            zero: rank_memory(
                                model, replace(layout_of(config, plan), zero=zero), PROCESS_BYTES["cuda"]
                            ).total
                            for zero in (1, 2, 3)
                        }
                        fits = [zero for zero, need in needs.items() if need <= 0.9 * memory]
                        assert plan.zero == fits[0] if fits else plan.micro_batch == 1
                        assert plan.nodes == nodes
                        assert plan.reason.count(".") >= 1 and "\n" not in plan.reason
                        cases += 1
    assert cases > 400


def test_users_expert_size_may_cross_nodes_and_the_reason_says_so():
    config = load_config(["--preset", "debug", "--parallel.expert=4"])
    plan = plan_topology(config, GPUS, RankInfo(0, 0, 4, 2))
    assert plan.expert == 4
    assert "across nodes" in plan.reason
