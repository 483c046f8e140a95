"""`armillary claims`: what is packaged, what it measures, what is refused, what is kept, and what a failure costs."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from backbones.embedded.generator import packaged_generator
from benchmarks.claims import GroupDiversity, LongGain, StreamingSpeed, SwitchGain, UpdateMemory, merge_adapters
from framework.adapters import LoRA
from framework.claims import Claim, Evidence, HeldOutDifference, Recipe
from framework.cli import main
from framework.commands.claims import ClaimRun, check_judged_alike, choose, plan_runs
from framework.config.load import load_config, packaged_configs, packaged_folder
from tests.support import close, normal, perturb


def claim_of(evidence: Evidence) -> Claim:
    return Claim("a", "", "", "", "", evidence)


# the packaged claims


@pytest.fixture(scope="module")
def packaged() -> list[Claim]:
    return load_config("claims", gin_files=["claims.gin"]).build()["claims"]


def test_every_packaged_claim_is_in_the_table_and_its_runs_are_packaged_and_judged_alike(packaged: list[Claim]):
    files = {c for c in packaged_configs() if c.startswith("claims/")}
    assert {f"claims/{claim.name}.gin" for claim in packaged} == {f for f in files if "/arms/" not in f}
    recipes = {recipe for claim in packaged for recipe in claim.evidence.recipes}
    assert {recipe.file for recipe in recipes} == {f for f in files if "/arms/" in f}
    assert all(len((packaged_folder() / f).read_text().splitlines()) <= 20 for f in files)
    for claim in packaged:
        check_judged_alike(claim)
    runs = plan_runs(packaged, 2, Path("somewhere"))
    assert len(runs) == 2 * len(recipes) == len({run.folder for run in runs}), "a shared run is trained once"
    assert all(run.operative_config() for run in runs)


def test_runs_that_are_judged_otherwise_are_refused(tmp_path: Path):
    other = tmp_path / "other.gin"
    other.write_text("include 'claims/arms/nft.gin'\nevaluation.HeldOut.members = 3\n")
    evidence = HeldOutDifference("claims/arms/nft.gin", str(other))
    with pytest.raises(
        ValueError, match=r"compares claims/arms/nft\.gin with .*HeldOut\.members is 4 and 3; set it alike"
    ):
        check_judged_alike(claim_of(evidence))


def test_two_files_of_one_name_are_refused():
    claims = [claim_of(HeldOutDifference("x/nft.gin", "y/nft.gin"))]
    with pytest.raises(ValueError, match=r"train x/nft\.gin and train y/nft\.gin would share a run folder"):
        plan_runs(claims, 1, Path("runs"))


def test_a_run_is_a_command_of_its_own():
    run = ClaimRun(Recipe("distill", "claims/arms/history_detached.gin"), 2, Path("runs/history_detached-2"))
    assert " ".join(run.arguments) == (
        "distill --gin_file claims/arms/history_detached.gin --gin_param distill.threads = 1 --seed 2 "
        "--output_dir runs/history_detached-2"
    )
    assert "distill.history_grad = False" in run.operative_config() and "distill.seed = 2" in run.operative_config()


def test_claims_are_chosen_by_name(packaged: list[Claim]):
    assert [claim.name for claim in choose(packaged, ("kernel", "memory"))] == ["memory", "kernel"]
    assert choose(packaged, ()) == list(packaged)
    with pytest.raises(ValueError, match="2 claims are called 'a'"):
        choose([claim_of(UpdateMemory())] * 2, ())


# what is measured


def test_merged_adapters_leave_no_adapter_and_the_same_predictions():
    torch.manual_seed(0)
    merged, beside = packaged_generator(), packaged_generator()
    x = normal(0, 2, 3, 3, 16, 16, dtype=torch.float32)
    prompts = ["a red circle moves left slowly", "a blue square moves up slowly"]
    for generator in (merged, beside):
        LoRA(rank=4).attach(generator.network, seed=0)
        perturb(generator.network, std=0.02)
    merge_adapters(merged.network)
    assert not [name for name, _ in merged.network.named_parameters() if "lora" in name]
    with torch.no_grad():
        after, before = (g.predict(x, 0.625, g.open(prompts)) for g in (merged, beside))
        plain = packaged_generator()
        start = plain.predict(x, 0.625, plain.open(prompts))
    close(after, before, atol=1e-4)
    assert (before - start).abs().max() > 1e-2, "the adapters act"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose adapter changes nothing."""
    folder, network = tmp_path_factory.mktemp("untrained"), packaged_generator().network
    LoRA(rank=2).attach(network, seed=0)
    LoRA(rank=2).save(network, folder / "adapter")
    return folder


def test_what_was_not_trained_gains_nothing_anywhere(untrained: Path):
    runs = {"arm.gin": untrained}
    for evidence in (
        LongGain("arm.gin", members=1, first_block=2, captions=2),
        SwitchGain("arm.gin", scenes=2, members=1),
    ):
        assert evidence.recipes == (Recipe("train", "arm.gin"),)
        effects = evidence.effects(0, runs)
        assert effects.shape == (2, 1)
        close(effects, torch.zeros(2, 1), atol=1e-4)


def test_speed_is_a_ratio_for_every_pair(untrained: Path):
    for merged in (True, False):
        evidence = StreamingSpeed("arm.gin", merged, clips=1, blocks=1, pairs=2)
        ratios = evidence.effects(0, {"arm.gin": untrained})
        assert ratios.shape == (2, 1) and bool((ratios > 0).all())


def test_diversity_is_a_paired_difference_that_depends_on_the_seed():
    size = {"captions": 2, "pivots": 1, "group": 2}
    same = GroupDiversity("noise, behind the prefix", "noise, behind the prefix", **size)
    close(same.effects(0, {}), torch.zeros(2, 1), atol=0)
    routed = GroupDiversity("routing, first half", "noise, behind the prefix", **size)
    first, second = routed.effects(0, {}), routed.effects(1, {})
    assert first.shape == (2, 1) and not torch.equal(first, second) and bool((first < 0).all())
    with pytest.raises(ValueError, match=r"GroupDiversity\.feature='colour' is none of 'place, px'"):
        GroupDiversity(feature="colour")


def test_memory_is_counted_against_the_thriftiest_other_way():
    ratio = UpdateMemory(length=2, factor=3).effects(0, {})
    assert ratio.shape == (1, 1) and float(ratio) > 1 and UpdateMemory.exact


# the command

PLUGIN = '''"""Evidence that is quick, and one that is broken."""
from dataclasses import dataclass
import torch
from framework.claims import Evidence

@dataclass(frozen=True)
class Planted(Evidence):
    size: float = 1.0
    def effects(self, seed, runs):
        if self.size > 100:
            raise RuntimeError("too large")
        with open(self.log, "a") as file:
            file.write(f"{self.size} {seed}\\n")
        return torch.full((4, 2), self.size) + 0.01 * seed
    log: str = "asked.txt"
'''
TABLE = """
claims.claims = (@one/claim.Claim(), @two/claim.Claim(), @three/claim.Claim())
one/claim.Claim.name = 'trained'
one/claim.Claim.statement = 'one | two'
one/claim.Claim.evidence = @claim.HeldOutDifference()
claim.HeldOutDifference.arm = 'tiny.gin'
claim.HeldOutDifference.baseline = 'other.gin'
two/claim.Claim.name = 'planted'
two/claim.Claim.statement = 'two'
two/claim.Claim.evidence = @two/plant.Planted()
three/claim.Claim.name = 'broken'
three/claim.Claim.statement = 'three'
three/claim.Claim.evidence = @three/plant.Planted()
three/plant.Planted.size = 1000.0
claim.Claim.paper = '1.0'
claim.Claim.source = 'nowhere'
claim.Claim.measures = 'nothing'
"""
TINY = """
include 'embedded/nft.gin'
train.max_steps = 1
train.prompts_per_step = 1
noise_endpoint.NoiseEndpoint.group_size = 2
noise_endpoint.NoiseEndpoint.window_blocks = 2
evaluation.HeldOut.members = 1
evaluation.HeldOut.every = 0
held_out/scenes.ShapesCaptions.limit = 2
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a table of claims and what it reads; the second arm is broken."""
    for name, text in (("plant.py", PLUGIN), ("table.gin", TABLE), ("tiny.gin", TINY),
                       ("other.gin", "include 'tiny.gin'\ntrain.replay_tolerance = -1.0\n")):  # fmt: skip
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "plant", raising=False)  # of an earlier test
    return tmp_path


def claims(*more: str) -> int:
    return main(["claims", "--gin_file", "table.gin", "--plugin", "plant.py", "--output_dir", "runs", *more])


def rows(desk: Path) -> dict[str, dict[str, str]]:
    with (desk / "runs" / "claims.csv").open(encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_what_fails_costs_its_own_rows_and_is_tried_again(desk: Path, capsys: pytest.CaptureFixture[str]):
    assert claims("--seeds", "1") == 1
    first = rows(desk)
    assert {name: row["verdict"] for name, row in first.items()} == {
        "trained": "failed", "planted": "undecided", "broken": "failed",
    }  # fmt: skip
    assert first["trained"]["reason"].startswith("other-0: ") and "replay" in first["trained"]["reason"]
    assert "RuntimeError: too large" in first["broken"]["reason"]
    assert "Traceback" in (desk / "runs" / "broken.log").read_text()
    out, err = capsys.readouterr()
    assert "2 of 3 claims failed, first trained" in err and "planted" in out and "Traceback" not in out + err

    trained = (desk / "runs" / "tiny-0" / "metrics.jsonl").stat().st_mtime_ns
    (desk / "other.gin").write_text("include 'tiny.gin'\noptimization.AdamW.learning_rate = 1e-2\n")
    (desk / "table.gin").write_text(TABLE.replace("1000.0", "2.0"))
    assert claims("--seeds", "1") == 0
    assert (desk / "runs" / "tiny-0" / "metrics.jsonl").stat().st_mtime_ns == trained, "a finished run is kept"
    assert (desk / "asked.txt").read_text() == "1.0 0\n2.0 0\n", "so is a measurement, unless it is another one"
    second = rows(desk)
    assert {row["verdict"] for row in second.values()} == {"undecided"}, "one seed decides nothing"
    assert float(second["trained"]["core_s"]) > 1 and second["trained"]["reason"] == ""
    text = (desk / "runs" / "claims.md").read_text()
    assert "**trained**: one \\| two" in text and "1.0 (nowhere)" in text and "core-seconds in all" in text

    (desk / "other.gin").write_text("include 'tiny.gin'\n")
    assert claims("--seeds", "1") == 1
    assert "other-0 holds a run of another configuration" in capsys.readouterr().err


def test_several_seeds_decide(desk: Path):
    assert claims("--only", "planted", "--seeds", "3") == 0
    row = rows(desk)["planted"]
    assert row["verdict"] == "agrees" and float(row["mean"]) == pytest.approx(1.01)
    assert 0.9 < float(row["low"]) < 1.01 < float(row["high"]) and len(row["seeds"].split()) == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--only", "plantet"), "--only plantet: no claim is called that; did you mean 'planted'?"),
        (("--seeds", "0"), "--seeds must be at least 1"),
        (("--parallel", "0"), "--parallel must be at least 1"),
        (("--gin_param", "claim.HeldOutDifference.baseline = 'none.gin'"), "there is no file 'none.gin'"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    more: tuple[str, ...], words: str, desk: Path, capsys: pytest.CaptureFixture[str]
):
    assert claims(*more) != 0
    _, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and not (desk / "runs").exists()


def test_without_a_file_the_packaged_claims_are_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["claims", "--only", "kernal", "--output_dir", str(tmp_path / "runs")]) == 2
    assert "did you mean 'kernel'?" in capsys.readouterr().err and not (tmp_path / "runs").exists()
