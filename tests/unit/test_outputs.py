"""Files that commands write: looked at before anything runs, of the kind that the name says, folders not in secret."""

import os
import threading

import pytest

from flashmoe_numba import cli
from flashmoe_numba.commands.outputs import check_outputs
from flashmoe_numba.errors import UsageError
from flashmoe_numba.seeing.plots import plot_timeline
from reference.pictures import picture_format
from sim.reading.charts import blank, save

BEGINNINGS = {"png": b"\x89PNG", "pdf": b"%PDF-", "svg": b"<?xml"}


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "png"), ("a.pdf", "pdf"), ("b.c.SVG", "svg"), (".pdf", "pdf"), ("a", "png")]
)
def test_a_picture_is_what_its_name_says(tmp_path, name, kind):
    plot_timeline([], 1, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(BEGINNINGS[kind])
    save(blank(2, 2), tmp_path / f"2{name}")
    assert (tmp_path / f"2{name}").read_bytes().startswith(BEGINNINGS[kind])


@pytest.mark.parametrize("name", ["a.jpg", "a.json", "pdf.txt", "a.pdf.gz"])
def test_a_picture_of_another_kind_is_refused_by_all(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    rule = f"a picture must end in one of .png, .pdf, .svg, got '{name}'"
    for write in (
        picture_format,
        lambda file: plot_timeline([], 1, file),
        lambda file: save(blank(2, 2), tmp_path / file),
    ):
        with pytest.raises(ValueError, match="a picture must end in"):
            write(name)
    for command in ("run", "sim"):
        assert cli.main([command, "--preset", "laptop-tiny", "--plot", name]) == 2
        assert capsys.readouterr().err == f"flashmoe {command}: error: argument --plot: {rule}\n"
    assert not list(tmp_path.iterdir())


def test_figures_go_into_a_folder(tmp_path, capsys):
    (tmp_path / "rows.jsonl").touch()
    assert cli.main(["plot", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "figures.pdf")]) == 2
    assert "argument --out: is a folder, where several figures go as PNG, got" in capsys.readouterr().err
    assert not (tmp_path / "figures.pdf").exists()


@pytest.mark.parametrize(("flag", "command"), [
    ("--json", "plan --json slip/deeper/a.json"),
    ("--json", "explore --list-plants --json slip/deeper/a.json"),
    ("--shrink", "explore --seeds 1 --shrink slip/deeper/a.json"),
    ("--out", "plot rows.jsonl --out slip/deeper"),
    ("--out", "sweep grid.toml --out slip/deeper/a.jsonl --jobs 1"),
])  # fmt: skip
def test_a_folder_that_was_not_there_is_said_to_be_made(tmp_path, monkeypatch, capsys, flag, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "grid.toml").write_text(
        'schema = 1\n[grid]\npolicy = ["flashmoe"]\nhardware = ["2xH100"]\npreset = ["laptop-tiny"]\ntokens = [3]\n'
    )
    cli.main(command.split())
    assert capsys.readouterr().err == f"flashmoe: {flag}: made the folder 'slip/deeper', which was not there\n"
    cli.main(command.split())
    assert capsys.readouterr().err == ""


def test_one_of_many_ranks_says_it(tmp_path, capsys):
    meeting = threading.Barrier(8)

    def rank():
        meeting.wait()
        check_outputs({"--trace": str(tmp_path / "new" / "trace.json")})

    ranks = [threading.Thread(target=rank) for _ in range(8)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join()
    assert capsys.readouterr().err.count("made the folder") == 1


def test_what_is_there_is_left_as_it_is(tmp_path):
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("target")
    check_outputs({"--json": str(tmp_path / "old"), "--trace": str(tmp_path / "new"), "--sass": str(tmp_path / "link")})
    assert (tmp_path / "old").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["link", "old"]
    assert (tmp_path / "link").is_symlink()


def test_the_reader_of_a_pipe_gets_the_whole_and_then_the_end(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    assert cli.main(["plan", "--preset", "laptop-tiny", "--json", str(tmp_path / "pipe")]) == 0
    reader.join(30)
    assert read[0].startswith("{") and read[0].endswith("}\n")


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"argument --json: cannot write .*/file/a.json'"):
        check_outputs({"--json": str(tmp_path / "file" / "a.json")})
    with pytest.raises(UsageError, match=r"argument --trace: cannot write .*/folder/': it names a folder"):
        check_outputs({"--trace": f"{tmp_path}/folder/"})
