"""One rank of a job of many, without the others: what it derives about them."""

import json
import sys
from pathlib import Path

from ranks import run

from smolds_dist.activity import ACTIVITY
from smolds_dist.launching.failure import RankReport
from smolds_dist.parallel.ranks import RankInfo, system_name
from smolds_dist.settings import Parallel

WORLD = 64


def test_one_rank_of_64_derives_all_ranks_fragments_which_cover_everything_once(tmp_path):
    options = [
        "--preset=debug", "--model.hidden_size=64", "--model.intermediate_size=32", "--model.num_attention_heads=2",
        "--model.num_key_value_heads=1", "--model.head_dim=32", f"--train.global_batch={WORLD}", "--train.micro_batch=1",
        "--train.dtype=fp32", "--train.optimizer=adamw", "--parallel.device=cpu", "--parallel.engine=deepspeed",
        "--parallel.zero=3", "--parallel.expert=max", f"--run.dir={tmp_path}",
    ]  # fmt: skip
    program = str(Path(__file__).with_name("fake_ranks.py"))
    finished = run([sys.executable, program, str(WORLD), *options], timeout=200)
    assert finished.stdout.endswith("all checks passed\n"), finished.text


def test_a_rank_watches_all_ranks_until_the_first_step_then_its_own_hosts(tmp_path, monkeypatch):
    report = RankReport(tmp_path, RankInfo(0, world_size=4), Parallel())
    monkeypatch.setattr(ACTIVITY, "passes", 1)
    assert report.local_entries() is None
    monkeypatch.setattr(ACTIVITY, "passes", 0)
    for rank, system in ((1, system_name()), (2, "another"), (3, "another")):
        entry = report.entry | {"rank": rank, "system": system}
        (report.folder / f"rank_{rank:05}.json").write_text(json.dumps(entry))
    (report.folder / "rank_00004.json").write_text(json.dumps(report.entry | {"rank": 4, "job": "the one before"}))
    assert report.local_entries() is None
    monkeypatch.setattr(ACTIVITY, "passes", 1)
    assert [path.name for path in report.local_entries()] == ["rank_00000.json", "rank_00001.json"]
    report.end()
