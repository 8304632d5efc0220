"""Measure the tables of docs/speed.md: our training steps beside PyTorch's, and long contexts.

python tools/speed.py --peer-python .venv-conformance/bin/python        all of it, about 20 minutes
python tools/speed.py --only lora                                       the cases with that word

Writes docs/speed-SET.json for the processor's instruction set, case by case (cases that are not
measured keep their figures), and a plot of it. `python tools/docs.py` writes the tables into
docs/speed.md. Run nothing else meanwhile.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.bench import machine
from tinyllama.cli.arguments import exit_code, leave
from tinyllama.system import device, processor

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

SMALL = (
    "configs/124m.toml --set model.hidden_size=256 --set model.num_layers=4"
    " --set model.num_heads=4 --set model.intermediate_size=768 --set model.vocab_size=4096"
    " --set model.max_seq_len=4096"
)
LORA = "--set lora.rank=16 --set lora.alpha=32"


def cases(instructions: str) -> dict[str, str]:
    """The arguments of `tinyllama bench` for each row of the table, by its name.

    On a processor without bfloat16 products PyTorch's bfloat16 is some 25 times slower than its
    float32; there its float32 is compared, which is the faster one. With AMX, torch.compile,
    the context of configs/124m.toml and LoRA in bfloat16 are compared too.
    """
    bf16_products = processor.multiplies_bf16(instructions)
    theirs = "" if bf16_products else " --peer-dtype float32"
    note = "" if bf16_products else " (PyTorch float32)"
    narrow = f"--dtype bfloat16 --peer torch{theirs}"
    big, one, four = "configs/124m.toml", "--batch 1 --context 512", "--batch 4 --context 256"
    few = f"{SMALL} --batch 4 --context 128 --steps 20"
    packed = "--set qlora.quantize_base=true"
    commands = {
        "124m, 1 x 512, float32": f"{big} {one} --steps 5 --peer torch",
        "124m, 4 x 256, float32": f"{big} {four} --steps 5 --peer torch",
        "h 256, 4 x 128, float32": f"{few} --peer torch",
        f"124m, 1 x 512, bfloat16{note}": f"{big} {one} --steps 5 {narrow}",
        f"124m, 4 x 256, bfloat16{note}": f"{big} {four} --steps 5 {narrow}",
        f"h 256, 4 x 128, bfloat16{note}": f"{few} {narrow}",
        "124m LoRA rank 16, 1 x 512, float32 (peft)": f"{big} {LORA} {one} --steps 5 --peer torch",
        "124m QLoRA rank 16, 1 x 512 (our LoRA)": f"{big} {LORA} {packed} {one} --steps 5"
        " --peer lora",
    }
    if instructions == "AMX":
        for rows in (one, four):
            name = rows.removeprefix("--batch ").replace(" --context ", " x ")
            commands[f"124m, {name}, bfloat16 (torch.compile)"] = (
                f"{big} {rows} --steps 5 --dtype bfloat16 --peer torch-compile"
            )
        commands["124m, 1 x 2048, bfloat16"] = f"{big} --batch 1 --context 2048 --steps 5 {narrow}"
        commands["124m LoRA rank 16, 1 x 512, bfloat16 (peft)"] = (
            f"{big} {LORA} {one} --steps 5 {narrow}"
        )
    for context in (512, 1024, 2048, 4096):
        commands[f"h 256, 1 x {context}, float32"] = (
            f"{SMALL} --batch 1 --context {context} --steps 6"
        )
    return commands


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="only rows with that word")
    parser.add_argument("--peer-python", help="Python with PyTorch, transformers, peft")
    parser.add_argument("--plot", action="store_true", help="measure nothing, draw again")
    options = parser.parse_args(arguments)
    instructions = device.instruction_set()
    file = DOCS / f"speed-{instructions.lower()}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    every = cases(instructions)
    for name in [] if options.plot else [name for name in every if options.only in name]:
        print(f"== {name}", flush=True)
        results[name] = measured(every[name], options.peer_python)
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(table({name: results[name]}).splitlines()[-1], flush=True)
    draw(results, file.with_suffix(".png"))
    return 0


def measured(words: str, peer_python: str | None) -> dict[str, Any]:
    """The benchmark's result for these arguments, with the command and the day."""
    command = ["python", "-m", "tinyllama.bench", *words.split(), "--json"]
    peer = ["--peer-python", peer_python] if peer_python and "--peer torch" in words else []
    done = subprocess.run(
        [sys.executable, *command[1:], *peer],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    day = time.strftime("%Y-%m-%d")
    return {"command": " ".join(command), "day": day, **json.loads(done.stdout)}


def report() -> str:
    """What docs/speed.md says: for each instruction set a table, and where and when it was
    measured."""
    parts = []
    for file in sorted(DOCS.glob("speed-*.json")):
        results = json.loads(file.read_text(encoding="utf-8"))
        places = {f"{machine.line(r['machine'])}; {r['day']}" for r in results.values()}
        parts += [*(f"On {place}:" for place in sorted(places)), "", table(results), ""]
    return "\n".join(parts)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table: tokens/s, ratio and memory of each case, ours and the peer's."""
    lines = [
        "| model, batch | tokens/s | peer | ratio | peak memory | peer | ratio | FLOPs"
        " | first loss | peer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        peer = r.get("peer")
        fields = [f"{r['tokens_per_second']:,.0f}", "", "", _gigabytes(r), "", ""]
        fields += [f"{r['flops_ratio']:.2f}", _start_up(r), ""]
        if peer:
            fields[1:3] = f"{peer['tokens_per_second']:,.0f}", f"**{r['ratio']:.2f}**"
            fields[4:6] = (
                _gigabytes(peer),
                f"{r['memory_ratio']:.2f}" if "memory_ratio" in r else "",
            )
            fields[8] = _start_up(peer)
        lines.append(f"| {name} | {' | '.join(fields)} |")
    return "\n".join(lines)


def _gigabytes(result: Mapping[str, Any]) -> str:
    return f"{result['peak_memory_bytes'] / 1e9:.2f} GB"


def _start_up(result: Mapping[str, Any]) -> str:
    """From the start of the process to its first loss, less one steady step."""
    return f"{result['first_loss_seconds'] - result['step_seconds']:.1f} s"


def draw(results: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Bars of the ratios to the peer, and time and memory over the context, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    compared = {name: r for name, r in results.items() if r.get("peer")}
    contexts = [r for name, r in results.items() if not r.get("peer")]
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(13, 4), dpi=144, layout="constrained", width_ratios=(3, 2, 2)
    )
    ratios = [r["ratio"] for r in compared.values()][::-1]
    shown = [min(ratio, 2.5) for ratio in ratios]  # one that is far ahead leaves the others room
    bars = left.barh([*compared][::-1], shown, color="#2f6f9f")
    left.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3)
    left.axvline(1, color="#d1495b", linewidth=1.2)
    left.set(title="tokens/s, ours over the peer's", xlim=(0, max([1, *shown]) * 1.15))
    lengths = [r["run"]["context"] for r in contexts]
    seconds = [r["step_seconds"] for r in contexts]
    per_token = [1e3 * s / t for s, t in zip(seconds, lengths, strict=True)]
    per_flop = [1e11 * s / r["run"]["model_flops"] for s, r in zip(seconds, contexts, strict=True)]
    middle.plot(lengths, per_token, marker="o", color="#2f6f9f", label="milliseconds per token")

    middle.plot(lengths, per_flop, marker="s", color="#d1495b", label="seconds per 100 GFLOP")
    middle.set(title="h 256, one row: time", xlabel="context, tokens", ylim=(0, None))
    middle.legend(frameon=False)
    memory = [r["peak_memory_bytes"] / 1e9 for r in contexts]
    right.plot(lengths, memory, marker="o", color="#2f6f9f")
    right.set(title="peak memory, GB", xlabel="context, tokens", ylim=(0, None))
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)
    pyplot.close(figure)


if __name__ == "__main__":
    leave(exit_code(main, "speed"))
