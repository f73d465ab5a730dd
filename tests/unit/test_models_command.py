"""The table of public models."""

import json

from flashmoe_numba import cli
from reference.families import family_names


def test_every_family_has_a_line(capsys):
    assert cli.main(["models"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if not line.startswith(" ")}
    assert header.split()[0] == "family" and list(rows) == family_names()
    words = ("sigmoid + bias", "groups by top2_sum", "renormalised*", "scaled*", "silu*(g) u", "5.24.0", "yes")
    assert all(word in rows["deepseek_v3"] for word in words), rows["deepseek_v3"]
    assert "logit bias" in rows["gpt_oss"] and "clamp, u + 1" in rows["gpt_oss"]
    assert rows["nemotron_h"].split()[-1] == "no"  # it adds up in float32
    assert "    outside: a bias of the block's result" in lines


def test_json_is_all_that_the_files_say(capsys):
    assert cli.main(["models", "--json", "-"]) == 0
    families = {family["name"]: family for family in json.loads(capsys.readouterr().out)}
    assert list(families) == family_names()
    assert families["step3p7"]["experts"]["gate_limit"] == "$swiglu_limits|0.0"
    assert families["mixtral"]["tested"] == {"transformers": "5.24.0", "float64": True}
