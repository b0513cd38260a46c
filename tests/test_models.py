"""Models: the one shift, loading, building from a seed, saving, LoRA, digests, templates, stop sets."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

import models
from dataloader import Sequences, Tokens, collate, encode_prompt
from engine import export
from settings.schema import ModelConfig
from templates import turn_end
from tests.support.helpers import ROOT
from tests.support.small import BUILD, BYTES, small_config


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return small_config()


@pytest.fixture(scope="module")
def tokenizer(config):
    return models.load_tokenizer(config)


@pytest.fixture(scope="module")
def model(config):
    return models.load_model(config, trainable=False)


def ragged(seed: int = 0) -> list[Tokens]:
    """Rows of several lengths with the supervised tokens anywhere after the first."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in (9, 4, 13, 6):
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        rows.append(Tokens(ids, [False] + (torch.rand(length - 1, generator=generator) < 0.5).tolist()))
    return rows


def naive(model, rows: list[Tokens], vocab_size: int):
    """One row at a time, without padding or cuts."""
    logits, targets, owners = [], [], []
    for row, tokens in enumerate(rows):
        out = model(input_ids=torch.tensor([tokens.ids]), use_cache=False).logits[0]
        for t in range(1, len(tokens.ids)):
            if tokens.response[t]:
                logits.append(out[t - 1, :vocab_size])
                targets.append(tokens.ids[t])
                owners.append(row)
    return torch.stack(logits), targets, owners


# ---- the shift


def test_response_logits_are_those_of_a_loop_over_unpadded_rows(model):
    rows = ragged()
    out = models.response_logits(model, collate(rows, pad_id=256), 259)
    logits, targets, owners = naive(model, rows, 259)
    assert out.targets.tolist() == targets and out.rows.tolist() == owners
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-5)


def test_only_the_needed_positions_go_through_the_output_layer(model):
    rows = [Tokens(list(range(1, 11)), [False] * 6 + [True] * 3 + [False]), Tokens([5, 6, 7, 8], [False] * 4)]
    seen = []
    hook = model.lm_head.register_forward_hook(lambda *args: seen.append(args[2].shape[1]))
    out = models.response_logits(model, collate(rows, 256), 259)
    hook.remove()
    full = model(input_ids=torch.tensor([rows[0].ids])).logits[0]
    assert seen == [3] and out.targets.tolist() == [7, 8, 9] and out.rows.tolist() == [0, 0, 0]
    torch.testing.assert_close(out.logits, full[5:8], atol=1e-5, rtol=1e-5)


def test_more_padding_and_another_padding_id_change_nothing(model):
    rows = ragged(1)
    short, long = collate(rows, 256), collate([*rows, Tokens([1] * 30, [False] * 30)], 7)
    one, other = models.response_logits(model, short, 259), models.response_logits(model, long, 259)
    torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=1e-5)
    assert one.targets.tolist() == other.targets.tolist()


@pytest.mark.parametrize("length", [1, 5])
def test_rows_without_a_supervised_token_give_nothing_and_still_run(model, length):
    ids = torch.ones(2, length, dtype=torch.int64)
    out = models.response_logits(model, Sequences(ids, ids.bool(), torch.zeros(2, length, dtype=torch.bool)), 259)
    assert out.logits.shape == (0, 259) and out.targets.shape == (0,) and out.rows.shape == (0,)


def test_a_vocabulary_padded_beyond_the_tokenizer_is_cut(config):
    padded = models.load_model(replace(config, build={**BUILD, "vocab_size": 320}), trainable=False)
    out = models.response_logits(padded, collate(ragged(), 256), 259)
    assert padded.config.vocab_size == 320 and out.logits.shape[1] == 259


# ---- building and loading


def test_built_weights_are_a_function_of_the_seed_alone(config):
    torch.manual_seed(1)
    one = models.load_model(config, trainable=True).state_dict()
    torch.rand(100)
    before = torch.get_rng_state()
    same = models.load_model(config, trainable=False).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    other = models.load_model(replace(config, build_seed=4), trainable=False).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_a_built_model_has_the_tokenizers_ids_and_the_dtype_asked_for(config, tokenizer):
    model = models.load_model(config, dtype=torch.bfloat16, trainable=False)
    assert model.config.vocab_size == len(tokenizer) == 259
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_narrow_and_compiled_models_are_computed_as_padded_rows(config, tokenizer, tmp_path):
    wide = replace(config, build={**BUILD, "hidden_size": 256})
    found = [models.packing_of(c) for c in (config, wide, replace(wide, compile=True), replace(config, packing="rows"))]
    assert found == ["none", "prompts", "none", "rows"]
    export.save_model(models.load_model(wide, trainable=False), tokenizer, tmp_path / "wide")
    assert models.packing_of(replace(config, name_or_path=str(tmp_path / "wide"), build=None)) == "prompts"


class Counted(TorchDispatchMode):
    """Count matrix products."""

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def test_activation_checkpointing_gives_the_same_gradient(config):
    gradients, products = [], []
    for switch, what in ((False, "all"), (True, "cheap"), (True, "all")):
        model = models.load_model(replace(config, activation_checkpointing=switch, recompute=what), trainable=True)
        assert model.is_gradient_checkpointing is switch
        with Counted() as forward:
            out = models.response_logits(model, collate(ragged(), 256, "prompts"), 259).logits
        with Counted() as backward:
            out.square().sum().backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
        products.append(backward.products - 2 * forward.products)
    for other in gradients[1:]:
        assert torch.equal(gradients[0], other)
    assert products[0] == products[1] < products[2]  # `cheap` computes no matrix product again


def test_num_layers_keeps_the_first_blocks_and_leaves_other_sources_alone(config, tokenizer, tmp_path):
    whole = models.load_model(replace(config, build={**BUILD, "num_hidden_layers": 4}), trainable=False)
    export.save_model(whole, tokenizer, tmp_path / "whole")
    student = replace(config, name_or_path=str(tmp_path / "whole"), build=None, num_layers=2)
    pruned = models.load_model(student, trainable=False)
    assert len(pruned.model.layers) == pruned.config.num_hidden_layers == 2
    kept = pruned.model.layers[1].mlp.up_proj.weight
    assert torch.equal(kept, whole.model.layers[1].mlp.up_proj.weight)
    export.save_model(pruned, tokenizer, tmp_path / "FINAL")
    again = models.load_model(replace(student, load_from=str(tmp_path / "FINAL")), trainable=False)
    assert torch.equal(again.model.layers[1].mlp.up_proj.weight, kept)
    teacher = models.load_model(student, source=str(tmp_path / "whole"), trainable=False)
    assert len(teacher.model.layers) == 4
    assert models.config_digest(student) != models.config_digest(replace(student, num_layers=None))
    with pytest.raises(ValueError, match="num_layers=9 must be between 1 and the model's 4"):
        models.load_model(replace(student, num_layers=9), trainable=False)


def test_settings_of_another_folder_take_its_weights_layers_and_tokenizer_and_nothing_of_their_own(
    config, model, tokenizer, tmp_path
):
    export.save_model(model, tokenizer, tmp_path / "m")
    own = replace(
        config,
        name_or_path="/nowhere/a",
        load_from="/nowhere/b",
        from_checkpoint="/nowhere/c",
        tokenizer_name_or_path="/nowhere/d",
        num_layers=1,
        batch_size=12,
    )
    other = own.of_folder(str(tmp_path / "m"))
    assert models.config_digest(other) == models.model_digest(tmp_path / "m")
    loaded = models.load_model(other, trainable=False)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert models.tokenizer_digest(models.load_tokenizer(other)) == models.tokenizer_digest(tokenizer)
    assert (other.batch_size, other.max_length) == (12, own.max_length)


def test_saving_and_loading_gives_the_same_model_and_digest(config, model, tokenizer, tmp_path):
    folder = tmp_path / "FINAL"
    export.save_model(model, tokenizer, folder)
    export.save_model(model, tokenizer, folder)  # over itself
    loaded = replace(config, load_from=str(folder), tokenizer_name_or_path=None)
    again = models.load_model(loaded, trainable=False)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.glob("*.tmp")) and (folder / "model.safetensors").is_file()
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    assert models.tokenizer_digest(models.load_tokenizer(loaded)) == models.tokenizer_digest(tokenizer)
    export.save_model(again, tokenizer, tmp_path / "copy")
    assert models.model_digest(folder) == models.model_digest(tmp_path / "copy") == models.config_digest(loaded)


def test_digests_tell_weights_templates_and_tokenizers_apart(config, model, tokenizer, tmp_path):
    export.save_model(model, tokenizer, tmp_path / "one")
    other = models.load_model(replace(config, build_seed=9), trainable=False)
    export.save_model(other, tokenizer, tmp_path / "other")
    assert models.model_digest(tmp_path / "one") != models.model_digest(tmp_path / "other")
    own = models.tokenizer_digest(tokenizer)
    changed = models.load_tokenizer(config)
    assert models.tokenizer_digest(changed) == own
    changed("padded", padding="max_length", max_length=20, truncation=True)
    changed.pad_token = "<|im_end|>"
    assert models.tokenizer_digest(changed) == own  # neither the last call nor padding reaches an id
    changed.chat_template += " "
    assert models.tokenizer_digest(changed) != own
    assert models.tokenizer_digest(AutoTokenizer.from_pretrained(ROOT / "assets/shop_tokenizer")) != own


# ---- LoRA


def test_merged_lora_computes_what_the_adapters_did_and_training_can_go_on(config, tokenizer, tmp_path):
    peft = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": None}
    lora_config = replace(config, use_peft=True, peft=peft)
    tied = replace(lora_config, build={**BUILD, "tie_word_embeddings": True})
    adapted = export.add_lora(models.load_model(tied, trainable=True), tied)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    torch.manual_seed(0)
    for p in (p for p in adapted.parameters() if p.requires_grad):
        p.data.normal_(0, 0.1)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    sequences = collate(ragged(), 256)
    expected = models.response_logits(adapted, sequences, 259).logits
    export.save_model(adapted, tokenizer, tmp_path / "FINAL", state_dict=adapted.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    plain = models.load_model(replace(config, load_from=str(tmp_path / "FINAL"), build=None), trainable=False)
    assert not any("lora" in name for name in plain.state_dict())
    torch.testing.assert_close(
        models.response_logits(plain, sequences, 259).logits, expected.detach(), atol=1e-4, rtol=1e-4
    )


def test_lora_starts_the_same_on_every_rank(config):
    peft = {"lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj"]}
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(
            export.add_lora(models.load_model(config, trainable=True), replace(config, peft=peft)).state_dict()
        )
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    with pytest.raises(ValueError, match="model.peft"):
        export.add_lora(
            models.load_model(config, trainable=True), replace(config, peft={**peft, "target_modules": ["no_such"]})
        )


# ---- tokenizers


@pytest.mark.parametrize("text", ["", "plain", "  é 日本 🎉\n\t\x00 <|im_end|> it 's .", "".join(map(chr, range(500)))])
def test_the_byte_tokenizer_gives_any_text_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(i < 256 for i in tokenizer(text.replace("<|im_end|>", ""))["input_ids"])


def test_the_byte_tokenizer_is_what_its_script_writes(tmp_path):
    from assets.build_byte_tokenizer import build

    build(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert json.loads(json.dumps((tmp_path / name).read_text())) == (ROOT / BYTES / name).read_text()


def test_byte_ids_are_the_bytes(tokenizer):
    assert tokenizer("Aé")["input_ids"] == list("Aé".encode())
    assert tokenizer.pad_token == "<pad>" and tokenizer.eos_token == "<|im_end|>"


def test_a_tokenizer_without_a_template_gets_the_default_one(config, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    bare = models.load_tokenizer(replace(config, tokenizer_name_or_path=str(tmp_path)))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    text = bare.apply_chat_template(messages, tokenize=False)
    assert text == "user:\nhi\n\nassistant:\nyes<|im_end|>\n\n"
    assert turn_end(bare).id == bare.eos_token_id and turn_end(bare).in_template
    prompt = encode_prompt(bare, messages[:1])
    assert bare.decode(prompt) == "user:\nhi\n\nassistant:\n"
    bare.save_pretrained(tmp_path / "kept")  # the default travels with the model
    assert AutoTokenizer.from_pretrained(tmp_path / "kept").chat_template == models.DEFAULT_TEMPLATE


def test_stop_ids_join_tokenizer_template_and_model(tokenizer):
    assert models.stop_ids(tokenizer) == [tokenizer.eos_token_id]
    single = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=7))
    several = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[9, 7]))
    none = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    eos = tokenizer.eos_token_id
    assert models.stop_ids(tokenizer, single) == [7, eos]
    assert models.stop_ids(tokenizer, several) == [7, 9, eos]
    assert models.stop_ids(tokenizer, none) == [eos]


def test_dtype_auto_is_float32_on_cpu():
    assert models.resolve_dtype("auto", "cpu") is torch.float32
    assert models.resolve_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert models.resolve_dtype("bfloat16", "cpu") is torch.bfloat16
