"""Kernels beside their floors."""

import json
from dataclasses import replace

from benchmark_runs import run

from benchmarks import kernels
from minivit.kernels import OPS


def test_kernels(tmp_path):
    printed = run("kernels", "layernorm", "permute", "--json", tmp_path / "kernels.json")
    result = json.loads((tmp_path / "kernels.json").read_text())
    timed = [(e["op"], e["direction"]) for e in result["results"]]
    assert timed == [(op, direction) for op in ("layernorm", "permute") for direction in ("forward", "backward")]
    assert all(e["seconds"] > 0 and e["bytes"] > 0 and e["launches"] > 0 for e in result["results"])
    assert result["memory_rate"] > 0 and "layernorm" in printed


def test_kernels_times_the_largest_case():
    for op in OPS.values():
        chosen = kernels.choose_case(op, tiny=False)
        assert kernels.size(op, chosen) == max(kernels.size(op, case) for case in op.cases)


def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys):
    op = OPS["layernorm"]

    def wrong(y, *arguments):
        op.forward.cpu(y, *arguments)
        y *= 1.001

    monkeypatch.setitem(OPS._loaded, "layernorm", replace(op, forward=replace(op.forward, cpu=wrong)))
    assert kernels.main(["layernorm", "--tiny"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed and "GB/s  of memory\nWRONG" in printed
