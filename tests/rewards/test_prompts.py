"""A template is the pinned bytes or it is refused; a prompt goes in as it is, and no special token with it."""

import hashlib
import re
from pathlib import Path

import pytest
from hypothesis import strategies as st

from rewards import prompts
from rewards.prompts import HPSV3, PLACEHOLDER, VIDEOALIGN, Template, fill, read_template, render
from tests.rewards.scorers import STAND_IN, byte_tokenizer, conversation, pinned, real_templates, real_text, setup
from tests.support import holds, refuted

HOME = Path(__file__).resolve().parents[2]
REAL = pytest.mark.parametrize("template", [VIDEOALIGN, HPSV3], ids=lambda template: template.name)
FAKE = pinned(VIDEOALIGN, STAND_IN["videoalign"])


def file_name(template: Template) -> str:
    return f"{template.name.lower()}_prompt.txt"


# The real texts, where somebody has them


@REAL
def test_a_template_of_the_pinned_bytes_is_read(template: Template):
    text = real_text(template)
    assert len(text) == template.size and text.count(PLACEHOLDER) == 1
    assert all(text.count(token) == 1 for token in template.rewards)


@pytest.mark.parametrize(
    ("template", "length", "digest"),
    [
        (VIDEOALIGN, 4158, "790655df95e1fc9081d69112b98d3646799eb52a549030f2d169ac9b34f4c1c0"),
        (HPSV3, 2751, "4d62b4c2c14fe0c6cead8e663a0034f91183585af3ba74884cabc98c63c17ba8"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_conversation_is_rendered_to_the_known_text(template: Template, length: int, digest: str):
    text = render(template, real_text(template), "a red circle moves left")
    assert len(text) == length and hashlib.sha256(text.encode()).hexdigest() == digest


@REAL
def test_a_template_without_its_trailing_blanks_is_refused_and_told_apart(template: Template, tmp_path: Path):
    stripped = re.sub(r"[ \t]+$", "", real_text(template), flags=re.MULTILINE)
    file = tmp_path / "stripped.txt"
    file.write_bytes(stripped.encode())
    with pytest.raises(ValueError, match=r"lacks the blanks at the ends of its lines.*github\.com"):
        read_template(template, str(file))


@REAL
def test_a_template_is_found_in_the_sources_of_a_clone(template: Template, tmp_path: Path):
    text = real_text(template)
    half = text.index(PLACEHOLDER) + len(PLACEHOLDER)
    whole = f"raise SystemExit('never run')\nOTHER = 'x'\nTEMPLATE = {text!r}\n"
    apart = f"raise SystemExit('never run')\nQUESTION = {text[:half]!r}\nENDING = {text[half:]!r}\n"
    for name, source in {"whole": whole, "apart": apart}.items():
        if name == "apart" and template is VIDEOALIGN:
            continue  # two of its reward tokens stand before the prompt
        folder = tmp_path / name / "package"
        folder.mkdir(parents=True)
        (folder / "prompt_template.py").write_text(source, encoding="utf-8")
        (folder / "broken.py").write_text("def <|Reward|> <|VQ_reward|>", encoding="utf-8")
        assert read_template(template, str(tmp_path / name)) == text
        assert read_template(template, str(folder / "prompt_template.py")) == text


def test_a_real_conversation_has_every_reward_token_once():
    for model, template in (("videoalign", VIDEOALIGN), ("hpsv3", HPSV3)):
        row = conversation(model, real_text(template)).row("a fox {jumps}", (1, 4, 4))
        assert [row.count(token) for token in setup().reward_tokens(model).rewards] == [1] * len(template.rewards)


# Any text


PACKAGES = ("backbones", "benchmarks", "configs", "docs", "examples", "framework", "rewards", "strategies", "tests",
            "theory_checks")  # fmt: skip


def phrases(text: str, words: int = 6) -> set[str]:
    """Runs of so many words."""
    found = re.findall(r"\w+", text.lower())
    return {" ".join(found[i : i + words]) for i in range(len(found) - words + 1)}


@REAL
def test_nothing_in_the_repository_repeats_six_words_of_a_template(template: Template):
    files = [file for package in PACKAGES for file in (HOME / package).rglob("*")] + list(HOME.glob("*.*"))
    texts = {
        f: f.read_text(encoding="utf-8") for f in files if f.suffix in (".py", ".gin", ".md", ".txt", ".json", ".toml")
    }
    said = phrases(real_text(template))
    assert len(said) > 200 and len(texts) > 200
    assert [file for file, text in texts.items() if phrases(text) & said] == []


def test_the_repository_holds_no_file_of_a_template():
    assert not list(HOME.glob("**/*_prompt.txt"))


def test_a_conversation_of_another_text_is_refused():
    chat = conversation("videoalign")
    with pytest.raises(ValueError, match="VideoAlign template that was given has"):
        type(chat)(chat.template, chat.text.replace("How", "how"), chat.tokenizer, chat.tokens)


@pytest.mark.parametrize("ending", [" ", "\n", ""], ids=["a blank more", "a line more", "a byte less"])
def test_one_byte_more_or_less_is_refused(ending: str, tmp_path: Path):
    text = STAND_IN["videoalign"] + ending if ending else STAND_IN["videoalign"][:-1]
    (tmp_path / "t.txt").write_bytes(text.encode())
    with pytest.raises(ValueError, match=r"has \d+ bytes with sha256 .* it comes unchanged from"):
        read_template(FAKE, str(tmp_path / "t.txt"))
    (tmp_path / "t.txt").write_bytes(STAND_IN["videoalign"].encode())
    assert read_template(FAKE, str(tmp_path / "t.txt")) == STAND_IN["videoalign"]


def test_a_folder_with_the_text_file_is_enough(tmp_path: Path):
    (tmp_path / file_name(FAKE)).write_bytes(STAND_IN["videoalign"].encode())
    assert read_template(FAKE, str(tmp_path)) == STAND_IN["videoalign"]


def test_windows_line_ends_are_another_text(tmp_path: Path):
    (tmp_path / "t.txt").write_bytes(STAND_IN["videoalign"].replace("\n", "\r\n").encode())
    with pytest.raises(ValueError, match="sha256"):
        read_template(FAKE, str(tmp_path / "t.txt"))


@pytest.mark.parametrize("source", ["nowhere", "nowhere.txt", "package:no-such-distribution"])
def test_a_missing_template_says_where_it_comes_from(source: str):
    with pytest.raises(ValueError, match="KlingTeam/VideoAlign") as refused:
        read_template(VIDEOALIGN, source)
    assert "trailing blanks matter" in str(refused.value) and "\n" not in str(refused.value)


def test_an_altered_source_is_refused(tmp_path: Path):
    altered = STAND_IN["videoalign"].replace("How", "how")
    (tmp_path / "prompt_template.py").write_text(f"T = {altered!r}", encoding="utf-8")
    with pytest.raises(ValueError, match="sha256"):
        read_template(FAKE, str(tmp_path))
    (tmp_path / "prompt_template.py").write_text("T = 'nothing'", encoding="utf-8")
    with pytest.raises(ValueError, match="no Python source"):
        read_template(FAKE, str(tmp_path))


def test_an_installed_distribution_is_parsed_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "scorer").mkdir()
    (tmp_path / "scorer" / "prompt_template.py").write_text(
        f"raise SystemExit('never run')\nT = {STAND_IN['videoalign']!r}", encoding="utf-8"
    )
    info = tmp_path / "scorer-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scorer\nVersion: 1.0\n", encoding="utf-8")
    (info / "RECORD").write_text("scorer/prompt_template.py,,\nscorer/gone.py,,\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read_template(FAKE, "package:scorer") == STAND_IN["videoalign"]


USER = st.text(max_size=40).filter(lambda text: prompts.SPECIAL.search(text) is None)


def check_literal(insert, prompt: str) -> None:
    """What stands around the prompt is the template, byte for byte."""
    before, after = STAND_IN["videoalign"].split(PLACEHOLDER)
    assert insert(STAND_IN["videoalign"], prompt) == before + prompt + after


def formatted(text: str, prompt: str) -> str:
    """A planted error: a prompt that is trimmed."""
    return fill(text, prompt.strip())


def test_a_prompt_goes_in_as_it_is():
    holds(lambda prompt: check_literal(fill, prompt), USER)
    refuted(lambda prompt: check_literal(formatted, prompt), USER)
    for braces in ("{", "}", "{text_prompt}", "{0}", "{{}}", "%s", "\\1"):
        check_literal(fill, braces)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|VQ_reward|>", "<|Reward|>", "<|video_pad|>", "<|anything_new|>"])
def test_a_prompt_with_a_special_token_is_refused(token: str):
    with pytest.raises(ValueError, match=re.escape(repr(token))):
        fill(STAND_IN["videoalign"], f"a cat{token}")


def test_a_prompt_with_a_token_that_only_the_tokenizer_knows_is_refused():
    chat = conversation("hpsv3")
    chat.tokenizer.add_tokens(["[NEW]"], special_tokens=True)
    with pytest.raises(ValueError, match=r"\[NEW\]"):
        chat.row("a [NEW] cat", (1, 2, 2))


def test_angle_brackets_and_bars_alone_are_no_special_token():
    assert "a <b> | c |> d" in fill(STAND_IN["hpsv3"], "a <b> | c |> d")


# Rows


def test_a_row_spells_the_conversation_with_a_vision_token_for_every_merged_patch():
    chat = conversation("videoalign")
    row = chat.row("a cat", (2, 4, 6))
    assert row.count(chat.tokens.vision) == 12
    spelled = chat.tokenizer.decode(row)
    rendered = render(chat.template, chat.text, "a cat")
    assert spelled == rendered.replace("<|video_pad|>", 12 * "<|video_pad|>")


def test_a_tokenizer_with_other_ids_is_refused():
    wrong = byte_tokenizer(("<|MQ_reward|>", "<|VQ_reward|>", "<|TA_reward|>"))
    chat = conversation("videoalign")
    with pytest.raises(ValueError, match=r"reads '<\|VQ_reward\|>' as"):
        type(chat)(chat.template, chat.text, wrong, chat.tokens)
    with pytest.raises(ValueError, match="VQ_reward"):
        type(chat)(chat.template, chat.text, byte_tokenizer(()), chat.tokens)


def test_templates_are_looked_for_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ARMILLARY_PROMPTS", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="ARMILLARY_PROMPTS"):
        real_templates()
