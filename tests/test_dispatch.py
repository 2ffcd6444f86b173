"""Which backend a call takes, what is said about it, and what the environment decides at import."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fusednn
from fusednn import testing
from fusednn.core import native as _native
from fusednn.core import settings
from fusednn.core.dispatch import Implementation, Operation

PACKAGE = Path(fusednn.__file__).parent


@pytest.fixture
def operation():
    """An operation of three backends: cpu takes floats, triton is never worth it."""
    return Operation(
        "double",
        (
            Implementation(
                "cpu", lambda x: ("cpu", 2 * x), lambda x: [] if isinstance(x, float) else ["no float"]
            ),
            Implementation("triton", lambda x: ("triton", 2 * x), unprofitable=lambda x: ["slower here"]),
            Implementation("reference", lambda x: ("reference", 2 * x)),
        ),
    )


def test_auto_takes_the_first_that_can(operation):
    assert operation(1.0) == ("cpu", 2.0)
    assert operation(1) == ("reference", 2)


def test_a_named_backend_is_binding(operation):
    with fusednn.use_backend("reference"):
        assert operation(1.0)[0] == "reference"
    with fusednn.use_backend("triton"):  # unprofitable is auto's concern alone
        assert operation(1.0)[0] == "triton"
    with fusednn.use_backend("cpu"), pytest.raises(RuntimeError) as refused:
        operation(1)
    assert str(refused.value) == (
        "double: backend 'cpu' can't serve this call:\n  - no float\n"
        "Ask for 'auto' to let fusednn choose, or 'reference' for plain PyTorch."
    )
    with fusednn.use_backend("cuda"), pytest.raises(RuntimeError, match="double has no cuda implementation"):
        operation(1.0)


def test_every_reason_is_given():
    reasons = ["the first", "the second", "the third"]
    refusing = Operation("op", (Implementation("cpu", abs, lambda x: reasons),))
    for backend in ("cpu", "auto"):
        with fusednn.use_backend(backend), pytest.raises(RuntimeError) as refused:
            refusing(1)
        assert all(reason in str(refused.value) for reason in reasons)


def test_nesting_and_leaving_by_an_error(operation):
    with fusednn.use_backend("reference"):
        with fusednn.use_backend("cpu"):
            assert settings.backend() == "cpu"
            with pytest.raises(RuntimeError), fusednn.use_backend("triton"):
                raise RuntimeError
            with fusednn.use_backend("auto"):
                assert settings.backend() == "auto"
            assert settings.backend() == "cpu"
        assert settings.backend() == "reference"
    assert settings.backend() == "auto"


def test_one_context_entered_twice():
    context = fusednn.use_backend("reference")
    with context, context:
        assert settings.backend() == "reference"
    assert settings.backend() == "auto"


def test_as_a_decorator():
    @fusednn.use_backend("reference")
    def inside():
        return settings.backend()

    assert inside() == "reference"
    assert settings.backend() == "auto"


def test_threads_choose_for_themselves():
    seen = []
    with fusednn.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(settings.backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.parametrize("name", ["", "gpu", "CPU", "Reference"])
def test_unknown_names(name):
    with pytest.raises(
        ValueError, match=r"use_backend: got .*expected one of auto, reference, cpu, cuda, triton"
    ):
        fusednn.use_backend(name)


def test_the_fallback_is_said_once(caplog):
    refusing = Implementation("cpu", abs, lambda x: [] if isinstance(x, float) else ["no float"])
    fallible = Operation("double", (refusing, Implementation("reference", abs)))
    with caplog.at_level(logging.WARNING, "fusednn"):
        for _ in range(3):
            fallible(1)
        fallible(1.0)
    assert [r.getMessage() for r in caplog.records] == [
        "double: falls back to the reference, correct but slower (said once): cpu: no float"
    ]


def test_a_reference_that_was_measured_to_be_faster_is_no_fallback(operation, caplog):
    with caplog.at_level(logging.WARNING, "fusednn"):
        assert operation(1)[0] == "reference"
    assert not caplog.records


def test_explain_without_a_choice(operation):
    assert str(operation.explain(1.0)) == (
        "double: cpu (asked for: auto)\n"
        "  not triton: slower here\n"
        "  not reference: cpu comes first\n"
        "  not cuda: double has no cuda implementation"
    )


def test_explain_with_a_choice(operation):
    with fusednn.use_backend("reference"):
        assert str(operation.explain(1)) == (
            "double: reference (asked for: reference)\n"
            "  not cpu: no float\n"
            "  not cuda: double has no cuda implementation\n"
            "  not triton: reference was asked for"
        )
    with fusednn.use_backend("cpu"):
        text = str(operation.explain(1))
    assert text.startswith("double: no backend (asked for: cpu)\n")
    assert "  not cpu: no float" in text


def test_explain_shows_the_plan_of_the_backend_that_is_taken():
    plan = {"path": "two kernels", "tasks": 3}
    operation = Operation(
        "double",
        (
            Implementation("cpu", float, lambda x: [] if x > 0 else ["not positive"], plan=lambda x: plan),
            Implementation("reference", float),
        ),
    )
    assert str(operation.explain(1)) == (
        "double: cpu (asked for: auto)\n"
        "  plan: path two kernels, tasks 3\n"
        "  not reference: cpu comes first\n"
        "  not cuda: double has no cuda implementation\n"
        "  not triton: double has no triton implementation"
    )
    assert operation.explain(-1).plan == {}


def test_explain_a_model():
    model = torch.nn.Sequential(fusednn.GRUCell(3, 5), fusednn.GRUCell(5, 7))
    found = fusednn.explain(model, torch.randn(2, 3))
    assert [e.operation for e in found] == ["gru_cell_forward"] * 2
    assert {e.backend for e in found} == {"cpu" if _native.extension is not None else "reference"}
    assert str(found) == repr(found) == f"2 x {found[0]}"
    assert str(found).count("asked for: auto") == 1
    assert str(fusednn.explain(torch.nn.Linear(3, 5), torch.randn(2, 3))) == "no fusednn operation was called"


def test_explain_groups_equal_calls_wherever_they_come():
    kinds = (fusednn.LSTMCell(3, 3), fusednn.GRUCell(3, 3))

    def call(x):
        for _ in range(3):
            for cell in kinds:
                cell(x)

    found = fusednn.explain(call, torch.randn(2, 3))
    lstm, gru = str(found[0]), str(found[1])
    assert str(found) == f"3 x {lstm}\n3 x {gru}"
    assert len(found) == 6


def test_use_backend_takes_any_string_for_a_type_checker():
    assert str in typing.get_args(typing.get_type_hints(fusednn.use_backend.__init__)["name"])


def test_explain_a_refusal_and_pass_on_other_errors():
    cell = fusednn.LSTMCell(3, 5)
    with fusednn.use_backend("cuda"):
        (found,) = fusednn.explain(cell, torch.randn(2, 3))
    assert found.backend is None
    assert found.passed_over["cuda"]
    with pytest.raises(RuntimeError, match="inconsistent input_size"):
        fusednn.explain(cell, torch.randn(2, 4))


def test_a_state_of_another_dtype_falls_back():
    """What the kernels don't take still works, on the reference."""
    cell = fusednn.LSTMCell(3, 5).to(torch.bfloat16)
    x, h, c = torch.randn(2, 3).bfloat16(), torch.zeros(2, 5).bfloat16(), torch.zeros(2, 5)
    found = fusednn.explain(cell, x, (h, c))
    assert found[0].backend == "reference"


# What is decided at import needs a process of its own.

REPORT = """
import json, logging, sys
records = []
class Keep(logging.Handler):
    def emit(self, record): records.append(record.getMessage())
logging.getLogger("fusednn").addHandler(Keep())
import torch, fusednn
from fusednn.core import native as _native, settings
h = fusednn.GRUCell(3, 5)(torch.randn(2, 3))
json.dump({
    "native": _native.extension is not None,
    "reason": _native.unavailable_reason,
    "backend": settings.backend(),
    "isa": _native.extension.cpu.isa() if _native.extension is not None else None,
    "taken": fusednn.explain(fusednn.GRUCell(3, 5), torch.randn(2, 3))[0].backend,
    "records": records,
    "file": fusednn.__file__,
}, sys.stdout)
"""


def imported(package: Path = PACKAGE, **environment: str) -> dict:
    """Import fusednn in a fresh process and report."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEDNN_", "TRITON_"))} | environment
    env["PYTHONPATH"] = str(package.parent)
    found = subprocess.run([sys.executable, "-c", REPORT], env=env, capture_output=True, text=True)
    if found.returncode:
        raise ImportError(found.stderr)
    report = json.loads(found.stdout)
    assert Path(report["file"]).parent == package
    return report


def test_environment_chooses_the_backend():
    report = imported(FUSEDNN_BACKEND="reference")
    assert (report["backend"], report["taken"]) == ("reference", "reference")
    with pytest.raises(
        ImportError, match="ValueError: FUSEDNN_BACKEND: got 'gpu', expected one of auto, ref"
    ):
        imported(FUSEDNN_BACKEND="gpu")


@pytest.mark.usefixtures("native")
def test_environment_caps_the_instruction_set():
    assert imported(FUSEDNN_CPU_ISA="baseline")["isa"] == "baseline"
    best = _native.extension.cpu.best_isa()
    assert imported(FUSEDNN_CPU_ISA=best)["isa"] == best
    for name in ("sse9", *set(settings.INSTRUCTION_SETS) - set(testing.instruction_sets())):
        report = imported(FUSEDNN_CPU_ISA=name)
        assert report["isa"] == best
        assert any(f"FUSEDNN_CPU_ISA is ignored: isa: got {name}" in text for text in report["records"])


def test_environment_leaves_the_extension_out():
    report = imported(FUSEDNN_NATIVE="0")
    assert not report["native"]
    assert report["reason"] == "FUSEDNN_NATIVE=0"
    assert report["taken"] == "reference"
    assert not any("To build it" in text for text in report["records"]), "asked for, so nothing to mend"


def _copy_of_package(tmp_path: Path) -> Path:
    target = tmp_path / "fusednn"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


BROKEN = {
    "no record": (None, "was not built"),
    "an empty record": ("", "was not built"),
    "no JSON": ("{", "was not built"),
    "another kind of JSON": ("[]", "was not built"),
    "an incomplete record": ("{}", "was not built"),
    "another torch": (json.dumps({"torch": "1.13.1"}), r"built for torch 1\.13\.1, and this is torch"),
}


@pytest.mark.parametrize(("record", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_a_stale_extension_is_refused_in_words(tmp_path, record, reason):
    """Import works, says once why there are no kernels and what mends it, and takes the reference."""
    package = _copy_of_package(tmp_path)
    path = package / "_build_info.json"
    path.unlink(missing_ok=True)
    if record is not None:
        path.write_text(record)
    report = imported(package)
    assert not report["native"]
    assert re.search(reason, report["reason"])
    said = [text for text in report["records"] if "To build it: FUSEDNN_NATIVE=1 pip install" in text]
    assert len(said) == 1
    assert report["reason"] in said[0]
    assert report["taken"] == "reference"


def test_an_extension_that_takes_other_arguments_is_stale(monkeypatch, caplog):
    """What the compiled kernels take is compared with each op's arguments when it is declared."""
    for name in ("extension", "unavailable_reason"):
        monkeypatch.setattr(_native, name, getattr(_native, name))
    monkeypatch.setattr(_native, "cuda_modules", {"cuda": None})
    cpu = SimpleNamespace(signatures={"gelu": ["input", "approximate"]})
    monkeypatch.setattr(_native, "extension", SimpleNamespace(cpu=cpu))
    _native.compare("gelu", ("input", "approximate"))
    _native.compare("relu", ("input",))  # has no compiled kernel
    assert _native.extension is not None
    _native.compare("gelu", ("input",))
    assert _native.extension is None
    assert _native.cuda_modules == {}
    assert "stale: gelu: got arguments ('input', 'approximate'), expected ('input',)" in caplog.text


def test_an_extension_that_cannot_be_loaded(tmp_path):
    package = _copy_of_package(tmp_path)
    (package / "_build_info.json").write_text(json.dumps({"torch": torch.__version__}))
    for path in package.glob("_C.*"):
        path.unlink()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (package / f"_C{suffix}").write_bytes(b"not a library")
    report = imported(package)
    assert not report["native"]
    assert "can't be loaded" in report["reason"]
    assert report["taken"] == "reference"
