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
from torch import nn

from framework.distributed import whole
from framework.weights import check_tensors, read_tensors, save_tensors

ADAPTER = "default"
WAN_LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
"""Every linear layer of a Wan transformer block."""


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
    adapter, full = folder / "adapter_model.safetensors", folder / "model.safetensors"
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
    raise ValueError(
        f"{folder} holds neither adapter_model.safetensors nor model.safetensors; give --adapter a folder that a "
        f"run saved"
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
