"""What is trained: LoRA adapters on a frozen base, or the whole network. Both are a named set of parameters.

PEFT injects the LoRA layers; nothing wraps the network, so no attribute can be set on a wrapper and miss the model.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftType, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from framework.distributed import whole
from framework.weights import check_tensors, read_tensors, save_tensors

ADAPTER = "default"
WAN_LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
"""Every linear layer of a Wan transformer block."""
EXPORTED = "pytorch_lora_weights.safetensors"
"""The file name that diffusers looks for in a LoRA repository."""
PIPELINE_PREFIX = "transformer."
"""What stands before the names in such a file: the part of a diffusers pipeline that they belong to."""
PIPELINE_METADATA = "lora_adapter_metadata"
"""The entry of such a file's metadata that holds rank, alpha and targets as JSON."""


class Adaptation(ABC):
    """Which parameters of a network are trained, and how they are saved."""

    @abstractmethod
    def attach(self, network: nn.Module, seed: int) -> dict[str, nn.Parameter]:
        """Freeze what is not trained; return the trained parameters by name, float32."""

    @abstractmethod
    def save(self, network: nn.Module, folder: Path, write: bool = True) -> None:
        """Write the trained parameters as safetensors into a new folder.

        write: False on all ranks but one; every rank takes part where parameters are sharded.
        """

    @abstractmethod
    def describe(self, parameters: dict[str, nn.Parameter]) -> str:
        """One line for the start of a run."""


@dataclass(frozen=True)
class LoRA(Adaptation):
    """W + (alpha / rank) B A on every targeted linear layer; B starts at zero, so the initial policy is the base.

    target_modules: name suffixes, as PEFT matches them. alpha None takes the rank, i.e. a factor of 1.
    """

    rank: int = 16
    alpha: float | None = None
    target_modules: Sequence[str] = WAN_LINEARS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA.rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"LoRA.alpha must be positive and finite, got {self.alpha}; at 0 an adapter does nothing")

    def attach(self, network: nn.Module, seed: int) -> dict[str, nn.Parameter]:
        """Raises ValueError when no module matches, and when something else than adapters would train."""
        network.requires_grad_(False)
        self._check_targets(network)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # pyright: ignore[reportArgumentType]
            target_modules=list(self.target_modules),
            lora_dropout=0.0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # PEFT initialises from the global stream
            inject_adapter_in_model(config, network, adapter_name=ADAPTER)
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        strangers = [name for name in trained if ".lora_A." not in name and ".lora_B." not in name]
        if strangers or not trained:
            raise ValueError(f"LoRA must train adapters and nothing else, but {strangers[:3]} would train too")
        for parameter in trained.values():
            parameter.data = parameter.data.float()  # bf16 adapters stop moving at lr 1e-5
        return trained

    def _check_targets(self, network: nn.Module) -> None:
        """Raises ValueError where a target names no module: PEFT would leave that one out in silence."""
        modules = dict(network.named_modules())
        idle = [t for t in self.target_modules if not any(name == t or name.endswith(f".{t}") for name in modules)]
        if idle or not self.target_modules:
            ends = {name.rsplit(".", 1)[-1] for name, module in modules.items() if isinstance(module, nn.Linear)}
            raise ValueError(
                f"LoRA.target_modules={list(self.target_modules)}: {idle or 'nothing'} names no module of "
                f"{type(network).__name__}; its linear layers end in {sorted(ends)}"
            )

    def save(self, network: nn.Module, folder: Path, write: bool = True) -> None:
        if not write:
            return
        folder.mkdir(parents=True)
        weights = get_peft_model_state_dict(network, adapter_name=ADAPTER)  # pyright: ignore[reportArgumentType]
        save_tensors(folder / "adapter_model.safetensors", weights)
        config = {
            "peft_type": PeftType.LORA.value,
            "r": self.rank,
            "lora_alpha": self.rank if self.alpha is None else self.alpha,
            "target_modules": list(self.target_modules),
            "lora_dropout": 0.0,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def describe(self, parameters: dict[str, nn.Parameter]) -> str:
        modules = len({name.rsplit(".lora_", 1)[0] for name in parameters})
        return f"LoRA rank {self.rank} on {modules} modules"


@dataclass(frozen=True)
class FullFineTuning(Adaptation):
    """Every parameter of the network is trained."""

    def attach(self, network: nn.Module, seed: int) -> dict[str, nn.Parameter]:
        network.requires_grad_(True)
        narrow = sorted({str(p.dtype) for p in network.parameters() if p.dtype.itemsize < 4})
        if narrow:
            raise ValueError(
                f"FullFineTuning needs weights in float32, the network has {narrow}; small steps round away"
            )
        return dict(network.named_parameters())

    def save(self, network: nn.Module, folder: Path, write: bool = True) -> None:
        weights = {}
        for name, value in network.state_dict().items():
            gathered = whole(value)
            if write:
                weights[name] = gathered.cpu()
        if write:
            folder.mkdir(parents=True)
            save_tensors(folder / "model.safetensors", weights)

    def describe(self, parameters: dict[str, nn.Parameter]) -> str:
        return "full fine-tuning"


def load_adaptation(network: nn.Module, folder: str | Path) -> str:
    """Load what `Adaptation.save` wrote; returns one line that says what it was.

    Raises ValueError for a folder that holds neither kind, or weights that do not fit the network; nothing is loaded
    half: every tensor is checked before the first one is copied.
    """
    folder = Path(folder)
    adapter, full, exported = (folder / name for name in ("adapter_model.safetensors", "model.safetensors", EXPORTED))
    if adapter.is_file():
        weights = read_tensors(adapter)
        lora = read_lora(folder / "adapter_config.json")
        lora.attach(network, seed=0)
        expected = get_peft_model_state_dict(network, adapter_name=ADAPTER)  # pyright: ignore[reportArgumentType]
        check_tensors(weights, expected, str(adapter))
        set_peft_model_state_dict(network, weights, adapter_name=ADAPTER)  # pyright: ignore[reportArgumentType]
        return f"LoRA rank {lora.rank} from {folder}"
    if full.is_file():
        weights = read_tensors(full)
        check_tensors(weights, network.state_dict(), str(full))
        network.load_state_dict(weights)
        return f"full weights from {folder}"
    if exported.is_file():
        return f"LoRA rank {load_exported(network, exported)} from {folder}"
    raise ValueError(
        f"{folder} holds neither adapter_model.safetensors nor model.safetensors; give --adapter a folder that a "
        f"run saved, or one that `armillary export` wrote"
    )


def read_lora(path: Path) -> LoRA:
    """The adaptation that an adapter_config.json describes. Raises ValueError for anything else."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        scaled = [name for name in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern") if config.get(name)]
        if scaled:
            raise ValueError(f"{scaled} change what the weights mean and are not supported")
        return LoRA(int(config["r"]), float(config["lora_alpha"]), tuple(config["target_modules"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a LoRA adapter: {error!r}") from error


def lora_layers(network: nn.Module) -> dict[str, LoraLayer]:
    """The layers that carry our adapter, by the names of the layers that they stand for."""
    return {name: m for name, m in network.named_modules() if isinstance(m, LoraLayer) and ADAPTER in m.scaling}


def lora_halves(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank] of our adapter."""
    a, b = (half.get_submodule(ADAPTER).get_parameter("weight") for half in (layer.lora_A, layer.lora_B))
    return a, b


def save_for_diffusers(network: nn.Module, path: Path) -> int:
    """Write the adapter as diffusers' `load_lora_adapter` and `load_lora_weights` read it; returns its rank.

    alpha / rank is multiplied into B: a loader that does not know alpha takes it to be the rank. Raises ValueError for
    a network without an adapter.
    """
    layers = lora_layers(network)
    if not layers:
        raise ValueError("the network carries no LoRA adapter: the run trained all weights; export them with --merged")
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        a, b = (half.detach().cpu() for half in lora_halves(layer))
        tensors[f"{PIPELINE_PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PIPELINE_PREFIX}{name}.lora_B.weight"] = layer.scaling[ADAPTER] * b
    (rank,) = {layer.r[ADAPTER] for layer in layers.values()}
    facts = {"r": rank, "lora_alpha": rank, "target_modules": sorted(layers), "lora_dropout": 0.0}
    metadata = json.dumps({f"{PIPELINE_PREFIX}{key}": value for key, value in facts.items()}, sort_keys=True)
    save_tensors(path, tensors, {"format": "pt", PIPELINE_METADATA: metadata})
    return rank


def load_exported(network: nn.Module, path: Path) -> int:
    """Put what `save_for_diffusers` wrote on a network; returns the rank. Raises as `load_adaptation` does."""
    weights = {name.removeprefix(PIPELINE_PREFIX): tensor for name, tensor in read_tensors(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[PIPELINE_METADATA])
        rank, targets = int(facts[f"{PIPELINE_PREFIX}r"]), tuple(facts[f"{PIPELINE_PREFIX}target_modules"])
        lora = LoRA(rank, float(facts[f"{PIPELINE_PREFIX}lora_alpha"]), targets)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not say its rank and targets in its metadata: {error!r}") from error
    lora.attach(network, seed=0)
    expected = get_peft_model_state_dict(network, adapter_name=ADAPTER)  # pyright: ignore[reportArgumentType]
    check_tensors(weights, expected, str(path))
    set_peft_model_state_dict(network, weights, adapter_name=ADAPTER)  # pyright: ignore[reportArgumentType]
    return rank


@torch.no_grad()
def merge_adapters(network: nn.Module) -> int:
    """Write W + (alpha / rank) B A into the weights, summed in float32 or wider, and take the adapters off.

    Returns how many layers were merged.
    """
    layers = lora_layers(network)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        weight = base.get_parameter("weight")
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (half.to(weight.device, wide) for half in lora_halves(layer))
        weight.copy_(weight.to(wide) + layer.scaling[ADAPTER] * (b @ a))
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, base)
    if layers:
        vars(network).pop("peft_config", None)
    return len(layers)
