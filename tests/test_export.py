"""Exports load in plain transformers and compute the same; imports continue training from them."""

import base64
import json
import shutil
import sys
import sysconfig
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import options_of_small_run
from ranks import TRANSFORMERS4, run, smolds
from read_exports import logits_and_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from smolds_dist.checkpoint.files import CheckpointReader, read_manifest
from smolds_dist.config import load_config
from smolds_dist.data.prefetch import BatchPrefetcher
from smolds_dist.data.prepare import prepare_data
from smolds_dist.data.tokenizer import load_tokenizer, save_tokenizer
from smolds_dist.errors import ConfigError
from smolds_dist.inference.generate import generate
from smolds_dist.interchange import export as export_module
from smolds_dist.interchange.export import export
from smolds_dist.interchange.import_model import import_model
from smolds_dist.model import DeepSeekV3ForCausalLM
from smolds_dist.observe.rows import read_rows
from smolds_dist.parallel.balancer import Balancer
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.parallel.topology import detect_machine, plan_topology
from smolds_dist.schedule import learning_rate
from smolds_dist.training.build import make_model_config, new_engine
from smolds_dist.training.step import Stepper
from smolds_dist.training.trainer import train

LATENT = ("--model.attention=latent", "--model.scoring_func=sigmoid", "--model.n_shared_experts=1")
GREEDY = """
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("def add", return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**ids, do_sample=False, max_new_tokens=8)[0], skip_special_tokens=True))
for absent in ("smolds_dist", "deepspeed"):
    try:
        __import__(absent)
    except ImportError:
        continue
    sys.exit(f"{absent} can be imported")
"""


@pytest.fixture(scope="module")
def exported(kept_run, tmp_path_factory):
    """Export and check the kept run's newest checkpoint in transformers' format."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    export([str(kept_run[0]), "--to", str(folder)])
    return folder


@pytest.fixture(scope="module")
def latent(corpus, cache, tmp_path_factory):
    """Train a latent model in bf16; export and check its step 4 in several files."""
    folder = tmp_path_factory.mktemp("latent")
    options = [*options_of_small_run(corpus, cache, folder), *LATENT, "--model.rms_norm_eps=1e-6", "--run.name=latent"]
    train(load_config([*options, "--train.dtype=bf16", "--train.eval_every=0", "--log.sample_every=0"]))
    run_dir, to = folder / "runs" / "latent", folder / "model"
    export([str(run_dir), "--to", str(to), "--step", "4", "--max-shard-size", "100KB"])
    return run_dir, to


@pytest.fixture(scope="module")
def transformers_alone(tmp_path_factory):
    """Return a folder of packages without smolds and DeepSpeed, and the environment in which Python uses only these."""
    folder = tmp_path_factory.mktemp("site")
    for package in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not package.name.startswith(("smolds", "deepspeed", "__editable__")) and package.suffix != ".pth":
            (folder / package.name).symlink_to(package)
    return [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(folder)!r})\n{GREEDY}"]


def test_export_of_two_zero_3_ranks_generates_the_same_in_transformers_alone(
    corpus, cache, tmp_path, transformers_alone, capsys
):
    options = [*options_of_small_run(corpus, cache, tmp_path), "--run.name=pair", "--parallel.zero=3", "-q"]
    finished = smolds("launch", "--nproc-per-node", "2", "--", *options, timeout=180)
    assert finished.returncode == 0, finished.text
    export([str(tmp_path / "runs" / "pair"), "--to", str(tmp_path / "model"), "--no-check"])
    theirs = run([*transformers_alone, str(tmp_path / "model")], timeout=120)
    assert theirs.returncode == 0, theirs.text
    capsys.readouterr()
    for source in (tmp_path / "runs" / "pair", tmp_path / "model"):
        generate([str(source), "--prompt", "def add", "--temperature", "0", "--max-new-tokens", "8"])
        ours = capsys.readouterr().out
        assert ours.startswith("def add") and len(ours) > len("def add\n")
        assert theirs.stdout == ours


def test_two_steps_from_an_import_are_those_from_the_checkpoint(kept_run, exported, tmp_path):
    run_dir, options = kept_run
    settings = [option for option in options if not option.startswith(("--preset", "debug", "--run.", "--model."))]
    to = tmp_path / "runs" / "back"
    import_model([str(exported), "--to", str(to), *settings, "--train.steps=2", "--train.balance_rate=0.01"])
    config = load_config(["--config", str(to / "config.yaml"), "--checkpoint.resume=auto"])
    train(config)
    losses = [row["loss"] for row in read_rows(to / "metrics.jsonl") if "loss" in row]

    checkpoint = run_dir / "checkpoints" / "step_00000006"
    reader, data = CheckpointReader(checkpoint, read_manifest(checkpoint)), prepare_data(config)
    topology = plan_topology(config, detect_machine(), RankInfo())
    engine = new_engine(make_model_config(config, data), config, topology, reader)
    balancer = Balancer(engine.model, config.train.balance_rate)
    for name, bias in balancer.named_biases().items():
        reader.read(name, "value", 0, bias)
        assert bias.any()
    expected = []
    batches = BatchPrefetcher(data, (0, 1), [topology.micro_batch])
    stepper = Stepper(engine, balancer, topology, config, batches)
    for step in (1, 2):
        loss, _ = stepper.accumulate(step)
        engine.step(learning_rate(step, config))
        balancer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-6)


def test_export_has_what_a_user_looks_for(exported):
    config = AutoConfig.from_pretrained(exported)
    assert config.architectures == ["Ernie4_5_MoeForCausalLM"]
    card = (exported / "README.md").read_text()
    for text in ("library_name: transformers", "from_pretrained", "validation loss", "MaxVio", "training_metrics.png"):
        assert text in card
    assert {path.name for path in exported.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "training_metrics.png",
    }  # fmt: skip
    names = load_file(exported / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in names
    assert "model.layers.1.mlp.moe_statics.e_score_correction_bias" in names


@pytest.mark.skipif(not TRANSFORMERS4.exists(), reason="no .venv/transformers4; ./launch/test.sh makes it")
def test_transformers_4_reads_exports_as_5_does(kept_run, exported, latent, tmp_path):
    """Models of both attentions, the tokenizers in them and in runs' own exports, and further control tokens."""
    tokenizer = load_tokenizer(str(exported))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"], "pad_token": "<|pad|>"})
    save_tokenizer(tokenizer, tmp_path / "more")
    folders = [exported, kept_run[0] / "export", latent[1], latent[0] / "export", exported, tmp_path / "more"]
    script = str(Path(__file__).with_name("read_exports.py"))
    finished = run([str(TRANSFORMERS4), script, str(tmp_path / "read"), *map(str, folders)], timeout=120)
    assert finished.returncode == 0, finished.text
    version, read = torch.load(tmp_path / "read")
    assert version.startswith("4.57") and len(read) == 3
    for (logits, *tokens), model, other in zip(read, folders[::2], folders[1::2], strict=True):
        expected, *ours = logits_and_tokens(str(model), [str(model), str(other)])
        assert tokens == ours
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert len(ours[0][0][0]) > 40 and expected.abs().max() > 0.1
    (_, (_, with_more), control) = read[-1]
    assert control == [0, len(tokenizer) - 1, len(tokenizer) - 2]
    assert with_more[1][-2:] == [66, len(tokenizer) - 2]


def test_latent_model_and_many_files(latent, tmp_path):
    run_dir, to = latent
    index = json.loads((to / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in to.glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert all(path.stat().st_size < 110_000 for path in to.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(to)
    assert type(model).__name__ == "DeepseekV3ForCausalLM" and model.dtype == torch.bfloat16
    import_model([str(to), "--to", str(tmp_path / "runs" / "back"), "--data.seq_len=32"])
    back = tmp_path / "runs" / "back" / "checkpoints" / "step_00000000"
    first, second = (
        CheckpointReader(folder, read_manifest(folder)) for folder in (run_dir / "checkpoints" / "step_00000004", back)
    )
    assert first.manifest.tensors == second.manifest.tensors
    for name in first.manifest.tensors:
        assert torch.equal(first.read_full(name, "value").bfloat16().float(), second.read_full(name, "value"))


def test_models_without_counterpart_export_in_smolds_format(corpus, cache, tmp_path):
    options = options_of_small_run(corpus, cache, tmp_path)
    train(load_config([*options, "--model.scoring_func=sigmoid", "--run.name=mixed", "--train.steps=2"]))
    source, to = str(tmp_path / "runs" / "mixed"), tmp_path / "model"
    with pytest.raises(ConfigError, match=r"gqa needs softmax.*--format smolds"):
        export([source, "--to", str(to)])
    assert not list(tmp_path.glob("model*"))
    export([source, "--to", str(to), "--format", "smolds"])
    assert isinstance(AutoModelForCausalLM.from_pretrained(to), DeepSeekV3ForCausalLM)
    import_model([str(to), "--to", str(tmp_path / "runs" / "back"), "--data.seq_len=32"])


def test_export_with_other_logits_is_detected(kept_run, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"].flip(0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = kept_run[0] / "checkpoints" / "step_00000006"
    reader = CheckpointReader(checkpoint, read_manifest(checkpoint))
    tokenizer = export_module.tokenizer_of(checkpoint, reader.manifest)
    config = export_module.model_config(reader.manifest, tokenizer)
    with pytest.raises(RuntimeError, match="logits differ"):
        export_module.check(reader, config, folder, "transformers", "fp32")


class Hub(BaseHTTPRequestHandler):
    """Implements what the Hub's client requests to upload small files, and stores them. Does not model how the Hub treats
    large files, names or tokens."""

    committed: ClassVar[dict[str, bytes]] = {}
    tokens: ClassVar[set[str | None]] = set()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.tokens.add(self.headers["Authorization"])
        answer: dict = {}
        if self.path == "/api/repos/create":
            assert json.loads(body)["name"] == "model"
            answer = {"url": f"http://{self.headers['Host']}/me/model"}
        elif self.path == "/api/models/me/model/preupload/main":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            answer = {"files": [file | {"shouldIgnore": False} for file in files]}
        elif self.path.startswith("/api/models/me/model/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {
                "commitUrl": f"http://{self.headers['Host']}/me/model/commit/1",
                "commitOid": "1",
                "success": True,
            }
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_args) -> None:
        pass


def test_push_sends_every_file_of_the_export(kept_run, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        finished = smolds(
            "export", str(kept_run[0]), "--to", str(tmp_path / "model"), "--no-check", "--push", "me/model",
            HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HUB_OFFLINE="0", HF_TOKEN="hf_mine",
        )  # fmt: skip
        hub.shutdown()
    assert finished.returncode == 0, finished.text
    assert Hub.committed == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert Hub.tokens == {"Bearer hf_mine"}
    assert "me/model" in finished.stdout


def test_push_without_the_hub_loses_nothing(kept_run, tmp_path):
    command = [str(kept_run[0]), "--to", str(tmp_path / "model"), "--no-check", "--push", "me/model"]
    with pytest.raises(ConfigError, match="could not be pushed to 'me/model'") as told:  # tests are offline
        export(command)
    assert len(str(told.value).splitlines()) == 1
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.long
def test_push_to_a_hub_that_does_not_answer_loses_nothing(kept_run, tmp_path):
    finished = smolds(
        "export", str(kept_run[0]), "--to", str(tmp_path / "model"), "--no-check", "--push", "me/model",
        HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0", HF_TOKEN="hf_none",
    )  # fmt: skip
    assert finished.returncode == 2
    assert "could not be pushed" in finished.stderr and len(finished.stderr.splitlines()) == 1
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_mistakes_raise_errors(kept_run, exported, tmp_path):
    source, to = str(kept_run[0]), ["--to", str(tmp_path / "model")]
    with pytest.raises(ConfigError, match="exists"):
        export([source, "--to", str(exported)])
    with pytest.raises(ConfigError, match="no checkpoint of step 5; it has 2"):
        export([source, *to, "--step", "5"])
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        export([str(tmp_path), *to])
    with pytest.raises(ConfigError, match="is not a file size"):
        export([source, *to, "--max-shard-size", "0GB"])
    with pytest.raises(ConfigError, match="it is a run, whose model"):
        import_model([source, *to])
    with pytest.raises(ConfigError, match="exists"):
        import_model([str(exported), "--to", source])
    assert not list(tmp_path.iterdir())

    def altered(name: str, change) -> str:
        folder = shutil.copytree(exported, tmp_path / name)
        change(folder)
        return str(folder)

    def set_config(folder: Path, **values) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))

    def drop(folder: Path, name: str, instead: torch.Tensor | None = None) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors | ({name: instead} if instead is not None else {}), folder / "model.safetensors")

    norm = "model.layers.0.input_layernorm.weight"
    for name, change, words in (
        ("gemma", lambda f: set_config(f, model_type="gemma"), "'gemma' is not one of ernie4_5_moe, mixtral"),
        ("dense", lambda f: set_config(f, moe_layer_end_index=0), "moe_layer_end_index=0"),
        ("biased", lambda f: set_config(f, use_bias=True), "use_bias=True"),
        ("short", lambda f: drop(f, norm), f"lacks the tensor {norm}"),
        ("wide", lambda f: drop(f, norm, torch.zeros(5)), "this config's weights"),
        ("half", lambda f: (f / "model.safetensors").write_bytes(b"1234"), "damaged"),
    ):
        with pytest.raises(ConfigError, match=words):
            import_model([altered(name, change), "--to", str(tmp_path / "run"), "--data.seq_len=32"])
        assert not (tmp_path / "run").exists()
