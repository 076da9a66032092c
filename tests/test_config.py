"""Presets load, options override them, and every invalid setting is an error with the fix."""

import ast
import contextlib
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from ranks import smolds

from smolds_dist import settings
from smolds_dist.cli import main
from smolds_dist.config import load_config, preset_names, save_config
from smolds_dist.errors import ConfigError
from smolds_dist.model import DeepSeekV3Config


def test_presets_load_and_build_model_configurations():
    reference = "smollm2-deepseek-255m"
    assert {
        "debug",
        "quickstart",
        reference,
        f"{reference}-local",
        f"{reference}-mla",
        "moe-1b-a200m",
        "moe-7b-a1b",
    } <= set(preset_names())
    for name in preset_names():
        config = load_config(["--preset", name])
        assert config.run.name == name
        DeepSeekV3Config(**config.model.architecture() | {"vocab_size": 49152})


def test_reference_preset_is_the_reference_model():
    config = load_config(["--preset", "smollm2-deepseek-255m"])
    architecture = config.model.architecture()
    model, expected = DeepSeekV3Config(**architecture | {"vocab_size": 49152}), DeepSeekV3Config()
    assert {k: getattr(model, k) for k in architecture} == {k: getattr(expected, k) for k in architecture}
    assert config.train.steps == 10_000
    assert config.data.source == "hf:HuggingFaceTB/smollm-corpus:cosmopedia-v2"
    assert config.data.tokenizer == "HuggingFaceTB/SmolLM2-135M"


def test_options_override_the_preset_in_any_order():
    config = load_config(["--train.steps", "7", "--preset", "debug", "--run.name=123", "--parallel.expert", "4"])
    assert config.train.steps == 7
    assert config.run.name == "123"
    assert config.parallel.expert == 4
    assert config.model.hidden_size == 192


def test_saved_configuration_gives_the_same_run(tmp_path):
    yarn = "--model.rope_scaling={rope_type: yarn, factor: 4, original_max_position_embeddings: 64}"
    config = load_config(["--preset", "debug", "--data.source", "text:a b/*.txt", "--train.lr", "1e-4", yarn])
    assert config.model.rope_scaling is not None and config.model.rope_scaling.beta_fast == 32
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


MISTAKES = [
    ("--preset=debux", "debug"),
    ("--train.stepz=5", "did you mean --train.steps"),
    ("--train.warmup=5", "did you mean --train.warmup_steps"),
    ("--nonsense=5", "--help"),
    ("--train.steps=2.5", "int"),
    ("--train.steps=0", "at least 1"),
    ("--train.time_budget=0", "at least 1, or null"),
    ("--train.lr=fast", "float"),
    ("--train.lr=0", "more than 0"),
    ("--train.balance=magic", "'bias', 'aux_loss', 'none'"),
    ("--train.dtype=fp8", "'auto', 'fp32', 'bf16'"),
    ("--train.seed=-1", "0 or more"),
    ("--train.micro_batch=3", "valid values: 1, 2, 4, 8"),
    ("--train.activation_checkpointing=some", "'selective', 'full'."),
    ("--train.beta2=1", "less than 1"),
    ("--data.val_fraction=0.9", "0.5"),
    ("--data.seq_len=1", "at least 2"),
    ("--data.seq_len=100000", "max_position_embeddings"),
    ("--data.source=csv:x", "jsonl:GLOB"),
    ("--data.source=text:", "names no files"),
    ("--data.source=tokens:x.npy", "a tokenizer is trained on text"),
    ("--data.window_tokens=0", "at least 1"),
    ("--data.sources={}", "at least one source"),
    ("--data.sources=7", "set for each name a `source`"),
    ("--data.sources={web: {sourc: stdlib}}", "set for each name a `source`"),
    ("--data.sources={web: {source: stdlib, weight: -1}}", "0 or more"),
    ("--data.sources={web: {source: stdlib, weight: 0}}", "at least one above 0"),
    ("--data.sources={web: {source: stdlib, max_epochs: 0}}", "more than 0"),
    ("--data.sources={web: {source: 'csv:x'}}", "jsonl:GLOB"),
    ("--data.sources={w/b: {source: stdlib}}", "digits"),
    ("--train.stages=[{until: half}]", "not an end"),
    ("--train.stages=[{until: 1.5}]", "not an end"),
    ("--train.stages=[{until: -2}]", "not an end"),
    ("--train.stages=[{until: 1.2.3 tokens}]", "not an end"),
    ("--train.stages=[{until: 3 epochs}]", "not an end"),
    ("--train.stages=[{until: 0.5}]", "omit until in the last stage"),
    ("--train.stages=[{until: 0.5}, {until: 0.4}, {}]", "raise until"),
    ("--train.stages=[{until: 0.5}, {until: 5 tokens}, {}]", "raise until"),
    ("--train.stages=[{seq_len: 64}, {}]", "has no until"),
    ("--train.stages=[]", "at least one stage"),
    ("--train.stages=[{sequence: 64}]", "`until` and optionally weights, seq_len"),
    ("--train.stages=[{weights: {web: 1}}]", "choose from stdlib"),
    ("--train.stages=[{weights: {stdlib: -1}}]", "0 or more"),
    ("--train.stages=[{weights: {stdlib: 0}}]", "no source with a weight"),
    ("--train.stages=[{seq_len: 1}]", "at least 2"),
    ("--train.stages=[{until: 0.5}, {seq_len: 1000000}]", "stage 2: --data.seq_len 1000000 is longer"),
    ("--train.stages=[{until: 0.5}, {global_batch: 8, micro_batch: 3}]", "stage 2: --train.micro_batch 3"),
    ("--train.stages=[{lr: -1}]", "0 or more"),
    ("--train.stages=[{lr: 1, lr_shape: exponential}]", "lr_shape"),
    ("--train.stages=[{lr: 1, lr_until: 0.5}]", "unset it"),
    ("--train.stages=[{rope_scaling: {factor: 4}}]", "train.stages is not valid"),
    ("--model.num_key_value_heads=4", "valid values: 1, 2, 3, 6"),
    ("--model.num_experts_per_tok=9", "lower it"),
    ("--model.head_dim=33", "use 34"),
    ("--model.first_k_dense_replace=4", "lower it"),
    ("--model.first_k_dense_replace=1", "--model.dense_intermediate_size"),
    ("--model.n_group=4", "set both"),
    ("--model.qk_norm=some", "'head', 'all' or null"),
    ("--model.rope_scaling={foo: 1, factor: 4, original_max_position_embeddings: 64}", "no setting 'foo'"),
    ("--model=x.yaml", "--model.NAME VALUE"),
    ("--model.latent_norm_eps=0", "more than 0"),
    ("--model.rope_scaling={factor: 4}", "original_max_position_embeddings"),
    ("--model.rope_scaling={factor: 0.5, original_max_position_embeddings: 64}", "at least 1"),
    ("--train.z_loss_coef=-1", "0 or more"),
    ("--model.force_uniform_routing=true", "smolds bench"),
    ("--run.name=../up", "folder name"),
    ("--parallel.zero=4", "0, 1, 2 or 3"),
    ("--parallel.expert=many", "'auto', 'max' or int"),
    ("--parallel.ds_config=/nowhere.json", "not a file"),
    ("--config=/nowhere.yaml", "not a file"),
]


def test_invalid_combinations_of_settings_are_rejected():
    groups = ["--model.n_group=4", "--model.topk_group=1"]
    for options, fix in (
        (["--model.n_group=3", "--model.topk_group=1"], "valid values: 1, 2, 4"),
        ([*groups, "--model.num_experts_per_tok=3"], "must leave enough"),
        (["--model.n_group=2", "--model.topk_group=3"], "at most n_group"),
        (["--model.attention=latent", "--model.qk_norm=head"], "for --model.attention gqa"),
        (["--train.qk_clip=100", "--model.qk_norm=head"], "unset one"),
        (["--train.time_budget=60", "--train.warmup_steps=1"], "set at least 2"),
        (["--train.time_budget=60", "--train.stages=[{until: 1}]"], "unset one"),
        (["--train.compile=true", "--train.activation_checkpointing=selective"], "use attention, experts or full"),
    ):
        with pytest.raises(ConfigError, match=fix):
            load_config(["--preset", "debug", *options])


@pytest.mark.parametrize(("option", "fix"), MISTAKES)
def test_invalid_setting_is_a_one_line_error_with_the_fix(option, fix):
    preset = [] if option.startswith(("--preset", "--config")) else ["--preset", "debug"]
    with pytest.raises(ConfigError) as error:
        load_config([*preset, option])
    message = str(error.value)
    assert fix in message
    assert option.split("=")[0].rstrip("z").lstrip("-") in message
    assert "\n" not in message


def test_source_and_sources_exclude_each_other(tmp_path):
    (tmp_path / "mix.yaml").write_text("data: {sources: {a: {source: 'text:a'}, b: {source: 'text:b', weight: 3}}}")
    given = ["--config", str(tmp_path / "mix.yaml")]
    assert {name: one.weight for name, one in load_config(given).data.mixed.items()} == {"a": 1.0, "b": 3.0}
    assert load_config([*given, "--data.sources.b.weight=1"]).data.mixed["b"].weight == 1
    with pytest.raises(ConfigError, match=r"--data.sources null"):
        load_config([*given, "--data.source=text:c"])
    assert list(load_config([*given, "--data.source=text:c", "--data.sources=null"]).data.mixed) == ["text"]


def test_error_names_the_setting_of_a_yaml_file(tmp_path):
    for content, word in (({"train": {"stepz": 5}}, "train.stepz"), ({"train": {"steps": "a"}}, "train.steps")):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(ConfigError, match=word):
            load_config(["--config", str(tmp_path / "config.yaml")])


def test_invalid_option_exits_with_code_2_without_traceback(tmp_path):
    finished = smolds("train", "--preset", "debug", "--train.steps", "many", cwd=tmp_path)
    assert finished.returncode == 2
    assert finished.stderr == "smolds: --train.steps many is not valid; set int.\n"
    assert not list(tmp_path.iterdir())


def test_help_describes_the_options():
    finished = smolds("train", "--help")
    assert finished.returncode == 0
    assert "Sequences per step over all ranks" in finished.stdout
    assert "--train.global_batch" in finished.stdout


def test_config_file_overrides_the_preset_and_options_override_both(tmp_path):
    (tmp_path / "mine.yaml").write_text("train:\n  steps: 7\n  lr: 0.5\nmodel:\n  num_hidden_layers: 3\n")
    given = ["--config", str(tmp_path / "mine.yaml"), "--train.lr=0.25"]
    config = load_config(["--preset", "debug", *given])
    preset = load_config(["--preset", "debug"])
    assert (config.train.steps, config.train.lr, config.model.num_hidden_layers) == (7, 0.25, 3)
    assert config.train.warmup_steps == preset.train.warmup_steps == 20
    assert config.model.hidden_size == preset.model.hidden_size == 192
    assert load_config([*given, "--preset=debug"]) == config
    assert load_config([*given, "--run.name=alone"]).model.hidden_size == 384


def test_config_file_may_name_its_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: debug\ntrain:\n  steps: 7\n")
    assert load_config(["--config", str(file)]) == load_config(["--preset", "debug", "--train.steps=7"])
    assert load_config(["--config", str(file), "--preset=moe-1b-a200m"]).run.name == "moe-1b-a200m"
    file.write_text("preset: debux\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: preset 'debux' is unknown; use one of debug"):
        load_config(["--config", str(file)])


COMMANDS = ["runs diff", "data", *(f"data {name}" for name in ("prepare", "show", "stats", "order"))]
COMMANDS += "train launch slurm plan doctor runs report board export import generate eval experts".split()
COMMANDS += [f"checkpoint {name}" for name in ("", "ls", "verify", "convert", "rm")]
COMMANDS += ["bench", "bench train", "ladder", *(f"ladder {name}" for name in ("plan", "run", "slurm", "fit"))]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_help_has_an_example(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["smolds", *command.split(), "--help"])
    with contextlib.suppress(SystemExit):
        main()
    shown = " ".join(capsys.readouterr().out.split())
    assert f"example: smolds {command}".strip() in shown and len(shown) > 100


def test_version_is_printed():
    finished = smolds("--version", timeout=30)
    assert finished.returncode == 0
    assert re.fullmatch(r"smolds \d+\.\d+\.\d+\n", finished.stdout)


def test_a_config_files_folder_may_have_glob_characters(tmp_path):
    folder = tmp_path / "exp[1]*"
    folder.mkdir()
    (folder / "config.yaml").write_text("preset: debug\ntrain:\n  steps: 77\n")
    assert load_config(["--config", str(folder / "config.yaml")]).train.steps == 77


IMPORTS = '{"class_path": "imported_by_settings.Anything"}'


@pytest.mark.parametrize(
    "given",
    [
        f"train: {IMPORTS}",
        f"model:\n  rope_scaling: {IMPORTS}",
        f"model:\n  rope_scaling: '{IMPORTS}'",
        f"data:\n  sources:\n    a: {IMPORTS}",
        "train: other.yaml",
        ["--train.class_path=imported_by_settings.Anything"],
        [f"--train={IMPORTS}"],
        ["--model.rope_scaling.class_path", "imported_by_settings.Anything"],
        [f'--data.sources={{"a": {IMPORTS}}}'],
    ],
)
def test_settings_import_nothing(tmp_path, monkeypatch, given):
    """jsonargparse imports the module that a `class_path` names before it rejects it."""
    (tmp_path / "imported_by_settings.py").write_text("open('imported', 'w').close()\nclass Anything: pass\n")
    (tmp_path / "other.yaml").write_text(IMPORTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if isinstance(given, str):
        (tmp_path / "config.yaml").write_text(given)
        given = ["--config=config.yaml"]
    with pytest.raises(ConfigError, match=r"class_path is not a setting|is not a mapping"):
        load_config(["--preset", "debug", *given])
    assert not (tmp_path / "imported").exists()


UNITS = re.compile(
    r"\b(tokens?|steps?|sequences|seconds|layers?|heads|channels|experts|ranks|GB|epochs|fraction|ratio|coefficient|number|"
    r"epsilon|deviations?|seed|rate|rotations|questions|norm|logit|processes|spikes|checkpoints|stage|groups|\d)\b",
    re.IGNORECASE,
)


def test_help_of_every_number_has_a_unit_or_a_range():
    """Check the docstring below each field, which `--help` prints."""
    tree = ast.parse(Path(settings.__file__).read_text())
    numbers = 0
    for section in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, doc in pairwise([*section.body, ast.Pass()]):
            if isinstance(field, ast.AnnAssign) and re.search(r"\b(int|float)\b", ast.unparse(field.annotation)):
                numbers += 1
                name = f"{section.name}.{ast.unparse(field.target)}"
                assert isinstance(doc, ast.Expr) and UNITS.search(doc.value.value), name
    assert numbers > 80
