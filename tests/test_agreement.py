"""Ranks compare versions, settings, devices and text before any work, and rank 0 plans for all."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial

import pytest

from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError, RankError
from smolds_dist.parallel import agreement, rendezvous
from smolds_dist.parallel.agreement import RankFacts, check_same_text, unreachable
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.rendezvous import WaitPolicy
from smolds_dist.parallel.topology import Machine

CPU = Machine(("cpu",), 4, True, int(8e9), "cpu")
GPU = Machine(("cuda", "cpu"), 2, True, int(80e9), "NVIDIA H100 80GB HBM3")


@pytest.fixture
def on_ranks(monkeypatch):
    """Return a function that runs another with the rendezvous of each of some ranks, and returns results or errors."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)

    def run(world: int, work):
        over = threading.Barrier(world)

        def one(rank: int):
            joined = rendezvous.rendezvous(RankInfo(rank, rank, world), WaitPolicy(20))
            try:
                return work(joined)
            except ConfigError as error:
                return error
            finally:
                over.wait(60)  # rank 0 has the store

        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(one, range(world)))

    return run


def test_all_ranks_get_rank_0s_decision_about_all_values(on_ranks):
    decisions = on_ranks(4, lambda ranks: ranks.agree("sum", lambda: ranks.info.rank, sum))
    assert decisions == [6, 6, 6, 6]


def raise_error(text: str):
    raise ConfigError(text)


def test_error_of_one_rank_names_it_and_ends_all(on_ranks):
    def work(ranks):
        compute = partial(raise_error, "no file matches 'a'.") if ranks.info.rank == 2 else lambda: 1
        if ranks.info.rank == 1:
            time.sleep(0.5)
        return ranks.agree("data", compute, len)

    errors = on_ranks(3, work)
    assert {str(error) for error in errors} == {f"rank 2 on host {rendezvous.host_name()}: no file matches 'a'."}
    assert not any(isinstance(error, RankError) for error in errors)  # rank 0 prints it


def test_error_of_all_ranks_is_reported_as_it_is(on_ranks):
    errors = on_ranks(2, lambda ranks: ranks.agree("data", partial(raise_error, "no file matches 'a'."), len))
    assert {str(error) for error in errors} == {"no file matches 'a'."}


def test_rank_reports_its_own_error_if_rank_0_is_busy(on_ranks, monkeypatch):
    monkeypatch.setattr(rendezvous, "LOG_AFTER", 0.5)

    def work(ranks):
        if ranks.info.rank == 0:
            time.sleep(2)
            return None
        return ranks.agree("data", partial(raise_error, "no file matches 'a'."), len)

    _, error = on_ranks(2, work)
    assert str(error).startswith("rank 1 on host ")


def facts(rank: int = 0, machine: Machine = CPU, here: int = 2, **changed) -> RankFacts:
    settings = {"train": {"lr": 0.001}, "run": {"name": "a"}}
    made = RankFacts(rank, rank % here, f"host{rank // here + 1}", here, {"torch": "2.13.0"}, settings, machine, True)
    return replace(made, **changed)


def decide(*args: str, reported: list[RankFacts]) -> dict:
    config = load_config(["--preset=debug", "--train.global_batch=8", *args])
    return agreement.plan_from(config, [asdict(one) for one in reported])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"versions": {"torch": "2.12.1"}},
            "rank 2 on host host2 has torch 2.12.1, but rank 0 on host host1 has 2.13.0; install the same versions on all",
        ),
        ({"versions": {}}, "rank 2 on host host2 has torch not installed, but rank 0 on host host1 has 2.13.0"),
        (
            {"settings": {"train": {"lr": 0.002}, "run": {"name": "a"}}},
            "rank 2 on host host2 has --train.lr 0.002, but rank 0 on host host1 has 0.001; start all ranks with the same",
        ),
        ({"shared": False}, "on host host2 is not the folder that rank 0 on host host1 writes to; choose a --run.dir"),
        (
            {"machine": GPU},
            "rank 0 on host host1 trains on cpu, but rank 2 on host host2 on cuda; repair the GPUs of host1",
        ),
    ],
)
def test_difference_names_host_value_and_fix(changed, message):
    reported = [facts(0), facts(1), facts(2, **changed), facts(3)]
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        decide(reported=reported)


def test_plan_fits_the_smallest_host():
    small = replace(CPU, memory=int(1e9), bf16=False, compiler=False)
    plan = decide(reported=[facts(0), facts(1), facts(2, small), facts(3, small)])
    assert plan["machine"]["memory"] == int(1e9)
    assert not plan["machine"]["bf16"] and not plan["machine"]["compiler"]
    assert plan["topology"]["nodes"] == 2 and plan["topology"]["world_size"] == 4
    assert "of 0.5 GB" in plan["topology"]["reason"]


def test_groups_fit_into_nodes_with_different_numbers_of_ranks():
    reported = [facts(rank, here=4, host="host1", local_rank=rank) for rank in range(4)]
    reported += [facts(4 + rank, here=2, host="host2", local_rank=rank) for rank in range(2)]
    reported += [facts(6 + rank, here=2, host="host3", local_rank=rank) for rank in range(2)]
    plan = decide("--parallel.expert=max", reported=reported)
    assert plan["topology"]["expert"] == 2 and plan["topology"]["nodes"] == 3
    assert plan["machine"]["memory"] == 2 * int(8e9) // 4  # of the two ranks that the planner counts per node


def test_slowest_gpu_counts_and_a_missing_one_is_named():
    slower = replace(GPU, name="NVIDIA A100-SXM4-80GB", memory=int(40e9))
    plan = decide(reported=[facts(0, GPU), facts(1, GPU), facts(2, slower), facts(3, slower)])
    assert (plan["machine"]["name"], plan["machine"]["memory"]) == (slower.name, int(40e9))
    with pytest.raises(ConfigError, match=r"^rank 3 on host host2: local rank 1 has no GPU"):
        decide(reported=[facts(0, GPU), facts(1, GPU), facts(2, GPU), facts(3, replace(GPU, device_count=1))])
    own = [facts(rank, replace(GPU, device_count=1), gpus_on_node=2) for rank in range(4)]
    assert decide(reported=own)["topology"]["device"] == "cuda"


def test_closed_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = list(server.getsockname())
        mine = facts(0, address=("127.0.0.1", 1))
        closed = ["127.0.0.1", 9]
        assert unreachable(replace(mine, address=tuple(closed)), [closed, address]) == []
        (text,) = unreachable(mine, [["127.0.0.1", 1], closed, address])
    assert text == "rank 0 on host host1 cannot connect to 127.0.0.1:9 (Connection refused)"


def test_other_text_names_the_host_and_the_source():
    one = {"host": "host1", "tokenizer": "a", "contents": {"web": "1", "code": "2"}}
    check_same_text([one, one | {"host": "host2"}])
    with pytest.raises(
        ConfigError, match="rank 1 on host host2 has another text of the source 'code' than rank 0 on host"
    ):
        check_same_text([one, one | {"host": "host2", "contents": {"web": "1", "code": "3"}}])
    with pytest.raises(ConfigError, match="rank 2 on host host3 has another tokenizer than rank 0 on host host1; copy"):
        check_same_text([one, one, one | {"host": "host3", "tokenizer": "b"}])
