import socket

import pytest

from dqo import peers
from dqo.errors import UserError
from dqo.peers import Peer


@pytest.fixture
def launch(monkeypatch):
    """Tells who the processes are, of which this one is the first."""
    monkeypatch.setattr(peers, "_peers", [])
    monkeypatch.setattr(peers, "BESIDE_SECONDS", 0.0)
    monkeypatch.setattr(peers, "_has_lost", False)
    monkeypatch.setattr(peers.atexit, "register", lambda function: None)
    return lambda others: peers.know([peers.listen(), *others], 0)


def gone(host="node7"):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return Peer(host, "127.0.0.1", closed.getsockname()[1])


BROKEN = RuntimeError(
    "[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:947. This is typical"
)


def test_who_does_not_live_is_named(launch):
    with socket.create_server(("127.0.0.1", 0)) as lives:  # nobody serves it
        launch([Peer("node6", "127.0.0.1", lives.getsockname()[1]), gone()])
        assert peers.is_lost(BROKEN) and peers.lost() == [2]
        said = peers.loss(BROKEN)
        assert said.startswith("lost process 2 on node7 (127.0.0.1), of 3 processes; ") and "\n" not in said
        launch([gone() for _ in range(6)])
        assert "process 4 on node7 (127.0.0.1), 2 more, of 7 processes" in peers.loss(BROKEN)
        launch([Peer("node6", "127.0.0.1", lives.getsockname()[1])])
        assert peers.loss(BROKEN).startswith(
            "the connection between the 2 processes broke (Connection closed by peer [10"
        )


def test_only_a_broken_exchange_of_several_is_a_loss(launch):
    assert not peers.is_lost(BROKEN)  # one process has nobody to lose
    launch([gone()])
    assert peers.is_lost(BROKEN)
    assert not peers.is_lost(RuntimeError("shape '[2, 3]' is invalid for input of size 5"))
    assert not peers.is_lost(ValueError("Connection closed by peer"))


def test_one_machine_has_all_processes_of_its_launch():
    assert not peers.several_machines({})
    assert not peers.several_machines({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"})
    assert not peers.several_machines({"WORLD_SIZE": "8"})  # a launcher that does not tell
    assert peers.several_machines({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"})


def test_a_python_program_is_told_in_one_line_and_then_ends_at_once(launch, monkeypatch):
    @peers.told_by_methods
    class Some:
        def work(self, error):
            raise error

    launch([gone()])
    ended = []
    monkeypatch.setattr(peers, "STAY_SECONDS", 0.0)
    monkeypatch.setattr(peers.os, "_exit", ended.append)
    with pytest.raises(RuntimeError, match="invalid"):
        Some().work(RuntimeError("shape '[2, 3]' is invalid for input of size 5"))
    peers._end()
    assert not ended
    with pytest.raises(UserError, match="^lost process 1 on node7 .127.0.0.1., of 2 processes; ") as said:
        Some().work(BROKEN)
    assert "\n" not in str(said.value) and said.value.__context__ is None  # torch's error is not shown beside it
    peers._end()
    assert ended == [2]


def test_what_works_over_processes_tells_it():
    from dqo import api

    works = api.sample, api.score, api.DQOTrainer.train, api.DQOTrainer.evaluate, api.DQOTrainer._begin
    assert all(hasattr(work, "__wrapped__") for work in works)
