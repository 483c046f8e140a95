"""Released adapters: merged they give what they give unmerged, and a file that is not the recipe's is refused."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from backbones.wan.checkpoints import diffusers_name
from backbones.wan.lora import EMBEDDING_LINEARS, LowRank, read_lora, targeted
from backbones.wan.recipes import WAN_1_3B, empty_network
from framework.adapters import ADAPTER, WAN_LINEARS, LoRA, merge_adapters
from tests.backbones.wan_files import ALPHA, BLOCK_ENDS, OUTSIDE, RANK, lora, network, originals, ours, outputs
from tests.golden import b7
from tests.golden.__main__ import FOLDER
from tests.golden.case import Case, read_case
from tests.golden.runner import run_case
from tests.support import close, holds, refuted

STATE = ours()
FILE = lora()


def read(state: dict[str, Tensor], **options) -> dict[str, LowRank]:
    given = {"rank": RANK, "alpha": ALPHA, "targets": WAN_LINEARS, **options}
    return read_lora(state, STATE, "lora.pt", **given)


def merged(updates: dict[str, LowRank]) -> torch.nn.Module:
    made = network()
    parameters = dict(made.named_parameters())
    with torch.no_grad():
        for name, update in updates.items():
            parameters[name].copy_(update.added_to(parameters[name]))
    return made


def by_hand(state: dict[str, Tensor], scale: float) -> torch.nn.Module:
    """The oracle: original weights, one module after another, W + scale · B A."""
    weights = originals(STATE)
    for key in [key for key in state if ".lora_A." in key]:
        module = key.removeprefix("base_model.model.").split(".lora_A")[0]
        weights[f"{module}.weight"] = (
            weights[f"{module}.weight"] + scale * state[key.replace("_A.", "_B.")] @ state[key]
        )
    made = network()
    made.load_state_dict({str(diffusers_name(key)): tensor for key, tensor in weights.items()})
    return made


# Sizes of the real ones


def test_the_targets_of_the_real_network_are_those_of_the_released_adapters() -> None:
    expected = dict(empty_network(WAN_1_3B).state_dict())
    blocks = targeted(expected, WAN_LINEARS)
    assert len(blocks) == 300
    assert sum(256 * sum(expected[name].shape) for name in blocks) == 349_962_240
    everywhere = targeted(expected, (*WAN_LINEARS, *EMBEDDING_LINEARS))
    assert len(everywhere) == 306
    assert round(sum(256 * sum(expected[name].shape) for name in everywhere) / 1e6, 1) == 356.6


# Merging


@pytest.mark.parametrize("outside", [(), OUTSIDE], ids=["blocks", "everywhere"])
@pytest.mark.parametrize(
    "form",
    ["base_model.model.{}.lora_{}.weight", "base_model.model.{}.lora_{}.default.weight", "{}.lora_{}.weight",
     "module._orig_mod.base_model.model.model.{}.lora_{}.default.weight"],
)  # fmt: skip
def test_a_merged_adapter_is_the_sum_whatever_its_keys_look_like(form: str, outside: list[str]) -> None:
    targets = (*WAN_LINEARS, *(EMBEDDING_LINEARS if outside else ()))
    updates = read(lora(outside=outside, form=form), targets=targets)
    expected = by_hand(lora(outside=outside), ALPHA / RANK)
    close(outputs(merged(updates)), outputs(expected), 1e-5)
    assert float((outputs(expected) - outputs(network())).abs().max()) > 0.1


def beside(updates: dict[str, LowRank], alpha: float) -> torch.nn.Module:
    """The adapter unmerged, as a trained one is."""
    made = network()
    targets = tuple(name.removesuffix(".weight") for name in updates)
    LoRA(next(iter(updates.values())).a.shape[0], alpha, targets).attach(made, seed=0)
    with torch.no_grad():
        for name, update in updates.items():
            layer = made.get_submodule(name.removesuffix(".weight"))
            layer.lora_A[ADAPTER].weight.copy_(update.a)
            layer.lora_B[ADAPTER].weight.copy_(update.b)
    return made


def check_unmerged(rank: int, alpha: float, outside: bool, added: Callable[[LowRank, Tensor], Tensor]) -> None:
    """Merged weights answer as the adapter beside them does."""
    targets = (*WAN_LINEARS, *(EMBEDDING_LINEARS if outside else ()))
    updates = read(lora(outside=OUTSIDE if outside else (), rank=rank), rank=rank, alpha=alpha, targets=targets)
    made = network()
    parameters = dict(made.named_parameters())
    with torch.no_grad():
        for name, update in updates.items():
            parameters[name].copy_(added(update, parameters[name]))
    close(outputs(made), outputs(beside(updates, alpha)), 1e-4)


SETTINGS = (st.integers(1, 6), st.sampled_from((1.0, 4.0, 6.5)), st.booleans())


def test_merged_and_unmerged_adapters_answer_alike() -> None:
    holds(lambda *drawn: check_unmerged(*drawn, LowRank.added_to), *SETTINGS, examples=8)

    def without_alpha(update: LowRank, weight: Tensor) -> Tensor:
        """A bare dict taken at a scale of 1."""
        return replace(update, scale=1.0).added_to(weight)

    refuted(lambda *drawn: check_unmerged(*drawn, without_alpha), *SETTINGS, examples=10)


def test_merging_a_trained_adapter_takes_it_off_and_changes_nothing() -> None:
    with_adapter = beside(read(FILE), ALPHA)
    before = outputs(with_adapter)
    assert merge_adapters(with_adapter) == len(FILE) // 2
    assert set(with_adapter.state_dict()) == set(STATE)
    close(outputs(with_adapter), before, 1e-4)
    assert merge_adapters(with_adapter) == 0


def test_a_narrow_weight_is_summed_in_float32() -> None:
    """Half a unit in the last place of bf16, twice: added in bf16 both would be lost."""
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    update = LowRank(torch.ones(1, 1), torch.ones(1, 1), 2.0**-8)
    assert update.added_to(weight).dtype == torch.float32
    assert float(update.added_to(update.added_to(weight)).bfloat16()) > 1
    assert float((weight + weight * 2.0**-8).bfloat16()) == 1


# What is not the recipe's adapter


DAMAGES = st.tuples(
    st.sampled_from(("removed", "renamed", "reshaped", "duplicated", "integer")), st.sampled_from(sorted(FILE))
)


def check_refused(damage: tuple[str, str], read: Callable) -> None:
    """One line that names the module and the half."""
    kind, key = damage
    state = dict(FILE)
    match kind:
        case "removed":
            del state[key]
        case "renamed":
            state[key.replace(".lora_", ".lorax_")] = state.pop(key)
        case "reshaped":
            state[key] = torch.cat([state[key], state[key]])
        case "duplicated":
            state[key.removeprefix("base_model.model.")] = state[key]
        case "integer":
            state[key] = state[key].to(torch.int8)
    named = key.removeprefix("base_model.model.").removesuffix(".weight")
    try:
        read(state)
    except ValueError as error:
        text = str(error).replace(".lorax_", ".lora_")
        assert named in text and "lora.pt" in text and "\n" not in text
    else:
        raise AssertionError("nothing was said")


def test_every_key_that_is_missing_or_renamed_or_reshaped_or_there_twice_is_named() -> None:
    holds(lambda damage: check_refused(damage, read), DAMAGES, examples=100)

    def careless(state: dict[str, Tensor]) -> None:
        """Merges the pairs that are there."""
        if not state:
            raise ValueError("lora.pt")

    refuted(lambda damage: check_refused(damage, careless), DAMAGES)


@pytest.mark.parametrize(
    ("state", "options", "said"),
    [
        (FILE, {"rank": 8}, "does not fit rank 8 on this network, 40 tensors differ: blocks.0"),
        (FILE, {"targets": (*WAN_LINEARS, "proj_out")}, "1 keys are missing: head.head.lora_A"),
        (FILE, {"targets": WAN_LINEARS[:-1]}, "2 are of no target: blocks.0.ffn.2.lora_A"),
        (FILE, {"targets": ("to_x",)}, "LoRA targets to_x: no linear layer"),
        (FILE, {"targets": ()}, "LoRA targets are missing"),
        (originals(STATE), {}, "keys that are no lora_A or lora_B weights: blocks.0.cross_attn.k.bias"),
        ({**FILE, "blocks.0.self_attn.q.lora_magnitude_vector": torch.ones(1)}, {}, "lora_magnitude_vector"),
        ({f"unet.{key}": tensor for key, tensor in FILE.items()}, {}, "no text-to-video Wan checkpoint: 20 of 20"),
    ],
)
def test_a_file_that_is_not_what_the_recipe_says_is_refused(state: dict, options: dict, said: str) -> None:
    with pytest.raises(ValueError) as refusal:
        read(state, **options)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


# Golden case b7


PACKAGED = read_case(FOLDER / "b7_lora.safetensors")


def missed(case: Case) -> set[str]:
    return {row.tensor for row in run_case(case, b7).misses}


def with_adapter(state: dict[str, Tensor], scale: float, **hparams) -> Case:
    """b7 with another adapter; what to expect comes from weights that are summed by hand, under original names."""
    weights = {key: tensor for key, tensor in PACKAGED.tensors.items() if key.startswith("weights.")}
    summed = dict(weights)
    for key in [key for key in state if ".lora_A." in key]:
        name = f"weights.{key.removeprefix('base_model.model.').split('.lora_A')[0]}.weight"
        b, a = state[key.replace("_A.", "_B.")].double(), state[key].double()
        summed[name] = summed[name].double() + scale * b @ a
    kept = {key: tensor for key, tensor in PACKAGED.tensors.items() if not key.startswith("lora.")}
    oracle = replace(PACKAGED, tensors={**kept, **summed})
    expected = b7.streamed_probe(oracle, b7.generator_of(oracle, torch.float64), torch.float64)
    tensors = {**kept, **{f"lora.{key}": t for key, t in state.items()}, "probe_velocity_lora": expected.float()}
    return replace(PACKAGED, tensors=tensors, hparams={**PACKAGED.hparams, **hparams})


def golden_lora(targets: list[str], rank: int, form: str) -> dict[str, Tensor]:
    """A random adapter on the golden network."""
    made: dict[str, Tensor] = {}
    random = torch.Generator().manual_seed(rank)
    for key, weight in PACKAGED.tensors.items():
        module = key.removeprefix("weights.").removesuffix(".weight")
        if key.endswith(".weight") and weight.ndim == 2 and any(f".{module}".endswith(f".{t}") for t in targets):
            made[form.format(module, "A")] = (
                torch.randn(rank, weight.shape[1], generator=random) / weight.shape[1] ** 0.5
            )
            made[form.format(module, "B")] = torch.randn(weight.shape[0], rank, generator=random) / 4
    return made


@pytest.mark.parametrize(
    ("targets", "rank", "alpha", "form"),
    [
        (["self_attn.q", "self_attn.v"], 2, 5.0, "base_model.model.{}.lora_{}.default.weight"),
        ([*BLOCK_ENDS, *OUTSIDE], 8, 4, "base_model.model.{}.lora_{}.weight"),
        (["o", "blocks.1.ffn.0"], 1, 1, "{}.lora_{}.weight"),
    ],
)
def test_the_golden_case_follows_its_own_rank_alpha_and_targets(targets, rank, alpha, form) -> None:
    state = golden_lora(targets, rank, form)
    hparams = {"lora_rank": rank, "lora_alpha": alpha, "lora_targets": targets}
    assert missed(with_adapter(state, alpha / rank, **hparams)) == set()


def test_a_wrong_alpha_misses_the_golden_case() -> None:
    wrong = replace(PACKAGED, hparams={**PACKAGED.hparams, "lora_alpha": 8})
    assert missed(wrong) == {"probe_velocity_lora"}


def test_a_golden_target_that_the_network_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora_targets names 'self_attn\.x'"):
        run_case(replace(PACKAGED, hparams={**PACKAGED.hparams, "lora_targets": ["self_attn.x"]}), b7)
