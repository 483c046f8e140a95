"""The root that tests the papers' claims at toy scale: train what they compare, measure, and put it in one table."""

import json
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from framework.arguments import check_counts
from framework.claims import Claim, Recipe, Verdict
from framework.commands.runs import FINISHED, check_folder, is_finished, train_all
from framework.config.described import described
from framework.config.load import Configuration, load_config
from framework.config.registry import ConfigError, did_you_mean, one_line
from framework.reporting.claim_tables import Finding, markdown, terminal_rows, write_csv
from framework.reporting.progress import progress, say
from framework.reporting.report import format_table
from framework.reporting.runfolder import fresh_folder, write_run_files

JUDGED_BY = ("scenes", "reward", "members", "blocks", "first_block", "seed")
"""Parameters of the evaluation that two compared runs must share."""


@dataclass(frozen=True)
class ClaimRun:
    """One training run that claims read."""

    recipe: Recipe
    seed: int
    folder: Path

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of `armillary`."""
        command, file = self.recipe
        return (command, "--gin_file", file, "--gin_param", f"{command}.threads = 1", "--seed", str(self.seed),
                "--output_dir", str(self.folder))  # fmt: skip

    def operative_config(self) -> str:
        """What its config.gin says."""
        return load(self.recipe, {"output_dir": str(self.folder), "seed": self.seed}).operative_config()


def claims(
    *,
    claims: Sequence[Claim],
    output_dir: str | None = None,
    only: Sequence[str] = (),
    seeds: int = 3,
    parallel: int = 1,
    operative_config: str = "",
) -> Path:
    """Test claims with seeds 0 … ``seeds`` − 1; returns the folder with claims.md and claims.csv.

    claims: the rows of the table. output_dir: of all runs, None for a fresh one under runs/; what is finished there is
    kept. only: names of the claims to test, none for all. parallel: training runs at a time, one thread each.

    Wrong names and configurations, and finished runs of another configuration in output_dir, are refused before the
    first run starts. A run or measurement that fails costs the claims that read it, no others; after the table is
    written, ValueError says how many failed.
    """
    check_counts("--", seeds=seeds, parallel=parallel)
    chosen = choose(claims, only)
    root = fresh_folder("claims") if output_dir is None else Path(output_dir)
    runs = plan_runs(chosen, seeds, root)
    for claim in chosen:
        check_judged_alike(claim)
    for run in runs:
        check_folder(run.folder, run.recipe.command, run.operative_config)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {str(root)!r} cannot be written: {error.strerror or error}") from error
    write_run_files(root, operative_config)
    torch.set_num_threads(1)
    failures = {failure.run: failure.line for failure in train_all(runs, parallel)}
    findings = [test_claim(claim, seeds, root, failures) for claim in progress(chosen, "claims")]
    report(findings, runs, root)
    failed = [finding for finding in findings if finding.verdict is Verdict.FAILED]
    if failed:
        raise ValueError(f"{len(failed)} of {len(findings)} claims failed, first {failed[0].claim.name} "
                         f"({failed[0].reason}); the same command tries again what is missing")  # fmt: skip
    return root


def choose(claims: Sequence[Claim], only: Sequence[str]) -> list[Claim]:
    """The claims of these names, in the order of the table. Raises ValueError for an unknown or a doubled one."""
    names = [claim.name for claim in claims]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise ValueError(f"{names.count(doubled)} claims are called {doubled!r}; give each a Claim.name of its own")
    unknown = next((name for name in only if name not in names), None)
    if unknown is not None:
        raise ConfigError(f"--only {unknown}: no claim is called that{did_you_mean(unknown, names)}; "
                          f"claims: {', '.join(names)}")  # fmt: skip
    return [claim for claim in claims if not only or claim.name in only]


def load(recipe: Recipe, flags: Mapping[str, object]) -> Configuration:
    """The configuration of a run. Raises ConfigError for what is wrong with it."""
    lines = [f"{recipe.command}.threads = 1"]
    return load_config(recipe.command, gin_files=[recipe.file], gin_params=lines, flags=flags)


def plan_runs(claims: Sequence[Claim], seeds: int, root: Path) -> list[ClaimRun]:
    """Every run that some claim reads, once. Raises ValueError where two files would share a folder."""
    recipes = list(dict.fromkeys(recipe for claim in claims for recipe in claim.evidence.recipes))
    files = {run_name(recipe.file): recipe for recipe in reversed(recipes)}
    for recipe in recipes:
        other = files[run_name(recipe.file)]
        if other != recipe:
            raise ValueError(f"{' '.join(other)} and {' '.join(recipe)} would share a run folder; rename one file")
    return [ClaimRun(recipe, seed, run_folder(root, recipe.file, seed)) for recipe in recipes for seed in range(seeds)]


def run_name(file: str) -> str:
    return Path(file).stem


def run_folder(root: Path, file: str, seed: int) -> Path:
    """Where the run of a gin file is."""
    return root / f"{run_name(file)}-{seed}"


def check_judged_alike(claim: Claim) -> None:
    """Raises ValueError when the runs of a claim would not be judged on the same clips by the same reward."""
    recipes = claim.evidence.recipes
    loaded = [load(recipe, {}) for recipe in recipes]
    for parameter in JUDGED_BY:
        words = [described(configuration, "evaluation", parameter) for configuration in loaded]
        other = next((i for i, text in enumerate(words) if text != words[0]), None)
        if other is not None:
            raise ValueError(
                f"claim {claim.name} compares {recipes[0].file} with {recipes[other].file}, but their "
                f"evaluation.HeldOut.{parameter} is {words[0]} and {words[other]}; set it alike"
            )


def test_claim(claim: Claim, seeds: int, root: Path, failures: Mapping[str, str]) -> Finding:
    """Judge one claim by its finished runs; what goes wrong becomes its reason."""
    read = [run_folder(root, recipe.file, seed) for seed in range(seeds) for recipe in claim.evidence.recipes]
    finding = Finding(claim, Verdict.FAILED, training_s=sum(cost(folder) for folder in read if is_finished(folder)))
    missing = next((folder.name for folder in read if not is_finished(folder)), None)
    if missing is not None:
        return replace(finding, reason=f"{missing}: {failures[missing]}")
    try:
        asked = [measured(claim, seed, root) for seed in range(1 if claim.evidence.exact else seeds)]
        effects, seconds = zip(*asked, strict=True)
        interval, verdict = claim.judge(effects)
    except Exception as error:  # a bug in one measurement must not lose the other rows; its traceback is kept
        log = root / f"{claim.name}.log"
        log.write_text(traceback.format_exc(), encoding="utf-8")
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        return replace(finding, reason=f"{kind}{one_line(error)}, see {log}")
    by_seed = tuple(float(effect.mean()) for effect in effects)
    return replace(finding, verdict=verdict, interval=interval, seeds=by_seed, measuring_s=sum(seconds))


def cost(folder: Path) -> float:
    """Core-seconds of a finished run's process. Raises ValueError where the run did not record them."""
    facts = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    if "process_core_s" not in facts:
        raise ValueError(f"{folder / FINISHED} has no process_core_s: an older version trained it; remove the folder")
    return float(facts["process_core_s"])


def measured(claim: Claim, seed: int, root: Path) -> tuple[Tensor, float]:
    """(effects [C, M], core-seconds) of one seed, from an earlier call where evidence and runs are still the same."""
    path, evidence = root / "measured" / f"{claim.name}-{seed}.json", claim.evidence
    runs = {recipe.file: run_folder(root, recipe.file, seed) for recipe in evidence.recipes}
    made = max((os.stat(folder / FINISHED).st_mtime_ns for folder in runs.values()), default=0)
    if path.is_file() and os.stat(path).st_mtime_ns >= made:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["evidence"] == repr(evidence):
            return torch.tensor(kept["effects"], dtype=torch.float64), float(kept["core_s"])
    started = time.process_time()
    effects = evidence.effects(seed, runs).double()
    core_s = time.process_time() - started
    path.parent.mkdir(exist_ok=True)
    partial_file = path.with_suffix(".partial")
    facts = {"evidence": repr(evidence), "core_s": core_s, "effects": effects.tolist()}
    partial_file.write_text(json.dumps(facts), encoding="utf-8")
    partial_file.replace(path)
    return effects, core_s


def report(findings: Sequence[Finding], runs: Sequence[ClaimRun], root: Path) -> None:
    """claims.md, claims.csv, and the table on the console."""
    trained = sum(cost(run.folder) for run in runs if is_finished(run.folder))
    total = trained + sum(finding.measuring_s for finding in findings)
    line = (
        f"{total:.0f} core-seconds in all ({total / 60:.1f} core-minutes); a run that several claims read is counted "
        "in each of their rows and once here"
    )
    (root / "claims.md").write_text(markdown(findings, line), encoding="utf-8")
    write_csv(findings, root / "claims.csv")
    say("")
    say(format_table(*terminal_rows(findings)))
    for finding in findings:
        if finding.reason:
            say(f"{finding.claim.name} failed: {finding.reason}")
    say("")
    say(line)
    say(f"saved {root / 'claims.md'} and {root / 'claims.csv'}")
