"""A schedule is one file of `sim/policies/`, and uses no other. Floors of `sim` are in tests/unit/test_imports.py."""

import pytest
from floors import ROOT, arrows

from sim.policies import POLICY_NAMES

FOLDER = ROOT / "sim" / "policies"


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_no_policy_uses_another(policy):
    names = {name.rpartition(".")[2] for name in arrows(ROOT, "sim")[f"sim.policies.{policy}"]}
    assert not names & set(POLICY_NAMES)


def test_every_file_with_a_schedule_is_a_policy():
    files = FOLDER.glob("[!_]*.py")
    found = {file.stem for file in files if "\ndef build(" in file.read_text(encoding="utf-8")}
    assert found == {*POLICY_NAMES, "template"}
