"""Bars in terminals and in files, and a log line per stage."""

from __future__ import annotations

import io
import logging
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from ecospa_fx import progress
from ecospa_fx.progress import peak_memory, progress_bar, stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_has_a_line_for_each_state(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(progress_bar([5, 6, 7], "fisher")) == [5, 6, 7]
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("fisher:   0%|")
    assert last.startswith("fisher: 100%|")
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    assert list(progress_bar([5, 6, 7], "fisher")) == [5, 6, 7]
    shown = capsys.readouterr().err
    assert "\r" not in shown
    assert [line.split("%")[0][-3:] for line in shown.splitlines()][:4] == ["  0", " 33", " 67", "100"]


def test_a_terminal_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "REDRAW_EVERY", 0.0)
    assert list(progress_bar(iter([1, 2]), "surgeon", 2)) == [1, 2]
    shown = terminal.getvalue()
    assert (shown.count("\n"), shown.count("surgeon:  50%")) == (1, 1)
    assert "\x1b" not in shown  # no colours, whatever NO_COLOR says
    assert "1/2" in shown


def test_where_the_total_is_unknown_items_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar((n for n in range(2)), "fisher")) == [0, 1]
    assert capsys.readouterr().err.splitlines()[-1].startswith("fisher: 2it [")


def test_a_bar_starts_no_thread(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    for _ in progress_bar([1], "fisher"):
        assert threading.active_count() == before


def test_a_stage_that_ends_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "ecospa_fx.progress")
    monkeypatch.setattr(progress, "peak_memory", lambda: 3 * 2**29)
    with stage("curvature"):
        assert not caplog.records
    monkeypatch.setattr(progress, "peak_memory", lambda: None)
    with stage("surgeon"):
        pass
    with pytest.raises(KeyError), stage("solving"):
        raise KeyError
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert caplog.messages == ["curvature: 0.0 s, at most 1.50 GiB in use so far", "surgeon: 0.0 s"]


def test_memory_is_what_the_system_or_the_gpu_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 99)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    if sys.platform != "win32":
        of_process = peak_memory()
        assert of_process is not None
        assert 2**26 < of_process < 2**40
        usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=70))
        monkeypatch.setattr(progress, "resource", usage)
        for platform, bytes_used in (("linux", 70 * 2**10), ("darwin", 70)):
            monkeypatch.setattr(sys, "platform", platform)
            assert peak_memory() == bytes_used
    monkeypatch.setattr(progress, "resource", None)
    assert peak_memory() is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert peak_memory() == 99


def test_a_gpu_on_which_there_is_nothing_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    peak = peak_memory()
    assert peak is None if sys.platform == "win32" else peak
