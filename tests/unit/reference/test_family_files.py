"""Files of families with mistakes: each is named, with its section."""

import pytest

from reference.families import read_family
from reference.families.layer_config import layer_config
from reference.families.values import resolve

FILE = """
model_type = "my_moe"
[sizes]
hidden = "$width"
ffn = [5, 11]
num_experts = 8
num_topk = 2
[router]
[experts]
activation = "silu"
gated = true
[shared]
ffn = 3
"""
MODEL = {"width": 7}


def read(tmp_path, *, old="", new=""):
    (tmp_path / "my.toml").write_text(FILE.replace(old, new) if old else FILE)
    return read_family(tmp_path / "my.toml")


def test_without_a_mistake(tmp_path):
    config = layer_config(read(tmp_path), MODEL, 1, num_tokens=4, num_ranks=1)
    assert (config.hidden, config.ffn, config.shared_ffn) == (7, 11, 3)


@pytest.mark.parametrize(("old", "new", "message"), [
    ("[router]", "[disk]\n[router]\nbias = true", r"\[router\] has unknown keys bias; those known are score, choice, "),
    ("num_topk", "topk = 1\nnum_topk", r"\[sizes\] has unknown keys topk; those known are hidden, ffn"),
    ("[shared]", "[shared]\nwidth = 3", r"\[shared\] has unknown keys width; those known are ffn, gate, activation"),
    ("gated", "renormalize = true\ngated", r"\[experts\] has unknown keys renormalize"),
    ("[router]", "[routers]", "the file has unknown keys routers; those known are model_type, .*sizes, router"),
    ('model_type = "my_moe"', "model_type = 7", "model_type must be a text, got 7"),
    ('model_type = "my_moe"', "", "must have a model_type, got none"),
    ('model_type = "my_moe"', 'model_type = "my_moe"\nblock = 3', "block must be a text, got 3"),
    ('model_type = "my_moe"', 'model_type = "my_moe"\ndisk = "a"', r"\[disk\] must be a table, got 'a'"),
    ("[router]", "[router]\nwhen = 3", r"\[router\] when must be a list of tables, got 3"),
    ("[router]", "[router]\nwhen = [3]", r"\[router\] when must be a list of tables, got \[3\]"),
    ("[router]", "[router]\nwhen = [{ a = 3 }]", r"\[router\] when must have a table `set` or a text `refuse`"),
    ("[router]", "[router]\nwhen = [{ a = 3, set = 4 }]", r"\[router\] when must have a table `set` or a text"),
    ("[router]", '[router]\nwhen = [{ set = {}, refuse = "no" }]', r"\[router\] when must have a table `set` or"),
    ("[router]", "[router]\nwhen = [{ set = { bias = 1 } }]", r"\[router\] when has unknown keys bias; those"),
    ("[router]", "[router", "must be TOML"),
])  # fmt: skip
def test_a_file_with_a_mistake(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=rf"my\.toml: {message}"):
        read(tmp_path, old=old, new=new)


@pytest.mark.parametrize("values", ["[5, 11]", "[]"])
def test_a_list_without_a_value_for_the_layer(tmp_path, values):
    family = read(tmp_path, old="[5, 11]", new=values)
    with pytest.raises(ValueError, match=r"family 'my': \[sizes\] ffn must have a value for layer 2, got"):
        layer_config(family, MODEL, 2, num_tokens=4, num_ranks=1)


def test_a_width_that_is_no_integer(tmp_path):
    with pytest.raises(TypeError, match=r"shared_ffn must be an integer, got 1\.7"):
        layer_config(read(tmp_path, old="ffn = 3", new="ffn = 1.7"), MODEL, num_tokens=4, num_ranks=1)


@pytest.mark.parametrize("value", ["$word*two", "$two+word", "$word+word", "$two*two+word"])
def test_products_and_sums_are_of_numbers(value):
    with pytest.raises(ValueError, match=r"of the model's config must be of numbers, got .*'a'"):
        resolve(value, {"word": "a", "two": 2})


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"family must be a file, got '.*my\.toml': No such file"):
        read_family(tmp_path / "my.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(IsADirectoryError, match=r"family must be a file, got '.*folder\.toml': Is a directory"):
        read_family(tmp_path / "folder.toml")
    (tmp_path / "my.toml").write_bytes(b"model_type = '\xff'")
    with pytest.raises(ValueError, match=r"my\.toml: must be in UTF-8"):
        read_family(str(tmp_path / "my.toml"))
    with pytest.raises(TypeError, match=r"family must be a name or the path of a \.toml file, got 3"):
        read_family(3)
