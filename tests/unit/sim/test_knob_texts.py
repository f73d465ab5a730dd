"""What knobs say of themselves: every default of every policy has a source, or is called an assumption or a choice."""

from dataclasses import dataclass, fields

import pytest

from sim.drafting.knob_texts import NOT_STATED, KnobText, knob_texts
from sim.drafting.knobs import PolicyKnobs
from sim.policies import POLICY_NAMES, make_knobs
from sim.policies.outside import TEMPLATE


@pytest.mark.parametrize("policy", [*POLICY_NAMES, str(TEMPLATE)])
def test_every_default_is_sourced_or_marked(policy):
    kind = type(make_knobs(policy, {}))
    texts = knob_texts(kind)
    assert list(texts) == [field.name for field in fields(kind)]
    for name, text in texts.items():
        assert text.meaning, f"{name} says nothing"
        assert text.default != NOT_STATED, f"{name} does not say where its default is from"
        assert not (name.endswith("_ns") and text.default == "choice"), f"{name} is a time, which nobody may choose"


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_nothing_is_said_of_knobs_that_are_none(policy):
    """Entries of the docstring begin at its own indent; what goes on is further in."""
    knobs = make_knobs(policy, {})
    lines = [line for line in type(knobs).__doc__.splitlines() if line.startswith("    ") and line[4:5].strip()]
    named = {name for line in lines for name in line.strip().partition(":")[0].split(", ")}
    assert named == {field.name for field in fields(knobs)} - {field.name for field in fields(PolicyKnobs)}


def test_entries_by_hand():
    @dataclass(frozen=True, kw_only=True)
    class Knobs(PolicyKnobs):
        """Some.

        Args:
            one, two: of a: thing,
                and more. Default: assumption: as
                others do.
            three: bare.
            rate: told again. Default: choice.

        Raises:
            four: no knob. Default: choice.
        """

        one: int = 1
        two: int = 2
        three: int = 3
        four: int = 4

    texts = knob_texts(Knobs)
    assert texts["one"] == texts["two"] == KnobText("of a: thing, and more", "assumption: as others do")
    assert texts["three"] == KnobText("bare", NOT_STATED)
    assert texts["rate"] == KnobText("told again", "choice")
    assert texts["four"] == KnobText("", NOT_STATED)
    assert texts["token_block"].default.startswith("assumption: what this project's kernel has")


def test_knobs_that_say_nothing_have_texts_that_say_so():
    @dataclass(frozen=True, kw_only=True)
    class Knobs(PolicyKnobs):
        one: int = 1

    assert knob_texts(Knobs)["one"] == KnobText("", NOT_STATED)
