"""Two machines: two processes with directories and caches of their own, which share an output directory."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dqo.config.options import load_options
from dqo.train import machines
from dqo.train.run import train
from tests.dqo import forked
from tests.dqo.helpers import arguments

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
OPTIONS = {
    "dataset_name": "rollouts.jsonl",
    "model_name_or_path": "model",
    "ref_cache_dir": "cache",
    "value_model": "separate",
    "per_device_train_batch_size": 4,
    "max_steps": 8,
    "save_steps": 4,
    "logging_steps": 2,
}


def flags(output, **changes):
    return arguments(Path("."), **(OPTIONS | {"output_dir": output} | changes))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def nodes(files):
    """Two directories with a copy of data and model each."""
    made = [files / "node-0", files / "node-1"]
    for node in made:
        node.mkdir()
        shutil.copytree(files / "model", node / "model")
        shutil.copy(files / "rollouts.jsonl", node)
    return made


def together(nodes, *options, environments=({}, {})):
    """(exit status, stdout, stderr) of `dqo-train` on each of two machines. `options`: of both, or of each."""
    port, running = free_port(), []
    each = options if len(options) == 2 else options * 2
    for rank, (node, words, more) in enumerate(zip(nodes, each, environments)):
        launch = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        launch |= {"MASTER_ADDR": "127.0.0.1", "HOME": node, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1} | more
        said = [node / f"{time.monotonic_ns()}.{name}" for name in ("out", "err")]
        environment = {name: str(value) for name, value in launch.items()}
        entry = "tests.dqo.run_machine:main"
        running.append((forked.start(forked.run_in_place, entry, words, said, node, environment, ()), said))
    for process, _ in running:
        process.join(300)
        process.kill()
        process.join()
    return [
        (process.exitcode, *(file.read_text() if file.exists() else "" for file in said)) for process, said in running
    ]


def weights(directory):
    found = {}
    for file in ("model.safetensors", "critic/model.safetensors"):
        found |= {f"{file}/{name}": tensor for name, tensor in load_file(directory / file).items()}
    return found


def rows(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in lines]


@pytest.mark.parametrize("lost", [1, 0])
def test_a_lost_machine_ends_the_run_with_one_line_and_the_run_goes_on_exactly(files, nodes, lost):
    environments: list[dict] = [{}, {}]
    environments[lost] = {"POWER_ENDS_IN_STEP": 6}
    begun = time.monotonic()
    ends = together(nodes, flags(files / "broken"), environments=environments)
    assert ends[lost][0] == -signal.SIGKILL
    status, _, said = ends[1 - lost]
    assert status == 2 and time.monotonic() - begun < 120
    line = said[said.index("error: ") :]
    host = socket.gethostname()
    assert line.startswith(f"error: lost process {lost} on {host} (127.0.0.1), of 2 processes; ")
    assert line.count("\n") == 1 and "Traceback" not in said
    assert [path.name for path in (files / "broken").glob("checkpoint-*")] == ["checkpoint-4"]
    if lost == 0:
        return
    shutil.copytree(files / "broken", files / "alone")
    for output in ("broken", "unbroken"):
        assert [status for status, _, _ in together(nodes, flags(files / output))] == [0, 0]
    assert rows(files / "broken") == rows(files / "unbroken")
    expected = weights(files / "unbroken")
    for name, found in weights(files / "broken").items():
        assert torch.equal(found, expected[name]), name
    kept = [json.loads(path.read_text()) for node in nodes for path in node.glob("cache/*/meta.json")]
    assert len(kept) == 2 and kept[0] == kept[1]  # each has all responses, and the shared directory none
    assert not (files / "broken" / "ref_cache").exists()
    os.chdir(nodes[0])
    train(load_options(flags(files / "alone", per_device_train_batch_size=8)))
    for name, found in weights(files / "alone").items():
        assert torch.allclose(found, expected[name], atol=2e-4), name


PROGRAM = """
import os, signal
from transformers import TrainerCallback
from dqo import DQOConfig, DQOTrainer, peers

class Power(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if os.environ["RANK"] == "1" and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    peers.STAY_SECONDS = 1.0
    options = DQOConfig(output_dir="out", max_steps=4, per_device_train_batch_size=4)
    DQOTrainer("model", options, "rollouts.jsonl", callbacks=[Power()]).train()
"""


def test_a_python_program_that_lost_a_process_ends_with_one_line_below_its_traceback(files):
    (files / "program.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    running = [
        subprocess.Popen([sys.executable, "program.py"], cwd=files, env=environment | variables, stderr=subprocess.PIPE)
        for variables in forked.ranks(2)
    ]
    said = [process.communicate(timeout=600)[1].decode() for process in running]
    assert [process.returncode for process in running] == [2, -signal.SIGKILL]
    *_, last = said[0].strip().splitlines()
    host = socket.gethostname()
    assert f"UserError: lost process 1 on {host} (127.0.0.1), of 2 processes; see what it said last" in last
    assert "Connection closed" not in said[0] and "another exception" not in said[0]


def test_machines_that_do_not_fit_are_refused_in_one_line_on_both(files, nodes):
    def refused(*options):
        ends = together(nodes, *options)
        assert [status for status, _, _ in ends] == [2, 2], ends
        lines = [said[said.index("error: ") :] for _, _, said in ends]
        assert all(line.count("\n") == 1 for line in lines)
        return lines

    for line in refused(flags("out")):
        assert "output_dir out of process 0 is not seen by process 1 on" in line
    for line in refused(flags(files / "out", beta=0.1), flags(files / "out", beta=0.2)):
        assert "was started with beta 0.2, process 0 with 0.1: give all machines one command" in line
    data = nodes[1] / "rollouts.jsonl"
    first, *others = data.read_text().splitlines()
    data.write_text("\n".join([json.dumps(json.loads(first) | {"reward": 0.25}), *others]))
    for line in refused(flags(files / "out")):
        assert "process 1 on" in line and "does not have the data of process 0: dataset_name must be" in line
    data.unlink()
    healthy, its_own = refused(flags(files / "out"))
    assert "rollouts.jsonl" in its_own and its_own.removeprefix("error: ") in healthy and "process 1 on" in healthy
    assert not list((files / "out").glob("checkpoint-*"))


def test_what_another_machine_makes_late_is_waited_for(tmp_path, monkeypatch):
    from dqo.processes import Processes

    monkeypatch.setattr(machines.time, "sleep", lambda _: (tmp_path / "late").touch())
    assert machines.seen(tmp_path / "late", Processes(world=2))
    assert not machines.seen(tmp_path / "never", Processes())


class Network:
    """Two namespaces joined by a pair of interfaces, each a machine's network. Needs root."""

    def __enter__(self):
        self.names = [f"dqo{os.getpid()}{end}" for end in "ab"]
        self.addresses, self.links = ["10.213.77.1", "10.213.77.2"], ["veth0", "veth1"]
        try:
            for name in self.names:
                self._ip("netns", "add", name)
            first, second = self.names
            self._ip(*f"link add veth0 netns {first} type veth peer name veth1 netns {second}".split())
            for name, link, address in zip(self.names, self.links, self.addresses):
                self._ip("-n", name, "address", "add", f"{address}/24", "dev", link)
                for up in ("lo", link):
                    self._ip("-n", name, "link", "set", up, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            pytest.skip(f"no network namespaces here: {error}")
        return self

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def _ip(self, *words):
        subprocess.run(["ip", *words], check=True, capture_output=True)


def test_a_machine_whose_power_ends_is_named_by_the_launcher_of_the_other(files, nodes):
    """As the documentation tells it: a launcher on each machine, the second of which is killed with its process."""
    with Network() as network:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
        launch += ["--num_processes", "2", "--main_process_ip", network.addresses[0], "--main_process_port", "29517"]
        running = []
        for rank, (node, name, link) in enumerate(zip(nodes, network.names, network.links)):
            command = [
                *launch,
                "--machine_rank",
                str(rank),
                "-m",
                "dqo.train",
                *flags(files / "out", max_steps=100_000),
            ]
            environment = {
                "OMP_NUM_THREADS": "1",
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT),
                "HOME": str(node),
            }
            environment |= {"GLOO_SOCKET_IFNAME": link, "HF_HUB_OFFLINE": "1"}
            with (node / "said").open("w") as said:
                # the pair has one number, by which all of a machine is ended
                running.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", name, *command],
                        cwd=node,
                        env=environment,
                        stdout=said,
                        stderr=said,
                        start_new_session=True,
                    )
                )
        try:
            until = time.monotonic() + 400
            while not list((files / "out").glob("checkpoint-*")):  # the first may be gone: only the newest stay
                assert time.monotonic() < until and running[0].poll() is None, (nodes[0] / "said").read_text()[-3000:]
                time.sleep(0.2)
            for worker in children(running[1].pid):
                os.kill(worker, signal.SIGKILL)
            os.kill(running[1].pid, signal.SIGKILL)
            assert running[0].wait(120) != 0
        finally:
            for process in running:
                for pid in [*children(process.pid), process.pid] if process.poll() is None else []:
                    os.kill(pid, signal.SIGKILL)
                process.wait()
        said = (nodes[0] / "said").read_text()
        (line,) = (line for line in said.splitlines() if "error: " in line and "lost" in line)
        assert f"lost process 1 on {socket.gethostname()} (10.213.77.2), of 2 processes; " in line
        assert "pair.cc" not in said  # nothing of gloo


def children(pid):
    """All below a process, the lowest first."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [*children(child), child]
    return found
