"""TensorBoard shows the rows of a two-rank run: read with its own reader, and viewed in a browser."""

import gzip
import json
import math
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import warm
from conftest import options_of_small_run
from ranks import ROOT, smolds
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smolds_dist.config import load_config
from smolds_dist.errors import ConfigError
from smolds_dist.observe.board import board, named, serve
from smolds_dist.observe.report import report
from smolds_dist.observe.rows import is_kept, load_table, read_rows
from smolds_dist.observe.tensorboard import Board, heatmap, rebuild
from smolds_dist.training.trainer import train

CHROMIUM = shutil.which("chromium")
SCREENSHOTS = ROOT / "screenshots"  # not in git


@pytest.fixture(scope="module")
def two_ranks(corpus, cache, tmp_path_factory):
    """Return the folder of a finished run of two ranks with sharded experts. Copy it, do not change it."""
    folder = tmp_path_factory.mktemp("board")
    options = [*options_of_small_run(corpus, cache, folder), "--run.name=two", "--parallel.device=cpu"]
    finished = smolds(
        "launch", "--nproc-per-node=2", "--", *options, "--train.steps=12", "--profile.steps=4:5", timeout=120
    )
    assert finished.returncode == 0, finished.text
    assert "all-to-all" in finished.stdout and "profile/steps_4-5.rank_0.pt.trace.json.gz" in finished.stdout
    return folder / "runs" / "two"


def test_layers_have_their_numbers_in_the_model(corpus, cache, tmp_path):
    """If the first layers are dense, the experts' curves begin after them."""
    options = [*options_of_small_run(corpus, cache, tmp_path), "--run.name=dense", "--train.steps=2"]
    dense = ["--model.num_hidden_layers=4", "--model.first_k_dense_replace=2", "--model.dense_intermediate_size=40"]
    train(load_config([*options, *dense]))
    run_dir = tmp_path / "runs" / "dense"
    tags = board_of(run_dir)
    numbers = {tag.split("/")[0].removeprefix("load_") for tag in tags["scalars"] if tag.startswith("load_layer")}
    assert numbers == {"layer_02", "layer_03"}
    assert {tag for tag in tags["scalars"] if tag.startswith("max_vio/")} == {"max_vio/layer_02", "max_vio/layer_03"}
    assert {tag for tag in tags["histograms"] if "bias" in tag} == {
        "selection_bias/layer_02",
        "selection_bias/layer_03",
    }
    assert "grad_norm/dense_layers" in tags["scalars"]
    lines = load_table(read_rows(run_dir / "metrics.jsonl")).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "2", "3"]


def board_of(run_dir: Path) -> dict:
    """Return what TensorBoard's own reader finds: points of every curve, images, histograms, texts."""
    size = {"scalars": 0, "images": 0, "tensors": 0, "histograms": 0}
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance=size).Reload()
    tags = board.Tags()
    return {
        "scalars": {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags["scalars"]},
        "images": {tag: [(e.step, e.width, e.height) for e in board.Images(tag)] for tag in tags["images"]},
        "histograms": {tag: [(e.step, e.histogram_value) for e in board.Histograms(tag)] for tag in tags["histograms"]},
        "texts": {
            tag: [(e.step, e.tensor_proto.string_val[0]) for e in board.Tensors(tag) if e.tensor_proto.string_val]
            for tag in tags["tensors"]
        },
        "hparams": set(board.PluginTagToContent("hparams")),
    }


def test_event_file_holds_the_rows_and_can_be_rebuilt_from_them(two_ranks, tmp_path):
    shown = board_of(two_ranks)
    scalars, texts = shown["scalars"], shown["texts"]
    rows = [row for row in read_rows(two_ranks / "metrics.jsonl") if "loss" in row]
    measured = [row for row in rows if "seconds" in row]
    assert [row["step"] for row in rows] == list(range(1, 13)) and [row["step"] for row in measured] == list(
        range(1, 11)
    )
    for layer in range(2):
        total = [0.0] * len(rows)
        for expert in range(8):
            curve = scalars[f"load_layer_{layer:02}/expert_{expert:02}"]
            assert curve == [(row["step"], pytest.approx(row["load"][layer][expert])) for row in rows]
            total = [one + value for one, (_, value) in zip(total, curve, strict=True)]
            biases = scalars[f"bias_layer_{layer:02}/expert_{expert:02}"]
            assert biases == [(row["step"], pytest.approx(row["bias"][layer][expert])) for row in measured]
        assert total == pytest.approx([1.0] * len(rows), abs=1e-4)
        for name in ("selection_bias", "router_probability"):
            assert [step for step, _ in shown["histograms"][f"{name}/layer_{layer:02}"]] == list(range(1, 11))
        probabilities = shown["histograms"][f"router_probability/layer_{layer:02}"][0][1]
        assert probabilities.num == 8 * 32 * 8  # sequences x tokens x experts
        assert probabilities.sum / probabilities.num == pytest.approx(1 / 8, abs=0.03)
    for name in ("max_vio", "max_vio_window"):
        assert scalars[f"balance/{name}"] == [(row["step"], pytest.approx(row[name])) for row in rows]
    for phase in ("data", "forward", "backward", "all_to_all", "optimizer", "logging", "other"):
        assert scalars[f"seconds/{phase}"] == [(row["step"], pytest.approx(row["seconds"][phase])) for row in measured]
    assert all(row["seconds"]["all_to_all"] > 0 for row in measured)
    for row in rows:
        received = [
            2 * max(sum(layer[:4]), sum(layer[4:])) for layer in row["load"]
        ]  # two ranks with four experts each
        assert row.get("max_received") == (pytest.approx(max(received), abs=1e-3) if row in measured else None)
    assert {f"grad_norm/{part}" for part in ("embeddings", "attention", "routers", "experts", "norms")} <= set(scalars)
    assert {"speed/mfu", "speed/memory_gb", "speed/tokens_per_s", "balance/router_entropy"} <= set(scalars)
    assert scalars["train/perplexity"][0][1] == pytest.approx(math.exp(rows[0]["loss"]), rel=1e-4)
    assert shown["images"]["balance/load"] == [(step, 8 * 12, 2 * 12) for step in range(1, 11)]

    tabs = texts["custom_scalars__config__"][0][1]
    assert tabs.index(b"Experts") < tabs.index(b"Learning") < tabs.index(b"Speed")
    assert b"num_experts: 8" in texts["configuration/text_summary"][0][1]
    assert b"2 ranks over gloo" in texts["environment/text_summary"][0][1]
    assert b"torch:" in texts["environment/text_summary"][0][1]
    assert [step for step, _ in texts["samples/def/text_summary"]] == [3, 6, 9, 12]
    assert shown["hparams"] == {
        f"_hparams_/{name}" for name in ("experiment", "session_start_info", "session_end_info")
    }

    copy = tmp_path / "copy"
    shutil.copytree(two_ranks, copy, symlinks=True)
    report([str(copy), "--rebuild-tensorboard"])
    assert board_of(copy) == shown

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))  # like a full disk
    try:
        with pytest.raises(ConfigError, match="free space and rerun the command"):
            rebuild(copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert board_of(copy) == shown and not list(copy.glob(".tensorboard*"))
    with (copy / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 13, "prompt": "x", "text": "a\n````\n# taken"}) + "\n")
    rebuild(copy)
    ((_, text),) = board_of(copy)["texts"]["samples/x/text_summary"]
    assert text == b"`````\na\n````\n# taken\n`````"


def test_traces_of_the_ranks_hold_their_steps(two_ranks):
    for rank in range(2):
        path = two_ranks / "profile" / f"steps_4-5.rank_{rank}.pt.trace.json.gz"
        names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
        # four sequences per rank in micro batches of two, over two steps
        assert [names.count(phase) for phase in ("forward", "backward", "optimizer")] == [4, 4, 2]
        assert any("all_to_all" in str(name) or "alltoall" in str(name) for name in names)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: .ci/install_system_packages.sh installs it")
def test_browser_shows_experts_first_then_learning_heatmap_and_samples(two_ranks):
    from playwright.sync_api import expect, sync_playwright

    server = subprocess.Popen(
        [warm.python(), "-m", "smolds_dist", "board", str(two_ranks), "--port=0", "--no-open"],
        stdout=subprocess.PIPE, text=True, env=warm.environment(),
    )  # fmt: skip
    alarm = threading.Timer(90, server.kill)
    alarm.start()
    try:
        line = server.stdout.readline()
        address = re.match(r"http://localhost:\d+/", line)
        assert address, line
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(30_000)
            expect.set_options(timeout=30_000)

            page.goto(address[0])  # opens on the experts' tab
            headings = page.locator("tf-category-paginated-view .heading, tf-category-paginated-view button.heading")
            expect(headings).to_contain_text(["Experts", "Learning", "Speed"])
            assert_curves(page, "load, layer 0", [f"load_layer_00/expert_{e:02}" for e in range(8)])
            assert_curves(page, "load, layer 1", [f"load_layer_01/expert_{e:02}" for e in range(8)])
            assert_curves(page, "MaxVio", ["balance/max_vio", "balance/max_vio_window", "validation/max_vio"])
            SCREENSHOTS.mkdir(exist_ok=True)
            page.screenshot(path=SCREENSHOTS / "experts.png")
            assert_curves(page, "loss", ["train/loss", "validation/loss"])
            page.screenshot(path=SCREENSHOTS / "learning.png")

            page.get_by_role("tab", name="Images").click()
            picture = page.locator("tf-image-loader").filter(has_text="balance/load").locator("img")
            expect(picture).to_be_visible()
            page.wait_for_function("image => image.naturalWidth > 0", arg=picture.element_handle())
            assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [8 * 12, 2 * 12]
            page.screenshot(path=SCREENSHOTS / "heatmap.png")

            page.get_by_role("tab", name="Text").click()
            page.locator("tf-category-paginated-view .heading").filter(has_text="samples").click()
            sample = json.loads((two_ranks / "samples.jsonl").read_text().splitlines()[-2])["text"]
            expect(page.locator("tf-text-loader").filter(has_text="samples/def").first).to_contain_text(
                sample.split()[0]
            )
            page.screenshot(path=SCREENSHOTS / "samples.png")
            browser.close()
    finally:
        alarm.cancel()
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=20) == 0


def assert_curves(page, chart: str, tags: list[str]) -> None:
    """Check that a chart of the custom scalars has a line with points for each of these tags, and no other."""
    from playwright.sync_api import expect

    card = page.locator("tf-custom-scalar-multi-line-chart-card")
    card = card.filter(has=page.get_by_text(chart, exact=True))
    card.scroll_into_view_if_needed()
    expect(card.locator(".match-list-entry")).to_have_count(len(tags))
    entries = " ".join(card.locator(".match-list-entry").all_text_contents())
    assert all(tag in entries for tag in tags), entries
    lines = card.locator("path.line")
    expect(lines).to_have_count(2 * len(tags))  # raw and smoothed
    drawn = [path for path in lines.evaluate_all("paths => paths.map(path => path.getAttribute('d') || '')") if path]
    assert len(drawn) >= len(tags) and len(set(drawn)) > len(tags) / 2, drawn


def test_heatmap_is_white_where_the_load_is_even_red_where_more_blue_where_less():
    picture = heatmap(torch.tensor([[0.25, 0.25, 0.5, 0.0]]))[:, 0, ::12].T.tolist()
    assert picture == [[1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 1]]


def test_files_of_long_runs_stay_small(two_ranks, tmp_path):
    config = asdict(load_config(["--preset=debug"]))
    row = next(row for row in read_rows(two_ranks / "metrics.jsonl") if row["step"] == 10 and "bias" in row)
    sizes = []
    for first in (1, 100_001):
        board = Board(tmp_path / str(first), 1, config)
        empty = size_of(tmp_path / str(first))
        for step in range(first, first + 1000):
            board.show(row | {"step": step})
        board.close()
        sizes.append(size_of(tmp_path / str(first)) - empty)
    assert 0 < sizes[1] < 0.02 * sizes[0]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_curves_keep_their_first_and_thin_their_later_steps():
    assert [step for step in range(1, 10_021) if not is_kept(step, 4)] == [
        *range(10_001, 10_010), *range(10_011, 10_020)
    ]  # fmt: skip
    for digits in (1, 3, 4):
        kept = [step for step in range(1, 100_000) if is_kept(step, digits)]
        assert sum(step >= 10_000 for step in kept) == 9 * 10 ** (digits - 1)


@pytest.mark.parametrize(
    ("args", "fix"),
    [
        (["nowhere"], "contains no TensorBoard files"),
        (["RUN", "--port", "TAKEN"], "choose another --port"),
        (["RUN", "RUN/.."], "each must be a run"),
        (["--port", "many"], "invalid int"),
    ],
)
def test_mistake_is_one_sentence(two_ranks, args, fix):
    with socket.create_server(("localhost", 0)) as taken:
        known = {"RUN": str(two_ranks), "RUN/..": str(two_ranks.parent), "TAKEN": str(taken.getsockname()[1])}
        with pytest.raises(ConfigError, match=fix):
            board([known.get(arg, arg) for arg in args])


def test_board_is_bound_where_asked(two_ranks, capsys):
    port = int(serve([two_ranks], 0, "0.0.0.0").rstrip("/").rpartition(":")[2])
    socket.create_connection(("127.0.0.2", port), timeout=10).close()
    assert "anyone who can reach this machine can see the runs" in capsys.readouterr().err


def test_two_runs_of_one_name_are_distinguished(two_ranks, tmp_path):
    runs = [tmp_path / "x" / "same", tmp_path / "y" / "same", two_ranks]
    names = [one.split(":")[0] for one in named(runs)]
    assert len(set(names)) == 3 and names[2] == "two"
