"""The command line as a person and a program use it, in processes of its own."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import typer
from click.testing import Result
from tqdm import tqdm
from typer.testing import CliRunner

from modprune import PruningPlan, count_params, evaluate, load, studies
from modprune.cli import app, main
from modprune.criteria import BlockScores
from modprune.data import ImageLoader, digits
from modprune.models import resnet20


def run(*arguments: object, check: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "modprune", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == check, done.stderr
    return done


def in_process(*arguments: object) -> Result:
    """The same without a process of its own, which takes seconds to import torch."""
    return CliRunner().invoke(app, list(map(str, arguments)))


def in_fork(*arguments: object) -> None:
    """The same in a process that may be killed, while it holds the lock that all forks share too."""
    tqdm.set_lock(threading.RLock())
    in_process(*arguments)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet20.pt"
    torch.save(resnet20().state_dict(), path)
    return path


def prune(weights: Path, out: Path, *more: object) -> list[object]:
    return [
        "prune",
        "--model",
        "resnet20",
        "--weights",
        weights,
        "--data",
        "digits",
        "--blocks",
        2,
        "--out",
        out,
        *more,
    ]


def test_help_names_every_command_and_option():
    whole = typer.main.get_command(app)
    assert sorted(whole.commands) == ["blocks", "curve", "evaluate", "plan", "prune", "study"]
    for group, words in ((whole, ()), (whole.commands["study"], ("study",))):
        text = in_process(*words, "--help").output
        for name, command in group.commands.items():
            assert name in text
            options = [option for option in command.params if option.name != "help"]
            assert all(option.help for option in options), name
            page = in_process(*words, name, "--help").output
            assert [word for option in options for word in option.opts if word not in page] == []


def test_a_network_without_blocks_is_told_why(tmp_path):
    text = in_process("blocks", "--model", "torchvision:squeezenet1_1", "--size", 64).output
    assert "none can go: no other module adds to its input (the first tensor it takes) as it is, and no " in text
    assert "0 blocks; the network has 1,235,496 parameters" in text


def test_blocks_curve_and_plan_write_json(weights, tmp_path):
    shared = ["--model", "resnet20", "--weights", weights, "--data", "digits"]
    assert "9 blocks" in in_process("blocks", "--model", "resnet20", "--json", tmp_path / "b.json").output
    assert len(json.loads((tmp_path / "b.json").read_text())["blocks"]) == 9
    text = run("curve", *shared, "--samples", 100, "--repeats", 2, "--json", tmp_path / "c.json",
               "--picture", tmp_path / "c.png").stdout  # fmt: skip
    assert "layer3.2" in text
    assert len(json.loads((tmp_path / "c.json").read_text())["layers"]) == 10
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    in_process("plan", *shared, "--blocks", 2, "--criterion", "l1_norm", "--json", tmp_path / "p.json")
    plan = PruningPlan.from_json(tmp_path / "p.json")
    assert (len(plan.remove), plan.criterion) == (2, "l1_norm")


def test_small_scores_are_told_apart(weights, monkeypatch):
    small = lambda model, blocks, _: BlockScores(blocks.names, [[i / 10**7 for i in range(-3, 6)]])  # noqa: E731
    monkeypatch.setattr("modprune.cli.fitted", lambda *_: small)
    text = in_process("plan", "--model", "resnet20", "--weights", weights, "--data", "digits", "--blocks", 2).output
    lines = text.splitlines()[:9]
    assert [line.split()[1] for line in lines[:5]] == ["-3.000e-07", "-2.000e-07", "-1.000e-07", "+0.000", "+1.000e-07"]
    assert len({len(line.removesuffix("  remove")) for line in lines}) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["blocks", "--model", "resnet57"], 2, "'resnet57' is unknown: give one of resnet20"),
        (["blocks", "--model", "keras:vgg"], 2, "'keras:vgg' is unknown: give one of resnet20"),
        (["blocks", "--model", "resnet20", "--data", "mine.py:"], 2, "'mine.py:' is unknown: give one of cifar10"),
        (["plan", "--model", "resnet20", "--weights", "w", "--flops", "1.5"], 2, "1.5 is not a fraction"),
        (["curve", "--model", "resnet20", "--weights", "w", "--data", "x"], 2, "'x' is unknown: give one of cifar10"),
        (
            ["study", "curves", "--model", "x", "--weights", "w", "--out", "o"],
            2,
            "'x' is unknown: give one of resnet20",
        ),
        (["plan", "--model", "resnet20", "--weights", "w"], 2, "say how much to remove"),
        (
            ["plan", "--model", "resnet20", "--weights", "w", "--flops", "0.5", "--latency", "0.5"],
            2,
            "flops=0.5 and latency=0.5: give one of the two",
        ),
        (["plan", "--model", "resnet20", "--weights", "w", "--criterion", "q"], 2, "'q' is unknown: give one of modul"),
        (
            ["plan", "--model", "resnet20", "--weights", "w", "--data", "digits", "--flops", "0.5"],
            1,
            "modprune: w: no such file",
        ),
        (
            ["evaluate", "--model", "none.safetensors", "--data", "digits"],
            1,
            "modprune: none.safetensors: no such file",
        ),
        (["evaluate", "--model", __file__, "--data", "digits"], 2, "plain weights; say with --network of which"),
        (
            ["evaluate", "--model", "plan.json", "--data", "digits"],
            2,
            "plan.json: JSON, as a plan is, holds no weights; give",
        ),
        (["evaluate", "--model", "m", "--network", "foo"], 2, "'foo' is unknown: give one of resnet20"),
        (["evaluate", "--model", "m", "--data", "digits", "--network", "vgg11_bn"], 1, "modprune: m: no such file"),
        (["curve", "--model", "resnet20", "--weights", "w", "--device", "meta"], 2, "--device meta: "),
        (["blocks"], 2, "Missing option '--model'; see modprune blocks --help"),
        (["bloks"], 2, "No such command 'bloks'"),
    ],
)
def test_errors_are_one_line_with_the_right_code(arguments, code, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["modprune", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("modprune: ")
    assert message in line


def test_without_a_command_it_shows_its_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["modprune"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"^[02]$"):  # 0 with click before 8.2
        main()
    assert "evaluate" in "".join(capsys.readouterr())


def test_an_unknown_tracker_is_told_before_the_measuring(weights, tmp_path):
    done = in_process(*prune(weights, tmp_path / "out", "--log-with", "chalk"))
    assert "accelerate has no such tracker" in str(done.exception)
    done = in_process(*prune(weights, tmp_path / "out", "--batch-size", 5000))
    assert "batch_size=5000: it lies between 1 and 1437, the number" in str(done.exception)
    assert not (tmp_path / "out" / "plan.json").exists()


def test_weights_in_the_folder_of_the_results_are_not_replaced(tmp_path):
    safetensors.torch.save_file(resnet20().state_dict(), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    done = in_process(*prune(tmp_path / "model.safetensors", tmp_path, "--epochs", 0, "--criterion", "l1_norm"))
    assert done.exit_code == 2
    assert "lies in --out, where it would be replaced" in done.output
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_an_unpruned_network_is_evaluated_with_its_weights(weights, tmp_path):
    in_process(
        "evaluate", "--model", weights, "--network", "resnet20", "--data", "digits", "--json", tmp_path / "e.json"
    )
    model = resnet20()
    model.load_state_dict(torch.load(weights))
    expected = evaluate(model, ImageLoader(digits(False), 100))
    assert json.loads((tmp_path / "e.json").read_text()) == asdict(expected)


def test_a_missing_data_folder_and_an_unwritable_one(weights, tmp_path):
    shared = ["--model", "resnet20", "--weights", weights, "--data-dir", tmp_path]
    assert "no intact CIFAR-10 there" in str(in_process("plan", *shared, "--blocks", 1).exception)
    (tmp_path / "file").write_text("")
    done = in_process(*prune(weights, tmp_path / "file", "--epochs", 0, "--criterion", "l1_norm"))
    assert done.exit_code == 1
    assert "cannot be written" in str(done.exception)


def test_where_results_go_is_looked_at_before_the_work(weights, tmp_path, monkeypatch):
    for name in ("modprune.modularity_curve", "modprune.studies.curves"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("measured before it looked"))
    (tmp_path / "file").write_text("")
    curve = ["curve", "--model", "resnet20", "--weights", weights, "--data", "digits"]
    for option in ("--json", "--picture"):
        done = in_process(*curve, option, tmp_path / "file" / "q.png")
        assert done.exit_code == 1
        assert f"file/q.png: cannot be written ({tmp_path}/file is no folder)" in str(done.exception)
    assert "cannot be written" in str(in_process(*curve, "--json", tmp_path).exception)
    done = in_process(*curve, "--picture", tmp_path / "q.jpg")
    assert done.exit_code == 2
    assert "give a name that ends in .png" in done.output
    done = in_process("study", "curves", *curve[1:], "--out", tmp_path / "file")
    assert "cannot be written" in str(done.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_killed_and_resumed_ends_like_an_uninterrupted_run(weights, tmp_path):
    options = ("--epochs", 3, "--lr", 0.05)
    assert "Top-1" in in_process(*prune(weights, tmp_path / "whole", *options)).output
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == [
        "curve.json",
        "curve.png",
        "metrics.csv",
        "model.safetensors",
        "plan.json",
        "report.json",
        "report.md",
        "run.json",
    ]
    arguments = json.loads((tmp_path / "whole" / "run.json").read_text())["arguments"]
    assert (arguments["blocks"], arguments["recipe"]["lr"], arguments["seed"]) == (2, 0.05, 0)

    cut = tmp_path / "cut"
    process = multiprocessing.get_context("fork").Process(target=in_fork, args=prune(weights, cut, *options))
    process.start()
    deadline = time.monotonic() + 120
    while not list(cut.glob("checkpoints/epoch-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (cut / "model.safetensors").exists()
    assert "holds the state of a run" in str(in_process(*prune(weights, cut, *options)).exception)
    assert in_process(*prune(weights, cut, *options, "--resume")).exit_code == 0
    for folder in (tmp_path / "whole", cut):
        rows = (folder / "metrics.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2", "3"]
    assert (cut / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()

    written = {path: path.stat().st_mtime_ns for path in cut.iterdir()}
    again = in_process(*prune(weights, cut, *options, "--resume"))  # a finished one is told once more
    assert "Top-1" in again.output
    assert {path: path.stat().st_mtime_ns for path in cut.iterdir()} == written
    for other in (("--seed", 5), ("--criterion", "random"), ("--lr", 0.1)):
        done = in_process(*prune(weights, cut, *options, "--resume", *other))
        assert "resume it as it was" in str(done.exception)

    for foreign in ("{}", "no JSON", '{"arguments": {"recipe": 3}}'):
        (tmp_path / "run.json").write_text(foreign)
        done = in_process(*prune(weights, tmp_path, *options, "--resume"))
        assert "run.json: not the record of a run" in str(done.exception)

    model = cut / "model.safetensors"
    text = in_process("evaluate", "--model", model, "--data", "digits", "--json", cut / "e.json").output
    report = json.loads((cut / "report.json").read_text())
    assert json.loads((cut / "e.json").read_text())["correct"] == report["pruned"]["accuracy"]["correct"]
    assert f"{report['pruned']['accuracy']['top1']:.2f} %" in text


def test_processes_of_torchrun_share_the_work_and_one_writes(weights, tmp_path):
    (tmp_path / "many.py").write_text(  # enough for five disjoint draws of 500
        "from dataclasses import replace\nimport torch\nfrom modprune.data import digits\n"
        "def many(train):\n    data = digits(train)\n"
        "    return replace(data, images=torch.cat([data.images, 255 - data.images]), labels=data.labels.repeat(2))"
    )
    shared = ["--model", "resnet20", "--weights", weights, "--data", f"{tmp_path}/many.py:many", "--blocks", 2]
    little = [*shared[:-2], "--samples", 100, "--repeats", 2]
    commands = [
        ["curve", *little, "--json", tmp_path / "curve.json"],
        ["plan", *shared, "--criterion", "l1_norm", "--json", tmp_path / "plan.json"],
        ["prune", *shared, "--epochs", 1, "--out", tmp_path / "out"],
    ]
    (tmp_path / "each.py").write_text(
        "import atexit, gc, json, os, sys\nfrom subprocess import getoutput\nimport torch\n"
        "from modprune import finetune\nfrom modprune.cli import app\n"
        "threads = lambda: getoutput(f'cat /proc/{os.getpid()}/task/*/comm')\n"
        "atexit.register(lambda: print('together' if 'gloo' in threads() else 'parted'))\n"  # runs last
        "gc.disable()\n"  # nor is it by luck
        "model, batch = torch.nn.Linear(4, 2), (torch.randn(8, 4), torch.arange(8) % 2)\n"
        "finetune(model, [batch], epochs=1, progress=False)\n"  # what starts the processes may be this too
        "assert torch.distributed.get_world_size() == 2\n"
        "for command in json.loads(sys.argv[1]):\n    app(command, standalone_mode=False)"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    texts = json.dumps([[str(word) for word in command] for command in commands])
    each = [*launch, str(tmp_path / "each.py"), texts]
    done = subprocess.run(each, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(word) for word in ("Results are in", "to remove: 2", "spread", "parted")] == [1, 1, 1, 2]
    assert in_process("curve", *little, "--json", tmp_path / "one.json").exit_code == 0
    both, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("curve", "one"))
    assert np.allclose(both["q"], one["q"], atol=1e-6)
    assert PruningPlan.from_json(tmp_path / "plan.json").criterion == "l1_norm"
    plan, one = PruningPlan.from_json(tmp_path / "out" / "plan.json"), tmp_path / "one-plan.json"
    assert in_process("plan", *shared, "--json", one).exit_code == 0
    assert plan.remove == PruningPlan.from_json(one).remove
    # Batches of other sizes round otherwise, and of two neighbours as near the other may be taken: an edge of 1,500.
    assert plan.scores == pytest.approx(PruningPlan.from_json(one).scores, abs=1 / 1500)
    assert len((tmp_path / "out" / "metrics.csv").read_text().splitlines()) == 2
    assert count_params(load(tmp_path / "out" / "model.safetensors")) < count_params(resnet20())
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_study_under_a_launcher_is_refused(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = ["--model", "resnet20", "--weights", weights, "--data", "digits", "--out", tmp_path / "out"]
    done = in_process("study", "difference", *shared)
    assert done.exit_code == 1
    assert str(done.exception) == "2 processes were started, and a study runs in one: start it without a launcher"
    assert not (tmp_path / "out").exists()


STUDIES = {
    "curves": ["--samples", 60, "--repeats", 1],
    "separation": ["--samples", 60],
    "ablation": ["--samples", 60, "--samples", 30, "--k", 3],
    "plateaus": ["--samples", 60, "--repeats", 1, "--cuts", 1],
    "redundancy": ["--samples", 60, "--repeats", 1, "--cuts", 1],
    "difference": ["--samples", 60],
    "training": ["--samples", 60, "--epochs", 1],
}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_writes_numbers_pictures_and_text(name, weights, tmp_path):
    shared = ["--model", "resnet20", "--weights", weights, "--data", "digits", "--out", tmp_path]
    done = in_process("study", name, *shared, *STUDIES[name])
    assert done.exit_code == 0, done.output
    assert {"study.json", "study.md", "study.png", "study.svg"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "parts.json").exists()
    assert not (tmp_path / "checkpoints").exists()
    assert json.loads((tmp_path / "study.json").read_text())["study"] == name
    assert (tmp_path / "study.md").read_text().split("\n\n")[1] in done.output


def test_curves_of_several_data_sets(weights, tmp_path):
    (tmp_path / "odd.py").write_text(
        "from modprune.data import digits\n"
        "def odd(train):\n    data = digits(train)\n    return data.subset(data.labels % 2 == 1)"
    )
    shared = ["study", "curves", *["--model", "resnet20", "--weights", weights] * 2, "--samples", 60, "--repeats", 1]
    done = in_process(*shared, "--data", "digits", "--data", f"{tmp_path}/odd.py:odd", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "out" / "study.json").read_text())["networks"]
    assert [row["network"] for row in rows] == ["resnet20, digits", "resnet20, odd.py:odd"]
    assert rows[0]["q"] != rows[1]["q"]
    done = in_process(*shared, *["--data", "digits"] * 3, "--out", tmp_path)
    assert done.exit_code == 2
    assert "2 --model and 3 --data: give one for all, or one for each" in done.output


def test_images_are_loaded_once(weights, tmp_path):
    (tmp_path / "told.py").write_text(
        f"from modprune.data import digits\ndef told(train):\n    with open({str(tmp_path / 'calls')!r}, 'a') as f:\n"
        "        print(train, file=f)\n    return digits(train)"
    )
    shared = ["--model", "resnet20", "--weights", weights, "--data", f"{tmp_path}/told.py:told"]
    few = ["--samples", 60, "--repeats", 1, "--cuts", 1, "--out", tmp_path / "out"]
    for command in (["plan", *shared, "--blocks", 1, "--criterion", "random"], ["study", "redundancy", *shared, *few]):
        assert in_process(*command).exit_code == 0
    assert sorted((tmp_path / "calls").read_text().split()) == ["False", "True", "True"]


def test_attacks_need_images_that_the_network_gets_right(weights, tmp_path):
    shared = ["--model", "resnet20", "--weights", weights, "--data", "digits", "--out", tmp_path]  # random weights
    done = in_process("study", "attacks", *shared, "--samples", 300)
    assert re.search(r"gets \d+ images right, 300 are asked for", str(done.exception))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_study_has_to_be_resumed(weights, tmp_path):
    (tmp_path / "parts.json").write_text('{"arguments": [], "parts": {}}')
    shared = ["study", "difference", "--model", "resnet20", "--weights", weights, "--data", "digits", "--out", tmp_path]
    assert "holds an unfinished study: resume it" in str(in_process(*shared).exception)
    assert "of a study with other arguments or weights" in str(in_process(*shared, "--resume").exception)


def test_parts_of_a_study_are_those_of_the_weights_not_of_their_path(weights, tmp_path, monkeypatch):
    def cut_short(*_, **options):
        options["parts"].keep("one", 1)
        raise KeyboardInterrupt

    shared = ["study", "difference", "--model", "resnet20", "--data", "digits", "--out", tmp_path / "out", "--weights"]
    moved, other = tmp_path / "moved.pt", tmp_path / "other.pt"
    shutil.copyfile(weights, moved)
    torch.save(resnet20().state_dict(), other)
    with monkeypatch.context() as patch:
        patch.setattr(studies, "difference", cut_short)
        assert in_process(*shared, weights).exit_code == 130
    assert "other arguments or weights" in str(in_process(*shared, other, "--resume").exception)
    assert in_process(*shared, moved, "--resume").exit_code == 0


@pytest.mark.parametrize(
    "wrong", ["attacks --attack nope", "difference --seed -1", "separation --seed 4294967296", "plateaus --lr inf"]
)
def test_wrong_usage_of_studies_makes_no_folder(wrong, weights, tmp_path):
    shared = ["--model", "resnet20", "--weights", weights, "--data", "digits", "--out", tmp_path / "out"]
    assert in_process("study", *wrong.split(), *shared).exit_code == 2
    assert not (tmp_path / "out").exists()
