from __future__ import annotations

import json

from transformers import AutoModelForCausalLM, LlamaForCausalLM

import mobillama.hf  # noqa: F401 registers the Auto classes
from conftest import run_cli


def test_quickstart_goes_from_text_to_samples_and_again_where_it_stopped(tmp_path):
    run = tmp_path / "quick"
    done = run_cli("quickstart", "--run", run, "--steps", 4)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "quickstart.json").read_text())
    assert done.stdout.splitlines()[-1] == str(run)
    assert "Kneser-Ney token 3-gram" in done.stdout
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert set(result["baselines"]) == {"gzip -9", "xz -9", "byte 3-gram", "Kneser-Ney token 3-gram"}
    assert 2.8 < result["baselines"]["byte 3-gram"] < 3.1
    assert 2 < result["held_out"]["bits_per_byte"] < 5
    assert result["held_out"]["bytes"] > 400_000
    assert len(result["samples"]) == 3
    assert result["environment"]["machine"]
    ours = AutoModelForCausalLM.from_pretrained(run / "export" / "mobillama")
    twin = AutoModelForCausalLM.from_pretrained(run / "export" / "llama")
    assert type(twin) is LlamaForCausalLM
    assert sum(p.numel() for p in ours.parameters()) == result["stored_parameters"]
    assert sum(p.numel() for p in twin.parameters()) == result["applied_parameters"]
    shown = run_cli("quickstart", "--run", run, "--steps", 4)
    assert "is finished" in shown.stderr
    assert shown.stdout == done.stdout
    (run / "quickstart.json").unlink()
    again = run_cli("quickstart", "--run", run, "--steps", 4)
    assert again.returncode == 0, again.stderr
    assert "all 4 steps are done" in again.stderr
    resumed = json.loads((run / "quickstart.json").read_text())
    assert (result["resumed"], resumed["resumed"]) == (False, True)
    assert resumed["held_out"] == result["held_out"]


def test_a_foreign_directory_is_not_taken_over(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    refused = run_cli("quickstart", "--run", tmp_path)
    assert refused.returncode == 2
    assert "choose another --run" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
