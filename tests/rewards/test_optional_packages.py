"""A package that is missing or broken is one line with a remedy, and RAFT is used as its authors mean it."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewards.encoders import load_clip
from rewards.optical_flow import RaftFlow, crop, load_raft, pad_frames
from rewards.optional import import_extra, refuse_broken_torchvision
from tests.rewards.tiny_encoders import noise_clips, save_clip
from tests.support import close, normal


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchvision" else found(name, *rest)
    )


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def broken_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A torchvision that installs cleanly and fails as one for another torch does."""
    forget(monkeypatch)
    package = tmp_path / "site" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("torchvision", None)


def refusal(call: Any) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("without_torchvision")
def test_a_missing_torchvision_is_named_with_the_extra_that_brings_it(tmp_path: Path):
    assert refusal(load_raft) == "RAFT needs torchvision, which is not installed: pip install 'armillary[flow]'"
    refuse_broken_torchvision("load_clip")  # to have none is fine
    save_clip(tmp_path)
    assert load_clip(str(tmp_path)).width == 8


@pytest.mark.usefixtures("broken_torchvision")
def test_a_torchvision_that_does_not_import_is_told_from_one_that_is_missing(tmp_path: Path):
    reason = "does not import (RuntimeError: operator torchvision::nms does not exist)"
    save_clip(tmp_path)
    for message in (refusal(load_raft), refusal(lambda: load_clip(str(tmp_path)))):
        assert reason in message and f"another torch than {torch.__version__}" in message
        assert "install the build that belongs to it" in message


def test_any_extra_is_named():
    message = refusal(lambda: import_extra("no_such_package.inner", "judge", "The judge"))
    assert message == "The judge needs no_such_package, which is not installed: pip install 'armillary[judge]'"
    assert import_extra("json.decoder", "judge", "The judge").__name__ == "json.decoder"


# RAFT


class FakeRaft(nn.Module):
    """What torchvision's RAFT takes and gives; its flow is read off the frames so that padding shows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.asked: list[tuple[tuple[int, ...], int]] = []

    def forward(self, image1: Tensor, image2: Tensor, num_flow_updates: int = 12) -> list[Tensor]:
        height, width = image1.shape[-2:]
        assert height % 8 == 0 and width % 8 == 0 and min(height, width) >= 128
        assert float(image1.abs().max()) <= 1 and image1.dtype == torch.float32
        self.asked.append((tuple(image1.shape), num_flow_updates))
        answer = self.weight * torch.stack([image1[:, 0], image2[:, 1]], 1)
        return [torch.zeros_like(answer)] * (num_flow_updates - 1) + [answer]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (128, 136), (129, 250), (480, 832)])
def test_frames_of_any_size_are_padded_for_raft_and_its_flow_is_cut_back(height: int, width: int):
    frames = noise_clips(3, 3, height, width), noise_clips(3, 3, height, width, seed=1)
    network = FakeRaft()
    flow = RaftFlow(network, iterations=20, batch_pairs=2).flow(*frames)
    expected = torch.stack([frames[0][:, 0], frames[1][:, 1]], 1).float() / 127.5 - 1
    close(flow, expected, atol=1e-6)
    assert [(shape[0], updates) for shape, updates in network.asked] == [(2, 20), (1, 20)]
    assert not flow.requires_grad and not network.training


def test_padding_repeats_the_border():
    frames = normal(0, 1, 3, 100, 130)
    padded = pad_frames(frames)
    assert padded.shape == (1, 3, 128, 136) and torch.equal(crop(padded, 100, 130), frames)
    for row in (0, -1):
        assert torch.equal(padded[..., row, 3:133], frames[..., row, :])


class FakeWeights:
    """torchvision's enumeration of weights."""

    url = "https://example.org/raft.pth"
    asked: dict[str, Any]

    def get_state_dict(self, **options: Any) -> dict[str, Tensor]:
        type(self).asked = options
        return {"weight": torch.full((1,), 3.0)}


@pytest.fixture
def fake_torchvision(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    weights = FakeWeights()
    enumeration = SimpleNamespace(__members__={"C_T_V1": weights, "C_T_V2": weights})
    module: Any = ModuleType("torchvision.models.optical_flow")
    module.raft_large = module.raft_small = FakeRaft
    module.Raft_Large_Weights = module.Raft_Small_Weights = enumeration
    forget(monkeypatch)
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[name].__spec__ = importlib.util.spec_from_loader(name, None)
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", module)
    return SimpleNamespace(weights=weights)


def test_the_named_weights_are_downloaded_as_tensors_and_checked(fake_torchvision: SimpleNamespace):
    assert load_raft().network.state_dict()["weight"].item() == 3
    assert FakeWeights.asked["weights_only"] is True and FakeWeights.asked["check_hash"] is True


def test_weights_may_be_a_file(fake_torchvision: SimpleNamespace, tmp_path: Path):
    torch.save({"weight": torch.full((1,), 5.0)}, tmp_path / "raft.pth")
    assert load_raft(weights=str(tmp_path / "raft.pth")).network.state_dict()["weight"].item() == 5
    torch.save({"other": torch.zeros(1)}, tmp_path / "wrong.pth")
    assert "are no weights of raft_large" in refusal(lambda: load_raft(weights=str(tmp_path / "wrong.pth")))
    assert "there is no file" in refusal(lambda: load_raft(weights=str(tmp_path / "gone.pth")))
    message = refusal(lambda: load_raft(weights="C_T_V3"))
    assert message == "load_raft.weights must be a file or one of C_T_V1, C_T_V2, got 'C_T_V3'"
    assert "load_raft.size must be" in refusal(lambda: load_raft(size="huge"))  # type: ignore[arg-type]


def test_weights_that_cannot_be_downloaded_say_where_they_are(
    fake_torchvision: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    def offline(self: FakeWeights, **options: Any) -> dict[str, Tensor]:
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(FakeWeights, "get_state_dict", offline)
    message = refusal(load_raft)
    assert "Temporary failure in name resolution" in message and "download https://example.org/raft.pth" in message


def test_settings_of_raft_that_mean_nothing_are_refused():
    assert "RaftFlow.iterations must be at least 1" in refusal(lambda: RaftFlow(FakeRaft(), iterations=0))
    assert "RaftFlow.batch_pairs must be at least 1" in refusal(lambda: RaftFlow(FakeRaft(), batch_pairs=0))
