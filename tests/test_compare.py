"""`armillary compare`: what it refuses before anything runs, what it keeps, and what a browser makes of its report."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from framework.cli import main
from framework.commands.compare import Run, check_kept
from framework.commands.compare_arms import Arm, check_budget, check_fair, read_arm, read_arms
from framework.commands.runs import reason
from framework.config.described import described
from framework.config.load import load_config
from framework.config.registry import ConfigError
from framework.reporting.comparison import Comparison
from framework.reporting.memory import peak_rss_mib, read_memory
from tests.browser import Browser, find_browser
from tests.test_comparison import whole

SMALL = (
    "train.prompts_per_step = 1",
    "evaluation.HeldOut.members = 1",
    "held_out/scenes.ShapesCaptions.limit = 2",
    "noise_endpoint.NoiseEndpoint.group_size = 2",
    "noise_endpoint.NoiseEndpoint.window_blocks = 2",
)
NFT = "embedded/nft.gin"


def compare(root: Path, *arms: str, more: tuple[str, ...] = ()) -> int:
    params = [word for line in SMALL for word in ("--gin_param", line)]
    words = ["compare", "--arms", *arms, "--output_dir", str(root), "--seeds", "1", "--samples", "2"]
    return main([*words, *params, *more])


def refusal(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line of a refused command."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert code != 0 and len(lines) == 1 and "Traceback" not in out + err, err
    return lines[0]


# arms


def test_equal_configurations_read_alike_however_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "own.gin"
    file.write_text(f"include {NFT!r}\nevaluation.HeldOut.reward = %JUDGE\nJUDGE = @x/shapes.ShapesReward()\n")
    plain, own = (load_config("train", gin_files=[name]) for name in (NFT, str(file)))
    for path in (("evaluation", "reward"), ("evaluation", "scenes"), ("generator",), ("seed",)):
        assert described(plain, *path) == described(own, *path)
    assert described(plain, "evaluation", "reward").startswith("shapes.ShapesReward(")
    assert "held_out=True" in described(plain, "evaluation", "scenes"), "the scope's binding, and defaults in words"
    other = load_config("train", gin_files=[NFT], gin_params=["optimization.AdamW.beta1 = 0.5"])
    assert "beta1=0.5" in described(other, "optimizer") and "beta1=0.9" in described(plain, "optimizer")
    with pytest.raises(KeyError, match=r"train\.seed is 0, not a part"):
        described(plain, "seed", "value")


@pytest.fixture(scope="module")
def nft() -> Arm:
    return read_arm("nft", NFT)


def test_an_arm_knows_the_clips_of_a_step(nft: Arm) -> None:
    assert (nft.clips_per_step, nft.max_steps, len(nft.captions)) == (48, 50, 24)
    assert read_arm("kvpo", "embedded/kvpo.gin").clips_per_step == 54, "anchors are generated as well"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("evaluation.HeldOut.members = 4", ["the evaluation's noises per scene", "8 and 4", "HeldOut.members"]),
        ("evaluation.HeldOut.seed = 1", ["the evaluation noise", "20260 and 1"]),
        ("evaluation.HeldOut.blocks = 5", ["the judged blocks", "7 and 5"]),
        ("evaluation.HeldOut.first_block = 2", ["the first judged block"]),
        ("held_out/scenes.ShapesCaptions.limit = 3", ["the evaluation scenes", "24 scenes and 3 scenes"]),
        ("evaluation.HeldOut.reward = @shapes_proxies.Smoothness()", ["the evaluation reward", "Smoothness"]),
        ("train.scenes = @x/scenes.ShapesCaptions()\nx/scenes.ShapesCaptions.limit = 60", ["the training prompts"]),
        ("embedded.packaged_generator.checkpoint = None", []),
    ],
)
def test_arms_that_are_judged_otherwise_are_refused(line: str, words: list[str], nft: Arm) -> None:
    other = read_arm("other", NFT, [line])
    if not words:
        return check_fair([nft, other])
    with pytest.raises(ValueError, match="arms nft and other cannot be compared") as refused:
        check_fair([nft, nft, other])
    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)


def test_arms_may_differ_in_all_that_is_to_be_compared(nft: Arm) -> None:
    check_fair([nft, *read_arms(["embedded/nft_random.gin", "embedded/nft_full.gin", "embedded/flow_grpo.gin"])])


def arm_of(name: str, clips: int, steps: int) -> Arm:
    return Arm(name, f"{name}.gin", (), (), clips, steps, 0, (), {})


def test_the_budget_is_the_same_number_of_clips_for_all() -> None:
    arms = [arm_of("a", 48, 50), arm_of("b", 54, 40)]
    assert check_budget(arms, 864) == {"a": 18, "b": 16}
    with pytest.raises(ValueError, match=r"--samples 900 is no .* \(clips per step: a 48, b 54\); 864 and 1296 are"):
        check_budget(arms, 900)
    with pytest.raises(ValueError, match=r"different numbers of clips \(a 2400, b 2160\); .* --samples, e\.g\. 2592"):
        check_budget(arms, None)
    assert check_budget(arms[:1], None) == {"a": 50}
    for nothing in (0, -48):
        with pytest.raises(ValueError, match=f"--samples {nothing} is no whole"):
            check_budget(arms[:1], nothing)


@pytest.mark.parametrize(
    ("arms", "more", "words"),
    [
        ([NFT, NFT], (), "2 arms are called 'nft'"),
        (["a b=" + NFT], (), "'a b' is no name for an arm"),
        (["x=../y=z.gin"], (), "arm x: --gin_file: there is no file"),
        (["embedded/nftt.gin"], (), "arm nftt: --gin_file: there is no file 'embedded/nftt.gin'"),
        ([NFT, "embedded/kvpo.gin"], (), "never used"),
        ([NFT], ("--seeds", "0"), "--seeds must be at least 1"),
        ([NFT], ("--samples", "3"), "--samples 3 is no whole number of steps"),
        ([NFT], ("--parallel", "0"), "--parallel must be at least 1"),
        ([NFT], ("--sample", "3"), "did you mean '--samples'"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    arms: list[str], more: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = compare(tmp_path / "runs", *arms, more=more)
    except SystemExit as exit:
        code = int(exit.code or 0)
    assert words in refusal(capsys, code)
    assert not (tmp_path / "runs").exists()


def test_help_answers_without_torch() -> None:
    code = (
        "import sys\nfrom framework.cli import main\n"
        "try:\n    main(['compare', '--help'])\nexcept SystemExit as exit:\n    assert exit.code == 0\n"
        "assert not {'torch', 'gin', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0 and "--samples" in answer.stdout, answer.stderr


# runs


def test_the_reason_of_a_failure_is_the_last_thing_that_was_said(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("loading\narmillary: error: too hot (--debug shows where)\nbye\n")
    assert reason(log, 1) == "too hot"
    log.write_text("loading\nTypeError: a bug\n\n")
    assert reason(log, 1) == f"TypeError: a bug (exit status 1), see {log}"
    assert reason(log, -9) == f"ended by signal 9, see {log}"


def test_a_folder_that_is_no_run_is_left_alone(nft: Arm, tmp_path: Path) -> None:
    (tmp_path / "nft-0").mkdir()
    run = Run(nft, 0, tmp_path / "nft-0", ("--max_steps", "1", "--seed", "0"))
    check_kept(run)
    (tmp_path / "nft-0" / "holiday.jpg").write_text("")
    with pytest.raises(ValueError, match=r"holds no config\.gin of a run"):
        check_kept(run)


MEASURE = """
from framework.reporting.memory import peak_rss_mib
before = peak_rss_mib()
block = b"x" * (400 * 2**20)
del block
print(before, peak_rss_mib())
"""


def test_memory_is_that_of_this_process_at_its_highest() -> None:
    """In a process of its own, which starts with less than the one that starts it has had."""
    started_by = peak_rss_mib()
    said = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True).stdout
    before, after = map(float, said.split())
    assert started_by is not None and 100 < before < started_by, "torch is loaded, and not the tests"
    assert 390 < after - before < 450


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[int], str]:
    """One arm that trains and one that fails, then the same command once the second is mended."""
    folder = tmp_path_factory.mktemp("compare")
    file, root = folder / "other.gin", folder / "runs"
    broken = f"include {NFT!r}\noptimization.AdamW.learning_rate = 1e-3\n"
    file.write_text(broken + "train.replay_tolerance = -1.0\n")
    codes = [compare(root, NFT, str(file), more=("--parallel", "2"))]
    first = (root / "report.html").read_text()
    written = (root / "nft-0" / "metrics.jsonl").stat().st_mtime_ns
    file.write_text(broken)
    codes.append(compare(root, NFT, str(file)))
    assert (root / "nft-0" / "metrics.jsonl").stat().st_mtime_ns == written, "a finished run is kept"
    return root, file, codes, first


@pytest.mark.slow
def test_a_failed_arm_does_not_lose_the_others_and_is_tried_again(story: tuple[Path, Path, list[int], str]) -> None:
    root, _, codes, first = story
    assert codes == [1, 0]
    assert "1 run did not finish" in first and "replay" in first and "Held-out reward" in first
    second = (root / "report.html").read_text()
    assert "did not finish" not in second and "Comparison of nft, other" in second


@pytest.mark.slow
def test_the_report_holds_what_the_runs_recorded(story: tuple[Path, Path, list[int], str]) -> None:
    root, *_ = story
    recorded = load_file(root / "other-0" / "evaluation.safetensors")
    with (root / "held_out.csv").open(encoding="utf-8") as file:
        row = next(r for r in csv.DictReader(file) if (r["arm"], r["seed"], r["signal"]) == ("other", "0", "VQ"))
    assert float(row["after"]) == pytest.approx(float(recorded["after.VQ"].mean()), abs=1e-6)
    assert read_memory(root / "other-0")["peak_rss_mib"] > 100
    blocks, start = (load_file(root / name / "blocks.safetensors") for name in ("other-0", "start"))
    assert blocks["VQ"].shape == start["VQ"].shape == (2, 1, 7) and not torch.equal(blocks["VQ"], start["VQ"])
    after = float(recorded["after.VQ"].mean())
    assert float(blocks["VQ"].mean()) == pytest.approx(after, abs=1e-5), "VQ is a mean over frames"
    text = (root / "report.html").read_text()
    assert "--samples 2" in text and "learning_rate = 0.001" in text and text.count("<video") == 2 * 3


@pytest.mark.slow
def test_runs_of_another_configuration_are_refused(
    story: tuple[Path, Path, list[int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, *_ = story
    line = refusal(capsys, compare(root, NFT, more=("--samples", "4")))
    assert "nft-0 holds a run of another configuration, it differs in 'train.max_steps = 1'" in line


# the report in a browser

PLAY = """Promise.all([...document.querySelectorAll('video')].map(film => new Promise(done => {
  const say = () => done([film.readyState, film.duration, film.currentTime, film.error ? film.error.message : '']);
  film.addEventListener('timeupdate', () => film.currentTime > 0 && say());
  film.addEventListener('error', say);
  setTimeout(say, 20000);
  film.play();
})))"""


def look(browser: Browser, path: Path, width: int) -> tuple[int, int]:
    """(width of the viewport, width of the page)."""
    browser.open(path, width)
    return tuple(browser.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollWidth]"))


@pytest.mark.browser
@pytest.mark.skipif(find_browser() is None, reason="no chromium on the path, and ARMILLARY_BROWSER names none")
def test_a_browser_shows_the_report_without_errors_overflow_or_still_videos(tmp_path: Path) -> None:
    from framework.reporting.comparison_page import write_page

    comparison: Comparison = whole(tmp_path, ("one", "a_name_that_is_too_long_for_any_phone_and_has_no_space_in_it"))
    path, bad = tmp_path / "report.html", tmp_path / "bad.html"
    write_page(comparison, path)
    wide = '<div style="width: 1500px">x</div><script>console.error("no")</script>'
    bad.write_text(path.read_text().replace("</main>", wide + "</main>"))
    with Browser(find_browser() or "", tmp_path / "profile") as browser:
        for width in (400, 1280):
            seen, needed = look(browser, path, width)
            assert width - 20 <= seen <= width and needed <= seen
        films = browser.evaluate(PLAY)
        assert len(films) == 6
        for ready, duration, at, error in films:
            assert ready >= 2 and duration == pytest.approx(5 / 8, abs=0.01) and at > 0 and not error
        assert all(browser.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)"))
        assert browser.messages == []
        assert look(browser, bad, 1280)[1] > 1280 and "['no']" in browser.messages, "both would be noticed"


def test_an_arm_that_cannot_be_read_names_itself() -> None:
    with pytest.raises(ConfigError, match=r"arm hot: .*learning_rate"):
        read_arm("hot", NFT, ["optimization.AdamW.learning_rate = 'fast'"])
