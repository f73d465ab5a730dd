"""Checkpoints that are not whole, not true or not known: what is wrong is named, and nothing is half loaded."""

import json
import shutil

import numpy as np
import pytest
from checkpoint_files import counted, write_file, write_folder, write_index
from published import BLOCKS, E, F, H, tensors_of

from flashmoe_numba.checkpoints import Checkpoint, load
from reference.families import family_names

CONFIG = {"model_type": "mixtral", **BLOCKS["mixtral"][1]}
PREFIX = "model.layers.3.block_sparse_moe."
W2 = PREFIX + "experts.6.w2.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A whole one, in five files."""
    return write_folder(tmp_path / "c", CONFIG, tensors_of("mixtral", [3]), num_files=5)


def file_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def refused(folder, error, *rules, layer=3, **how):
    with pytest.raises(error) as caught:
        load(folder, layer, **dict(num_tokens=5) | how)
    for rule in rules:
        assert rule in str(caught.value), caught.value


def rewrite(folder, name, tensor):
    """Put another tensor into the file of that name; None: leave it out."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    file = file_of(folder, name)
    tensors = {each: t for each, t in tensors_of("mixtral", [3]).items() if weight_map[each] == file.name}
    tensors = {each: t for each, t in (tensors | {name: tensor}).items() if t is not None}
    write_file(file, tensors)


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "c", FileNotFoundError, "path must be the folder of a checkpoint", str(tmp_path / "c"))
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", NotADirectoryError, "path must be the folder of a checkpoint")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_pickles_are_refused_with_the_reason(tmp_path, suffix):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    pickle = tmp_path / f"pytorch_model{suffix}"
    pickle.write_bytes(b"")
    why = "is a pickle, which is not read: loading one runs whatever code is in it"
    refused(tmp_path, ValueError, str(pickle), why)
    refused(pickle, ValueError, str(pickle), why)


def test_a_folder_without_files(tmp_path):
    refused(tmp_path, FileNotFoundError, "config.json: not there")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path, FileNotFoundError, "must have model.safetensors, or model.safetensors.index.json", "got none")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '"a"'])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none(folder, name, text):
    (folder / name).write_text(text)
    refused(folder, ValueError, str(folder / name), "must be")


@pytest.mark.parametrize("table", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_an_index_without_a_map(folder, table):
    (folder / INDEX).write_text(json.dumps(table))
    refused(folder, ValueError, INDEX, "must have a weight_map")


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", 7, None, "", ".."])
def test_an_index_that_leads_elsewhere(folder, file):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, weight_map | {W2: file})
    refused(folder, ValueError, INDEX, f"{W2!r} must be in a .safetensors file of this folder, got {file!r}")


def test_an_index_that_names_a_missing_file(folder):
    file = file_of(folder, W2)
    file.unlink()
    refused(folder, FileNotFoundError, str(file), "not there", INDEX)


def test_files_that_a_rank_does_not_need_may_be_missing(tmp_path):
    """Who has downloaded only his rank's files can load its experts."""
    tensors = tensors_of("mixtral", [3])
    folder = write_folder(tmp_path / "c", CONFIG, tensors)
    mine = {
        name: t for name, t in tensors.items() if "experts" not in name or "experts.2." in name or "experts.3." in name
    }
    (folder / "model.safetensors").unlink()
    write_file(folder / "a.safetensors", mine)
    write_index(folder, {name: "a.safetensors" if name in mine else "b.safetensors" for name in tensors})
    _, weights = load(folder, 3, num_tokens=5, num_ranks=4, rank_idx=1)
    assert np.array_equal(weights.down_proj[0], tensors[PREFIX + "experts.2.w2.weight"])
    refused(folder, FileNotFoundError, "b.safetensors", num_ranks=4, rank_idx=2)


def test_an_index_that_says_more_than_the_file(folder):
    rewrite(folder, W2, None)
    refused(folder, ValueError, str(file_of(folder, W2)), f"must have tensor {W2!r}", INDEX)


@pytest.mark.parametrize("num_bytes", [0, 5, 100, -1])
def test_a_file_that_is_cut_off(folder, num_bytes):
    file = file_of(folder, W2)
    file.write_bytes(file.read_bytes()[:num_bytes])
    refused(folder, ValueError, str(file), "must")


def test_a_tensor_that_is_missing(tmp_path):
    tensors = tensors_of("mixtral", [3])
    del tensors[W2]
    refused(write_folder(tmp_path / "c", CONFIG, tensors), ValueError, f"tensor {W2!r} of down_proj is missing")
    without = {name: tensor for name, tensor in tensors.items() if "w2" not in name}
    rule = f"down_proj is missing: looked for tensor {PREFIX}experts.0.w2.weight"
    refused(write_folder(tmp_path / "c", CONFIG, without), ValueError, rule)


@pytest.mark.parametrize("shape", [(F, H), (H * F,), (H, F, 1), (H, F + 1), (0, F), ()])
def test_a_tensor_of_another_shape(folder, shape):
    rewrite(folder, W2, np.zeros(shape, np.float32))
    refused(folder, ValueError, str(file_of(folder, W2)), W2, f"must have shape [{H}, {F}], got {list(shape)}")


def test_a_tensor_of_another_type(folder):
    rewrite(folder, W2, np.zeros((H, F), np.int64))
    refused(folder, ValueError, str(file_of(folder, W2)), W2, "must be of dtype F64, F32, F16, BF16", "got I64")


def test_all_is_checked_before_anything_is_read(folder):
    rewrite(folder, W2, np.zeros((F, H), np.float32))
    with Checkpoint(folder) as checkpoint:
        with pytest.raises(ValueError, match="must have shape"):
            checkpoint.load(3, num_tokens=5)
        assert checkpoint.bytes_read == 0


def test_a_tensor_that_the_family_knows_nothing_of(tmp_path):
    tensors = tensors_of("mixtral", [3]) | {PREFIX + "experts.8.w2.weight": np.zeros((H, F), np.float32)}
    refused(write_folder(tmp_path / "c", CONFIG, tensors), ValueError, "'mixtral'", PREFIX + "experts.8.w2.weight")
    tensors = tensors_of("mixtral", [3]) | {PREFIX + "gate.bias": np.zeros(E, np.float32)}
    refused(write_folder(tmp_path / "c", CONFIG, tensors), ValueError, "must say what every tensor of the block is")


def test_a_layer_that_is_not_there(tmp_path):
    folder = write_folder(tmp_path / "c", CONFIG, tensors_of("mixtral", [1, 2, 3, 7]))
    refused(folder, ValueError, "layer must be one with experts, got 5", "are 1 to 3, 7", "layers.5.block", layer=5)
    with pytest.raises(ValueError, match="layer must be at least 0, got -1"):
        load(folder, -1, num_tokens=5)
    with pytest.raises(TypeError, match="layer must be an integer, got '3'"):
        load(folder, "3", num_tokens=5)


def test_a_model_type_that_is_not_known(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "my_moe"}))
    refused(folder, ValueError, "got my_moe", "family='my.toml'", *family_names())
    refused(folder, ValueError, "family must be one of", family="my_moe")


def test_a_config_that_lacks_a_size(folder):
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}))
    refused(folder, ValueError, "mixtral", "must have hidden_size")


@pytest.mark.parametrize(("how", "error", "rule"), [
    (dict(num_ranks=4, rank_idx=4), ValueError, "rank_idx must be in [0, num_ranks=4), got 4"),
    (dict(num_ranks=4, rank_idx=-1), ValueError, "rank_idx must be in [0, num_ranks=4), got -1"),
    (dict(rank_idx="0"), TypeError, "rank_idx must be an integer"),
    (dict(num_ranks=3), ValueError, "num_experts must be a multiple of num_ranks=3"),
    (dict(dtype="int8"), ValueError, "dtype must be one of"),
    (dict(layers=3), TypeError, "layers"),
])  # fmt: skip
def test_arguments(folder, how, error, rule):
    refused(folder, error, rule, **how)


MY_FAMILY = """
model_type = "my_moe"
[sizes]
hidden = "$width"
ffn = "$inner"
num_experts = "$experts"
num_topk = 2
[router]
renormalize = true
[experts]
activation = "gelu"
gated = false
[disk]
prefix = "blocks.{layer}/"
router = "choose: hidden choice"
up_proj = "up: expert hidden ffn"
down_proj = "down/{expert}"
outside = ["norm*"]
"""


def test_a_family_of_ones_own(tmp_path):
    """No code: a file says what the model's config and tensors are called."""
    (tmp_path / "my.toml").write_text(MY_FAMILY)
    rng = np.random.default_rng(0)
    arrays = dict(router=rng.random((E, H)), up_proj=rng.random((E, F, H)), down_proj=rng.random((E, H, F)))
    tensors = {"blocks.4/choose": arrays["router"].T, "blocks.4/up": arrays["up_proj"].swapaxes(1, 2)}
    tensors |= {f"blocks.4/down/{e}": arrays["down_proj"][e] for e in range(E)}
    tensors |= {"blocks.4/norm.weight": rng.random(H)}
    folder = write_folder(tmp_path / "c", dict(model_type="my_moe", width=H, inner=F, experts=E), tensors)
    config, weights = load(folder, 4, num_tokens=5, num_ranks=2, rank_idx=1, family=tmp_path / "my.toml")
    assert config.router_kind.renormalize and not config.expert_kind.gated and config.dtype == "float64"
    assert np.array_equal(weights.router, arrays["router"])
    assert np.array_equal(weights.up_proj, arrays["up_proj"][4:])
    assert np.array_equal(weights.down_proj, arrays["down_proj"][4:])


@pytest.mark.parametrize(("old", "new", "rule"), [
    ('up_proj = "up: expert hidden ffn"', 'up_proj = "up: hidden expert ffn"', "up_proj must have the axes"),
    ('up_proj = "up: expert hidden ffn"', 'up_proj = "up: expert hidden"', "up_proj must have the axes"),
    ('up_proj = "up: expert hidden ffn"', 'up_proj = "up: expert hidden hidden ffn"', "up_proj must have the axes"),
    ('up_proj = "up: expert hidden ffn"', 'up_proj = "two words"', "up_proj must be 'NAME' or 'NAME: AXES'"),
    ('up_proj = "up: expert hidden ffn"', "up_proj = 7", "up_proj must be 'NAME' or 'NAME: AXES'"),
    ('up_proj = "up: expert hidden ffn"', 'upper = "up"', "field must be one of"),
    ('router = "choose: hidden choice"', "", "router is missing"),
    ('prefix = "blocks.{layer}/"', "prefix = 7", "prefix must be a text"),
    ('activation = "gelu"', 'activation = "tanh"', "activation must be one of"),
])  # fmt: skip
def test_a_family_that_says_something_else(tmp_path, folder, old, new, rule):
    (tmp_path / "my.toml").write_text(MY_FAMILY.replace(old, new))
    config = dict(model_type="my_moe", width=H, inner=F, experts=E)
    shutil.rmtree(folder)
    write_folder(folder, config, {"blocks.4/choose": np.zeros((H, E))})
    with pytest.raises(ValueError, match=rule):
        load(folder, 4, num_tokens=5, family=tmp_path / "my.toml")


def test_a_model_with_two_kinds_of_layers_asks_which(tmp_path):
    thinker, talker = (
        {"model_type": f"qwen3_omni_moe{part}text", **BLOCKS["qwen3_moe"][1]} for part in ("_", "_talker_")
    )
    model = dict(model_type="omni", thinker_config=dict(text_config=thinker), talker_config=dict(text_config=talker))
    tensors = {name.replace("model.", "talker.model."): t for name, t in tensors_of("qwen3_moe", [3]).items()}
    folder = write_folder(tmp_path / "c", model, tensors)
    refused(folder, ValueError, "family must be given", "qwen3_omni_moe_thinker", "qwen3_omni_moe_talker")
    refused(folder, ValueError, "looked for thinker.model.layers.3", family="qwen3_omni_moe_thinker")


def test_a_refused_checkpoint_leaves_no_file_open(folder):
    """Which pytest would tell: every file that is left open is an error here."""
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "my_moe"}))
    shutil.copy(file_of(folder, W2), folder / "model.safetensors")
    (folder / INDEX).unlink()
    _, num_bytes = counted(lambda: refused(folder, ValueError, "my_moe"))
    assert num_bytes < 100_000


def test_names_without_a_layer_are_of_layer_0(tmp_path):
    (tmp_path / "my.toml").write_text(MY_FAMILY.replace("blocks.{layer}/", "block/"))
    rng = np.random.default_rng(0)
    tensors = {"block/choose": rng.random((H, E)), "block/up": rng.random((E, H, F))}
    tensors |= {f"block/down/{e}": rng.random((H, F)) for e in range(E)}
    folder = write_folder(tmp_path / "c", dict(model_type="my_moe", width=H, inner=F, experts=E), tensors)
    load(folder, 0, num_tokens=5, family=tmp_path / "my.toml")
    refused(folder, ValueError, "layer must be 0 where names are the same of all", layer=3, family=tmp_path / "my.toml")
    with Checkpoint(folder, tmp_path / "my.toml") as checkpoint:
        assert checkpoint.layers == [0]


def test_a_family_without_names_of_tensors(tmp_path, folder):
    (tmp_path / "my.toml").write_text(MY_FAMILY.split("[disk]")[0])
    (folder / "config.json").write_text(json.dumps(dict(model_type="my_moe", width=H, inner=F, experts=E)))
    refused(folder, ValueError, "family 'my': [disk]: ", "the section is empty", family=tmp_path / "my.toml")


def test_a_layer_of_none_of_several_families(tmp_path):
    """Each is named with what it lacks."""
    sizes = dict(hidden_size=H, moe_intermediate_size=F, num_local_experts=E, num_experts_per_tok=2)
    shapes = {"w1": (F, H), "w2": (H, F), "w3": (F, H)}
    experts = [f"experts.{e}" for e in range(E)]
    tensors = {f"{part}.{name}.weight": shapes[name] for part in (*experts, "shared_experts") for name in shapes}
    tensors |= {"gate.weight": (E, H), "gate.more": (E,)}
    tensors = {f"layers.3.ffn.{name}": np.zeros(shape, np.float32) for name, shape in tensors.items()}
    folder = write_folder(tmp_path / "c", dict(model_type="deepseek_v4", **sizes), tensors)
    hash_layer = "; not deepseek_v4_hash, because family 'deepseek_v4_hash' must say"
    refused(folder, ValueError, "not deepseek_v4, because selection_bias is missing", hash_layer, "ffn.gate.more")
    refused(folder, ValueError, "rank_idx must be in [0, num_ranks=1), got 1", rank_idx=1)


def test_the_same_config_twice_is_no_choice(tmp_path):
    part = {"model_type": "mixtral", **BLOCKS["mixtral"][1]}
    model = dict(model_type="sees", text_config=part, llm_config=dict(part))
    folder = write_folder(tmp_path / "c", model, tensors_of("mixtral", [3]))
    assert load(folder, 3, num_tokens=5)[0].hidden == H
    write_folder(folder, model | dict(llm_config=part | dict(hidden_size=H + 1)), tensors_of("mixtral", [3]))
    refused(folder, ValueError, "family must be given, because the model has several")
