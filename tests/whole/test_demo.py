"""The embedded model: it is small, it has learnt to predict prose, and it is an ordinary exportable module."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
import torch
from torch.export import Dim, export

from ecospa_fx import demo
from ecospa_fx.demo import __main__ as command

PACKAGE_LIMIT = 4_000_000
DENSE_PERPLEXITY = 2.90


@pytest.fixture(scope="module")
def model() -> demo.ByteLM:
    return demo.load()


def test_the_package_data_is_small() -> None:
    names = {"weights.pt", "calibration.txt", "valid.txt"}
    data = [f for f in files("ecospa_fx.demo").iterdir() if f.is_file() and not f.name.endswith(".py")]
    assert {f.name for f in data} == names
    assert sum(len(f.read_bytes()) for f in data) <= PACKAGE_LIMIT


def test_the_model_predicts_authors_it_never_read(model: demo.ByteLM) -> None:
    held_out = demo.windows(demo.texts()[1], 512, 32)
    assert 1.5 < demo.perplexity(model, held_out) < DENSE_PERPLEXITY


def test_perplexity_of_a_wrong_model_is_bad() -> None:
    torch.manual_seed(0)
    held_out = demo.windows(demo.texts()[1], 128, 4)
    untrained = demo.perplexity(demo.ByteLM().eval(), held_out)
    assert untrained > 100
    shuffled = held_out[:, torch.randperm(held_out.shape[1])]
    assert demo.perplexity(demo.load(), shuffled) > 10


def test_perplexity_is_the_mean_over_all_bytes(model: demo.ByteLM) -> None:
    held_out = demo.windows(demo.texts()[1], 64, 9)
    with torch.no_grad():
        chances = model(held_out[:, :-1]).log_softmax(-1).gather(-1, held_out[:, 1:, None])
    assert demo.perplexity(model, held_out) == pytest.approx(chances.mean().neg().exp().item(), rel=1e-5)


def test_the_loss_is_of_the_input_shifted(model: demo.ByteLM) -> None:
    ids = demo.windows(demo.texts()[0], 63, 2)
    with torch.no_grad():
        logits = model(ids)
        expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean().neg()
    torch.testing.assert_close(demo.next_byte_loss(logits, (ids,), {}), expected, rtol=1e-5, atol=0)


def test_the_model_is_float32_in_eval_mode_with_one_tied_matrix(model: demo.ByteLM) -> None:
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.head.weight is model.embedding.weight
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 2_000_000


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 700), (3, 17)])
def test_any_batch_and_length(model: demo.ByteLM, batch: int, length: int) -> None:
    ids = torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0))
    assert model(ids).shape == (batch, length, 256)


def test_attention_is_causal(model: demo.ByteLM) -> None:
    ids = demo.encode("It was the best of times, it was the worst of times")[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[:, :20], model(ids[:, :20]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_export_with_symbolic_batch_and_length(dtype: torch.dtype) -> None:
    model = demo.load().to(dtype)
    dynamic = ((Dim.DYNAMIC, Dim.DYNAMIC),)
    exported = export(model, (torch.zeros(2, 64, dtype=torch.long),), dynamic_shapes=dynamic, strict=False).module()
    ids = torch.randint(256, (5, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(exported(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_texts_are_clean_prose() -> None:
    for text in demo.texts():
        assert 50_000 < len(text) < 130_000
        assert not any(line.startswith(("#", "|")) for line in text.splitlines())
        assert sum(c.isascii() for c in text) > 0.999 * len(text)


def test_the_texts_do_not_overlap() -> None:
    calibration, valid = demo.texts()
    assert not set(calibration.split("\n\n")) & set(valid.split("\n\n"))


def test_encode_is_utf8() -> None:
    ids = demo.encode("Zoë")
    assert ids.dtype == torch.long
    assert bytes(ids.tolist()).decode() == "Zoë"


def test_windows_are_disjoint_and_spread() -> None:
    text = "".join(map(chr, range(100)))
    cut = demo.windows(text, 4, 3)
    assert cut.tolist() == [list(range(s, s + 5)) for s in (0, 33, 66)]
    assert demo.windows(text, 9, 10).flatten().tolist() == list(range(100))


def test_too_many_windows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"11 windows of 9 \+ 1 bytes do not fit into a text of 100 bytes"):
        demo.windows("x" * 100, 9, 11)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "error", "status", "verdict"),
    [("second-order", None, 0, "(exact)"), ("magnitude", 1e-6, 1, "NOT EXACT")],
)
@pytest.mark.usefixtures("shallow", "brief")
def test_the_demonstration(
    method: str,
    error: float | None,
    status: int,
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "VALID_WINDOWS", 4)
    monkeypatch.setattr(command, "WINDOW", 64)
    if error is not None:
        monkeypatch.setattr(command, "exactness", lambda plan, ids: error)
    assert command.main(["--windows", "8", "--ratio", "0.25", "--method", method]) == status
    printed = capsys.readouterr().out
    assert verdict in printed
    dense, small = re.findall(r"^parameters +([\d,]+) +([\d,]+)$", printed, re.MULTILINE)[0]
    assert int(small.replace(",", "")) < 0.8 * int(dense.replace(",", ""))
    assert "blocked because" in printed
