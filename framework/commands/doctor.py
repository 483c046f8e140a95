"""The command that looks before a run does: is this machine fit, and would a configuration's training fit into it."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from framework.devices import META, sizes_only
from framework.environment import Finding, Verdict, available_memory, check_memory, check_reward, machine_findings
from framework.reporting.progress import say


def doctor(
    *,
    gin_files: Sequence[str] = (),
    gin_params: Sequence[str] = (),
    plugins: Sequence[str] = (),
    output_dir: str | None = None,
    device: str = "cpu",
) -> int:
    """Print what was found; returns 0, or 1 where something is fatal. Nothing is written and no network is run.

    gin_files, gin_params, plugins: a configuration of `train`, whose parts are built and whose memory is estimated;
    none for the machine alone. output_dir, device: where the run would write and compute. Raises ConfigError for a
    configuration that `train` would refuse too.
    """
    findings = list(machine_findings(device, Path("runs" if output_dir is None else output_dir)))
    for finding in findings:
        say(finding.line())
    if gin_files or gin_params:
        for finding in run_findings(gin_files, gin_params, plugins, device):
            say(finding.line())
            findings.append(finding)
    fatal = sum(finding.verdict is Verdict.FATAL for finding in findings)
    warnings = sum(finding.verdict is Verdict.WARNING for finding in findings)
    say(f"{len(findings)} checks, {warnings} warnings, {fatal} fatal")
    return 1 if fatal else 0


def run_findings(
    gin_files: Sequence[str], gin_params: Sequence[str], plugins: Sequence[str], device: str
) -> Iterator[Finding]:
    """What only a configuration can tell: its parts build and fit, its reward answers, its memory."""
    # what a broken environment cannot import comes after what says why
    from framework.commands.train import train
    from framework.compatibility import check_recipe
    from framework.config.load import load_config
    from framework.data.scenes import draw_scenes
    from framework.rollout import check_routes
    from framework.run_shape import StepParts, estimate_step

    with sizes_only():
        built = load_config("train", gin_files=gin_files, gin_params=gin_params, plugins=plugins).build()
    given: dict[str, Any] = {
        name: parameter.default for name, parameter in inspect.signature(train).parameters.items()
    } | built
    keep = check_recipe(given["exploration"], given["surrogate"], given["advantage"], given["regularizer"])
    scenes = given["scenes"].scenes()
    draw_scenes(scenes, 0, given["prompts_per_step"], given["seed"])
    parts = StepParts(
        given["generator"], given["exploration"], given["surrogate"], given["regularizer"],
        scenes, keep, given["seed"], given["prompts_per_step"], given["updates_per_rollout"],
        given["micro_batch_size"], given["groups_at_once"], given["branches_at_once"],
    )  # fmt: skip
    check_routes(parts.generator, parts.first_plan(), scenes)
    yield Finding("config", Verdict.OK, "all parts build and fit together")
    yield check_reward(given["reward"])
    network = given["generator"].network
    place = next(network.parameters()).device
    with place if place.type == META else nullcontext():
        trained = given["adaptation"].attach(network, given["seed"])
    counts = (sum(p.numel() for p in parameters) for parameters in (network.parameters(), trained.values()))
    yield Finding("network", Verdict.OK, "{:,} parameters, of which {:,} train".format(*counts))
    yield check_memory(estimate_step(parts, given["adaptation"]), available_memory(device))
