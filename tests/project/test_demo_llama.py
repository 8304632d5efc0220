"""The checks of the demo's short parts, and the settings of its adapters."""

from pathlib import Path

import demo
import demo_llama
import pytest

from tinyllama.config import load_config

CONFIG = demo.ROOT / demo.CONFIG


def test_a_loss_that_does_not_fall_fails(capsys: pytest.CaptureFixture[str]) -> None:
    falling = [8.0] * 2 + [1.0, 9.0] * 8 + [7.0, 6.0]  # 20 steps: a tenth is 2
    demo_llama.check_falls(falling)
    assert capsys.readouterr().out == "training loss    8.000 -> 6.500 in 20 steps\n"
    with pytest.raises(demo_llama.Failed, match=r"did not fall: 6\.5000 at first, 8\.0000 at last"):
        demo_llama.check_falls(falling[::-1])
    with pytest.raises(demo_llama.Failed, match="did not fall"):
        demo_llama.check_falls([3.0])


def test_adapters_that_do_not_help_and_merges_that_differ_fail() -> None:
    demo_llama.check_adapters(7.0, 6.0, 6.00005)
    with pytest.raises(demo_llama.Failed, match=r"did not help: 7\.0000, and 7\.0000 without"):
        demo_llama.check_adapters(7.0, 7.0, 7.0)
    for merged in (6.0002, 5.9998, float("nan")):
        with pytest.raises(demo_llama.Failed, match="merging changed the model"):
            demo_llama.check_adapters(7.0, 6.0, merged)


def test_chapters_are_learned_or_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topics = {f"{number:03}": f"text {number}" for number in range(30)}
    monkeypatch.setattr(demo_llama.pydoc_data.topics, "topics", topics)
    monkeypatch.setattr(demo_llama, "TEXT", tmp_path / "learned.jsonl")
    monkeypatch.setattr(demo_llama, "HELD_OUT", tmp_path / "held_out.jsonl")
    demo_llama.write_topics()
    held_out = demo.texts(tmp_path / "held_out.jsonl")
    assert held_out == ["text 0", "text 10", "text 20"]
    assert {*held_out, *demo.texts(tmp_path / "learned.jsonl")} == set(topics.values())


@pytest.mark.parametrize("extra", [{}, demo_llama.PACKED], ids=["lora", "qlora"])
def test_the_settings_of_the_adapters_fit_the_demos_configuration(extra: dict[str, str]) -> None:
    settings = demo_llama.ADAPTERS | {"model.base": "base"} | extra
    config = load_config(CONFIG, [f"{key}={value}" for key, value in settings.items()])
    assert config.lora is not None and len(config.lora.modules) == 7
    assert (config.qlora is not None) == bool(extra)
    assert config.tokenizer_source == "base" and config.data.val_path is None


def test_a_failed_check_exits_with_1_and_a_failed_command_with_its_own_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code in ((demo_llama.Failed("why"), 1), (demo.Stopped(130), 130)):

        def fail(budget: float, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(demo_llama, "train_base", fail)
        assert demo_llama.main(["train", "--budget", "1"]) == code
    assert capsys.readouterr().err == "demo_llama: why\n"
