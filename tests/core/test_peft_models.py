"""Real PEFT adapters of tiny random models: read, written and read by PEFT again, with the same logits."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from fedrot.core.adapter import Adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


CASES = {
    "bert": (bert, {"task_type": "SEQ_CLS", "target_modules": ["query", "intermediate.dense"]}),
    "bert-patterns": (
        bert,
        {
            "task_type": "SEQ_CLS",
            "target_modules": ["query", "value", "dense"],
            "rank_pattern": {"value": 2, r"layer\.1\.attention\.self\.query": 5},
            # In alphabetical order, as PEFT writes them: the first that matches wins.
            "alpha_pattern": {"0.output.dense": 1.5, "attention.output.dense": 4, "dense": 6},
        },
    ),
    "bert-rslora": (
        bert,
        {"task_type": "SEQ_CLS", "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"key": 3}},
    ),
    "gpt2": (gpt2, {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "mlp.c_fc"], "fan_in_fan_out": True}),
    "gpt2-unsaid": (gpt2, {"task_type": "CAUSAL_LM", "target_modules": ["c_attn"]}),  # PEFT sets fan_in_fan_out itself
}


def trained(name: str) -> nn.Module:
    """The case's PEFT model, every trainable tensor random."""
    base, settings = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(), peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, **settings)).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 21).reshape(2, 10)).logits


@pytest.mark.parametrize("name", CASES)
def test_peft_computes_the_same_logits_from_what_fedrot_saved(name, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path / "peft")
    Adapter.load(tmp_path / "peft").save(tmp_path / "fedrot")
    again = peft.PeftModel.from_pretrained(CASES[name][0](), tmp_path / "fedrot").eval()
    assert not torch.allclose(logits(model), logits(CASES[name][0]()), atol=1e-3)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", CASES)
def test_layers_scales_and_head_are_those_of_the_peft_model(name, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    modules = {
        path.removeprefix("base_model.model."): module
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert adapter.layers.keys() == modules.keys()
    for path, module in modules.items():
        assert adapter.layers[path].scale == module.scaling["default"], path
        assert torch.equal(adapter.layers[path].a, module.lora_A["default"].weight)
        assert torch.equal(adapter.layers[path].b, module.lora_B["default"].weight)
        assert adapter.layers[path].fan_in_fan_out == name.startswith("gpt2")
    head = {"classifier.weight", "classifier.bias"} if name.startswith("bert") else set()
    assert adapter.head.keys() == head
    for path, tensor in adapter.head.items():
        kept = model.get_submodule("base_model.model.classifier").modules_to_save["default"]
        assert torch.equal(tensor, kept.get_parameter(path.rpartition(".")[2]))


@pytest.mark.parametrize("name", CASES)
def test_the_dense_update_is_the_change_of_the_merged_weight(name, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    merged, base = model.merge_and_unload(), CASES[name][0]()
    for path, pair in adapter.layers.items():
        before, after = (m.get_submodule(path).weight for m in (base, merged))
        torch.testing.assert_close(pair.delta(), (after - before).detach(), atol=1e-6, rtol=1e-5)
        assert pair.delta().norm() > 0.1


def test_an_adapter_made_in_memory_without_settings_loads_in_peft(tmp_path):
    trained("bert").save_pretrained(tmp_path / "peft")
    read = Adapter.load(tmp_path / "peft")
    Adapter(read.layers, read.head).save(tmp_path / "bare")
    again = peft.PeftModel.from_pretrained(bert(), tmp_path / "bare").eval()
    torch.testing.assert_close(logits(again), logits(trained("bert")), atol=1e-6, rtol=1e-6)
