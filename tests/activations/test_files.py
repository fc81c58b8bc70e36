import pytest
from safetensors import SafetensorError

from topk_ortho.activations.files import finished_as, write_whole


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with finished_as(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    write_whole(path, "newer")
    assert path.read_text() == "newer"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("raised", [OSError("full"), KeyboardInterrupt(), SafetensorError("full")], ids=type)
def test_an_error_leaves_the_old_one_and_nothing_else(raised, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    expected = OSError if isinstance(raised, SafetensorError) else type(raised)

    def write():
        with finished_as(path) as unfinished:
            unfinished.write_text("ne")
            raise raised

    with pytest.raises(expected):
        write()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
