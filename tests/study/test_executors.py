"""Studies with real worker processes and a stand-in for training: nothing is done twice, nothing is lost, failures are kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import deltatune as dt
from deltatune.errors import DeltaTuneError
from deltatune.files import write_json
from deltatune.study import Plan, run_study, status
from deltatune.study.crew import Crew
from deltatune.study.inputs import inspect
from deltatune.study.status import Status
from deltatune.study.store import Store
from tests.study.fake import fake_tune

SEARCH = '[search]\nlr = [1e-3, 3e-3]\ntasks = ["topic"]\nsteps = 10'


def do(plan: Plan | Path, folder: Path, workers: int = 1, retry_failed: bool = False) -> Status:
    return run_study(plan, folder, workers=workers, retry_failed=retry_failed, execute=fake_tune)


def begin(plan: Path, folder: Path) -> None:
    """Open the study in this process, so that others need not load a modelling library to look at its backbones."""
    made = Plan.read(plan)
    Store(folder).open(made, inspect(made))


def starts(folder: Path) -> dict[str, list[str]]:
    """The process ids that started each run."""
    return {path.parent.name: path.read_text().split() for path in folder.glob("runs/*/starts")}


def test_a_finished_study_starts_nothing_and_a_longer_plan_only_what_is_new(
    write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    assert do(write(seeds="0"), folder).complete
    first = starts(folder)
    assert len(first) == 4
    with monkeypatch.context() as patch:
        patch.setattr(Crew, "idle", lambda self: pytest.fail("a finished study started a process"))
        assert do(write(seeds="0"), folder).complete
    assert do(write(seeds="0, 1", more=SEARCH), folder).complete
    later = starts(folder)
    assert first.items() <= later.items()
    assert all(len(each) == 1 for each in later.values())
    # 4 candidates; the 4 runs of seed 0 are as before where the search took their learning rate again.
    assert status(folder).counts["done"] == 4 + 8


def test_a_candidate_never_reads_the_test_split_and_is_no_final_run(
    write: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    plan = write(tasks='"topic"', seeds="0", more="[search]\nlr = [1e-3, 3e-3]")
    assert all(not entry.run.recipe.test for entry in Plan.read(plan).search_runs())
    now = do(plan, folder)
    assert now.complete and len(now.lines) == 4 + 2
    assert len(starts(folder)) == 6 and all(len(each) == 1 for each in starts(folder).values())
    assert "6 of 6 runs" in capsys.readouterr().out


def test_two_commands_share_the_work_and_no_run_is_started_twice(
    write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "0.2")
    folder, plan = tmp_path / "study", write()
    begin(plan, folder)
    context = multiprocessing.get_context("spawn")
    commands = [context.Process(target=do, args=(plan, folder)) for _ in range(2)]
    for command in commands:
        command.start()
    for command in commands:
        command.join(120)
    assert [command.exitcode for command in commands] == [0, 0]
    found = starts(folder)
    assert len(found) == 8 and all(len(each) == 1 for each in found.values())
    assert len({each[0] for each in found.values()}) == 2
    assert status(folder).complete


def test_a_failed_run_is_kept_the_others_go_on_and_retry_failed_repeats_it(
    write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plan = tmp_path / "study", write(seeds="0")
    monkeypatch.setenv("FAKE_TROUBLE", "fail:topic")
    now = do(plan, folder)
    assert now.counts == {"done": 2, "failed": 2}
    assert not now.complete
    assert {line.entry.run.task for line in now.failures} == {"topic"}
    assert all("NonFiniteLoss: the loss is nan at step 3" in line.reason for line in now.failures)
    monkeypatch.delenv("FAKE_TROUBLE")
    assert len(do(plan, folder).failures) == 2
    assert do(plan, folder, retry_failed=True).complete


@pytest.mark.parametrize(("kind", "failed", "tries"), [("die-once", 0, 2), ("die", 2, 2)])
def test_a_run_whose_process_dies_is_tried_once_more_by_another(
    write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, failed: int, tries: int
) -> None:
    folder = tmp_path / "study"
    monkeypatch.setenv("FAKE_TROUBLE", f"{kind}:topic")
    now = do(write(seeds="0"), folder)
    assert now.counts["failed"] == failed and now.counts["done"] == 4 - failed
    assert all("WorkerDied" in line.reason and "exit code -9" in line.reason for line in now.failures)
    for line in now.lines:
        pids = starts(folder)[line.entry.run.id]
        assert len(pids) == len(set(pids)) == (tries if line.entry.run.task == "topic" else 1)


def test_a_failing_candidate_only_loses_the_search(
    write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plan = tmp_path / "study", write(tasks='"sentiment"', seeds="0", more=SEARCH)
    store = Store(folder)
    for entry in Plan.read(plan).search_runs():
        if entry.run.recipe.lr == 3e-3:
            store.begin(entry.run)
            store.fail(entry.run.id, "NonFiniteLoss", "nan")
    now = do(plan, folder)
    assert now.complete and not now.failures and now.counts["failed"] == 2
    assert {line.entry.run.recipe.lr for line in now.lines if line.entry.part == "final"} == {1e-3}


def test_workers_end_with_their_parent(write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "1")
    folder, plan = tmp_path / "study", write()
    begin(plan, folder)
    command = multiprocessing.get_context("spawn").Process(target=do, args=(plan, folder))
    command.start()
    worker = int(wait_for(lambda: next(iter(starts(folder).values()), [None])[0]))
    assert command.pid is not None
    os.kill(command.pid, signal.SIGKILL)
    command.join()
    wait_for(lambda: not alive(worker))
    assert "running" not in {line.state for line in status(folder).lines}


def test_ctrl_c_leaves_no_process_and_no_failure(
    write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plan = tmp_path / "study", write(seeds="0")
    seen: list[int] = []

    def interrupt(self: Crew):
        seen.extend(worker.process.pid or 0 for worker in self.workers)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Crew, "messages", interrupt)
        do(plan, folder)
    assert seen and not any(alive(pid) for pid in seen)
    assert do(plan, folder).complete


def test_a_folder_belongs_to_one_study_and_to_unchanged_inputs(write: Callable, tmp_path: Path) -> None:
    folder, plan = tmp_path / "study", Plan.read(write(seeds="0"))
    inputs = {"tasks": {"topic": {"digest": "a" * 64}}, "backbones": {"tiny": {"digest": "b" * 64}}}
    Store(folder).open(plan, inputs)
    with pytest.raises(DeltaTuneError, match="'tiny' has changed since .*bbbbbbbbbbbb then, cccccccccccc now"):
        Store(folder).open(plan, {**inputs, "backbones": {"tiny": {"digest": "c" * 64}}})
    path = write(seeds="0")
    path.write_text(path.read_text().replace('name = "small"', 'name = "large"'))
    with pytest.raises(DeltaTuneError, match="holds the study 'small', but the plan is named 'large'"):
        Store(folder).open(Plan.read(path), inputs)
    with pytest.raises(DeltaTuneError, match="holds no study"):
        status(tmp_path / "elsewhere")


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    store = Store(tmp_path)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready), daemon=True)
    holder.start()
    assert ready.wait(60)
    with store.claim("run") as mine:
        assert not mine
    assert store.state("run") == "running"
    holder.kill()
    holder.join()
    assert store.state("run") == "pending"
    with store.claim("run") as mine:
        assert mine
        with Store(tmp_path).claim("run") as again:
            assert not again


def hold(folder: Path, ready) -> None:
    with Store(folder).claim("run") as mine:
        assert mine
        ready.set()
        time.sleep(600)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(found: Callable, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)
    return value


def test_a_run_done_with_other_defaults_of_its_method_is_another_run(write: Callable, tmp_path: Path) -> None:
    folder, plan = tmp_path / "study", write(tasks='"topic"', seeds="0")
    do(plan, folder)
    assert status(folder).complete
    path = next(path for path in folder.glob("runs/*/run.json") if "LoRA" in path.read_text())
    record = json.loads(path.read_text())
    assert record["delta"] == "LoRA(rank=2)" and record["terms"] == dt.parse("LoRA(rank=2)").to_json()
    record["terms"][0]["method"]["LoRA"]["alpha"] = 1.0
    write_json(path, record)
    assert status(folder).counts == {"done": 1, "pending": 1}
    assert {run.delta for run in Store(folder).found()} == {"Full()"}
    del record["terms"]  # as kept by versions that wrote the text alone
    write_json(path, record)
    assert status(folder).complete


def test_a_run_of_a_method_that_is_gone_stays_and_hinders_nobody(write: Callable, tmp_path: Path) -> None:
    folder, plan = tmp_path / "study", write(tasks='"topic"', seeds="0")
    do(plan, folder)
    path = next(path for path in folder.glob("runs/*/run.json") if "LoRA" in path.read_text())
    record = json.loads(path.read_text())
    for gone in ({"delta": "NoSuchMethod(rank=2)"}, {"recipe": {**record["recipe"], "no_such_setting": 1}}):
        write_json(path, {**record, **gone})
        assert status(folder).counts == {"done": 1, "pending": 1}
        assert {run.delta for run in Store(folder).found()} == {"Full()"}
    assert path.exists()
