"""A plan on a cluster: what may run beside what, and on two nodes of Ray, stopped and one of them killed, the records of one process."""

import os
import pickle
import signal
import socket
import threading
import time
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import pytest

from m2helpers.__main__ import main
from m2helpers.data import load_dataset
from m2helpers.engine.loop import Stopped
from m2helpers.engine.resume import has_state
from m2helpers.experiments import cluster
from m2helpers.experiments.cluster import on_ray
from m2helpers.experiments.planning import Plan
from m2helpers.experiments.runner import Work, best_of_grid, run_plan
from m2helpers.files import UserError, read_json, write_json
from m2helpers.ledger import Ledger
from m2helpers.settings import TrainSettings
from tests.campaigns.cluster import records

INITIAL = TrainSettings(
    lora_r=1, learning_rate=1e-2, batch_size=3, max_steps=4, max_length=48, eval_steps=50, save_steps=20, eval_windows=4
)
PLAN = Plan(INITIAL, INITIAL, (1e-3, 1e-2), ranks=(1,), contexts=(), precisions=(), sweep_steps=200, measured=())


# ---------------------------------------------------------------- what may run beside what


class Three:
    """Carries out three runs at once, and is done with the last of them first."""

    def __init__(self, work):
        self.work, self.begun, self.seen = work, [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert not self.begun

    def room(self):
        return len(self.begun) < 3

    def start(self, run, whole):
        self.begun.append((run, whole))
        self.seen.append({run.name for run, _ in self.begun})

    def finished(self):
        run, whole = self.begun.pop()
        return run, self.work.carry_out(run, whole)


def test_long_runs_wait_for_the_grid_and_all_others_for_room(tmp_path, monkeypatch, tiny_folder, small_data):
    """The grid is best at its edge, and so grows twice, before a long run begins."""

    def carry_out(work, run, whole):
        (folder := work.folder / run.name).mkdir(parents=True)
        loss = 1 / run.settings.learning_rate
        (folder / "history.csv").write_text(f"step,loss,val_loss,flops\n1,{loss},{loss},1\n")
        write_json(folder / "config.json", {"settings": asdict(run.settings)})
        return True

    monkeypatch.setattr(Work, "carry_out", carry_out)
    hands, said = [], []

    def three(work):
        hands.append(Three(work))
        return hands[0]

    plan = Plan(INITIAL, INITIAL, (1e-3, 1e-2), ranks=(1,), contexts=(32,), precisions=(1,), sweep_steps=2)
    done = run_plan(plan, str(tiny_folder), small_data, tmp_path, say=said.append, executor=three)
    assert hands[0].seen[2] == {"untrained", "initial", "sweep/lr0.001-r1-n48-p2-seed0"}
    assert done.learning_rates == (1e-3, 1e-2, 0.1) and done.final.learning_rate == 0.1
    best = best_of_grid(done, tmp_path).learning_rate
    assert read_json(tmp_path / "final" / "config.json")["settings"]["learning_rate"] == best == 0.1
    alone = [names for names in hands[0].seen if "final" in names]
    grid = {run.name for run in done.runs_of(["grid"])}
    assert alone and not any(names & grid for names in alone)


# ---------------------------------------------------------------- what is refused


def test_machines_that_would_not_share_a_ledger_are_refused(monkeypatch, tmp_path):
    nodes = [{"Alive": True, "NodeManagerAddress": f"10.0.0.{number}"} for number in (1, 2, 2)]
    two, work = SimpleNamespace(nodes=lambda: nodes), SimpleNamespace(ledger=None)
    monkeypatch.setenv("M2_LEDGER", str(tmp_path / "ledger.sqlite"))
    with pytest.raises(UserError, match="2 machines cannot share a ledger in a file; set M2_LEDGER to postgresql"):
        cluster._check_ledger(two, work)
    monkeypatch.setenv("M2_LEDGER", "postgresql://user@host/database")
    cluster._check_ledger(two, work)


def test_more_than_any_machine_has_is_refused():
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]
    fake = SimpleNamespace(nodes=lambda: nodes, remote=lambda **_: lambda task: task, put=lambda value: value)
    work = Work("m", "0", None, None, False, None, None, print)
    hands = [cluster._OnRay(fake, work, cpus, gpus, lambda: False, None) for cpus, gpus in ((2, 0), (8, 0), (1, 0.5))]
    assert hands[0].room()
    hands[0].running = dict.fromkeys("ab")
    assert not hands[0].room()
    for one in hands[1:]:
        with pytest.raises(UserError, match="no machine of the cluster has"):
            one.room()


def test_a_ledger_that_is_sent_is_opened_anew(tmp_path):
    ledger = pickle.loads(pickle.dumps(Ledger(tmp_path / "ledger.sqlite", 7)))
    assert (ledger.where, ledger.cap) == (tmp_path / "ledger.sqlite", 7) and not ledger.entries()


def test_impossible_shares_are_refused(capsys, tmp_path):
    assert main(["experiments", "--cluster=ray", "--cpus-per-run=0", f"--output-dir={tmp_path}"]) == 1
    assert "--cpus-per-run 0" in capsys.readouterr().err


# ---------------------------------------------------------------- on two nodes


def _node(nodes):
    """A node with one core. Its ports are given: those that it chooses it has to find within 15 seconds."""
    with socket.socket() as a, socket.socket() as b, socket.socket() as c:
        ports = []
        for free in (a, b, c):
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    names = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port")
    given = dict(zip(names, ports, strict=True))
    return nodes.add_node(num_cpus=1, object_store_memory=cluster.STORE, include_dashboard=False, **given)


@pytest.fixture
def two_nodes(monkeypatch):
    """A cluster of two nodes with a core each, and the second of them."""
    import ray  # takes seconds
    from ray.cluster_utils import Cluster

    nodes = Cluster()
    try:
        _node(nodes)
        second = _node(nodes)
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes, second
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.mark.slow
@pytest.mark.long
def test_one_process_can_have_one_cluster_after_another(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    for _ in range(2):
        ray = cluster._connect(1, 0)
        try:
            assert ray.cluster_resources()["CPU"] >= 1
        finally:
            ray.shutdown()


def _once(ready, then):
    """Do something in a thread as soon as it is time."""

    def wait():
        until = time.monotonic() + 120
        while not ready() and time.monotonic() < until:
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.long
def test_a_plan_that_is_stopped_and_loses_a_node_leaves_the_records_of_one_process(
    two_nodes, tiny_folder, long_data, tmp_path, monkeypatch
):
    nodes, second = two_nodes
    said = []
    options = dict(stages=["grid", "final"], say=said.append)
    for name in ("alone", "cluster"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cluster")

    def saved(n):
        return sum(map(has_state, (tmp_path / "cluster" / "out" / "sweep").glob("*"))) >= n

    dataset, model, hands = load_dataset(long_data.path), str(tiny_folder), partial(on_ray, cpus=1)
    stopping = _once(lambda: saved(2), lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match="every run was saved where it stood; --resume goes on"):
        run_plan(PLAN, model, dataset, "out", executor=hands, **options)
    stopping.join()
    assert saved(2)  # two of them side by side

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cluster" / "out").rglob("state.safetensors")}
    losing = _once(
        lambda: all(path.stat().st_mtime_ns != then for path, then in before.items() if path.exists()),
        lambda: nodes.remove_node(second, allow_graceful=False),
    )
    run_plan(PLAN, model, dataset, "out", resume=True, executor=hands, **options)
    losing.join()
    assert any("its worker was lost (NodeDiedError); it goes on from its last save" in line for line in said)

    monkeypatch.chdir(tmp_path / "alone")
    run_plan(PLAN, model, dataset, "out", **options)
    ours, theirs = (records(tmp_path / name / "out") for name in ("cluster", "alone"))
    assert len(ours) > 15 and list(ours) == list(theirs)
    assert {name for name in ours if ours[name] != theirs[name]} == set()
