"""All families in the same time."""

import json

import pytest

from benchmarks import families


def test_families_go_on_where_they_were_interrupted(tmp_path, monkeypatch, capsys):
    """Equal time, so more images for the faster model; each run is kept as it ends, and the most accurate stands first."""
    speed = families.speed
    rates = {"vit_nano_patch2_8": 2000.0, "mixer_nano_patch2_8": 1000.0}
    monkeypatch.setattr(families, "speed", lambda *given: speed(*given) | {"images_per_second": rates[given[-1]]})
    arguments = ["--tiny", "--json", str(tmp_path / "f.json"), "--models", "vit_nano_patch2_8", "mixer_nano_patch2_8"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        calls, measure = [], families.measure

        def interrupted(*given):
            calls.append(given)
            if len(calls) > 1:
                raise KeyboardInterrupt
            return measure(*given)

        patch.setattr(families, "measure", interrupted)
        families.main(arguments)
    (kept,) = json.loads((tmp_path / "f.json").read_text())["results"]
    assert families.main([*arguments, "--picture", str(tmp_path / "f.png")]) == 0
    first, second = json.loads((tmp_path / "f.json").read_text())["results"]
    assert first == kept and [first["model"], second["model"]] == ["vit_nano_patch2_8", "mixer_nano_patch2_8"]
    assert [round(e["epochs"] * e["limit"], -1) for e in (first, second)] == [1200, 600]
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[0] for line in lines] == [e["model"] for e in sorted((first, second), key=lambda e: -e["test_accuracy"])]
    assert (tmp_path / "f.png").stat().st_size > 5000


@pytest.mark.parametrize("images, epochs, limit", [(10, 1, 10), (100, 1, 100), (150, 2, 75), (1000, 10, 100)])
def test_a_share_of_the_images(images, epochs, limit):
    assert families.share_of(images, 100) == {"epochs": epochs, "limit": limit}
