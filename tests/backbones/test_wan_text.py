"""Prompts become the embeddings that diffusers' pipeline makes of them at 512 tokens; the cache gives them back or says
which file is damaged."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import diffusers.pipelines.wan.pipeline_wan as stock
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from backbones.wan import text as module
from backbones.wan.text import TOKENS, EmbeddingCache, TextEncoder, clean_prompt, folder_digest, load_encoder
from framework.weights import save_tensors
from tests.backbones.tiny_stack import NETWORK, TEXT_DIM, save_text, tiny_network
from tests.support import close, holds, normal, refuted

CPU = torch.device("cpu")
PROMPTS = ("a red square moves left", "", "  the &amp;lt;blue&amp;gt;\tdisc\n", "â€œa catâ€\x9d", "x" * 700)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A tiny text encoder and its tokenizer. Tests that change them copy it."""
    with TemporaryDirectory() as place:
        save_text(Path(place))
        yield Path(place)


def encoder(folder: Path, **more) -> TextEncoder:
    return TextEncoder(folder, torch.float32, **more)


def pipeline(text: TextEncoder, prompts: tuple[str, ...], length: int = TOKENS) -> Tensor:
    """What diffusers' Wan pipeline makes of prompts with the same encoder."""
    tokenizer, model = text._load()
    stage = WanPipeline(tokenizer, model, None, FlowMatchEulerDiscreteScheduler())  # pyright: ignore
    with torch.no_grad():
        return stage.encode_prompt(list(prompts), None, False, max_sequence_length=length, device=CPU)[0]


MARKS = st.sampled_from(("&amp;", "&amp;lt;", "&#28;", " ", "\u3000", "\x1c", "\x85", "\n", "ﬁ", "â€œ", "Ã©", "’"))
TEXTS = st.lists(st.one_of(MARKS, st.text(max_size=4)), max_size=8).map("".join)


def check_cleaning(clean, text: str) -> None:
    assert clean(text) == stock.prompt_clean(text)


def test_prompts_are_cleaned_as_in_the_reference() -> None:
    assert stock.is_ftfy_available(), "without ftfy diffusers leaves a step of the reference out"
    assert clean_prompt(PROMPTS[2]) == "the <blue> disc" and clean_prompt(PROMPTS[3]) == '"a cat"'
    holds(lambda text: check_cleaning(clean_prompt, text), TEXTS, examples=200)


@pytest.mark.parametrize("left_out", ["ftfy.fix_text", "html.unescape", "re.sub"])
def test_the_cleaning_check_sees_each_step_that_is_left_out(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    holder, name = left_out.split(".")

    def clean(text: str) -> str:
        with monkeypatch.context() as patch:
            own = SimpleNamespace(**{n: getattr(getattr(module, holder), n) for n in (name,)})
            setattr(own, name, (lambda *given: given[-1]))
            patch.setattr(module, holder, own)
            return clean_prompt(text)

    refuted(lambda text: check_cleaning(clean, text), TEXTS, examples=300)


def check_embeddings(text: TextEncoder) -> None:
    """512 rows: those of diffusers' pipeline up to the prompt's length, then zeros."""
    rows = text.encode(PROMPTS, CPU)
    assert rows.shape == (len(PROMPTS), TOKENS, TEXT_DIM)
    wanted = pipeline(text, PROMPTS)
    close(rows, wanted, atol=1e-5)
    assert torch.equal(rows.abs().sum(-1) > 0, wanted.abs().sum(-1) > 0)
    assert [int(n) for n in (rows.abs().sum(-1) > 0).sum(1)[[0, 1, 4]]] == [6, 1, 512]


def test_embeddings_are_those_of_the_stock_pipeline_at_512_tokens(folder: Path) -> None:
    check_embeddings(encoder(folder))


def test_the_embedding_check_sees_padding_that_is_not_zero_and_prompts_that_are_not_cleaned(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Padded(TextEncoder):
        def encode(self, prompts, device):
            rows = super().encode(prompts, device)
            return torch.where(rows.abs().sum(-1, keepdim=True) > 0, rows, 0.1)

    with pytest.raises(AssertionError):
        check_embeddings(Padded(folder, torch.float32))
    monkeypatch.setattr(module, "clean_prompt", str)
    with pytest.raises(AssertionError):
        check_embeddings(encoder(folder))


def test_226_rows_are_another_conditioning_than_512(folder: Path) -> None:
    """The rows themselves agree; but the network attends to its zero rows, of which there are 286 fewer, and a long
    prompt is cut earlier. 226 is what diffusers' pipeline takes where nobody says 512."""
    text, network = encoder(folder), tiny_network()
    rows, short = text.encode(PROMPTS[:1], CPU), pipeline(text, PROMPTS[:1], length=226)
    close(rows[:, :226], short, atol=1e-5)
    x, t = normal(0, 1, 16, 1, 4, 4, dtype=torch.float32), torch.tensor([500.0])
    with torch.no_grad():
        full, other = (network(x, t, embedding)[0] for embedding in (rows, short))
        again = network(x, t, torch.cat([short, torch.zeros(1, 286, TEXT_DIM)], 1))[0]
    assert float((full - other).abs().max()) > 1e-3
    close(full, again, atol=1e-5)
    assert NETWORK["text_dim"] == TEXT_DIM and len(stock.prompt_clean(PROMPTS[4])) > TOKENS


def test_a_prompt_that_is_cut_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = encoder(folder)
    text.encode(PROMPTS[:4], CPU)
    assert "is cut" not in capsys.readouterr().out
    text.encode(PROMPTS, CPU)
    assert "a prompt of 702 tokens is cut to 512, as in training: 'xxx" in capsys.readouterr().out


def test_a_prompt_has_one_embedding_in_any_company(folder: Path) -> None:
    alone = [encoder(folder).encode([prompt], CPU) for prompt in PROMPTS]
    assert torch.equal(encoder(folder).encode([*PROMPTS, PROMPTS[0]], CPU), torch.cat([*alone, alone[0]]))


# caches


def test_the_disk_gives_back_every_bit_and_the_weights_stay_unread(folder: Path, tmp_path: Path) -> None:
    first = encoder(folder, cache=tmp_path / "cache")
    rows = first.encode(PROMPTS, CPU)
    assert first.loaded and len(list((tmp_path / "cache").glob("*.safetensors"))) == len(PROMPTS)
    second = encoder(folder, cache=tmp_path / "cache")
    assert torch.equal(second.encode(PROMPTS, CPU), rows) and not second.loaded
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_memory_holds_a_bounded_number_of_prompts(folder: Path) -> None:
    text = encoder(folder, remembered=2)
    rows = text.encode(PROMPTS[:3], CPU)
    assert len(text._memory) == 2
    assert torch.equal(text.encode(PROMPTS[:3], CPU), rows)


@pytest.mark.parametrize(("keep", "loaded"), [("device", True), ("cpu", True), ("nowhere", False)])
def test_the_encoder_waits_where_it_is_told_to(folder: Path, keep: str, loaded: bool) -> None:
    text = encoder(folder, keep=keep)
    assert not text.loaded
    rows = text.encode(PROMPTS[:1], CPU)
    assert text.loaded is loaded and torch.equal(text.encode(PROMPTS[:1], CPU), rows)
    with pytest.raises(ValueError, match="keep_text_encoder must be one of device, cpu, nowhere"):
        encoder(folder, keep="here")


def cached(folder: Path) -> tuple[EmbeddingCache, Path]:
    cache = EmbeddingCache(folder, "digest")
    cache.write("a cat", normal(0, 4, TEXT_DIM).to(torch.bfloat16))
    return cache, cache.path("a cat")


def check_read(cache: EmbeddingCache, path: Path) -> None:
    """It is refused, on one line with its name."""
    with pytest.raises(ValueError, match="is a damaged embedding; delete it") as said:
        cache.read("a cat")
    assert str(path) in str(said.value) and "\n" not in str(said.value)


def test_a_damaged_embedding_is_refused_by_name_whatever_the_damage(tmp_path: Path) -> None:
    cache, path = cached(tmp_path)
    rows = cache.read("a cat")
    assert rows is not None and rows.dtype == torch.bfloat16 and cache.read("another") is None
    whole = path.read_bytes()
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        check_read(cache, path)
    for length in (0, 4, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        check_read(cache, path)
    for place in (9, 30, len(whole) - 5, len(whole) - 1):  # header and numbers
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        check_read(cache, path)
    save_tensors(path, {"embedding": rows})
    check_read(cache, path)
    other = cache.path("a dog")
    cache.write("a dog", rows)
    shutil.copy(other, path)
    check_read(cache, path)


def test_a_write_that_is_cut_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(path: Path, *rest) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_tensors", cut)
    cache = EmbeddingCache(tmp_path, "digest")
    with pytest.raises(OSError, match="No space"):
        cache.write("a cat", torch.zeros(1, 2))
    assert not list(tmp_path.iterdir()) and cache.read("a cat") is None


def test_another_encoder_tokenizer_or_precision_is_another_entry(folder: Path, tmp_path: Path) -> None:
    changed = {}
    for part, file in (("tokenizer", "tokenizer_config.json"), ("text_encoder", "model.safetensors")):
        copy = tmp_path / part
        shutil.copytree(folder, copy)
        data = bytearray((copy / part / file).read_bytes())
        data[-1] ^= 1
        (copy / part / file).write_bytes(bytes(data))
        changed[part] = folder_digest(copy)
    assert len({folder_digest(folder), *changed.values()}) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WHOLE", 8192)  # larger files are looked at in pieces
        assert len({folder_digest(place) for place in (folder, tmp_path / "text_encoder")}) == 2
    texts = [TextEncoder(folder, dtype, tmp_path / "cache") for dtype in (torch.float32, torch.bfloat16)]
    first, second = (text.cache.path("a cat") for text in texts if text.cache is not None)
    assert first != second and texts[1].encode(["a cat"], CPU).dtype == torch.bfloat16
    assert second.is_file() and not first.is_file()


# files


def test_a_partial_encoder_is_refused_and_a_missing_one_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "stack"
    shutil.copytree(folder, copy)
    path = copy / "text_encoder" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if "block.1" not in name}  # noqa: SIM118
    save_tensors(path, tensors, {"format": "pt"})
    with pytest.raises(ValueError, match=r"text_encoder lacks \d+ tensors of its UMT5 encoder: .*block\.1"):
        load_encoder(copy / "text_encoder", torch.float32)
    path.write_bytes(b"no tensors")
    for load, place in ((partial(load_encoder, dtype=torch.float32), path.parent), (module.load_tokenizer, tmp_path)):
        with pytest.raises(ValueError, match="holds no") as said:
            load(place)
        assert "\n" not in str(said.value)
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(ValueError, match=r"no subfolder 'tokenizer'; give wan\.generator\.text_folder"):
        encoder(copy)


def test_an_encoder_that_overflows_is_found(folder: Path) -> None:
    text = encoder(folder)
    _, model = text._load()
    with torch.no_grad():
        model.shared.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"non-finite numbers for 'a cat' .* wan\.generator\.text_dtype"):
        text.encode(["a cat"], CPU)
