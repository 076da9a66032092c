"""llama.cpp computes the same tokens, logits and text from a GGUF export as we do."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from conftest import SENTENCES, options_of_small_run
from ranks import READERS, run
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from smolds_dist.checkpoint.files import open_verified
from smolds_dist.config import load_config
from smolds_dist.data.tokenizer import END_OF_TEXT, save_tokenizer, text_encoder
from smolds_dist.errors import ConfigError
from smolds_dist.interchange import gguf_format
from smolds_dist.interchange.export import build_model, export, find_checkpoint, model_config, tokenizer_of
from smolds_dist.interchange.gguf_settings import hyperparameters, llama_architecture
from smolds_dist.interchange.gguf_tokenizer import SAMPLE, check_vocabulary, vocabulary
from smolds_dist.model import DeepSeekV3Config
from smolds_dist.training.trainer import train

needs_llama = pytest.mark.skipif(not READERS.exists(), reason="no .venv/readers; ./launch/test.sh makes it")
CONTROL = [END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<file_sep>"]
LATENT = [
    "--model.attention=latent", "--model.scoring_func=sigmoid", "--model.n_shared_experts=1", "--model.kv_lora_rank=32",
    "--model.qk_nope_head_dim=32", "--model.qk_rope_head_dim=16", "--model.v_head_dim=16",
]  # fmt: skip
YARN = '{"factor": 4, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.7}'
FAMILY = [
    "--model.num_hidden_layers=3", "--model.first_k_dense_replace=1", "--model.dense_intermediate_size=64",
    "--model.tie_word_embeddings=false", f"--model.rope_scaling={YARN}",
]  # fmt: skip
VARIANTS: dict[str, list[str]] = {
    "gqa": [],
    "gqa with a shared expert, untied": ["--model.n_shared_experts=2", "--model.tie_word_embeddings=false"],
    "latent": LATENT,
    "latent, queries too": [
        *LATENT, "--model.q_lora_rank=24", "--model.norm_topk_prob=false", "--model.routed_scaling_factor=2.5",
        "--model.num_hidden_layers=3",
    ],
    "gqa family": [
        *FAMILY, "--model.n_shared_experts=1", "--model.num_experts_per_tok=3",
    ],
    "latent family": [*LATENT, *FAMILY, "--model.n_group=4", "--model.topk_group=2", "--model.n_shared_experts=2"],
    "dense": ["--model.num_experts=1", "--model.num_experts_per_tok=1"],
    "latent with softmax": [*LATENT, "--model.scoring_func=softmax"],
}  # fmt: skip

# Every feature at least once.
VARIANTS_IN_SHORT = {name: VARIANTS[name] for name in ("gqa", "latent", "gqa family", "latent family", "dense")}

# One thread: two would busy-wait while another test uses a core.
# Exact attention: by default llama.cpp stores keys and values, and computes attention, in fp16.
LLAMA = """
import json, sys, urllib.request, xllamacpp
answers = []
for model, requests in json.load(open(sys.argv[1])):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.fit_params, params.verbosity = model, 256, False, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    answers.append([])
    for path, body in requests:
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
        answers[-1].append(json.load(urllib.request.urlopen(request)))
print(json.dumps(answers))
"""


def llama(scratch: Path, *asked: tuple[Path, list[tuple[str, dict]]]) -> list[list[dict]]:
    """Return the answers of llama.cpp's server to each model's requests, all in one process."""
    (scratch / "asked.json").write_text(json.dumps([(str(model), requests) for model, requests in asked]))
    finished = run([str(READERS), "-c", LLAMA, str(scratch / "asked.json")], timeout=120)
    assert finished.returncode == 0, finished.text
    return json.loads(finished.stdout.splitlines()[-1])


def next_token(ids: list[int], size: int) -> tuple[str, dict]:
    """Return a request for the log-probabilities of the token after `ids`."""
    return "/completion", {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": size}


def log_probabilities(answer: dict, size: int) -> torch.Tensor | None:
    """Return [V], or None if the best token is part of a character, for which the server gives no probabilities."""
    if not answer.get("completion_probabilities"):
        return None
    found = {token["id"]: token["logprob"] for token in answer["completion_probabilities"][0]["top_logprobs"]}
    assert sorted(found) == list(range(size))
    return torch.tensor([found[number] for number in range(size)])


def smollm_tokenizer(folder: Path) -> None:
    """Save a tokenizer like SmolLM2's: single digits, and several control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*SENTENCES, SAMPLE], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    fast.add_special_tokens({"additional_special_tokens": CONTROL[1:]})
    save_tokenizer(fast, folder)


def parts_of(run_dir: Path) -> SimpleNamespace:
    folder = find_checkpoint(run_dir, None)
    reader = open_verified(folder)
    tokenizer = tokenizer_of(folder, reader.manifest)
    config = model_config(reader.manifest, tokenizer)
    return SimpleNamespace(reader=reader, tokenizer=tokenizer, config=config, model=build_model(reader, config).eval())


@dataclass
class Exported:
    run_dir: Path
    file: Path
    page: str  # text with control tokens
    ids: list[int]  # of some text
    ends: range  # ends of prefixes of `ids`
    answers: list[dict]  # llama.cpp's, to the requests of `exported`


@pytest.fixture(scope="module")
def exported(corpus, cache, tmp_path_factory, request):
    """Return by the variant's name: a run of 40 steps with a high learning rate, so that every part of the model matters,
    its export, and llama.cpp's answers; llama.cpp starts once."""
    folder = tmp_path_factory.mktemp("gguf")
    smollm_tokenizer(folder / "tokenizer")
    found, asked = {}, []
    for name, variant in (VARIANTS if request.config.getoption("--all") else VARIANTS_IN_SHORT).items():
        options = [*options_of_small_run(corpus, cache, folder), *variant, f"--run.name=run{len(found)}"]
        if name == "latent":  # an external tokenizer, with fewer tokens than the model
            options += [f"--data.tokenizer={folder / 'tokenizer'}", "--model.vocab_size=384"]
        options += ["--train.steps=40", "--train.lr=0.01", "--log.tensorboard=false", "--checkpoint.every=40"]
        train(load_config([*options, "--train.eval_every=0", "--log.sample_every=0"]))
        run_dir, file = folder / "runs" / f"run{len(found)}", folder / f"run{len(found)}.gguf"
        export([str(run_dir), "--to", str(file), "--format", "gguf"])
        ours = parts_of(run_dir)
        page = SAMPLE + "".join(f"{text}user\n {text}" for text in CONTROL) + " [PAD383] "
        ids = text_encoder(ours.tokenizer).encode(SENTENCES[1] + " äöü 😀 12345 " + SENTENCES[0]).ids
        ends = range(1, len(ids) + 1, 3)
        requests = [
            ("/tokenize", {"content": page, "parse_special": False, "add_special": True}),
            ("/tokenize", {"content": page, "parse_special": True}),
            ("/completion", {"prompt": ids, "n_predict": 64, "temperature": 0, "return_tokens": True}),
            *(next_token(ids[:end], ours.config.vocab_size) for end in ends),
        ]
        found[name] = Exported(run_dir, file, page, ids, ends, [])
        asked.append((file, requests))
    for one, answers in zip(found.values(), llama(folder, *asked), strict=True):
        one.answers = answers
    return found


@needs_llama
@pytest.mark.parametrize(
    "name", [name if name in VARIANTS_IN_SHORT else pytest.param(name, marks=pytest.mark.long) for name in VARIANTS]
)
@torch.no_grad()
def test_llama_cpp_reads_tokens_and_computes_logits_and_text_as_we_do(exported, name):
    one = exported[name]
    ours = parts_of(one.run_dir)
    size, ids, encode = ours.config.vocab_size, one.ids, text_encoder(ours.tokenizer).encode
    text, controls, greedy, *answers = one.answers
    assert text["tokens"] == encode(one.page).ids
    assert controls["tokens"] == text_encoder(ours.tokenizer, allow_control_tokens=True).encode(one.page).ids
    assert text["tokens"] != controls["tokens"]

    expected = ours.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    found = {end: log_probabilities(answer, size) for end, answer in zip(one.ends, answers, strict=True)}
    found = {end: values for end, values in found.items() if values is not None}
    assert len(found) > 10
    for end, values in found.items():
        torch.testing.assert_close(values, expected[end - 1], rtol=0, atol=1e-4)

    best = ours.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=64, pad_token_id=0)[0, len(ids) :]
    assert len(best) == 64 or best[-1] == ours.tokenizer.eos_token_id
    assert greedy["tokens"] == best.tolist()


@needs_llama
@pytest.mark.parametrize("name", ["latent family", pytest.param("gqa", marks=pytest.mark.long)])
def test_q8_0_costs_little_perplexity(exported, tmp_path, name):
    run_dir = exported[name].run_dir
    ours = parts_of(run_dir)
    ids = text_encoder(ours.tokenizer).encode("\n".join(f"{50 + i} {SENTENCES[i % 4]}." for i in range(8))).ids[:120]
    files = {kind: tmp_path / f"{kind}.gguf" for kind in ("fp32", "bf16", "q8_0")}
    for kind, file in files.items():
        options = ["--quantize", "q8_0"] if kind == "q8_0" else ["--dtype", kind]
        export([str(run_dir), "--to", str(file), "--format", "gguf", *options])
    requests = [next_token(ids[:end], ours.config.vocab_size) for end in range(1, len(ids))]
    perplexity = {}
    for kind, answers in zip(files, llama(tmp_path, *((file, requests) for file in files.values())), strict=True):
        found = [log_probabilities(answer, ours.config.vocab_size) for answer in answers]
        likely = [values[ids[end]].item() for end, values in enumerate(found, 1) if values is not None]
        assert len(likely) > 80
        perplexity[kind] = math.exp(-sum(likely) / len(likely))
    assert perplexity["bf16"] == pytest.approx(perplexity["fp32"], rel=0.03)
    assert perplexity["q8_0"] == pytest.approx(perplexity["fp32"], rel=0.03)
    assert perplexity["q8_0"] != perplexity["fp32"]
    assert files["q8_0"].stat().st_size < exported[name].file.stat().st_size


def test_gguf_metadata_describes_the_model(kept_run, tmp_path):
    to = tmp_path / "new" / "model.gguf"
    export([str(kept_run[0]), "--to", str(to), "--format", "gguf", "--dtype", "bf16", "--quantize", "q8_0"])
    assert {path.name for path in to.parent.iterdir()} == {"model.gguf", "Modelfile"}
    file = gguf.GGUFReader(to)
    value = {name: field.contents() for name, field in file.fields.items()}
    assert value["general.architecture"] == "ernie4_5-moe"
    assert value["general.name"] == kept_run[0].name
    assert value["tokenizer.ggml.pre"] == "gpt-2"
    assert value["tokenizer.ggml.add_bos_token"] is False
    assert value["tokenizer.ggml.eos_token_id"] == value["tokenizer.ggml.tokens"].index(END_OF_TEXT)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    assert kinds["blk.1.ffn_gate_exps.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert {kinds[f"blk.1.{name}"] for name in ("ffn_gate_inp.weight", "exp_probs_b.bias", "attn_norm.weight")} == {
        "F32"
    }
    assert "output.weight" not in kinds
    text = (to.parent / "Modelfile").read_text()
    for line in (
        "FROM ./model.gguf",
        "PARAMETER temperature 0.6",
        "PARAMETER top_k 50",
        'TEMPLATE "{{ .Prompt }}"',
    ):
        assert line in text.splitlines()


def test_existing_modelfile_is_kept(kept_run, tmp_path):
    command = [str(kept_run[0]), "--format", "gguf", "--to"]
    (tmp_path / "Modelfile").write_text("FROM llama3\n")
    export([*command, str(tmp_path / "a.gguf")])
    assert (tmp_path / "Modelfile").read_text() == "FROM llama3\n"
    assert "FROM ./a.gguf\n" in (tmp_path / "a.Modelfile").read_text()
    (tmp_path / "b.Modelfile").write_text("FROM llama3\n")
    with pytest.raises(ConfigError, match=r"b\.Modelfile exist already"):
        export([*command, str(tmp_path / "b.gguf")])
    assert not list(tmp_path.glob("b.gguf*"))


def test_damage_is_detected(kept_run, tmp_path):
    ours, file = parts_of(kept_run[0]), tmp_path / "model.gguf"
    export([str(kept_run[0]), "--to", str(file), "--format", "gguf"])
    tensors = list(gguf_format.gguf_tensors(ours.reader, {}, ours.config))
    kinds = {one.name: gguf_format.quantization_of(one, gguf.GGMLQuantizationType.F32, None) for one in tensors}
    words = vocabulary(ours.tokenizer, ours.config.vocab_size)
    with pytest.raises(RuntimeError, match=r"exp_probs_b\.bias, which the checkpoint does not"):
        gguf_format.check_gguf(file, words, ours.tokenizer, tensors, kinds)
    tensor = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "blk.1.ffn_up_exps.weight")
    with file.open("r+b") as content:
        content.seek(int(tensor.data_offset) + 100)
        content.write(b"\x40")
    with pytest.raises(RuntimeError, match=r"blk\.1\.ffn_up_exps\.weight differs between the file and the checkpoint"):
        gguf_format.check_gguf(file, words, ours.tokenizer, tensors, kinds)


def test_mistakes_raise_errors(kept_run, tmp_path):
    source = str(kept_run[0])
    (tmp_path / "there.gguf").touch()
    for options, words in (
        (["--to", str(tmp_path / "there.gguf"), "--format", "gguf"], "exists; choose another"),
        (["--to", str(tmp_path / "model"), "--format", "gguf"], "choose a name such as model.gguf"),
        (["--to", str(tmp_path / "model"), "--quantize", "q8_0"], "needs --format gguf"),
        (["--to", str(tmp_path / "model.gguf"), "--format", "gguf", "--push", "me/model"], "--push does not support"),
    ):
        with pytest.raises(ConfigError, match=words):
            export([source, *options])
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("scoring_func", {"scoring_func": "sigmoid"}),
        ("norm_topk_prob", {"norm_topk_prob": False}),
        ("routed_scaling_factor", {"routed_scaling_factor": 2.5}),
        ("n_shared_experts", {"attention": "latent"}),
        ("q_lora_rank", {"attention": "latent", "n_shared_experts": 1, "q_lora_rank": 8, "num_hidden_layers": 27}),
        ("qk_norm", {"qk_norm": "head"}),
        ("latent_norm_eps", {"attention": "latent", "n_shared_experts": 1, "latent_norm_eps": 1e-6}),
    ],
)
def test_setting_that_llama_cpp_lacks_raises_error(field, values):
    with pytest.raises(ConfigError, match=rf"no counterpart for {field}="):
        llama_architecture(DeepSeekV3Config(**values))


def test_yarn_is_written_as_far_as_llama_cpp_has_it():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    config = DeepSeekV3Config(attention="latent", n_shared_experts=1)
    config.rope_scaling = {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
    values = hyperparameters(config)
    assert values["rope.scaling.original_context_length"] == 2048
    # As in DeepSeek's own files: a tenth of mscale_all_dim.
    assert values["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    assert values["rope.scaling.attn_factor"] == pytest.approx(1.0)
    for wrong in ({"beta_fast": 16}, {"factor": 0.5}, {"truncate": False}, {"attention_factor": 2.0}):
        config.rope_scaling = {**yarn, **wrong}
        with pytest.raises(ConfigError, match="no counterpart for rope_scaling="):
            hyperparameters(config)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("pre-tokenizer", lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))),
        ("pre-tokenizer", lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(False, use_regex=False))),
        ("pre-tokenizer", lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace())),
        ("normalizer", lambda t: setattr(t, "normalizer", normalizers.NFC())),
        ("a WordLevel model", lambda t: setattr(t, "model", models.WordLevel({"a": 0}, "a"))),
    ],
)
def test_tokenizer_that_llama_cpp_lacks_raises_error(kept_run, words, change):
    backend = parts_of(kept_run[0]).tokenizer.backend_tokenizer
    change(backend)
    with pytest.raises(ConfigError, match=rf"the tokenizer has .*{words}.* no counterpart"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT), 300)


def test_differently_split_tokens_are_detected(kept_run):
    tokenizer = parts_of(kept_run[0]).tokenizer
    with pytest.raises(RuntimeError, match="tokenize text differently"):
        check_vocabulary(vocabulary(tokenizer, 300)._replace(pre="smollm"), tokenizer)
