"""The script behind the figures of decoding: a table of both sides' rates, best run by best run."""

import stat
import sys
from pathlib import Path

import bench_decode
import pytest
from gguf_helpers import write_gguf

# Speaks the protocol as llama.cpp's side does; faster each time it is asked for a run.
PEER = """#!{python}
import sys
for count, line in enumerate(sys.stdin):
    print(10.0 * 10 ** count, 2.0 * 10 ** count, flush=True)
"""


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    path = tmp_path / "peer"
    path.write_text(PEER.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def test_a_row_has_both_rates_and_their_ratio(
    tmp_path: Path, peer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "model.gguf", "Q4_0")
    words = [str(tmp_path / "model.gguf"), "--peer-python", str(peer), "--types", "Q8_0"]
    words += ["--threads", "1", "--prompt", "8", "--new", "4", "--runs", "1", "--cpu-seconds"]
    bench_decode.main(words)
    head, rule, *rows = (line.split(" | ") for line in capsys.readouterr().out.splitlines())
    assert head == [
        *("weights", "new tokens/s", "llama.cpp", "ratio"),
        *("prompt tokens/s", "llama.cpp", "ratio"),
    ]
    assert rule == ["---"] * 7
    assert [row[0] for row in rows] == ["as in the file", "Q8_0"]
    for _, new, their_new, new_ratio, prompt, their_prompt, prompt_ratio in rows:
        # The peer's second run: its first one is left out, as ours is, which compiles.
        assert (their_new, their_prompt) == ("20", "100")
        assert float(new) > 0 and abs(float(new_ratio) - float(new) / 20) < 0.5 / 20 + 0.01
        assert abs(float(prompt_ratio) - float(prompt) / 100) < 0.5 / 100 + 0.01


def test_the_best_run_counts_and_the_first_does_not() -> None:
    side = bench_decode.Side([sys.executable, "-c", "input()"])
    side.close()
    side.rates = [(900.0, 90.0), (5.0, 3.0), (7.0, 2.0)]
    assert side.best() == (7.0, 3.0)


def test_a_file_stored_anew_has_matrices_of_the_type_and_the_same_values(tmp_path: Path) -> None:
    import gguf

    write_gguf(tmp_path / "model.gguf", "Q8_0")
    path = bench_decode.stored_as(tmp_path / "model.gguf", "F32", tmp_path)
    before = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    after = gguf.GGUFReader(path)
    assert {t.tensor_type.name for t in after.tensors} == {"F32"}
    for tensor in after.tensors:
        old = before[tensor.name]
        assert (gguf.dequantize(old.data, old.tensor_type) == tensor.data).all(), tensor.name
    assert after.fields["llama.block_count"].contents() == 2
