"""The run of a GPU's first minutes: stages that hang or fail, and the real ones by emulation."""

import json
import time
from pathlib import Path

import pytest
from cuda_emulation import emulator

from benchmarks import contact_products, contact_stages, first_contact
from benchmarks.first_contact import Stage
from minivit.kernels.cuda import compiled, nvrtc

PLANTED = {name: Stage(f"planted_stages:{name}", 20) for name in ("fine", "wrong", "fails", "hangs", "later")}
PLANTED |= {"hangs": Stage("planted_stages:hangs", 4), "later": Stage("planted_stages:fine", 20)}


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


def run(tmp_path, *options, stages=first_contact.STAGES):
    path = tmp_path / "found.json"
    status = first_contact.main(["--tiny", "--json", str(path), *options], stages)
    return status, json.loads(path.read_text())


def test_a_stage_that_hangs_or_fails_costs_itself_alone(planted, tmp_path, capsys):
    start = time.perf_counter()
    status, found = run(tmp_path, stages=PLANTED)
    stages = found["stages"]
    assert status == 1 and time.perf_counter() - start < 60
    ended = {name: stage["status"] for name, stage in stages.items()}
    assert ended == {"fine": "ended", "wrong": "ended", "fails": "failed (1)", "hangs": "stopped at its limit", "later": "ended"}
    assert stages["hangs"]["entries"] == [{"before": "it hangs"}] and stages["fails"]["entries"] == [{"before": "it fails"}]
    assert "ValueError: a stage that fails" in stages["fails"]["output"][-1]
    assert stages["later"]["entries"] == [{"tiny": True, "result": "a result"}] and 4 <= stages["hangs"]["seconds"] < 20
    rows = capsys.readouterr().out.splitlines()[-5:]
    assert "1 WRONG" in rows[1] and "stopped at its limit" in rows[3] and rows[4].endswith("a result")


def test_the_deadline_ends_the_run(planted, tmp_path):
    status, found = run(tmp_path, "--deadline", "5", stages={"hangs": Stage("planted_stages:hangs", 60), "later": PLANTED["later"]})
    assert status == 1 and found["stages"]["hangs"]["status"] == "stopped at its limit" and found["seconds"] < 20
    assert found["stages"]["later"]["status"].startswith("not begun")


@pytest.mark.slow
@pytest.mark.skipif(bool(emulator.unavailable()), reason=emulator.unavailable())
def test_every_stage_runs_emulated(tmp_path):
    status, found = run(tmp_path)
    assert status == 0 and list(found["stages"]) == list(first_contact.STAGES)
    for name, stage in found["stages"].items():
        assert stage["status"] == "ended" and stage["entries"], name
        assert not [entry for entry in stage["entries"] if entry.get("right") is False]
    assert found["seconds"] < 180
    added = [entry for entry in found["stages"]["choices"]["entries"] if entry.get("as", "beta 0") != "beta 0"]
    assert added and all(entry["beta 0"] > 0 and entry["beta 1 in place"] > 0 and entry["beta 1 out of place"] > 0 for entry in added)
    (profile,) = found["stages"]["profile 128"]["entries"]
    assert len(profile["by launch"]) == profile["launches"] > 30 and profile["moved GB"] > 0
    assert any("failed" in entry or "seconds" in entry for entry in found["stages"]["steps 128"]["entries"] if "mode" in entry)


def test_products_are_right_in_emulation_and_a_wrong_one_is_seen(cuda_runtime, monkeypatch):
    with contact_stages.device(True):
        setting = contact_stages.Setting(True, None, 10.0)
        assert all(entry.get("right", True) for entry in contact_products.products(setting))
        correct = contact_products.gemm
        monkeypatch.setattr(contact_products, "gemm", lambda c, a, b, **options: correct(c, a, b, **options | {"bias": None}))
        wrong = {entry["product"] for entry in contact_products.products(setting) if entry.get("right") is False}
    assert wrong == {case.name for case in contact_products.CASES if case.bias}


def test_choices_of_algorithms_are_kept_with_the_kernels_that_travel(cuda_runtime, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    if isinstance(cuda_runtime, emulator.Emulator):
        emulator.cublaslt_path()  # built before the cache is elsewhere
    folder = tmp_path / "kernels"
    kept = []
    for _ in range(2):
        status, found = run(tmp_path, "--stages", "products", "--kernels", str(folder))
        assert status == 0 and found["stages"]["products"]["status"] == "ended"
        kept.append({file.name: file.stat().st_mtime_ns for file in folder.rglob("*.algorithm")})
    assert len(kept[0]) > 10 and kept[0] == kept[1]


def test_kernels_that_were_compiled_elsewhere_are_taken(tmp_path, monkeypatch, capsys):
    try:
        nvrtc.version()
    except Exception as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(contact_stages, "NANO", contact_stages.NANO[:1])
    compiled._folder.cache_clear()
    monkeypatch.setattr(contact_stages, "PRECISIONS", ("bfloat16",))
    assert first_contact.main(["--compile", str(tmp_path), "--tiny"]) == 0
    number = int(capsys.readouterr().out.split()[0])
    files = list(tmp_path.rglob("*.cubin"))
    assert number == len(files) >= 20 and all("sm_90" in str(file) for file in files)
    for folder in {file.parent for file in files}:
        folder.chmod(0o777)  # as an archive may leave them
    first_contact.use_kernels(tmp_path)
    monkeypatch.setattr(compiled, "compile_kernel", lambda *arguments: pytest.fail("compiled again"))
    assert contact_stages.compile_kernels("sm_90", tiny=True) == number
    compiled._folder.cache_clear()
