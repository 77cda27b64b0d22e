"""The page as a file: what is in it, and what cannot be. What it computes is tested in tests/page."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

import fastdiff as fd
from fastdiff import page
from fastdiff.cli import main
from fastdiff.errors import ArgumentError, DataError, TrainingError


def payload(html):
    return json.loads(re.search(r'<script type="application/json" id="payload">(.*?)</script>', html, re.DOTALL)[1])


@pytest.fixture(scope="module")
def model():
    return fd.Diffusion(seed=5, backend="numpy").fit(
        fd.data.harmonic_curves(40, points=12), steps=2, batch=8, progress=False
    )


def test_it_is_small_and_loads_nothing(tmp_path, capsys):
    assert main(["page", "-o", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text("utf-8")
    assert 200_000 < len(html.encode()) < 500_000
    assert "kB, open it in a browser" in capsys.readouterr().out
    assert not re.findall(r'(?:src|href)="(?!#|data:)|url\(|@import|\bfetch\(|import\(', html)
    assert "{{" not in html.replace("${{", "")
    assert "<noscript>" in html


def test_its_tables_are_the_librarys():
    found = payload(page.document())
    schedule = fd.Schedule.sigmoid(200, beta_start=1e-5, beta_end=0.1)
    assert found["signal"] == schedule.signal.tolist()
    for name, steps in (("unipc", 10), ("ddpm", 200), ("deis", 20)):
        table = fd.samplers.named(name, schedule, steps, prediction="v")
        assert found["samplers"][name]["tables"][str(steps)] == np.array(table.rows).tolist()


def test_a_model_travels_inside_and_its_data_do_not(tmp_path, model):
    assert page.document(model, name="</script>").count("</script>") == 3
    model.save(tmp_path / "<b>.safetensors")
    assert main(["page", str(tmp_path / "<b>.safetensors"), "-o", str(tmp_path / "m.html")]) == 0
    found = payload((tmp_path / "m.html").read_text("utf-8"))
    assert found["model"]["name"] == "<b>.safetensors"
    assert found["auto"] == ["dpmpp_2m", 50]
    assert found["families"] == []
    flat = np.frombuffer(base64.b64decode(found["model"]["arrays"]["flat"]), "<f4")
    assert np.array_equal(flat, model.denoiser().flat)
    drawn = np.frombuffer(base64.b64decode(found["model"]["samples"]), "<f8").reshape(-1, 12)
    assert np.array_equal(drawn, model.sample(24))


def test_what_a_page_cannot_carry(tmp_path, monkeypatch, model, capsys):
    pictures = fd.Diffusion(fd.UNet((8, 8, 1), channels=(4, 4), blocks=1, T=5), backend="numpy")
    pictures.fit(np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1), steps=1, batch=2, progress=False)
    with pytest.raises(ArgumentError, match=r"model.*pictures.*--gif"):
        page.document(pictures)
    with pytest.raises(TrainingError, match="not been trained"):
        page.document(fd.Diffusion())
    shaped = fd.Diffusion(noise_shape=fd.NoiseShape.dense(np.diag(np.arange(1.0, 13))), backend="numpy")
    shaped.fit(fd.data.harmonic_curves(40, points=12), steps=1, progress=False)
    with pytest.raises(ArgumentError, match="white noise"):
        page.document(shaped)
    along = fd.Diffusion(fd.UNet((12,), channels=(4, 4), blocks=1, T=5), backend="numpy")
    along.fit(fd.data.harmonic_curves(40, points=12), steps=1, batch=4, progress=False)
    with pytest.raises(ArgumentError, match=r"network UNet, wants a perceptron.*fd\.MLP\(12\).*fastdiff sample .*gif"):
        page.document(along)
    monkeypatch.setattr(page, "MOST_BYTES", 100_000)
    with pytest.raises(ArgumentError, match=r"weights of 0\.\d MB.*at most 0\.1 MB"):
        page.document(model)
    path = tmp_path / "m.safetensors"
    model.save(path)
    assert main(["page", str(path), "-o", str(tmp_path / "m.html")]) == 2
    assert "weights of" in capsys.readouterr().err
    assert not (tmp_path / "m.html").exists()


def test_where_it_cannot_be_written(tmp_path, capsys):
    with pytest.raises(ArgumentError, match=r"\.html"):
        page.save(tmp_path / "page.txt")
    with pytest.raises(DataError, match="cannot be written"):
        page.save(tmp_path / "missing" / "page.html")
    assert main(["page", "-o", str(tmp_path / "missing" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_every_module_is_joined():
    known = {path.stem for path in Path(page.__file__).parent.glob("*.js")}
    assert known == {*page.COMPUTING, *page.SHOWING}
    joined = page._inlined("b", 'import {\n  x,\n} from "./a.js";\nexport const y = x;\nexport class Z {}\n')
    assert (
        joined
        == "modules.b = (() => {\nconst {\n  x,\n} = modules.a;\nconst y = x;\nclass Z {}\n\nreturn { y, Z };\n})();\n"
    )
