"""Adapters: matched and counted, alone in training, exactly the base at the start, and the same after a round trip."""

import json
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backbones.embedded.generator import ShapesGenerator
from framework.adapters import WAN_LINEARS, FullFineTuning, LoRA, load_adaptation
from framework.optimization import Constant
from framework.policies import CURRENT, REFERENCE, Policies
from tests.framework.test_policies import make_probes
from tests.support import PROMPTS, close, normal, perturb, tiny_generator

BLOCKS, LINEARS = 2, 10
"""Blocks of the tiny network and linear layers of a block: 4 + 4 of the attentions and 2 of the feed-forward."""


def adapter_layers(network) -> int:
    """How many modules carry an adapter."""
    return sum(isinstance(module, BaseTunerLayer) for module in network.modules())


def outputs(generator: ShapesGenerator) -> Tensor:
    """What the policy in force does behind a clean past."""
    with torch.no_grad():
        stream = generator.commit(normal(1, 2, 3, 3, 16, 16).float(), generator.open(PROMPTS[:2]))
        return generator.predict(normal(0, 2, 3, 3, 16, 16).float(), 0.9375, stream)


def adapted(rank: int = 4, alpha: float | None = None, seed: int = 0) -> tuple[ShapesGenerator, LoRA]:
    """A generator whose adapters have moved: B is not zero any more."""
    generator, lora = tiny_generator(), LoRA(rank, alpha)
    for i, parameter in enumerate(lora.attach(generator.network, 0).values()):
        parameter.data += 0.05 * normal(1000 * seed + i, *parameter.shape).float()
    return generator, lora


# attaching


def test_adapters_sit_on_every_linear_layer_of_every_block_and_nowhere_else():
    network = tiny_generator().network
    sizes = {name: m.in_features + m.out_features for name, m in network.named_modules()
             if isinstance(m, nn.Linear) and name.startswith("blocks.")}  # fmt: skip
    parameters = LoRA(4).attach(network, 0)
    assert adapter_layers(network) == BLOCKS * LINEARS == len(sizes)
    assert {name.rsplit(".lora_", 1)[0] for name in parameters} == set(sizes)
    assert sum(p.numel() for p in parameters.values()) == 4 * sum(sizes.values())
    assert LoRA(4).describe(parameters) == f"LoRA rank 4 on {BLOCKS * LINEARS} modules"


def test_adapters_and_nothing_else_train_in_float32_on_a_base_of_any_precision():
    for dtype in (torch.float64, torch.bfloat16):
        network = tiny_generator(dtype).network
        parameters = LoRA().attach(network, 0)
        assert {name for name, p in network.named_parameters() if p.requires_grad} == set(parameters)
        assert {p.dtype for p in parameters.values()} == {torch.float32}
        assert all(p is dict(network.named_parameters())[name] for name, p in parameters.items())


def test_the_initial_policy_is_exactly_the_base():
    generator = tiny_generator()
    base = outputs(generator)
    LoRA().attach(generator.network, 0)
    assert torch.equal(outputs(generator), base)


def test_adapters_are_drawn_from_their_seed_and_leave_the_global_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        parameters = LoRA().attach(tiny_generator().network, seed)
        assert torch.equal(torch.rand(3), expected)
        draws.append(torch.cat([p.flatten() for name, p in parameters.items() if ".lora_A." in name]))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def check_scale(generator: ShapesGenerator, factor: float) -> None:
    """The adapted network is the base with W + factor · B A written into its layers."""
    merged = tiny_generator()
    layers = dict(merged.network.named_modules())
    parameters = {n: p for n, p in generator.network.named_parameters() if ".lora_" in n}
    with torch.no_grad():
        for name in {name.rsplit(".lora_", 1)[0] for name in parameters}:
            a, b = (parameters[f"{name}.lora_{part}.default.weight"] for part in "AB")
            layers[name].weight += factor * (b @ a)
    close(outputs(generator), outputs(merged), atol=1e-5)


@pytest.mark.parametrize(("alpha", "factor"), [(None, 1.0), (4.0, 1.0), (8.0, 2.0), (1.0, 0.25)])
def test_an_adapter_adds_alpha_over_rank_times_b_a(alpha: float | None, factor: float):
    check_scale(adapted(4, alpha)[0], factor)


def test_the_scale_check_sees_a_forgotten_alpha():
    with pytest.raises(AssertionError):
        check_scale(adapted(4, 8.0)[0], 1.0)


def test_a_suffix_that_matches_nothing_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"target_modules=\['to_query'\].*CausalWanTransformer3DModel.*to_q.*to_v"):
        LoRA(target_modules=("to_query",)).attach(tiny_generator().network, 0)


def test_a_part_of_the_layers_can_be_chosen():
    network = tiny_generator().network
    LoRA(target_modules=("to_q", "to_v")).attach(network, 0)
    assert adapter_layers(network) == BLOCKS * 4


def test_a_parameter_that_would_train_beside_the_adapters_is_refused(monkeypatch):
    from framework import adapters

    real = adapters.inject_adapter_in_model

    def unfreezing(config, network, **options):
        real(config, network, **options)
        network.proj_out.bias.requires_grad_()

    monkeypatch.setattr(adapters, "inject_adapter_in_model", unfreezing)
    with pytest.raises(ValueError, match=r"proj_out\.bias"):
        LoRA().attach(tiny_generator().network, 0)


def test_every_adapter_gets_a_gradient_once_b_has_moved():
    generator = tiny_generator()
    policies = Policies(generator, LoRA(4), Constant(0.0), 0.9, 0)
    for i, parameter in enumerate(policies.parameters.values()):
        parameter.data += 0.05 * normal(i, *parameter.shape).float()
    policies.stepped()
    probes = make_probes(history_grad=True)
    views = policies.views(frozenset({CURRENT, REFERENCE}), probes)
    (views[CURRENT] - views[REFERENCE]).square().sum().backward()
    still = [name for name, p in policies.parameters.items() if p.grad is None or not bool(p.grad.any())]
    assert still == []


def test_full_fine_tuning_trains_everything():
    network = tiny_generator().network
    parameters = FullFineTuning().attach(network, 0)
    assert sum(p.numel() for p in parameters.values()) == sum(p.numel() for p in network.parameters())
    assert all(p.requires_grad for p in network.parameters())


# saving and loading


def test_a_saved_adapter_reproduces_the_policy_on_a_fresh_base(tmp_path: Path):
    generator, lora = adapted(4, 8.0)
    lora.save(generator.network, tmp_path / "adapter")
    fresh = tiny_generator()
    assert not torch.equal(outputs(fresh), outputs(generator))
    assert load_adaptation(fresh.network, tmp_path / "adapter") == f"LoRA rank 4 from {tmp_path / 'adapter'}"
    assert torch.equal(outputs(fresh), outputs(generator))


def test_an_adapter_folder_is_what_peft_reads(tmp_path: Path):
    from peft import LoraConfig

    generator, lora = adapted(4, 8.0)
    lora.save(generator.network, tmp_path / "adapter")
    config = LoraConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (4, 8.0, set(WAN_LINEARS))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * BLOCKS * LINEARS and {t.dtype for t in tensors.values()} == {torch.float32}


def test_saved_full_weights_reproduce_the_policy(tmp_path: Path):
    generator = tiny_generator()
    perturb(generator.network, 3)
    FullFineTuning().save(generator.network, tmp_path / "adapter")
    fresh = tiny_generator()
    assert "full weights" in load_adaptation(fresh.network, tmp_path / "adapter")
    assert torch.equal(outputs(fresh), outputs(generator))


def drop_one(tensors: dict[str, Tensor]) -> None:
    del tensors[min(tensors)]


def rename_one(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.7.attn1.to_q.lora_A.weight"] = tensors.pop(min(tensors))


def reshape_one(tensors: dict[str, Tensor]) -> None:
    tensors[max(tensors)] = torch.zeros(2, 2)


SPOILT = {
    drop_one: r"1 tensors missing \['blocks\.0\.attn1",
    rename_one: r"1 unknown \['blocks\.7\.attn1\.to_q",
    reshape_one: r"blocks\.1\..* has shape \(2, 2\)",
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_foreign_adapter_is_refused_by_name_and_nothing_is_half_loaded(tmp_path: Path, spoil):
    generator, lora = adapted()
    lora.save(generator.network, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, file)
    fresh = tiny_generator()
    base = outputs(fresh)
    with pytest.raises(ValueError, match=SPOILT[spoil]):
        load_adaptation(fresh.network, tmp_path / "adapter")
    assert torch.equal(outputs(fresh), base)


def test_the_half_loaded_check_can_fail(tmp_path: Path):
    generator, lora = adapted()
    lora.save(generator.network, tmp_path / "adapter")
    fresh = tiny_generator()
    base = outputs(fresh)
    load_adaptation(fresh.network, tmp_path / "adapter")
    assert not torch.equal(outputs(fresh), base)


def test_full_weights_of_another_network_are_refused_and_nothing_is_half_loaded(tmp_path: Path):
    generator = tiny_generator(seed=8)
    FullFineTuning().save(generator.network, tmp_path / "adapter")
    file = tmp_path / "adapter" / "model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.bias"] = torch.zeros(7)
    save_file(tensors, file)
    fresh = tiny_generator()
    base = outputs(fresh)
    with pytest.raises(ValueError, match=r"proj_out\.bias has shape \(7,\), the network needs"):
        load_adaptation(fresh.network, tmp_path / "adapter")
    assert torch.equal(outputs(fresh), base)


def test_what_is_no_adapter_folder_is_refused_with_a_sentence(tmp_path: Path):
    with pytest.raises(ValueError, match="holds neither adapter_model"):
        load_adaptation(tiny_generator().network, tmp_path)
    generator, lora = adapted()
    lora.save(generator.network, tmp_path / "adapter")
    weights, config = (tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    whole, described = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a whole safetensors file"):
        load_adaptation(tiny_generator().network, tmp_path / "adapter")
    weights.write_bytes(whole)
    for text in ("{", "[]", json.dumps({k: v for k, v in described.items() if k != "r"})):
        config.write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config\.json does not describe a LoRA adapter"):
            load_adaptation(tiny_generator().network, tmp_path / "adapter")
