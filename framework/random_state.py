"""The process-wide random generators, kept and put back: no packaged part draws from them, one of a user may."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Where the generators of torch (CPU and initialised GPUs), numpy and Python stand, as a checkpoint can hold it."""
    version, words, spare = random.getstate()
    drawn = np.random.get_state(legacy=False)
    twister = drawn["state"]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": {"version": version, "words": torch.tensor(words), "spare": spare},
        "numpy": {
            "name": drawn["bit_generator"],
            "key": torch.from_numpy(twister["key"].astype(np.int64)),
            "position": int(twister["pos"]),
            "spare": (int(drawn["has_gauss"]), float(drawn["gauss"])),
        },
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue from `random_state`; GPUs that were not in use then are left as they are."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        for device, generator in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(generator, device)
    python, drawn = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["spare"]))
    twister = {"key": drawn["key"].numpy().astype(np.uint32), "pos": drawn["position"]}
    has_gauss, gauss = drawn["spare"]
    np.random.set_state({"bit_generator": drawn["name"], "state": twister, "has_gauss": has_gauss, "gauss": gauss})
