"""`plan` as a user types it, and its arithmetic against counting and against numbers computed by hand."""

import inspect
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_danube.__main__ import main
from lightning_danube.checkpoints.strategy import ShardedStrategy
from lightning_danube.cli.verbs.plan import _accelerators, _engine, _rounded, _unit
from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.planning.accelerators import Accelerator, parse_accelerator
from lightning_danube.planning.memory import Layout, TrainingMemory
from lightning_danube.planning.run import Pace, TrainerSection, layout_of, seconds_of
from lightning_danube.planning.saving import CheckpointAdvice, checkpoint_bytes
from lightning_danube.pretraining.curriculum import Curriculum, Stage

ROOT = Path(__file__).resolve().parents[3]
PAPER = ROOT / "configs" / "pretrain"


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def cells(printed: str, first: str) -> list[str]:
    """The cells of the first table row that begins so."""
    line = next(line for line in printed.splitlines() if re.match(rf"{re.escape(first)}  ", line))
    return re.split(r"  +", line.strip())


def test_the_4b_on_64_nodes_of_8(capsys: pytest.CaptureFixture[str]) -> None:
    """Six trillion tokens by arithmetic; what the paper publishes, and what follows from it by hand."""
    batch = 1024 * 8192
    printed = planned(
        capsys,
        *("--config", str(PAPER / "danube3-4b.yaml"), "--trainer.num_nodes", "64", "--trainer.devices", "8"),
        *("--data.init_args.batch_tokens", str(batch), "--accelerator", "h100=2"),
        *("--source-tokens", "web=4T,instruct=20B", "--utilisation", "0.5"),
    )
    assert "3,961,839,360 parameters" in printed
    ends = [math.ceil(4.6e12 / batch)]
    ends.append(ends[0] + math.ceil(1.35e12 / batch))
    ends.append(ends[1] + math.ceil(0.05e12 / batch))
    for name, end, web in zip(("web-heavy", "refined", "quality"), ends, ("90.60", "81.70", "51.60"), strict=True):
        row = cells(printed, name)
        assert row[2:5] == [f"{end * batch:,}", f"{end:,}", f"{web} %"]
    assert f"{ends[2] * batch:,} tokens in {ends[2]:,} steps" in printed
    taken = sum(n * batch * share for n, share in zip((ends[0], ends[1] - ends[0]), (0.906, 0.817), strict=True))
    # Web text as in the paper: 5.296T of 4T less the held-out 0.05 %.
    taken += (ends[2] - ends[1]) * batch * 0.516
    assert float(cells(printed, "web")[-1]) == pytest.approx(taken / (4e12 * 0.9995), abs=0.006)
    assert cells(printed, "code")[-3:] == ["?", "?", "?"]
    days, device_hours, cost = cells(printed, "h100")[-3:]
    config = DecoderConfig.preset("danube3-4b")
    hours = config.flops_per_token(8192) * ends[2] * batch / (0.5 * 989e12) / 3600
    assert float(device_hours.replace(",", "")) == pytest.approx(hours, abs=1)
    assert float(days) == pytest.approx(hours / 512 / 24, abs=0.06)
    assert float(cost.replace(",", "")) == pytest.approx(2 * hours, abs=2)


def test_a_strategy_may_be_given_on_the_command_line(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strategy = ("--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy")
    sizes = ("--trainer.strategy.data_parallel_size", "1", "--trainer.strategy.tensor_parallel_size", "2")
    printed = planned(capsys, "--config", str(tiny / "tiny.yaml"), "--trainer.devices", "2", *strategy, *sizes)
    assert "one device" not in printed and "tensor parallel over 2" in printed


def test_what_fit_would_refuse_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    config = ("--config", str(PAPER / "danube3-500m.yaml"), "--accelerator", "h100")
    printed = planned(capsys, *config, "--source-tokens", "instruct=1B")
    assert re.search(r"instruct: \d+\.\d epochs are more than data.max_epochs = 16: fit will refuse", printed)
    assert "note: trainer.devices is auto: counted as 1" in printed
    assert "cost" not in printed
    assert "does not divide into 512 devices × micro-batch of 6 rows" in refused(
        capsys, *config, "--trainer.num_nodes", "64", "--trainer.devices", "8"
    )


def test_no_weight_is_made_and_no_text_is_read(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(decoder: Decoder) -> None:
        raise AssertionError("weights were made")

    monkeypatch.setattr(Decoder, "init_weights", nothing)
    printed = planned(capsys, "--config", str(tiny / "tiny.yaml"))
    assert "max_tokens" not in printed
    assert (
        "web, wiki: `prepare` counts the tokens. To see the epochs without it, give your own numbers: "
        "--source-tokens web=10B,wiki=10B\n"
    ) in printed
    # With what the line says to type, there is nothing left to say.
    printed = planned(capsys, "--config", str(tiny / "tiny.yaml"), "--source-tokens", "web=10B,wiki=10B")
    assert "counts the tokens" not in printed
    assert cells(printed, "wiki")[2:4] == ["9,500,000,000", "--source-tokens"]
    assert not (tiny / "cache").exists() and not (tiny / "runs").exists()


def test_a_toy_is_told_in_units_that_fit_it(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No accelerator's arithmetic says how long a step of microseconds takes. This CPU's rate is measured."""
    printed = planned(capsys, "--config", str(tiny / "tiny.yaml"), "--trainer.accelerator", "cpu")
    assert cells(printed, "h100")[-2:] == ["–", "–"]
    assert "the arithmetic of a step takes less than 10 ms there" in printed
    assert "MiB on a device" in printed and "e-0" not in printed
    this_cpu = next(line for line in printed.splitlines() if line.startswith("this CPU, "))
    assert 0 < float(re.split(r"  +", this_cpu)[1]) < 1000
    assert "at its end" in printed


def test_what_a_process_on_a_cpu_holds_beside_tensors_is_told(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For a tiny model it is most of the memory. A GPU's tensors have the device for themselves."""
    config = ("--config", str(tiny / "tiny.yaml"), "--accelerator", "h100")
    printed = planned(capsys, *config, "--trainer.accelerator", "cpu")
    said = r"not counted: a process on a CPU also holds about 450 MiB of libraries, and about (\d+) MiB for kernels, "
    (megabytes,) = re.findall(said, printed)
    in_all = float(next(line for line in printed.splitlines() if line.startswith("in all")).split()[2])
    assert abs(int(megabytes) - (57 + 0.42 * in_all)) <= 1  # rounded down
    assert "not counted:" not in planned(capsys, *config, "--trainer.accelerator", "gpu")


def test_prepared_shards_say_how_much_there_is(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ("--config", str(tiny / "tiny.yaml"))
    assert main(["prepare", *config]) == 0
    capsys.readouterr()
    row = cells(planned(capsys, *config), "wiki")
    assert row[3] == "its shards" and int(row[2].replace(",", "")) > 1000
    # 6.5 thousand tokens in steps of 256: 26 of them, as the trained run has.
    assert cells(planned(capsys, *config), "finish")[3] == "26"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--accelerator", "h10"], "--accelerator is 'h10': did you mean 'h100', or state peak and memory"),
        (["--accelerator", "h100=cheap"], "the price of one device for an hour is a number, such as 2.50"),
        (["--utilisation", "40"], "--utilisation is 40.0: a share of the peak, above 0 and at most 1"),
        (["--network", "0"], "--network is 0.0: give GB/s of a node, above 0"),
        (["--write-speed", "0"], "--write-speed is 0.0: give GB/s, above 0"),
        (["--source-tokens", "web"], "--source-tokens has 'web': write source=tokens, such as web=10T,wiki=6B"),
        (["--source-tokens", "wbe=1B"], "--source-tokens names the unknown source 'wbe': did you mean 'web'?"),
        (["--trainer.num_nodes", "many"], "trainer.num_nodes: expected a whole number, not many"),
        (["--trainer.strategy", "deepspeed"], "trainer.strategy is deepspeed: its memory is not known here"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "--config", str(tiny / "tiny.yaml"), *arguments)


def test_other_tasks_are_refused_before_their_weights_are_fetched(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--config", str(ROOT / "configs" / "sft" / "danube3-500m.yaml"))
    assert "only pre-training can be planned (Pretraining on CurriculumData), not SupervisedFineTuning on Chat" in said


def test_the_trainer_section_says_how_a_run_is_spread() -> None:
    def parallel(**sizes: int) -> dict[str, object]:
        return {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": sizes}

    assert layout_of(TrainerSection())[0] == Layout() and len(layout_of(TrainerSection())[1]) == 1
    assert layout_of(TrainerSection(devices="0,1,2")) == (Layout(3), [])
    ddp = TrainerSection(devices=8, num_nodes=64, strategy="ddp_find_unused_parameters_true")
    assert layout_of(ddp)[0] == Layout(512)
    assert layout_of(TrainerSection(devices=8, num_nodes=64, strategy="fsdp"))[0] == Layout(512, sharded=True)
    both = parallel(data_parallel_size=16, tensor_parallel_size=2)
    assert layout_of(TrainerSection(devices=8, num_nodes=4, strategy=both))[0] == Layout(16, 2, sharded=True)
    assert layout_of(TrainerSection(devices=8, num_nodes=4, strategy=parallel()))[0] == Layout(4, 8, sharded=True)
    with pytest.raises(ValueError, match=r"data_parallel_size 16 × tensor_parallel_size 2 is not 8"):
        layout_of(TrainerSection(devices=8, strategy=both))


def test_the_options_of_the_sharded_strategy_are_part_of_a_plan() -> None:
    def layout(**options: object) -> Layout:
        options = {"data_parallel_size": 8, "tensor_parallel_size": 1, **options}
        # Beside class_path, as on a command line, where everything is text.
        strategy = {"class_path": "lightning_danube.checkpoints.strategy.ShardedStrategy", **options}
        return layout_of(TrainerSection(devices=8, strategy=strategy))[0]

    assert layout() == Layout(8, sharded=True)
    assert layout(shard_size="4", gather_again="false", reduce_once="False") == Layout(8, 1, True, 4, False, False)
    assert inspect.signature(ShardedStrategy).parameters["reduce_once"].default is Layout().reduce_once
    assert inspect.signature(ShardedStrategy).parameters["gather_again"].default is Layout().gather_again
    with pytest.raises(ValueError, match="shard_size 3 does not divide data_parallel_size 8"):
        layout(shard_size=3)


@pytest.mark.parametrize(
    ("devices", "nodes", "tensor", "expected"),
    [(8, 4, 1, Layout(32, 1, True, 8)), (8, 1, 1, Layout(8, 1, True, 8)), (8, 2, 2, Layout(8, 2, True, 4))],
)
def test_the_replicas_of_a_node_share_a_copy(devices: int, nodes: int, tensor: int, expected: Layout) -> None:
    sizes = {"tensor_parallel_size": tensor, "shard_size": "node"}
    strategy = {"class_path": "lightning_danube.checkpoints.strategy.ShardedStrategy", "init_args": sizes}
    assert layout_of(TrainerSection(devices=devices, num_nodes=nodes, strategy=strategy))[0] == expected


def test_training_waits_for_a_copy_where_checkpoints_are_written_meanwhile() -> None:
    sharded = {"class_path": "lightning_danube.checkpoints.strategy.ShardedStrategy"}
    assert TrainerSection().saves_in_background, "on a GPU"
    assert not TrainerSection(accelerator="cpu").saves_in_background
    assert TrainerSection(accelerator="cpu", devices=2, strategy=sharded).saves_in_background
    assert not TrainerSection(accelerator="cpu", devices=1, strategy=sharded).saves_in_background


def test_the_settings_have_the_options_and_the_defaults_of_what_they_stand_for() -> None:
    from lightning.pytorch import Trainer

    from lightning_danube.callbacks import Checkpoints
    from lightning_danube.pretraining import CurriculumData, Pretraining
    from lightning_danube.pretraining.settings import CurriculumSettings, PretrainingSettings

    trainer = inspect.signature(Trainer).parameters
    for name, option in inspect.signature(TrainerSection).parameters.items():
        assert option.default == trainer[name].default, name
    for settings, whole in ((CurriculumSettings, CurriculumData), (PretrainingSettings, Pretraining)):
        assert inspect.signature(settings).parameters == inspect.signature(whole).parameters
    callbacks: list[Any] = ["x.Progress", {"class_path": "lightning_danube.callbacks.Checkpoints"}]
    assert TrainerSection(callbacks=callbacks).save_interval == Checkpoints().schedule.interval
    assert TrainerSection().save_interval is None


def test_a_plan_loads_neither_lightning_nor_torch() -> None:
    """Their import takes most of the time of a plan. A config for the CPU alone asks PyTorch how fast it multiplies."""
    code = (
        "import sys; from lightning_danube.__main__ import main; main(['plan', '--config', 'pretrain/danube3-500m']);"
        "print(sorted({'torch', 'lightning', 'jsonargparse'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_passes_by_stage_are_those_of_every_sample_counted() -> None:
    stages = [Stage("a", 4000, {"x": 70, "y": 30}), Stage("b", 2000, {"x": 20, "y": 80})]
    curriculum = Curriculum(stages, {"x": 31, "y": 17}, context_length=8, batch_samples=5, seed=1)
    for k, span in enumerate(curriculum.spans, start=1):
        seen = [key.source for key in curriculum.samples(0, span.stop)]
        assert curriculum.passes_after(k) == {"x": seen.count(0) / 31, "y": seen.count(1) / 17}


def test_time_and_advice_by_hand() -> None:
    accelerator = parse_accelerator("400e12/64GiB=1.5")
    assert (accelerator.flops, accelerator.memory, accelerator.price) == (400e12, 64 * 2**30, 1.5)
    assert seconds_of(1.6e18, 10, accelerator, 0.4) == 1000
    advice = CheckpointAdvice(size=0, write=50, between_failures=10_000)
    assert advice.interval == 1000 and advice.lost(1000) == 0.05 + 0.05
    assert min(range(100, 5000, 100), key=advice.lost) == 1000
    # With a copy of two seconds, training waits for it alone, but loses more to a failure while the file is written.
    behind = CheckpointAdvice(size=0, write=50, between_failures=10_000, copy=2, start=30)
    assert behind.interval == 200 and behind.lost(200) == pytest.approx(2 / 200 + (100 + 50 + 30) / 10_000)
    assert CheckpointAdvice(size=0, write=500, between_failures=10_000, copy=2).interval == 500, "one at a time"


def test_a_checkpoint_has_the_size_that_is_told(tiny_run: Path) -> None:
    config = DecoderConfig(32, 64, 2, 4, 2, vocab_size=4096, max_position_embeddings=32)
    checkpoint = next((tiny_run / "checkpoints").glob("stage_3_*.ckpt"))
    # Names and the state of loops and callbacks come on top: some 40 kB.
    told = checkpoint_bytes(TrainingMemory(config, 8, 32))
    assert told <= checkpoint.stat().st_size < told + 100_000


def test_checkpoints_are_advised_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """Young (1974): save every sqrt(2 × write × time between failures)."""
    printed = planned(
        capsys,
        *("--config", str(PAPER / "danube3-4b.yaml"), "--trainer.num_nodes", "64", "--trainer.devices", "8"),
        *("--data.init_args.batch_tokens", str(1024 * 8192), "--accelerator", "h100", "--write-speed", "2"),
        *("--utilisation", "0.5"),
    )
    size = 3 * 4 * 3_961_839_360  # weights and two averages
    # Each of the 8 devices of a node copies its share, over PCIe at 14.2 GB/s.
    write, copy, between = size / 2e9, size / 8 / 14.2e9, 50_000 * 3600 / 512
    assert f"checkpoint: {size / 1e9:.2f} GB" in printed and f", {write:.1f} s at 2 GB/s" in printed
    assert f"training waits {copy:.1f} s for a copy\n" in printed
    assert f"a failure about every {between / 3600:.0f} h" in printed
    seconds = DecoderConfig.preset("danube3-4b").flops_per_token(8192) * 1024 * 8192 / (512 * 0.5 * 989e12)
    steps = round(math.sqrt(2 * copy * between) / seconds)
    (every,) = map(int, re.findall(r"lost with ([\d,]+)", printed.replace(",", "")))
    lost = [100 * (copy / (n * seconds) + (n * seconds / 2 + write + 26.9) / between) for n in (steps, every)]
    found = [line.split() for line in printed.splitlines() if line.startswith("h100  ")][-1]
    assert found[1:] == [f"{seconds:,.2f}", f"{steps:,}", f"{lost[0]:.2f}", "%", f"{lost[1]:.2f}", "%"]
    assert every != steps


def test_a_run_fits_if_it_leaves_a_tenth_of_the_memory() -> None:
    memory = TrainingMemory(DecoderConfig(64, 96, 2, 4, 2, vocab_size=272), 1, 64)
    data: Any = SimpleNamespace(
        context_length=64, total_tokens=10**12, batch_tokens=64 * 24, batch_samples=24, total_steps=10
    )
    peak = memory.peak().total
    devices = [Accelerator("tight", 1e8, math.ceil(peak / 0.9)), Accelerator("less", 1e8, int(peak / 0.95))]
    printed = _accelerators(devices, [Pace(1.0)] * 2, memory, data, 0.5)
    # A replica of DDP holds more than one device alone; shards of FSDP2 hold less.
    assert cells(printed, "tight")[3:6] == ["yes", "only 1", "1 or 3"]
    fits, ddp, fsdp = cells(printed, "less")[3:6]
    assert (fits, ddp) == ("no", "none") and int(fsdp) in (2, 3, 4)


def test_the_layout_of_a_plan_is_named() -> None:
    def engine(*layout: Any) -> str:
        return _engine(TrainingMemory(DecoderConfig(64, 96, 2, 4, 2, vocab_size=272), 1, 64, layout=Layout(*layout)))

    assert [engine(), engine(4), engine(4, 1, True)] == ["one device", "DDP over 4", "FSDP2 over 4"]
    assert engine(2, 4, True) == "FSDP2 over 2, tensor parallel over 4"
    assert engine(1, 4, True) == "tensor parallel over 4"
    assert engine(8, 1, True, 4) == "HSDP over 2 × 4" and engine(8, 1, True, 8) == "FSDP2 over 8"


@pytest.mark.parametrize(
    ("seconds", "unit"),
    [
        ([5.0], ("minutes", 60)),
        ([5.0, 3599.0], ("minutes", 60)),
        ([5.0, 3600.0], ("hours", 3600)),
        ([90_000.0, 7.0], ("days", 86400)),
    ],
)
def test_times_are_told_in_the_unit_of_the_longest(seconds: list[float], unit: tuple[str, int]) -> None:
    assert _unit(seconds) == unit


def test_passes_are_those_at_the_end_of_each_stage(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stages of 12, 8 and 6 steps of 256 tokens; a twentieth of each source is held out."""
    config = ("--config", str(tiny / "tiny.yaml"), "--accelerator", "h100")
    printed = planned(capsys, *config, "--source-tokens", "web=10K,wiki=20K")
    taken = {"web": 0.0, "wiki": 0.0}
    expected: dict[str, list[float]] = {"web": [], "wiki": []}
    for steps, web in ((12, 0.906), (8, 0.817), (6, 0.516)):
        for name, share, tokens in (("web", web, 10_000), ("wiki", 1 - web, 20_000)):
            taken[name] += 256 * steps * share
            expected[name].append(taken[name] / (0.95 * tokens))
    for name, passes in expected.items():
        # Whole rows of 32 tokens.
        assert [float(cell) for cell in cells(printed, name)[-3:]] == pytest.approx(passes, abs=0.012)


@pytest.mark.parametrize(
    ("number", "shown"), [(3.7e-5, "< 0.001"), (0, "0"), (0.00575, "0.00575"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_numbers_are_told_without_exponents(number: float, shown: str) -> None:
    assert _rounded(number) == shown
