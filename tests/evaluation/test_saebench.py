"""SAEBench on dictionaries whose results can be told beforehand, of a model that says of a word what we put into it.

The model's blocks add nothing, so that its activations are the embeddings of its tokens. That of a word has its first
letter in one of 26 dimensions. Ten words with an "a" have a further dimension each, which tells them apart.
"""

import csv
import itertools
import json
import shutil
import statistics
import string
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from tests.activations.models import save_tiny_gemma, save_tokenizer
from topk_ortho.activations.config import MINILM_ON_THE_HUB, ModelConfig
from topk_ortho.activations.transformer import Transformer
from topk_ortho.evaluation.saebench.__main__ import INSTALL, main
from topk_ortho.evaluation.saebench.subject import Subject, load_subject
from topk_ortho.sae import StandardSAE
from topk_ortho.sae.export import save_saelens
from topk_ortho.study.benchmark import Benchmark
from topk_ortho.training.config import TrainConfig

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("sae_bench", reason="needs SAEBench, which make test installs")
pytestmark = pytest.mark.filterwarnings("default")  # those of SAEBench and of what it calls are not ours

ROOT = Path(__file__).parents[2]
LETTERS = string.ascii_lowercase
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
WORDS = [a + b + c for a in LETTERS for b, c in itertools.islice(itertools.product("aeiouy", LETTERS), 30)]
ABSORBED = WORDS[:10]
VOCABULARY = list(dict.fromkeys([*SPECIAL, ":", "has", "the", "first", "letter", *string.ascii_uppercase, *WORDS]))
D_IN = 64
HOOK = "blocks.0.hook_resid_post"


def embedding(token):
    """First letters in dimensions 0 to 25, absorbed words in 26 to 35, noise in the others."""
    generator = torch.Generator().manual_seed(VOCABULARY.index(token))
    vector = torch.zeros(D_IN)
    vector[36:] = torch.randn(D_IN - 36, generator=generator)
    if token.isalpha():
        vector[LETTERS.index(token[0].lower())] = 10.0
    if token in ABSORBED:
        vector[26 + ABSORBED.index(token)] = 10.0
    return vector


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    ids = {word: number for number, word in enumerate(VOCABULARY)}
    words = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    save_tokenizer(directory, ids, words)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=D_IN,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.stack([embedding(token) for token in VOCABULARY]))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(directory)
    return directory


def save(sae, folder, model, **metadata):
    save_saelens(sae, folder, {"model_name": str(model), "hook_name": HOOK} | metadata)
    return folder


def letters_that_absorb():
    """A latent for each letter, silent at the absorbed words; these have a latent each, which carries their letter."""
    sae = StandardSAE(D_IN, 36)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.W_enc[:26, :26] = torch.eye(26)
        sae.W_enc[0, 26:36] = -10.0
        sae.W_enc[26:, 26:36] = 2 * torch.eye(10)
        sae.b_enc.fill_(-5.0)
        sae.W_dec.zero_()
        sae.W_dec[:26, :26] = torch.eye(26)
        sae.W_dec[26:, 26:36] = torch.eye(10) * 0.6
        sae.W_dec[26:, 0] = 0.8
    return sae


def exact():
    """Reconstructs everything: for each dimension there is a latent of either sign."""
    sae = StandardSAE(D_IN, 2 * D_IN)
    with torch.no_grad():
        directions = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)])
        sae.W_enc.copy_(directions)
        sae.W_dec.copy_(directions)
    return sae


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(" ".join(WORDS[n : n + 30]) for n in range(0, len(WORDS), 30)))
    return path


def run(folder, text, *arguments):
    main([str(folder), "--text", str(text), "--context-size", "16", "--batch-size", "8", *map(str, arguments)])


def result(folder, name):
    (path,) = (folder / "saebench" / name).glob("*_eval_results.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def absorption(model, text, tmp_path_factory):
    """The result for the dictionary that absorbs, and the words that were measured."""
    folder = tmp_path_factory.mktemp("absorbing")
    cache = tmp_path_factory.mktemp("cache")
    save(letters_that_absorb(), folder / "sae", model)
    run(folder, text, "--evals", "absorption", "--cache-dir", cache)
    (table,) = cache.rglob("test_df.csv")
    with table.open(newline="") as file:
        tested = {row["token"] for row in csv.DictReader(file)}
    return result(folder, "absorption"), tested, folder, cache


def test_absorption_is_what_was_put_in(absorption):
    found, tested, _, _ = absorption
    absorbed = tested & set(ABSORBED)
    assert absorbed
    for letter in found["eval_result_details"]:
        n = len(absorbed) if letter["first_letter"] == "a" else 0
        assert letter["num_full_absorption"] == n, letter
    assert len(found["eval_result_details"]) == 26
    rates = [letter["full_absorption_rate"] for letter in found["eval_result_details"]]
    mean = found["eval_result_metrics"]["mean"]
    assert mean["mean_full_absorption_score"] == pytest.approx(statistics.mean(rates))
    assert mean["std_dev_full_absorption_score"] == pytest.approx(statistics.stdev(rates))
    # a word is absorbed as a whole here, and one latent stands for each letter
    assert mean["mean_absorption_fraction_score"] == pytest.approx(statistics.mean(rates))
    assert (mean["mean_num_split_features"], mean["std_dev_num_split_features"]) == (1, 0)


def test_how_well_latents_tell_their_letters(absorption):
    found, tested, _, _ = absorption
    validity = found["eval_result_unstructured"]
    words = {word for word in tested if word[:1].lower() == "a"}
    recall = 1 - len(words & set(ABSORBED)) / len(words)
    letters = validity["letters"]
    assert letters["a"]["latent_f1"] == pytest.approx(2 * recall / (1 + recall))
    assert all(letters[letter]["latent_f1"] == 1 for letter in LETTERS[1:])
    assert validity["with_latent"] == 26
    rates = [letter["full_absorption_rate"] for letter in found["eval_result_details"]]
    assert validity["mean_full_absorption_rate_with_latent"] == pytest.approx(sum(rates) / 26)
    assert validity["n_words"] == len([word for word in VOCABULARY if word.isalpha()]) - 4


def test_what_a_result_says_of_itself(absorption):
    found, _, folder, _ = absorption
    assert found["sae_bench_commit_hash"].startswith("sae-bench 0.")
    assert found["eval_config"]["prompt_token_pos"] == -6
    assert found["sae_lens_release_id"] == folder.name


def test_what_is_there_is_not_measured_again(absorption, text, capsys, monkeypatch):
    _, _, folder, _ = absorption
    monkeypatch.setattr("topk_ortho.evaluation.saebench.absorption.measure_absorption", fail)
    run(folder, text, "--evals", "absorption")
    said = capsys.readouterr().out
    assert said.startswith("absorption: full absorption ")
    assert "26 letters have a latent with an F1 score of 0.5 or more" in said


def test_a_study_judges_its_runs(absorption, text, tmp_path, monkeypatch):
    folder = shutil.copytree(absorption[2], tmp_path / absorption[2].name)
    config = TrainConfig(out_dir=folder, device="cpu")
    benchmark = Benchmark(["absorption"])
    assert benchmark.has_judged(folder)
    shutil.rmtree(folder / "saebench")
    assert not benchmark.has_judged(folder)
    monkeypatch.setattr("topk_ortho.evaluation.saebench.subject.check_subject", lambda *_, **__: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert benchmark.judge(config) is None
    assert benchmark.has_judged(folder)
    assert benchmark.numbers(folder) == benchmark.numbers(absorption[2])
    assert benchmark.numbers(folder)["saebench.absorption.with_latent"] == 26
    assert "give more --words" in (benchmark._replace(words=1).judge(config) or "")


def fail(*arguments, **settings):
    raise AssertionError("it measured")


def test_a_result_of_something_else_is_not_taken(absorption, model, text, tmp_path):
    folder = shutil.copytree(absorption[2], tmp_path / absorption[2].name)
    with pytest.raises(SystemExit, match="is of another number of words: --overwrite measures anew"):
        run(folder, text, "--evals", "absorption", "--words", 700)
    sae = letters_that_absorb()
    with torch.no_grad():
        sae.b_enc.sub_(0.1)
    save(sae, folder / "sae", model)
    with pytest.raises(SystemExit, match="is of another dictionary"):
        run(folder, text, "--evals", "absorption", "--allow-untrained")


def test_without_latents_the_rate_says_nothing(model, text, tmp_path, absorption, capsys, monkeypatch):
    sae = letters_that_absorb()
    with torch.no_grad():
        sae.b_enc[:26] = -100.0  # the letters' latents never fire
    save(sae, tmp_path / "sae", model)
    monkeypatch.setattr(Transformer, "activations", spy := Counted(Transformer.activations))
    run(tmp_path, text, "--evals", "absorption", "--cache-dir", absorption[3], "--allow-untrained")
    validity = result(tmp_path, "absorption")["eval_result_unstructured"]
    assert validity["with_latent"] == 0
    assert validity["mean_full_absorption_rate_with_latent"] is None
    assert "0 letters have a latent" in capsys.readouterr().out
    # of the words only those that are measured are read again, not those that train the probes
    assert spy.n_tokens < 0.5 * validity["n_words"] * 80


class Counted:
    """A method that counts the tokens that it is given."""

    def __init__(self, method):
        self.method, self.n_tokens = method, 0

    def __get__(self, owner, kind):
        def call(tokens, *arguments):
            self.n_tokens += tokens.numel()
            return self.method(owner, tokens, *arguments)

        return call


def test_too_few_words_are_refused(model, text, tmp_path):
    save(letters_that_absorb(), tmp_path, model)
    for n_words in (1, 60):
        with pytest.raises(SystemExit, match=rf"with {n_words} words .* give more --words"):
            run(tmp_path, text, "--evals", "absorption", "--words", n_words, "--cache-dir", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_words_are_found_where_they_stand(model):
    """The words of the question stand in a prompt twice, so they are none; the place is that of the word's token."""
    from topk_ortho.evaluation.saebench.absorption import _words

    transformer = Transformer(ModelConfig(name=str(model), hook=HOOK), torch.device("cpu"))
    subject = Subject("it", None, transformer, transformer.load_tokenizer(), 0, "")
    words, place = _words(subject, None, 0)
    assert place == -6
    assert set(words) == {word for word in VOCABULARY if word.isalpha()} - {"has", "the", "first", "letter"}
    some, _ = _words(subject, 400, 0)
    assert len(some) == 400
    assert some.items() <= words.items()
    assert some != _words(subject, 400, 1)[0]


def test_core_of_an_exact_dictionary(model, text, tmp_path):
    save(exact(), tmp_path, model)
    run(tmp_path, text, "--evals", "core", "--batches", 2, "--allow-untrained")
    found = result(tmp_path, "core")
    metrics = found["eval_result_metrics"]
    assert metrics["reconstruction_quality"]["mse"] == pytest.approx(0, abs=1e-6)
    assert metrics["reconstruction_quality"]["cossim"] == pytest.approx(1)
    predictions = metrics["model_performance_preservation"]
    assert predictions["ce_loss_score"] == pytest.approx(1)
    assert metrics["model_behavior_preservation"]["kl_div_score"] == pytest.approx(1)
    assert metrics["token_stats"]["total_tokens_eval_reconstruction"] == 2 * 8 * 16
    assert len(found["eval_result_details"]) == 2 * D_IN
    assert found["eval_config"]["dataset"] == str(text)

    # the loss of the model as it is, by another path through other code
    tokenizer = Transformer(ModelConfig(name=str(model), hook=HOOK), torch.device("cpu")).load_tokenizer()
    ids = tokenizer(" <eos> ".join(text.read_text().split("\n\n")), add_special_tokens=False)["input_ids"]
    windows = torch.tensor([[2, *ids[15 * n : 15 * n + 15]] for n in range(16)])
    logits = LlamaForCausalLM.from_pretrained(model)(windows).logits[:, :-1].log_softmax(-1)
    losses = -logits.gather(2, windows[:, 1:, None])[..., 0]
    counted = ~torch.isin(windows[:, :-1], torch.tensor([0, 1, 2]))
    assert predictions["ce_loss_without_sae"] == pytest.approx(losses[counted].mean().item(), rel=1e-5)


def test_a_run_of_the_trainer_is_found(model, text, tmp_path):
    """Under the name of its folder; a model that a package carries by the name that it has here."""
    save(exact(), tmp_path / "run" / "sae", model)
    run(tmp_path / "run", text, "--evals", "core", "--batches", 1, "--allow-untrained")
    assert result(tmp_path / "run", "core")["sae_lens_release_id"] == "run"
    settings = {"trained_with": "topk_ortho", "training_config": {"model": {"name": "minilm"}}}
    save(exact(), tmp_path / "run" / "sae", MINILM_ON_THE_HUB, **settings)
    with pytest.raises(SystemExit, match="minilm predicts no tokens"):
        run(tmp_path / "run", text)


def test_half_precision_is_judged_in_float32(model, tmp_path):
    folder = save(letters_that_absorb(), tmp_path, model)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    subject = load_subject(folder, model=None, batch_size=8, device=torch.device("cpu"))
    assert {parameter.dtype for parameter in subject.sae.parameters()} == {torch.float32}


def test_a_dictionary_that_saelens_trained(model, text, tmp_path):
    """Its directions are of any length; SAEBench wants unit ones, with which it computes the same."""
    torch.manual_seed(0)
    sae = sae_lens.StandardTrainingSAE(sae_lens.StandardTrainingSAEConfig(d_in=D_IN, d_sae=128, l1_coefficient=0.01))
    embeddings = torch.stack([embedding(word) for word in WORDS])
    settings = SAETrainerConfig(total_training_samples=200_000, train_batch_size_samples=200, lr=1e-2, lr_end=1e-3)
    batches = iter(lambda: embeddings[torch.randint(len(WORDS), (200,))], None)
    sae_lens.SAETrainer(settings, sae, batches).fit()
    sae.cfg.metadata.hook_name = HOOK
    sae.save_inference_model(tmp_path)
    norms = sae.W_dec.norm(dim=1)
    assert norms.max() > 1.01 * norms.min()
    run(tmp_path, text, "--evals", "core", "--batches", 2, "--model", model)
    found = result(tmp_path, "core")
    assert found["sae_cfg_dict"]["metadata"]["model_name"] == str(model)

    tokenizer = Transformer(ModelConfig(name=str(model), hook=HOOK), torch.device("cpu")).load_tokenizer()
    ids = tokenizer(" <eos> ".join(text.read_text().split("\n\n")), add_special_tokens=False)["input_ids"]
    words = [VOCABULARY[number] for number in ids[: 16 * 15] if number > 3]
    x = torch.stack([embedding(word) for word in words])
    metrics = found["eval_result_metrics"]
    cosine = torch.cosine_similarity(sae(x), x).mean().item()
    assert metrics["reconstruction_quality"]["cossim"] == pytest.approx(cosine, rel=1e-5)
    assert metrics["sparsity"]["l0"] == pytest.approx((sae.encode(x) > 0).sum(dim=1).float().mean().item(), rel=1e-5)
    residual, spread = (part.double().square().sum().item() for part in (sae(x) - x, x - x.mean(dim=0)))
    explained = found["eval_result_unstructured"]["explained_variance"]
    assert explained == pytest.approx(1 - residual / spread, rel=1e-5)
    assert 0.5 < explained < 1


@pytest.fixture
def labelled(tmp_path):
    """Words that begin with "a" to "e" or with "v" to "z"."""
    rows = [
        {"text": " ".join(WORDS[30 * LETTERS.index(letter) + n : 30 * LETTERS.index(letter) + n + 4]), "label": label}
        for label, letters in (("front", "bcde"), ("back", "vwxyz"))
        for letter in letters
        for n in range(20)
    ]
    path = tmp_path / "halves.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sparse_probing(model, text, tmp_path, labelled):
    """Five latents of letters tell all, as does the model itself; a single one does not."""
    sae = letters_that_absorb()
    save(sae, tmp_path / "sae", model)
    run(tmp_path, text, "--evals", "sparse_probing", "--probing-data", labelled)
    found = result(tmp_path, "sparse_probing")
    metrics = found["eval_result_metrics"]
    assert metrics["sae"]["sae_test_accuracy"] == metrics["llm"]["llm_test_accuracy"] == 1
    assert metrics["sae"]["sae_top_5_test_accuracy"] > 0.9
    assert 0.5 < metrics["sae"]["sae_top_1_test_accuracy"] < 0.75
    (detail,) = found["eval_result_details"]
    assert detail["dataset_name"] == "halves_results"  # SAEBench's way


def test_rows_without_a_text_or_a_label_are_passed_over(labelled, tmp_path):
    from topk_ortho.evaluation.saebench.sparse_probing import _labelled_texts

    rows = [{"text": f"a{n}", "label": 0} for n in range(20)] + [{"text": f"b{n}", "label": 1} for n in range(30)]
    rows[5:5] = [{"text": None, "label": 1}, {"text": "x", "label": None}, {"text": " ", "label": 1}]
    path = tmp_path / "gaps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, test = _labelled_texts(path)
    assert sorted(train) == sorted(test) == ["0", "1"]
    assert sorted(train["0"] + test["0"]) == sorted(f"a{n}" for n in range(20))
    assert sorted(train["1"] + test["1"]) == sorted(f"b{n}" for n in range(20))
    assert len(test["0"]) == len(test["1"]) == 4


def test_special_tokens_and_padding_do_not_count(model):
    """Activations of a text are those of its own tokens."""
    from topk_ortho.evaluation.saebench.sparse_probing import _activations

    transformer = Transformer(ModelConfig(name=str(model), hook=HOOK), torch.device("cpu"))
    subject = Subject("it", None, transformer, transformer.load_tokenizer(), 0, "")
    found = _activations(subject, [" ".join(WORDS[:3]), f"{WORDS[3]} <eos> {WORDS[4]}"], 6)
    zero = torch.zeros(D_IN)
    assert torch.equal(found[0], torch.stack([zero, *map(embedding, WORDS[:3]), zero, zero]))
    assert torch.equal(found[1], torch.stack([zero, embedding(WORDS[3]), zero, embedding(WORDS[4]), zero, zero]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "aba", "label": "a"}] * 30, r"must have two classes or more .* it has a \(30\)"),
        ([{"text": "aba", "label": "a"}] * 30 + [{"text": "bab", "label": "b"}] * 3, r"10 texts or more each"),
        ([{"text": "aba"}] * 3, "has no column label; it has text"),
    ],
)
def test_data_that_cannot_be_probed(model, text, tmp_path, rows, message):
    save(letters_that_absorb(), tmp_path, model)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, text, "--evals", "sparse_probing", "--probing-data", tmp_path / "data.jsonl")


def test_without_a_hub_and_without_data(model, text, tmp_path):
    save(letters_that_absorb(), tmp_path, model)
    with pytest.raises(SystemExit, match=r"no --probing-data is given, and SAEBench's data set .* cannot be read"):
        run(tmp_path, text, "--evals", "sparse_probing")


def test_an_untrained_dictionary_is_refused(model, text, tmp_path):
    sae = StandardSAE(D_IN, 200, generator=torch.Generator().manual_seed(0))
    save(sae, tmp_path / "tied", model)
    with pytest.raises(SystemExit, match="tied was never trained: its encoder is still the transposed decoder"):
        run(tmp_path / "tied", text)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(200, D_IN, generator=torch.Generator().manual_seed(1)))
    save(sae, tmp_path / "random", model)
    with pytest.raises(SystemExit, match=r"random explains -\d+.* never trained, or on other activations"):
        run(tmp_path / "random", text)


def test_what_is_no_dictionary_of_a_language_model(model, text, tmp_path):
    with pytest.raises(SystemExit, match=r"holds no dictionary in SAELens's format: there is no cfg\.json"):
        run(tmp_path, text)
    save_saelens(exact(), tmp_path / "nameless", {"hook_name": HOOK})
    with pytest.raises(SystemExit, match="name no model_name: give --model"):
        run(tmp_path / "nameless", text)
    save_saelens(exact(), tmp_path / "nowhere", {"model_name": str(model)})
    with pytest.raises(SystemExit, match="name no hook_name"):
        run(tmp_path / "nowhere", text)
    save(exact(), tmp_path / "embedding", model, hook_name="hook_embed")
    with pytest.raises(SystemExit, match="SAEBench measures at hooks of blocks"):
        run(tmp_path / "embedding", text)
    save(exact(), tmp_path / "mlp", model, hook_name="blocks.0.hook_mlp_out")
    with pytest.raises(SystemExit, match=r"absorption is measured at blocks\.0\.hook_resid_post"):
        run(tmp_path / "mlp", text, "--allow-untrained", "--evals", "absorption")
    with pytest.raises(SystemExit, match=r"takes activations of width 64, and .* has 16"):
        run(tmp_path / "mlp", text, "--model", save_tiny_gemma(tmp_path / "gemma"), "--allow-untrained")
    with pytest.raises(SystemExit, match="device 'nowhere' cannot be used here"):
        run(tmp_path / "mlp", text, "--device", "nowhere")
    (tmp_path / "mlp" / "sae_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match=r"the dictionary in .*mlp cannot be loaded"):
        run(tmp_path / "mlp", text)
    save(exact(), tmp_path / "encoder", "minilm")
    with pytest.raises(SystemExit, match="minilm predicts no tokens"):
        run(tmp_path / "encoder", text)


def test_a_result_that_the_schema_refuses_is_not_written(model, text, tmp_path, monkeypatch):
    save(exact(), tmp_path, model)
    monkeypatch.setattr("topk_ortho.evaluation.saebench.output.asdict", lambda output: {"eval_result_unstructured": {}})
    with pytest.raises(SystemExit, match="SAEBench's schema refuses its result: 'eval_config' is a required property"):
        run(tmp_path, text, "--evals", "core", "--batches", 1, "--allow-untrained")
    assert not list(tmp_path.rglob("*_eval_results.json"))


def test_what_to_install_is_said(model, text, tmp_path, monkeypatch):
    save(exact(), tmp_path, model)
    monkeypatch.setitem(sys.modules, "sae_bench.sae_bench_utils.general_utils", None)
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, text)
    assert INSTALL in str(exit_.value)


def test_the_documented_command_is_the_one_that_make_runs():
    first, second = INSTALL.split(" && ")
    documented = (ROOT / "docs" / "saebench.md").read_text()
    assert f"{first}\n{second}\n" in documented
    makefile = (ROOT / "Makefile").read_text()
    assert "--no-deps --constraint constraints.txt" in makefile
    assert "eval,dev]" in makefile
    assert second.split()[-1] in (ROOT / "constraints.txt").read_text().split()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "studies" / "saebench").rglob("*.json")), ids=lambda path: path.stem
)
def test_committed_results_are_saebenchs(path):
    folder = files("sae_bench.evals") / path.parent.name
    (schema,) = (each for each in folder.iterdir() if each.name.startswith("eval_output_schema_"))
    jsonschema.validate(json.loads(path.read_text()), json.loads(schema.read_text()))
