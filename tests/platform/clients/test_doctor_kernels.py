"""`loraplex doctor --kernels`: what the self-test's process says, as lines of the report."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplex.platform.cli import doctor

Answers = Callable[[str, str], None]
SOUND = {"sound": True, "shapes": ["llama-3-8b"], "findings": [], "seconds": 4.5, "versions": {}}
WRONG = {"operation": "swiglu", "dtype": "bfloat16", "text": "off by 7", "remedied": False}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """The process ends with this output."""

    def give(stdout: str, stderr: str = "") -> None:
        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            assert command[1:3] == ["-m", "loraplex.kernels.gpu.self_test"]
            return subprocess.CompletedProcess(command, 0, stdout, stderr)

        monkeypatch.setattr(doctor.subprocess, "run", run)

    return give


def test_sound_kernels_are_one_line(answers: Answers) -> None:
    answers("a log line\n" + json.dumps(SOUND), "")
    (finding,) = doctor.check_kernels()
    assert (finding.verdict, finding.value) == ("ok", "right for llama-3-8b (4.5 s)")


def test_every_wrong_kernel_is_a_line(answers: Answers) -> None:
    remedied = {**WRONG, "operation": "attention", "remedied": True}
    answers(json.dumps({**SOUND, "sound": False, "findings": [WRONG, remedied]}), "")
    bad, note = doctor.check_kernels()
    assert (bad.what, bad.verdict, bad.advice) == ("kernel swiglu", "bad", "off by 7")
    assert (note.what, note.verdict) == ("kernel attention", "note")


def test_without_a_gpu_it_is_a_note(answers: Answers) -> None:
    answers(json.dumps({"error": "no CUDA device"}), "")
    (finding,) = doctor.check_kernels()
    assert (finding.verdict, finding.advice) == ("note", "no CUDA device")


@pytest.mark.parametrize("stdout", ["", "Segmentation fault"])
def test_a_process_that_dies_is_bad(answers: Answers, stdout: str) -> None:
    answers(stdout, "first\nImportError: no triton")
    (finding,) = doctor.check_kernels()
    assert (finding.verdict, finding.advice) == ("bad", "ImportError: no triton")


def test_a_process_that_hangs_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> Any:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(doctor.subprocess, "run", run)
    (finding,) = doctor.check_kernels()
    assert finding.verdict == "bad"
    assert "600 s" in finding.advice


def test_the_flag_asks_for_it(cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = {"threads": 2, "device": "cpu", "isa": "AVX512", "gpu": None, "backend": "native"}
    monkeypatch.setattr(doctor, "probe", lambda: facts)
    lines = [doctor.Finding("kernel self-test", "failed", "bad", "why")]
    monkeypatch.setattr(doctor, "check_kernels", lambda: iter(lines))
    command = ("doctor", "--port", 0, "--data-dir", tmp_path, "--json")
    assert cli(*command).exit_code == 0
    done = cli(*command, "--kernels")
    assert done.exit_code == 1
    assert done.json["findings"][-1]["what"] == "kernel self-test"


def test_the_real_process_answers_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (finding,) = doctor.check_kernels()
    assert finding.verdict == "note"
    assert "no CUDA device" in finding.advice
