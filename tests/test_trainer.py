"""Our model in a user's own training code: transformers' Trainer, and accelerate, alone and with one of our DeepSpeed files.

accelerate is in a separate folder, visible only to these tests: if it is installed, importing transformers also imports
DeepSpeed.
"""

import json
import os
import sys

import pytest
from ranks import EXTRAS, ROOT, run


@pytest.mark.skipif(not EXTRAS.is_dir(), reason="no .venv/extras; ./launch/test.sh makes it")
@pytest.mark.parametrize(
    ("way", "ranks"),
    [
        ("trainer", 1),
        ("accelerate", 1),
        pytest.param("trainer", 2, marks=pytest.mark.long),
        pytest.param("accelerate", 2, marks=pytest.mark.long),
    ],
)
def test_twenty_steps_equal_transformers_model(way, ranks, tmp_path):
    start = [sys.executable]
    more = [way, str(tmp_path / "out")]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        more.append(str(ROOT / "ds_configs" / "zero1.json"))
    path = os.pathsep.join((str(EXTRAS), str(ROOT)))
    finished = run([*start, str(ROOT / "tests" / "trainer_worker.py"), *more], timeout=180, PYTHONPATH=path)
    assert finished.returncode == 0, finished.text
    losses = json.loads((tmp_path / "out" / "losses.json").read_text())
    assert len(losses["ours"]) == 20
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-5)
    assert losses["ours"][-1] < losses["ours"][0] / 2
