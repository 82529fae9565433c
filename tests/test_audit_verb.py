"""`strop audit` and `strop train sae`: what they write, print, exit with and refuse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from browser import chromium, complaints, requests, show
from report_study import make_study
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from test_cli import save_tiny, strop_

from strop import load
from strop.audit.audit_report import write_report
from strop.audit.sae import CONFIG, SAE, WEIGHTS
from strop.auditing import auditor, training
from strop.tune.report import view

M = 128
WORDS = ("alpha", "beta", "gamma", "delta", "return", "lambda")
TEXT = "\n".join(f"{WORDS[i % 6]} <b>{i * i % 97}</b> {WORDS[i * 5 % 6]}" for i in range(700))
HARSH = "strop: 1\nweights: {rtn: {bits: 2}}\n"


def laid(at: Path) -> Path:
    """A tiny model with large weights, an autoencoder of it, a text and two recipes."""
    save_tiny(at / "model", initializer_range=0.3)
    draw = torch.Generator().manual_seed(0)
    directions = torch.randn(M, 32, generator=draw)
    directions /= directions.norm(dim=1, keepdim=True)
    sae = SAE(directions.T.contiguous(), torch.zeros(M), directions, torch.zeros(32), 0, "topk", 8)
    sae.save(at / "sae")
    (at / "text.txt").write_text(TEXT)
    (at / "harsh.yaml").write_text(HARSH)
    (at / "cached.yaml").write_text(
        "strop: 1\nkv: {kvarn: {bits_k: 2, bits_v: 2, sinks: 0, tail: 32, group: 32}}\n"
        "decode: {prompt_lookup: {}}\n"
    )
    return at


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return laid(tmp_path_factory.mktemp("audited"))


def told_by(result: Any) -> str:
    """What a command said, on one line."""
    return " ".join(result.output.split())


def audit(place: Path, out: Path, after: str = "harsh.yaml", *words: object, code: int = 0) -> Any:
    given = ["--data", place / "text.txt", "--sae", place / "sae", "--tokens", 6000, "--out", out]
    return strop_("audit", place / "model", place / after, *given, *words, code=code)


@pytest.fixture(scope="module")
def done(place, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("done") / "audit"
    audit(place, out)
    return out


def test_the_three_files_agree(done):
    told = json.loads((done / "audit.json").read_text())
    table = pyarrow.parquet.read_table(done / "features.parquet")
    rho = table["rho"].to_numpy()
    assert told["features"]["active"] == table.num_rows == len(rho) > M // 2
    assert told["survival"]["survived"][0] == pytest.approx((rho > 0.9).mean())
    assert told["worst"][0]["rho"] == pytest.approx(rho.min()) and rho.min() < 0.9
    assert sum(told["histogram"]["counts"]) == len(rho)
    about = json.loads(table.schema.metadata[b"strop"])
    assert about["after"]["label"] == told["after"]["label"] == "rtn int2"
    assert about["regime"]["first_token"] == "no first token" and told["gate"] is None
    page = (done / "report.html").read_text()
    assert f"Feature {told['worst'][0]['feature']}: correlation" in page
    assert "&lt;b&gt;" in page and "<b>9" not in page.partition("<main>")[2].partition("</main>")[0]


def test_too_few_survivors_are_exit_code_1(place, tmp_path):
    output = told_by(audit(place, tmp_path / "out", "harsh.yaml", "--fail-under", "99%", code=1))
    assert "features may survive, below the 99 % asked for" in output and "It does not pass" in output


def test_a_second_run_replaces_the_files_and_an_unchanged_model_keeps_all(place, tmp_path):
    first = audit(place, tmp_path, "harsh.yaml", "--json")
    again = audit(place, tmp_path, "model", "--json", "--fail-under", "0.99")
    told = [json.loads(result.stdout) for result in (first, again)]
    assert told[1]["survival"]["survived"] == [1, 1, 1] and told[1]["passed"] is True
    assert told[1]["loss"]["rise"] == [0, 0, 0] and told[1]["worst"] == []
    assert json.loads((tmp_path / "audit.json").read_text()) == told[1] != told[0]
    assert "Every active feature survived" in (tmp_path / "report.html").read_text()


def test_a_lossy_cache_is_felt_and_drafts_are_left_out(place, tmp_path):
    told = json.loads(audit(place, tmp_path, "cached.yaml", "--json", "--length", 256).stdout)
    assert told["survival"]["mean"][0] < 0.99999 and told["loss"]["rise"][0] != 0
    assert any("decode slot was left out" in note for note in told["notes"])


def test_controls_stand_beside_it(place, tmp_path):
    output = told_by(audit(place, tmp_path, "harsh.yaml", "--controls", "--tokens", 3000))
    told = json.loads((tmp_path / "audit.json").read_text())
    names = [row["name"] for row in told["discordance"]]
    assert names[1:] == [
        "permuted pairing",
        "untrained dictionary",
        "raw neurons",
        "noise of the same size in the weights",
    ]
    assert told["discordance"][1]["survived"][0] < 0.05
    assert all(row["rise"][0] == told["loss"]["rise"][0] for row in told["discordance"][:4])
    assert told["discordance"][4]["rise"][0] != told["loss"]["rise"][0]
    assert all(words in output for words in (*names[:4], "Loss rise, nats", "First-token gate: not needed"))
    rates = [f"{100 * told['discordance'][row]['rate']:.2f}%" for row in (0, 2)]
    assert f"autoencoder fire at {rates[0]} of the tokens on average; untrained" in output
    assert f"untrained dictionary {rates[1]}, raw neurons 50.0%." in output


def test_a_poor_autoencoder_is_told(place, tmp_path):
    sae = SAE.load(place / "sae")
    replace(sae, w_dec=torch.zeros_like(sae.w_dec)).save(tmp_path / "sae")
    assert "its features say little" in told_by(
        audit(place, tmp_path, "harsh.yaml", "--sae", tmp_path / "sae")
    )


def other(place: Path, at: Path, **changes: Any) -> Path:
    return save_tiny(at / "other", **changes)


def shuffled_vocabulary(at: Path) -> None:
    told = json.loads((at / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (at / "tokenizer.json").write_text(json.dumps(told))


def test_what_cannot_be_compared_is_told_in_one_sentence(place, tmp_path):
    def refused(after: Path | str, *words: object) -> str:
        given = ["--data", place / "text.txt", "--out", tmp_path / "out", *words]
        output = told_by(strop_("audit", place / "model", after, *given, code=2))
        assert not (tmp_path / "out").exists()
        return output

    sae = ("--sae", place / "sae")
    deep = save_tiny(tmp_path / "deep", num_hidden_layers=3)
    assert "another depth" in refused(deep, *sae)
    shutil.copytree(place / "model", tmp_path / "shuffled")
    shuffled_vocabulary(tmp_path / "shuffled")
    assert "another vocabulary" in refused(tmp_path / "shuffled", *sae)
    SAE.load(place / "sae").save(tmp_path / "narrow")
    tensors = SAE.load(place / "sae")
    replace(
        tensors, w_enc=tensors.w_enc[:16].contiguous(), w_dec=tensors.w_dec[:, :16], b_dec=tensors.b_dec[:16]
    ).save(tmp_path / "narrow")
    assert "width 16" in refused(place / "harsh.yaml", "--sae", tmp_path / "narrow")
    assert "reads layer 0 and --layer says 1" in refused(place / "harsh.yaml", *sae, "--layer", 1)
    replace(tensors, layer=7).save(tmp_path / "high")
    assert "layers 0 to 1, and layer 7" in refused(place / "harsh.yaml", "--sae", tmp_path / "high")
    tensors.w_dec[5, 0] = torch.nan
    tensors.save(tmp_path / "spoilt")
    assert "not finite (feature 5)" in refused(place / "harsh.yaml", "--sae", tmp_path / "spoilt")
    assert "no readable cfg.json" in refused(place / "harsh.yaml", "--sae", tmp_path)
    (tmp_path / "short.txt").write_text("x" * 250)
    assert "less than one sequence of 256" in refused(
        place / "harsh.yaml", *sae, "--data", tmp_path / "short.txt"
    )
    swapped = strop_("audit", place / "harsh.yaml", place / "model", "--out", tmp_path / "out", code=2)
    assert "is a recipe: name its model" in told_by(swapped)


def train(place: Path, out: Path, *words: object, code: int = 0) -> Any:
    given = ["--data", place / "text.txt", "--features", 64, "--k", 4, "--tokens", 16384, "--out", out]
    return strop_("train", "sae", "--target", place / "model", *given, *words, code=code)


@pytest.mark.parametrize("form", ["topk", "l1"])
def test_a_trained_autoencoder_explains_and_a_killed_run_ends_in_the_same_bits(
    place, tmp_path, monkeypatch, form
):
    told = json.loads(train(place, tmp_path / "whole", "--form", form, "--json").stdout)
    assert told["quality"]["explained_variance"] > 0.2 and told["quality"]["loss_recovered"] > 0.2
    (tmp_path / "whole" / "work").mkdir()  # as a kill at the very end leaves it
    assert json.loads(train(place, tmp_path / "whole", "--form", form, "--json").stdout) == told
    assert not (tmp_path / "whole" / "work").exists()
    heard = []

    def killed(what: str, share: float) -> None:
        heard.append(share)
        if 0 < share < 1 and len(heard) > 2:
            raise KeyboardInterrupt

    settings = training.Settings(dtype="fp32")
    given = {"form": form, "m": 64, "k": 4, "l1": 1.0, "tokens": 16384}
    with pytest.raises(KeyboardInterrupt):
        training.train(
            str(place / "model"), place / "text.txt", tmp_path / "cut", settings, given, False, killed, print
        )
    assert not (tmp_path / "cut" / CONFIG).exists() and list((tmp_path / "cut" / "work").iterdir())
    train(place, tmp_path / "cut", "--form", form)
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_folder_of_another_run_is_refused_or_replaced(place, tmp_path):
    train(place, tmp_path / "sae")
    before = (tmp_path / "sae" / WEIGHTS).read_bytes()
    assert "holds a run with other settings" in told_by(train(place, tmp_path / "sae", "--seed", 1, code=2))
    assert (tmp_path / "sae" / WEIGHTS).read_bytes() == before
    train(place, tmp_path / "sae", "--seed", 1, "--resume")
    assert (tmp_path / "sae" / WEIGHTS).read_bytes() != before


def test_an_autoencoder_is_trained_where_none_is_given(place, tmp_path, monkeypatch):
    monkeypatch.setattr(auditor, "LEARNT", 8192)
    words = ["--data", place / "text.txt", "--out", tmp_path / "out", "--json", "--layer", 1]
    result = strop_("audit", place / "model", place / "harsh.yaml", *words)
    assert "is trained into" in result.stderr
    told = json.loads(result.stdout)
    assert told["sae"]["name"].endswith("sae") and told["sae"]["layer"] == 1
    assert SAE.load(tmp_path / "out" / "sae").m == told["sae"]["features"] == 16 * 32


def test_the_bundled_autoencoder_is_found_by_its_model():
    base = load("zoo:coder", "fp32")
    found = auditor.Auditor(base, None, Path("unused"), auditor.Settings(tokens=2048))
    assert found.sae_name == "zoo:coder-sae" and found.quality["loss_recovered"] > 0.95
    assert found.quality["explained_variance"] > 0.9 and not found.trained


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_draws_its_charts_and_names_the_damaged(done, width):
    with chromium() as driver:
        show(driver, done / "report.html", width, dark=width == 390)
        WebDriverWait(driver, 20).until(
            lambda d: len(d.find_elements(By.CSS_SELECTOR, "#discordance .points .point")) == 1
        )
        bars = driver.find_elements(By.CSS_SELECTOR, "#rho .bars .point")
        assert len(bars) == 40
        told = json.loads((done / "audit.json").read_text())
        named = [title.text for title in driver.find_elements(By.CSS_SELECTOR, ".damaged h3")]
        assert named == [f"Feature {f['feature']}: correlation {f['rho']:.2f}" for f in told["worst"]]
        assert driver.find_elements(By.CSS_SELECTOR, "mark")
        assert driver.execute_script("return document.documentElement.scrollWidth") == width
        assert complaints(driver) == [] and requests(driver) == []


def test_hostile_text_and_missing_numbers_stay_in_their_place(done, tmp_path):
    told = json.loads((done / "audit.json").read_text())
    told["after"]["label"] = told["before"]["name"] = "<img src=x onerror=alert(1)>"
    told["worst"][0]["before"] = [{"left": "</script>", "token": "  ", "right": "<i>\n x", "strength": 1.0}]
    told["worst"][0]["rho_firing"] = None
    told["loss"]["rise"][1:] = [None, None]
    write_report(told, tmp_path / "report.html")
    body = (tmp_path / "report.html").read_text().partition("<main>")[2].partition("</main>")[0]
    assert "<img" not in body and "</script>" not in body and "<i>" not in body
    assert "\N{OPEN BOX}\N{OPEN BOX}" in body and "None" not in body


def test_tune_tells_what_features_are_kept(place, tmp_path, monkeypatch):
    monkeypatch.setattr(auditor, "LEARNT", 8192)
    monkeypatch.setattr("strop.audit.survival.SURVIVED", 0.99999)  # 8 bits cost a tiny model less
    words = [
        "--data",
        place / "text.txt",
        "--methods",
        "rtn,prompt_lookup",
        "--context",
        64,
        "--max-drop",
        "90%",
    ]
    strop_("tune", place / "model", *words, "--out", tmp_path, "--json", "--audit")
    page = (tmp_path / "report.html").read_text()
    assert "Features kept" in page
    told = json.loads(
        strop_("tune", place / "model", *words, "--out", tmp_path, "--json", "--audit", "--resume").stdout
    )
    rows = {row["label"]: row["audit"] for row in told["rows"] if row["status"] == "measured"}
    assert rows["as is"] == rows["prompt_lookup"] == {"survived": 1, "interval": [1, 1]}
    by_bits = [rows[name]["survived"] for name in rows if name.startswith("rtn") and "+" not in name]
    assert 0 <= min(by_bits) < 1 and "--audit" in told["settings"]["command"]
    assert "--audit True" not in told["settings"]["command"]


def test_a_recipe_that_keeps_the_loss_and_loses_features_is_warned_of():
    study = make_study()
    within = [row for row in study["rows"] if row["within_drop"]]
    within[1]["audit"] = {"survived": 0.71, "interval": [0.7, 0.72]}
    told = view(study)
    assert len(told["warnings"]) == 1 and f"{within[1]['label']} (71.0" in told["warnings"][0]
    within[1]["audit"]["survived"] = 0.95
    assert view(study)["warnings"] == []
