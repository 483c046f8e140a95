"""Several configurations trained with several seeds, each run in a process of its own, and one report of all."""

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from framework.adapters import load_adaptation
from framework.arguments import check_counts
from framework.commands.compare_arms import Arm, check_budget, check_fair, read_arms
from framework.commands.runs import check_folder, is_finished, train_all
from framework.devices import prepare
from framework.drift import judge_blocks
from framework.reporting.comparison import Comparison, Failure, RunResult, pooled_gains, read_run
from framework.reporting.comparison_clips import CLIPS, read_clips, spread, write_clips
from framework.reporting.comparison_page import write_page
from framework.reporting.comparison_tables import write_tables
from framework.reporting.progress import progress, say
from framework.reporting.report import GAIN_HEADERS, format_table, gain_cells
from framework.weights import read_tensors, save_tensors

BLOCKS = "blocks.safetensors"
SHOWN = 6
"""Captions whose clips are shown."""


@dataclass(frozen=True)
class Run:
    """One training run of a comparison. arguments: of `armillary`."""

    arm: Arm
    seed: int
    folder: Path
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder and its log."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        """Whether its folder holds everything."""
        return is_finished(self.folder)


def compare(
    *,
    arms: Sequence[str],
    output_dir: str,
    seeds: int = 3,
    samples: int | None = None,
    parallel: int = 1,
    device: str = "cpu",
    gin_params: Sequence[str] = (),
    plugins: Sequence[str] = (),
) -> Path:
    """Train every arm with seeds 0 … ``seeds`` − 1, judge every result block by block, write the report; its path.

    arms: gin files, ``FILE`` or ``NAME=FILE``. output_dir: of all runs; those that are finished there are kept.
    samples: training clips of every run; None where the arms ask for equally many. parallel: runs at a time, one thread
    each. gin_params: gin lines for every arm.

    Everything that can be refused is refused before the first run starts: arms that would not be comparable, and
    finished runs in output_dir of another configuration. A run that fails does not stop the others; after the report is
    written, ValueError says how many did.
    """
    check_counts("--", seeds=seeds, parallel=parallel)
    chosen = read_arms(arms, gin_params, plugins)
    check_fair(chosen)
    steps = check_budget(chosen, samples)
    root = Path(output_dir)
    runs = [plan_run(arm, seed, root, steps[arm.name], device) for arm in chosen for seed in range(seeds)]
    for run in runs:
        check_kept(run)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir!r} cannot be written: {error.strerror or error}") from error
    failures = train_all(runs, parallel)
    comparison = judge_all(root, chosen, runs, failures, device)
    words = ["armillary", "compare", "--arms", *arms, "--seeds", str(seeds), "--output_dir", output_dir]
    for flag, values in (("--samples", () if samples is None else (str(samples),)), ("--gin_param", gin_params),
                         ("--plugin", plugins), ("--device", () if device == "cpu" else (device,))):  # fmt: skip
        words += [word for value in values for word in (flag, value)]
    comparison = replace(comparison, command=shlex.join(words))
    path = root / "report.html"
    write_page(comparison, path, write_tables(comparison, root))
    show(comparison, path)
    if comparison.failures:
        first = comparison.failures[0]
        raise ValueError(f"{len(comparison.failures)} of {len(runs)} runs failed, first {first.run} ({first.line}); "
                         f"{path} holds the others, the same command tries again what is missing")  # fmt: skip
    return path


def plan_run(arm: Arm, seed: int, root: Path, steps: int, device: str) -> Run:
    """The command that trains one seed of an arm."""
    folder = root / f"{arm.name}-{seed}"
    words = ["train", *arm.words, "--seed", str(seed), "--max_steps", str(steps), "--output_dir", str(folder)]
    return Run(arm, seed, folder, (*words, *(() if device == "cpu" else ("--device", device))))


def check_kept(run: Run) -> None:
    """Raises ValueError when its folder holds a finished run of another configuration, or no run at all."""
    steps, seed = (int(run.arguments[run.arguments.index(flag) + 1]) for flag in ("--max_steps", "--seed"))
    device = run.arguments[run.arguments.index("--device") + 1] if "--device" in run.arguments else None
    check_folder(run.folder, "train", lambda: run.arm.operative_config(str(run.folder), seed, steps, device))


def judge_all(
    root: Path, arms: Sequence[Arm], runs: Sequence[Run], failures: Sequence[Failure], device: str
) -> Comparison:
    """Read all finished runs and judge their policies block by block. Raises ValueError when there is none."""
    failed = list(failures)
    results: list[RunResult] = []
    finished = [run for run in runs if run.finished]
    if not finished:
        raise ValueError(f"no run finished; first {failed[0].run}: {failed[0].line}")
    shown = spread(len(arms[0].captions), SHOWN)
    start = judge_run(arms[0], None, root / "start", shown, device)
    for run in progress(finished, "judging"):
        try:
            folder = judge_run(run.arm, run.folder / "adapter", run.folder, shown, device)
            result = read_run(run.arm.name, run.seed, run.folder, shlex.join(["armillary", *run.arguments]))
            blocks = read_tensors(folder / BLOCKS)
        except (ValueError, OSError) as error:
            failed.append(Failure(run.name, str(error).splitlines()[0]))
            continue
        results.append(result.judged(blocks, read_clips(folder)))
    if not results:
        raise ValueError(f"no run can be reported; first {failed[0].run}: {failed[0].line}")
    firsts = {run.arm.name: run for run in reversed(finished)}
    return Comparison(
        runs=tuple(results),
        failures=tuple(failed),
        configs={arm.name: (firsts[arm.name].folder / "config.gin").read_text(encoding="utf-8")
                 for arm in arms if arm.name in firsts},
        start_blocks=read_tensors(start / BLOCKS),
        start_clips=read_clips(start),
        captions=tuple(arms[0].captions[i] for i in shown),
        shown=shown,
        first_block=arms[0].first_block,
    )  # fmt: skip


def judge_run(arm: Arm, adapter: Path | None, folder: Path, shown: Sequence[int], device: str) -> Path:
    """Judge a policy block by block, once: blocks.safetensors and the shown clips in ``folder``; returns it.

    adapter: what a run saved, None for the generator that all arms start from.
    """
    done, stamp = folder / BLOCKS, folder / "judged.txt"
    if done.is_file() and stamp.read_text(encoding="utf-8") == arm.judged_as:
        return folder
    generator, evaluation = arm.build()
    prepare(generator.network, device, 1)
    if adapter is not None:
        load_adaptation(generator.network, adapter)
    blocks, videos = judge_blocks(evaluation, generator)
    shutil.rmtree(folder / CLIPS, ignore_errors=True)
    write_clips(folder, videos, shown)
    stamp.write_text(arm.judged_as, encoding="utf-8")
    partial = folder / (BLOCKS + ".partial")
    save_tensors(partial, blocks)
    partial.replace(done)  # last: whoever finds it finds the clips as well
    return folder


def show(comparison: Comparison, path: Path) -> None:
    """The pooled gains of every arm, alarms and the path, on the console."""
    for arm, runs in comparison.arms.items():
        say("")
        say(f"{arm}: held-out gain over seeds {', '.join(str(run.seed) for run in runs)}")
        say(format_table(gain_cells(pooled_gains(runs)), GAIN_HEADERS))
    for line in comparison.alarms:
        say(f"alarm: {line}")
    say("")
    say(f"saved {path}")
